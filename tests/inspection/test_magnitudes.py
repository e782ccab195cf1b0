"""Curvature and influence where squares over- or underflow, and where values inside are complex."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

SCALES = np.array([4.0, -3.0, 2.0, 1.0, 0.5], np.float32)
W = jnp.ones(5)


def quadratic(w, unit):
    return 0.5 * jnp.sum(unit * SCALES * w**2) + unit * w[0] * w[1]


H = np.diag(SCALES)
H[0, 1] = H[1, 0] = 1.0
VALUES = np.linalg.eigvalsh(H)
UNITS = [pytest.param(unit, marks=[pytest.mark.slow] * (unit != 1e-25)) for unit in (1e-25, 1e25)]


@pytest.mark.parametrize("unit", UNITS)
def test_eigenvalues_whose_squares_are_no_numbers(unit):
    unit = np.float32(unit)
    eigs = gf.curvature.hessian_eigs(quadratic, k=2, which="largest")(W, unit)
    np.testing.assert_allclose(eigs.values / unit, VALUES[::-1][:2], rtol=1e-4)
    assert bool(jnp.all(eigs.converged))


@pytest.mark.slow
@pytest.mark.parametrize("unit", [1e-25, 1e25])
def test_estimates_whose_squares_are_no_numbers(unit):
    """The standard error scales with the matrix, as the estimate does."""
    unit = np.float32(unit)
    spectrum = gf.curvature.hessian_spectrum(quadratic, samples=1)(W, unit)
    np.testing.assert_allclose(np.sort(spectrum.nodes[0]) / unit, VALUES, rtol=1e-4)
    for estimator in (gf.curvature.hessian_trace, gf.curvature.hessian_diagonal):
        of_unit, of_one = estimator(quadratic)(W, unit), estimator(quadratic)(W, np.float32(1))
        np.testing.assert_allclose(of_unit.value / unit, of_one.value, rtol=1e-5)
        np.testing.assert_allclose(of_unit.standard_error / unit, of_one.standard_error, rtol=1e-4, atol=1e-6)
        assert float(jnp.max(of_one.standard_error)) > 0.1
    signs = jax.vmap(lambda key: jax.random.rademacher(key, [5], jnp.float32))(
        jax.random.split(jax.random.key(0), 64)
    )
    each = np.einsum("ni,ij,nj->n", signs, H, signs)
    found = gf.curvature.hessian_trace(quadratic)(W, np.float32(1))
    np.testing.assert_allclose(found.standard_error, each.std(ddof=1) / 8, rtol=1e-4)
    slope = jax.grad(lambda s: gf.curvature.hessian_trace(quadratic)(W, s).standard_error)(np.float32(unit))
    np.testing.assert_allclose(slope, each.std(ddof=1) / 8, rtol=1e-4)


@pytest.mark.parametrize("unit", UNITS)
def test_cosines_of_gradients_whose_squares_are_no_numbers(unit):
    x = np.array([[1.0, 0.0], [3.0, 3.0]], np.float32)
    found = gf.attribution.tracin(lambda w, x: w @ x, normalize=True)(
        [jnp.ones(2)], np.float32(unit) * x, x, 1.0
    )
    np.testing.assert_allclose(found, [[1.0, 0.5**0.5], [0.5**0.5, 1.0]], rtol=1e-5)


def test_filters_whose_squares_are_no_numbers_have_their_length_in_the_landscape():
    weights = 1e-25 * jnp.array([[3.0, 4.0], [0.0, 1.0]])
    landscape = gf.curvature.loss_landscape(lambda w: jnp.sum(w), dims=1, points=2)(weights)
    np.testing.assert_allclose(jnp.linalg.norm(landscape.directions[0] * 1e25, axis=1), [5.0, 1.0], rtol=1e-5)


def spectral(params, x):
    """Return the power of a product of complex numbers made of real parameters."""
    return jnp.sum(jnp.abs(jnp.fft.fft(x * params["w"]) * jax.lax.complex(params["a"], params["b"])) ** 2)


@pytest.mark.slow
def test_complex_values_inside_have_the_curvature_of_their_real_parameters():
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=4), jnp.float32) for name in ("w", "a", "b")}
    vector = jax.tree.map(jnp.cos, params)
    x = jnp.asarray(rng.normal(size=[3, 4]), jnp.float32)

    def by_hand(params, x):  # the same in real arithmetic, by the matrix of the transform
        n = np.outer(np.arange(4), np.arange(4)) * (2 * np.pi / 4)
        real, imaginary = np.cos(n).astype(np.float32), -np.sin(n).astype(np.float32)
        u = x * params["w"]
        return jnp.sum(((real @ u) ** 2 + (imaginary @ u) ** 2) * (params["a"] ** 2 + params["b"] ** 2))

    flat, unravel = jax.flatten_util.ravel_pytree(params)
    v = jax.flatten_util.ravel_pytree(vector)[0]
    mean = lambda p: jax.vmap(lambda x: by_hand(p, x))(x).mean()  # noqa: E731
    dense = jax.hessian(lambda w: mean(unravel(w)))(flat)
    G = jax.vmap(lambda x: jax.grad(lambda w: by_hand(unravel(w), x))(flat))(x)
    product = gf.curvature.hvp(gf.batch_mean(spectral))(params, vector, x)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(product)[0], dense @ v, rtol=1e-3, atol=1e-3)
    product = gf.curvature.fisher_vp(spectral)(params, vector, x)
    np.testing.assert_allclose(
        jax.flatten_util.ravel_pytree(product)[0], G.T @ (G @ v) / 3, rtol=1e-3, atol=1e-2
    )
    np.testing.assert_allclose(gf.attribution.tracin(spectral)([params], x, x, 1.0), G @ G.T, rtol=1e-4)
    for tool in (
        gf.curvature.hessian_eigs(spectral),
        gf.curvature.sharpness(spectral, 0.1),
        gf.curvature.loss_landscape(spectral),
    ):
        with pytest.raises(gf.ParameterError, match=r"^a: .*expected real parameters"):
            tool({**params, "a": jnp.ones(4, jnp.complex64)}, x[0])
