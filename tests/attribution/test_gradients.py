"""Gradient maps against formulas by hand: sigmoid nets, polynomials, and the sites of `gf.inspect`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradfn as gf

NET = gf.mlp([6, 5, 3])
PARAMS = NET.init(jax.random.key(0))
X = jnp.linspace(-1.0, 2.0, 6)
Z1 = PARAMS["W1"] @ X + PARAMS["b1"]
A1 = jax.nn.sigmoid(Z1)


def close(a, b, rtol=1e-5):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


def test_a_sigmoid_net_by_hand():
    slope = A1 * (1 - A1)
    for k in (0, 2):
        close(gf.attribution.saliency(NET.apply, k)(PARAMS, X), (PARAMS["W2"][k] * slope) @ PARAMS["W1"])
        close(gf.attribution.saliency(NET.apply, k, at="a1")(PARAMS, X), PARAMS["W2"][k])
        close(gf.attribution.saliency(NET.apply, k, at="z1")(PARAMS, X), PARAMS["W2"][k] * slope)
        close(gf.attribution.grad_times_input(NET.apply, k, at="a1")(PARAMS, X), PARAMS["W2"][k] * A1)
    unit = gf.attribution.saliency(NET.apply, target=("a1", 2))(PARAMS, X)
    close(unit, slope[2] * PARAMS["W1"][2])
    several = gf.attribution.saliency(NET.apply, target=("z1", slice(1, 3)))(PARAMS, X)
    close(several, PARAMS["W1"][1:3].mean(0))


def test_batches_and_classes_go_through_vmap_and_jit():
    maps = jax.jit(jax.vmap(lambda k: gf.attribution.saliency(NET.apply, k)(PARAMS, X)))(jnp.arange(3))
    close(maps, jax.jacobian(NET.apply, argnums=1)(PARAMS, X))
    batch = jnp.stack([X, -X])
    maps = jax.vmap(gf.attribution.saliency(NET.apply, 1, at="a1"), (None, 0))(PARAMS, batch)
    close(maps, jnp.stack([PARAMS["W2"][1]] * 2))


def looped(w, x):
    def step(c, _):
        c = gf.tap(jnp.tanh(c * w), "c")
        return c, None

    return jax.lax.scan(step, x, None, length=3)[0].sum()


@pytest.mark.slow
def test_a_site_in_a_loop_has_one_map_per_iteration():
    w, x = jnp.array(0.7), jnp.array([0.5, -1.0])
    inspection = gf.inspect(looped, keep="c")(w, x)
    close(gf.attribution.saliency(looped, at="c")(w, x), inspection["c"].grad)
    ig = gf.attribution.integrated_gradients(looped, at="c")(w, x)
    # With its value replaced, an iteration no longer depends on the one before.
    close(ig.attributions, jnp.zeros((3, 2)).at[2].set(inspection["c"].value[2]))


def quadratic(params, x):
    A, b = params
    return x @ A @ x + b @ x


@jax.jit
def integrated_quadratic(params, x, base):
    return gf.attribution.integrated_gradients(quadratic, steps=2, baseline=base)(params, x)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_integrated_gradients_of_a_quadratic_in_closed_form(seed):
    rng = np.random.default_rng(seed)
    A, b, x, base = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(4, 4), 4, 4, 4])
    result = integrated_quadratic((A, b), x, base)
    # The gradient is linear along the path, so its mean is that at the midpoint.
    np.testing.assert_allclose(
        result.attributions, (x - base) * ((A + A.T) @ (x + base) / 2 + b), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(result.score, quadratic((A, b), x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.baseline_score, quadratic((A, b), base), rtol=1e-4, atol=1e-4)
    assert abs(float(result.gap)) < 1e-4


@pytest.mark.slow
def test_the_quadrature_is_gauss_legendre(x64):
    x = jnp.array([1.0, 2.0])
    cubes = lambda _, x: jnp.sum(x**5)  # noqa: E731
    close(gf.attribution.integrated_gradients(cubes, steps=3)(None, x).attributions, x**5, 1e-12)
    assert float(gf.attribution.integrated_gradients(cubes, steps=2)(None, x).relative_gap) > 1e-3
    result = gf.attribution.integrated_gradients(NET.apply, 0, steps=16)(PARAMS, 4 * X)
    assert abs(float(result.gap)) < 1e-6
    close(result.gap, result.attributions.sum() - (result.score - result.baseline_score))


def test_between_activations_it_goes_from_the_site_at_the_baseline():
    def f(w, x):
        a = gf.tap(x**2, "a")
        return jnp.sum(a**2) + 10.0 * x.sum()  # the second term stays as it is for x

    x, base = jnp.array([1.0, 2.0]), jnp.array([0.5, 0.0])
    result = gf.attribution.integrated_gradients(f, at="a", baseline=base)(None, x)
    close(result.attributions, x**4 - base**4)
    close(result.baseline_score, jnp.sum(base**4) + 30.0)
    same = gf.attribution.integrated_gradients(f, baseline=x)(None, x)
    assert float(same.gap) == float(same.relative_gap) == 0.0


@pytest.mark.slow
def test_smooth_gradients_have_the_given_noise():
    x = jnp.array([0.0, 1.0, 2.0])
    cubes = lambda _, x: jnp.sum(x**3)  # noqa: E731
    key = jax.random.key(0)
    smooth = gf.attribution.smooth_grad(cubes, samples=20_000, noise=0.25)(None, x, key=key)
    np.testing.assert_allclose(smooth, 3 * (x**2 + 0.5**2), rtol=0.03)  # sd 0.25 of the range 2
    inside = gf.attribution.smooth_grad(
        lambda _, x: cubes(None, gf.tap(2 * x, "d")), at="d", samples=20_000, noise=0.25
    )
    np.testing.assert_allclose(inside(None, x / 2, key=key), smooth, rtol=1e-4)
    close(gf.attribution.smooth_grad(cubes, noise=0.0, samples=2)(None, x, key=key), 3 * x**2)


def test_tokens_have_maps_at_a_site():
    embed = lambda table, tokens: gf.tap(table[tokens], "e").sum(0)  # noqa: E731
    table, tokens = jnp.arange(6.0).reshape(3, 2), jnp.array([2, 0])
    close(gf.attribution.saliency(embed, 1, at="e")(table, tokens), jnp.array([[0.0, 1.0]] * 2))
    result = gf.attribution.integrated_gradients(embed, 1, at="e", baseline=1)(table, tokens)
    close(result.attributions, jnp.array([[0.0, 5.0 - 3.0], [0.0, 1.0 - 3.0]]))
    with pytest.raises(TypeError, match=r"saliency: expected a floating array as input x, got int32\[2\]"):
        gf.attribution.saliency(embed, 1)(table, tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"saliency: expected a scalar output, got float32\[3\]. Select an element of it: target="),
        ({"target": 3}, r"saliency: target 3 of an output of shape \[3\]: index 3 is out of bounds"),
        (
            {"target": jnp.array(-4)},
            r"saliency: target -4 of an output of shape \[3\]: index -4 is out of bounds",
        ),
        ({"target": (0, 0)}, "too many indices"),
        ({"target": ("a3", 0)}, "saliency: there is no site 'a3'. Did you mean a1"),
        ({"target": 0, "at": "b9"}, "saliency: there is no site 'b9'"),
        ({"target": 0, "at": "z*"}, r"expected one site, got 'z\*', which matches 2: z1, z2"),
    ],
)
def test_errors_name_the_alternatives(options, message):
    with pytest.raises(ValueError, match=message):
        gf.attribution.saliency(NET.apply, **options)(PARAMS, X)


def test_errors_for_values_without_a_gradient():
    with pytest.raises(ValueError, match=r"site 'i' \(int32\[\]\) has no gradient"):
        gf.attribution.saliency(lambda _, x: x[gf.tap(jnp.argmax(x), "i")], at="i")(None, X)
    with pytest.raises(TypeError, match=r"expected a floating output, got int32\[\]"):
        gf.attribution.saliency(lambda _, x: jnp.argmax(x))(None, X)
    with pytest.raises(ValueError, match=r"expected a baseline of the input's shape \[6\], got \[4\]"):
        gf.attribution.integrated_gradients(NET.apply, 0, baseline=jnp.zeros(4))(PARAMS, X)
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got 0"):
        gf.attribution.integrated_gradients(NET.apply, 0, steps=0)
    with pytest.raises(ValueError, match="expected samples >= 1 and noise >= 0, got samples=4, noise=-1"):
        gf.attribution.smooth_grad(NET.apply, 0, samples=4, noise=-1)
