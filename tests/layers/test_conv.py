import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf


def reference(x, W, b, stride, dilation, groups):
    """Convolve in numpy, window by window, without padding. x [H, W, C], W [out, in / groups, h, w]."""
    n_out, n_in, h, w = W.shape
    rows = (x.shape[0] - dilation * (h - 1) - 1) // stride + 1
    columns = (x.shape[1] - dilation * (w - 1) - 1) // stride + 1
    out = np.zeros([rows, columns, n_out])
    for r in range(rows):
        for c in range(columns):
            for o in range(n_out):
                first = o // (n_out // groups) * n_in
                patch = x[r * stride :, c * stride :, first : first + n_in]
                patch = patch[: h * dilation : dilation, : w * dilation : dilation]
                out[r, c, o] = (patch.transpose(2, 0, 1) * W[o]).sum() + b[o]
    return out


@pytest.mark.parametrize(("stride", "dilation", "groups"), [(1, 1, 1), (2, 1, 2), (1, 2, 4)])
def test_conv_equals_the_formula(stride, dilation, groups):
    rng = np.random.default_rng(0)
    layer = gf.layers.conv(4, 4, [3, 2], stride, "VALID", dilation, groups)
    params = {name: rng.normal(size=p.shape).astype(np.float32) for name, p in layer.spec.items()}
    x = rng.normal(size=[8, 7, 4]).astype(np.float32)
    expected = reference(x, params["W"], params["b"], stride, dilation, groups)
    np.testing.assert_allclose(layer.apply(params, x), expected, rtol=1e-4, atol=1e-5)


def test_same_padding_keeps_the_size_over_time_and_images():
    for window, shape in (([3], [5, 2]), ([5, 3], [6, 7, 2])):
        layer = gf.layers.conv(2, 3, window)
        assert layer.apply(layer.init(jax.random.key(0)), jnp.ones(shape)).shape == (*shape[:-1], 3)


def test_pooling_equals_the_formula():
    x = np.random.default_rng(0).normal(size=[5, 6, 3]).astype(np.float32)
    tiles = x[:4].reshape(2, 2, 3, 2, 3)
    np.testing.assert_array_equal(gf.layers.max_pool([2, 2]).apply({}, x), tiles.max((1, 3)))
    np.testing.assert_allclose(
        gf.layers.avg_pool([2, 2]).apply({}, x), tiles.mean((1, 3)), rtol=1e-5, atol=1e-6
    )
    slid = np.stack([x[i : i + 3].mean(0) for i in range(3)])[:, 0]
    np.testing.assert_allclose(gf.layers.avg_pool([3], 1).apply({}, x[:, 0]), slid, rtol=1e-5, atol=1e-6)


def test_group_norm_equals_the_formula():
    x = np.random.default_rng(0).normal(3, 2, size=[4, 5, 6]).astype(np.float32)
    norm = gf.layers.group_norm(6, 3)
    y = norm.apply(norm.init(jax.random.key(0)), x)
    for g in range(3):
        part = x[..., 2 * g : 2 * g + 2]
        np.testing.assert_allclose(y[..., 2 * g : 2 * g + 2], (part - part.mean()) / part.std(), atol=1e-4)
    with pytest.raises(ValueError, match="groups must divide the number of channels, got 4 for 6"):
        gf.layers.group_norm(6, 4)


@pytest.mark.parametrize(
    ("channels", "shape", "message"),
    [
        (1, [28, 28], r"got \[28, 28\] float32\. Add a channel axis: x\[\.\.\., None\]"),
        (3, [3, 28, 28], r"Channels come last: jnp\.moveaxis\(x, 0, -1\)"),
        (3, [5, 28, 28, 3], r"For a batch: jax\.vmap"),
        (
            3,
            [28, 28, 4],
            r"W is \[2, 3, 3, 3\], expected an input of \[H, W, 3\] float32, got \[28, 28, 4\]",
        ),
    ],
)
def test_a_wrong_image_raises_with_the_expected_shape(channels, shape, message):
    layer = gf.layers.conv(channels, 2, [3, 3])
    with pytest.raises(gf.ParameterError, match=message):
        layer.apply(layer.init(jax.random.key(0)), jnp.zeros(shape))


def test_conv_and_pool_check_windows_and_groups():
    with pytest.raises(ValueError, match=r"window must be \[time\] or \[height, width\], got \[3, 3, 3\]"):
        gf.layers.conv(1, 1, [3, 3, 3])
    with pytest.raises(ValueError, match="groups must divide n_in and n_out, got 2 for 3 and 4"):
        gf.layers.conv(3, 4, [3], groups=2)
    with pytest.raises(ValueError, match=r"max_pool: expected 2 axes and channels, got shape \[4, 2\]"):
        gf.layers.max_pool([2, 2]).apply({}, jnp.ones([4, 2]))
