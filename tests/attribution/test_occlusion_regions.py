"""Occlusion, and weights outside a region set to zero: against explicit sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradfn as gf

NET = gf.mlp([12, 5, 3])
PARAMS = NET.init(jax.random.key(0))
X = jnp.linspace(-1.0, 2.0, 12)  # an image of 3 x 4
MASKS = gf.attribution.grid_regions((3, 4), 2)


@pytest.mark.parametrize(("size", "stride", "rows", "columns"), [(2, None, 2, 3), (3, 2, 2, 3), (5, 1, 1, 2)])
def test_occlusion_of_a_linear_function_is_the_sum_of_what_was_covered(size, stride, rows, columns):
    w = jnp.arange(30.0).reshape(5, 6)
    if size == 2:
        w = w[:3, :5]  # the last squares extend beyond the edge
    x = w + 1.0
    result = gf.attribution.occlusion(lambda w, x: jnp.sum(w * x), size, stride, value=0.5)(w, x)
    stride = stride or size
    by_hand = [
        [
            (w * (x - 0.5))[i * stride : i * stride + size, j * stride : j * stride + size].sum()
            for j in range(columns)
        ]
        for i in range(rows)
    ]
    np.testing.assert_allclose(result, by_hand, rtol=1e-5)


def test_occlusion_of_flat_images_and_channels():
    covered = gf.attribution.occlusion(NET.apply, 2, target=1, shape=(3, 4))(PARAMS, X)
    corner = X.reshape(3, 4).at[:2, 2:].set(0.0).reshape(-1)
    np.testing.assert_allclose(
        covered[0, 1], NET.apply(PARAMS, X)[1] - NET.apply(PARAMS, corner)[1], rtol=1e-5
    )
    colors = jnp.arange(12.0).reshape(2, 2, 3)
    np.testing.assert_allclose(
        gf.attribution.occlusion(lambda _, x: x.sum(), 1)(None, colors), colors.sum(-1), rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"pass shape=\(28, 28\)\), got float32\[12\]"):
        gf.attribution.occlusion(NET.apply, 2, target=1)(PARAMS, X)
    with pytest.raises(ValueError, match=r"expected shape \[3, 3\], got float32\[12\]"):
        gf.attribution.occlusion(NET.apply, 2, target=1, shape=(3, 3))(PARAMS, X)
    with pytest.raises(ValueError, match=r"expected size in 1..3 and stride >= 1, got 4 and 4"):
        gf.attribution.occlusion(NET.apply, 4, target=1, shape=(3, 4))(PARAMS, X)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_grid_has_each_pixel_once(height, width, data):
    rows, columns = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    masks = gf.attribution.grid_regions((height, width), rows, columns)
    assert masks.shape == (rows * columns, height, width)
    np.testing.assert_array_equal(masks.sum(0), 1)
    assert masks.any((1, 2)).all()


def test_sums_over_regions_add_up_and_outputs_depend_on_one_region():
    by_region = jax.jit(gf.attribution.regions(NET.apply, MASKS))
    result = by_region(PARAMS, X)
    assert result.sums.shape == (4, 5)
    np.testing.assert_allclose(result.sums.sum(0), PARAMS["W1"] @ X, rtol=1e-5)
    np.testing.assert_allclose(result.total, PARAMS["W1"] @ X, rtol=1e-6)
    for r, mask in enumerate(MASKS.reshape(4, 12)):
        by_hand = [sum(float(PARAMS["W1"][i, j] * X[j]) for j in np.flatnonzero(mask)) for i in range(5)]
        np.testing.assert_allclose(result.sums[r], by_hand, rtol=1e-4, atol=1e-6)
        # The first layer is linear: zero weights have the effect of zero inputs.
        np.testing.assert_allclose(
            result.outputs[r], NET.apply(PARAMS, jnp.where(mask, X, 0)), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            result.without[r], NET.apply(PARAMS, jnp.where(mask, 0, X)), rtol=1e-5, atol=1e-6
        )
    np.testing.assert_allclose(result.output, NET.apply(PARAMS, X), rtol=1e-6)
    batch = jax.vmap(by_region, (None, 0))(PARAMS, jnp.stack([X, 2 * X]))
    np.testing.assert_allclose(batch.sums[1], 2 * result.sums, rtol=1e-5)


def test_regions_of_a_layer_by_its_path_and_errors():
    net = gf.serial(first=gf.layers.dense(12, 4), last=gf.layers.dense(4, 3))
    params = net.init(jax.random.key(1))
    result = gf.attribution.regions(net.apply, MASKS, "first/W")(params, X)
    np.testing.assert_allclose(
        result.outputs[2], net.apply(params, jnp.where(MASKS[2].reshape(-1), X, 0)), rtol=1e-5
    )
    with pytest.raises(
        ValueError,
        match=r"'last/W': expected shape \[nodes, 12\], got \[3, 4\]. Parameters of that shape: first/W",
    ):
        gf.attribution.regions(net.apply, MASKS, "last/W")(params, X)
    with pytest.raises(ValueError, match=r"'W1': .* got no such parameter"):
        gf.attribution.regions(net.apply, MASKS)(params, X)
    with pytest.raises(ValueError, match="expected masks of the size of x, 12, got 16"):
        gf.attribution.regions(NET.apply, gf.attribution.grid_regions((4, 4), 2))(PARAMS, X)
    with pytest.raises(ValueError, match=r"expected masks bool\[regions, ...\], got int64\[2\]"):
        gf.attribution.regions(NET.apply, np.arange(2))
    with pytest.raises(ValueError, match=r"expected 1 to 3 rows and 1 to 4 columns .* got 5 and 5"):
        gf.attribution.grid_regions((3, 4), 5)
