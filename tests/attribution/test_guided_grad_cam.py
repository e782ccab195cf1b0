"""Guided backpropagation and Grad-CAM against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.attribution import grad_cam, guided_backprop

RNG = np.random.default_rng(0)
PARAMS = {"W1": RNG.normal(size=(5, 4)), "W2": RNG.normal(size=(6, 5)), "W3": RNG.normal(size=(3, 6))}
PARAMS = {name: jnp.asarray(W, jnp.float32) for name, W in PARAMS.items()}
X = jnp.asarray(RNG.normal(size=4), jnp.float32)

RELUS = {
    "jax": jax.nn.relu,
    "maximum": lambda z: jnp.maximum(z, 0),
    "of zeros": lambda z: jnp.maximum(jnp.zeros_like(z), z),
    "where": lambda z: jnp.where(z > 0, z, 0.0),
    "reversed": lambda z: jnp.where(z < 0, 0.0, z),
    "zeros": lambda z: jnp.where(jnp.zeros_like(z) < z, z, jnp.zeros_like(z)),
    "mask": lambda z: z * (z > 0).astype(z.dtype),
}


def net(relu):
    def f(params, x):
        a = gf.tap(relu(params["W1"] @ x), "a")
        return params["W3"] @ relu(params["W2"] @ a)

    return f


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RELUS)
def test_guided_backprop_by_hand(name):
    f = net(RELUS[name])
    z1 = PARAMS["W1"] @ X
    z2 = PARAMS["W2"] @ jax.nn.relu(z1)
    through = jnp.where(z2 > 0, jnp.maximum(PARAMS["W3"][1], 0), 0)
    at_a = PARAMS["W2"].T @ through
    close(guided_backprop(f, 1, at="a")(PARAMS, X), at_a)
    expected = PARAMS["W1"].T @ jnp.where(z1 > 0, jnp.maximum(at_a, 0), 0)
    close(guided_backprop(f, 1)(PARAMS, X), expected)
    assert float(jnp.abs(expected - gf.attribution.saliency(f, 1)(PARAMS, X)).max()) > 0.1


def test_relus_in_loops_batches_and_branches():
    def looped(params, x):
        x = params["W1"] @ x
        x, _ = jax.lax.scan(lambda x, W: (jax.checkpoint(jax.nn.relu)(W @ x), None), x, params["W"])
        return params["W3"][:, :5] @ jax.lax.cond(x[0] > -1, jax.nn.relu, lambda x: x, x)

    def unrolled(params, x):
        x = params["W1"] @ x
        for W in params["W"]:
            x = jax.nn.relu(W @ x)
        return params["W3"][:, :5] @ jax.nn.relu(x)

    params = PARAMS | {"W": jnp.asarray(RNG.normal(size=(3, 5, 5)), jnp.float32)}
    xs = jnp.stack([X, -X])
    expected = jax.vmap(guided_backprop(unrolled, 1), (None, 0))(params, xs)
    close(jax.jit(jax.vmap(guided_backprop(looped, 1), (None, 0)))(params, xs), expected)
    of_batch = lambda params, xs: jax.vmap(looped, (None, 0))(params, xs)  # noqa: E731
    close(2 * guided_backprop(of_batch, (..., 1))(params, xs), expected)


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.gelu, lambda z: jnp.maximum(z, 0.1), jnp.abs])
def test_a_function_without_relu_is_an_error(activation):
    with pytest.raises(ValueError, match="guided_backprop: expected a ReLU between the input and the output"):
        guided_backprop(net(activation), 1)(PARAMS, X)


CLASS = 0
CNN = gf.cnn((8, 8, 1), (3, 4), (), 3)
IMAGE = jnp.asarray(np.random.default_rng(3).normal(size=(8, 8)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(CNN.init)(jax.random.key(0))


def value_and_gradient(f, site, params, image):
    """Return the value of a site and the gradient of `CLASS` with respect to it."""

    @jax.jit
    def both(params, image):
        value = gf.capture(f, sites=site, keep=site)(params, image)[site].value
        return value, gf.attribution.saliency(f, CLASS, at=site)(params, image)

    return both(params, image)


def test_grad_cam_by_hand(params):
    value, gradient = value_and_gradient(CNN.apply, "a2", params, IMAGE)
    small = jax.nn.relu(jnp.einsum("hwc,c->hw", value, gradient.mean((0, 1))))
    expected = jax.image.resize(small, (8, 8), "bilinear")
    assert float(expected.max()) > 0
    batch = jax.vmap(grad_cam(CNN.apply, "a2", CLASS), (None, 0))(params, jnp.stack([IMAGE, -IMAGE]))
    close(batch[0], expected)
    close(grad_cam(CNN.apply, "a2", CLASS, shape=(8, 8))(params, IMAGE.reshape(-1)), expected)


def test_grad_cam_of_channels_first_with_an_axis_of_one_image():
    def f(params, x):
        a = gf.tap(jnp.tanh(params["V"][:, None, None] * x[0]), "a")[None]  # [1, 3, 4, 4]
        return jnp.sum(a * params["U"])

    params = {"V": jnp.array([1.0, -2.0, 0.5]), "U": jnp.asarray(RNG.normal(size=(1, 3, 4, 4)), jnp.float32)}
    x = jnp.asarray(RNG.normal(size=(1, 1, 4, 4)), jnp.float32)
    weights = params["U"][0].mean((1, 2))
    expected = jax.nn.relu(jnp.einsum("chw,c->hw", jnp.tanh(params["V"][:, None, None] * x[0]), weights))
    close(grad_cam(f, "a", channel_axis=0)(params, x), expected)
    one_more = lambda params, x: f(params, x) + 0 * gf.tap(x, "image").sum()  # noqa: E731
    close(grad_cam(one_more, "image", channel_axis=0)(params, x), jnp.zeros((4, 4)))


def test_grad_cam_of_the_tokens_of_a_vision_transformer():
    config = gf.ViTConfig(
        image=(8, 8, 1), patch=4, classes=3, n_layers=1, n_heads=1, width=4, hidden=4, pool="class"
    )
    vit = gf.vit(config)
    params = jax.jit(vit.init)(jax.random.key(0))
    site = "embedded"
    value, gradient = value_and_gradient(vit.apply, site, params, IMAGE)
    small = jax.nn.relu(value[-4:] @ gradient[-4:].mean(0)).reshape(2, 2)
    cam = grad_cam(vit.apply, site, CLASS, grid=(2, 2))(params, IMAGE)
    close(cam, jax.image.resize(small, (8, 8), "bilinear"))


@pytest.mark.parametrize(
    ("options", "image", "message"),
    [
        ({"site": "a9"}, IMAGE, "grad_cam: there is no site 'a9'"),
        (
            {"site": "z3"},
            IMAGE,
            r"grad_cam: expected a site of one image with two spatial axes .* got 'z3' of shape \[3\]",
        ),
        (
            {"site": "a2"},
            IMAGE.reshape(-1),
            r"grad_cam: expected an image \(for a flat one pass shape=.*got shape \[64\]",
        ),
        (
            {"site": "a2", "shape": (64,)},
            IMAGE,
            r"grad_cam: expected shape=\(height, width\), got shape \[64\]",
        ),
        ({"site": "a2", "channel_axis": 3}, IMAGE, r"grad_cam: channel_axis must be in \[-3, 3\), got 3"),
        (
            {"site": "a2", "grid": (2, 2)},
            IMAGE,
            r"grad_cam: expected a site of one image with \[tokens, channels\] for a g",
        ),
    ],
)
def test_bad_arguments(params, options, image, message):
    with pytest.raises(ValueError, match=message):
        grad_cam(CNN.apply, target=CLASS, **options)(params, image)
