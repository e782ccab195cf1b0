"""Functions with a backward rule only, `custom_vjp` and `odeint`, under curvature and influence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.ode import odeint
from jax.flatten_util import ravel_pytree

import gradfn as gf


@jax.custom_vjp
def plain(x):
    return x**3


plain.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))


@jax.custom_vjp
def nested(x):  # calls itself in both of its rules, so not even its gradient has a forward mode
    return x**3


nested.defvjp(lambda x: (nested(x), x), lambda x, g: (3 * nested(x) / x * g,))


@jax.custom_vjp
def once(x):  # as kernels are: a backward rule that has no derivative at all
    return x**3


def once_backward(x, g):
    state = (0, g)
    return (jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] * x), state)[1] * 3,)


once.defvjp(lambda x: (once(x), x), once_backward)

FUNCTIONS = {"plain": plain, "nested": nested, "once": once}
PARAMS = {"a": jnp.array([[0.5, 0.7], [0.4, -0.6]]), "b": jnp.array([0.3, 0.4])}
X, Y = jax.random.normal(jax.random.key(0), (2, 6, 2))
VECTOR = jax.tree.map(jnp.cos, PARAMS)


def outputs(cube):
    return lambda params, x: params["a"] @ cube(params["a"] @ x + params["b"])


def of_one(cube):
    """Return a loss of one example; with a scan, so that the function is not at the top of the program."""

    def loss(params, example):
        x, y = example
        z, _ = jax.lax.scan(lambda x, _: (outputs(cube)(params, x), None), x, length=1)
        return jnp.sum(jnp.cosh(z - y)) / 100

    return loss


def flat(tree):
    return ravel_pytree(tree)[0]


def dense(f, *args):
    """Return the Jacobian of a function of the parameters."""
    values, unravel = ravel_pytree(PARAMS)
    by_values = lambda w: f(unravel(w), *args)  # noqa: E731
    return np.asarray(jax.jit(jax.jacobian(by_values))(values))


@pytest.fixture(scope="module")
def known():
    true = of_one(lambda x: x**3)
    H = dense(lambda params: flat(jax.grad(lambda p: jax.vmap(lambda *e: true(p, e))(X, Y).mean())(params)))
    J = dense(lambda params: jax.vmap(lambda x: outputs(lambda x: x**3)(params, x))(X))
    G = dense(lambda params: jax.vmap(lambda *e: true(params, e))(X, Y))
    return H, J, G, flat(VECTOR)  # [P, P], [6, 2, P], [6, P], [P]


@pytest.mark.parametrize("name", ["plain", "nested"])
def test_custom_vjp_has_products_with_its_curvature(known, name):
    H, J, _, v = known
    cube, batch = FUNCTIONS[name], (X, Y)
    mean = gf.batch_mean(of_one(cube))
    close = lambda tree, expected: np.testing.assert_allclose(flat(tree), expected, rtol=2e-5, atol=1e-6)  # noqa: E731
    close(jax.jit(gf.curvature.hvp(mean))(PARAMS, VECTOR, batch), H @ v)
    gauss_newton = np.einsum("nip,niq,q->p", J, J, v) / 6
    close(jax.jit(gf.curvature.ggn_vp(outputs(cube), "squared"))(PARAMS, VECTOR, batch), gauss_newton)
    convex = lambda z, y: jnp.sum(cube(z - y) * (z - y) ** 3) / 60  # noqa: E731
    z = jax.vmap(lambda x: outputs(lambda x: x**3)(PARAMS, x))(X)
    by_outputs = np.einsum("nip,ni,niq,q->p", J, np.asarray(0.5 * (z - Y) ** 4), J, v) / 6
    close(jax.jit(gf.curvature.ggn_vp(outputs(cube), convex))(PARAMS, VECTOR, batch), by_outputs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_custom_vjp_has_a_fisher_matrix_and_influence_from_its_gradients(known, name):
    _, _, G, v = known
    loss, batch = of_one(FUNCTIONS[name]), (X, Y)
    np.testing.assert_allclose(
        flat(jax.jit(gf.curvature.fisher_vp(loss))(PARAMS, VECTOR, batch)), G.T @ (G @ v) / 6, rtol=1e-5
    )
    np.testing.assert_allclose(
        gf.attribution.tracin(loss)([PARAMS], batch, batch, 0.1), 0.1 * G @ G.T, rtol=1e-5, atol=1e-7
    )


@pytest.mark.slow
def test_custom_vjp_has_eigenvalues_a_trace_and_a_spectrum(known):
    H, _, G, _ = known
    mean, batch = gf.batch_mean(of_one(nested)), (X, Y)
    values = np.linalg.eigvalsh(H)
    eigs = gf.curvature.hessian_eigs(mean, k=6, which="smallest")(PARAMS, batch)
    np.testing.assert_allclose(eigs.values, values, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gf.curvature.sharpness(mean, 0.1)(PARAMS, batch).value, values[-1], rtol=1e-5)
    spectrum = gf.curvature.hessian_spectrum(mean, samples=1)(PARAMS, batch)
    # Lanczos in float32 is right relative to the largest eigenvalue, 6e4.
    np.testing.assert_allclose(spectrum.nodes[0], values, rtol=1e-4, atol=1e-6 * np.abs(values).max())
    trace, error = gf.curvature.hessian_trace(mean)(PARAMS, batch)
    assert abs(trace - np.trace(H)) < 5 * error
    fisher = gf.curvature.hessian_eigs(gf.curvature.fisher_vp(of_one(nested)), k=1)(PARAMS, batch)
    np.testing.assert_allclose(fisher.values[0], np.linalg.eigvalsh(G.T @ G / 6)[-1], rtol=1e-5)


def test_custom_vjp_that_is_not_a_derivative_has_the_slope_of_its_gradient():
    """A reversed gradient: its slope is not symmetric, so a product from the wrong side would show."""

    @jax.custom_vjp
    def reverse(x):
        return x * 1.0

    reverse.defvjp(lambda x: (x * 1.0, None), lambda _, g: (-g,))

    def loss(w):
        return (w[0] ** 2 + 3 * w[1]) * reverse(w[0] * w[1] ** 2) + nested(w[0])

    w, v = jnp.array([1.0, 2.0]), jnp.array([1.0, 0.5])
    slopes = jax.jacrev(jax.grad(loss))(w)
    assert abs(slopes[0, 1] - slopes[1, 0]) > 1
    np.testing.assert_allclose(gf.curvature.hvp(loss)(w, v), slopes @ v, rtol=1e-6)


def test_a_backward_rule_without_a_derivative_is_named_with_its_line():
    batch = (X, Y)
    named = r"once \(.*test_backward_only\.py:\d+.*\), and its backward rule cannot .*while_loop"
    for product in (
        gf.curvature.hvp(gf.batch_mean(of_one(once))),
        gf.curvature.ggn_vp(outputs(once), "squared"),
    ):
        with pytest.raises(TypeError, match=named):
            product(PARAMS, VECTOR, batch)
    with pytest.raises(TypeError, match=named):
        gf.curvature.sharpness(gf.batch_mean(of_one(once)), 0.1)(PARAMS, batch)
    with pytest.raises(TypeError, match="expected real outputs, got complex64"):
        gf.curvature.ggn_vp(lambda params, x: jnp.fft.fft(x * params), "squared")(
            jnp.ones(2), jnp.ones(2), batch
        )


def solved(w, t=1.0):
    """Return exp(-w t), as the solution of y' = -w y."""
    return odeint(lambda y, t, w: -w * y, jnp.ones(2), jnp.array([0.0, t]), w)[-1]


@pytest.mark.slow
def test_odeint_under_curvature_and_influence():
    w, v = jnp.array([1.0, 2.0]), jnp.array([1.0, -1.0])
    curvature = 4 * jnp.exp(-2 * w)  # of exp(-2 w), a diagonal
    product = jax.jit(gf.curvature.hvp(lambda w: jnp.sum(solved(w) ** 2)))(w, v)
    np.testing.assert_allclose(product, curvature * v, rtol=1e-4)

    def loss(w, x):
        return jnp.sum(solved(w) * x)

    x = jnp.array([[1.0, 2.0], [3.0, -1.0]])
    G = -jnp.exp(-w)[None] * x  # [examples, P]
    np.testing.assert_allclose(gf.curvature.fisher_vp(loss)(w, v, x), G.T @ (G @ v) / 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        gf.attribution.tracin(loss)([w], x, x, 0.1), 0.1 * G @ G.T, rtol=1e-4, atol=1e-5
    )
