"""Differentiating what `inspect` returns: gradient penalties and norm regularizers, against plain jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

X = jnp.array([[0.5, -1.0], [2.0, 0.3], [0.1, 0.7]])
W = jnp.array([[0.3, -0.2], [0.1, 0.4]])
V = jnp.array([0.7, -0.9])


def tail(h, w):
    """Compute what follows the site `h`."""
    return jnp.mean(jnp.square(jnp.tanh(h) @ V)) + jnp.sum(h**3) / 10


def loss(w, x):
    return tail(gf.tap(x @ w, "h"), w)


def rms(x):
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def inspected(w, x, f=loss):
    return gf.inspect(f, keep="h")(w, x)


def at_site(w, x):
    return jax.grad(tail)(x @ w, w)


PENALTIES = {
    "value": (lambda w, x: inspected(w, x).value ** 2, lambda w, x: loss(w, x) ** 2),
    "grads": (
        lambda w, x: jnp.sum(inspected(w, x).grads ** 2),
        lambda w, x: jnp.sum(jax.grad(loss)(w, x) ** 2),
    ),
    "input_grads": (
        lambda w, x: jnp.sum(inspected(w, x).input_grads[0] ** 2),
        lambda w, x: jnp.sum(jax.grad(loss, 1)(w, x) ** 2),
    ),
    "kept": (lambda w, x: jnp.sum(inspected(w, x)["h"].value ** 3), lambda w, x: jnp.sum((x @ w) ** 3)),
    "rms": (lambda w, x: inspected(w, x).stats["h"].rms, lambda w, x: rms(x @ w)),
    "mean": (lambda w, x: inspected(w, x).stats["h"].mean, lambda w, x: jnp.mean(x @ w)),
    "max": (lambda w, x: inspected(w, x).stats["h"].max, lambda w, x: jnp.max(jnp.abs(x @ w))),
    "kept_grads": (
        lambda w, x: jnp.sum(inspected(w, x)["h"].grad ** 2),
        lambda w, x: jnp.sum(at_site(w, x) ** 2),
    ),
    "grad_rms": (lambda w, x: inspected(w, x).grad_stats["h"].rms, lambda w, x: rms(at_site(w, x))),
    "to_the_loss": (  # a regularizer beside the loss, as it is trained with
        lambda w, x: inspected(w, x).value + 0.1 * inspected(w, x).stats["h"].rms,
        lambda w, x: loss(w, x) + 0.1 * rms(x @ w),
    ),
}


_SLOW = ("value", "grads", "mean", "max", "to_the_loss")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in _SLOW else n for n in PENALTIES]
)
def test_differentiating_what_inspect_returns_is_right(name):
    of_inspect, plain = PENALTIES[name]
    expected = jax.grad(plain, (0, 1))(W, X)
    for reverse in (jax.grad(of_inspect, (0, 1)), jax.jit(jax.grad(of_inspect, (0, 1)))):
        for got, right in zip(reverse(W, X), expected, strict=True):
            np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)
            assert np.any(np.asarray(right))
    np.testing.assert_allclose(jax.jit(jax.jacfwd(of_inspect))(W, X), expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["rms", pytest.param("kept", marks=pytest.mark.slow), "grad_rms"])
def test_second_derivatives_of_what_inspect_returns_are_right(name):
    of_inspect, plain = PENALTIES[name]
    got = jax.jit(jax.hessian(of_inspect))(W, X)
    np.testing.assert_allclose(got, jax.hessian(plain)(W, X), rtol=1e-4, atol=1e-6)


def scanned(w, x):
    def layer(h, _):
        h = jnp.tanh(gf.tap(h @ w, "h"))
        return h, None

    h, _ = jax.lax.scan(jax.checkpoint(layer), x, None, length=3)
    return jnp.sum(h**2)


def unrolled(w, x, offsets):
    sites = []
    for offset in offsets:
        sites.append(x @ w + offset)
        x = jnp.tanh(sites[-1])
    return jnp.sum(x**2), jnp.stack(sites)


@pytest.mark.parametrize("compiled", [pytest.param(False, marks=pytest.mark.slow), True])
def test_differentiating_the_iterations_of_a_scan_is_right(compiled):
    zeros = jnp.zeros((3, *X.shape))

    def of_inspect(w):
        inspection = gf.inspect(scanned, keep="h")(w, X)
        return (
            jnp.sum(inspection["h"].value[0] ** 3)
            + inspection.stats["h"].rms[1]
            + inspection.grad_stats["h"].rms[2]
        )

    def plain(w):
        sites = unrolled(w, X, zeros)[1]
        at_sites = jax.grad(lambda offsets: unrolled(w, X, offsets)[0])(zeros)
        return jnp.sum(sites[0] ** 3) + rms(sites[1]) + rms(at_sites[2])

    gradient = jax.grad(of_inspect)
    got = (jax.jit(gradient) if compiled else gradient)(W)
    np.testing.assert_allclose(got, jax.grad(plain)(W), rtol=1e-5, atol=1e-6)


def test_differentiating_through_values_that_the_loss_closes_over_is_right():
    def penalty(s):
        return inspected(W, X, lambda w, x: loss(w, s * x)).stats["h"].rms

    np.testing.assert_allclose(jax.grad(penalty)(2.0), rms(X @ W), rtol=1e-6)


def test_the_rms_of_zeros_has_the_gradient_zero():
    gradient = jax.grad(lambda w: gf.inspect(loss)(w, X).stats["h"].rms)(jnp.zeros_like(W))
    np.testing.assert_array_equal(gradient, jnp.zeros_like(W))


def test_a_vmapped_penalty_is_right():
    of_inspect, plain = PENALTIES["grad_rms"]
    scales = jnp.array([0.5, 1.0, 2.0])
    got, right = [jax.vmap(lambda s, p=p: jax.grad(p)(s * W, X))(scales) for p in (of_inspect, plain)]
    np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)


def test_a_loss_with_effects_is_differentiated_right():
    def printed(w, x):
        jax.debug.callback(lambda h: None, x)
        return loss(w, x)

    got = jax.jit(jax.grad(lambda w: inspected(w, X, printed).stats["h"].rms))(W)
    np.testing.assert_allclose(got, jax.grad(lambda w: rms(X @ w))(W), rtol=1e-5)


def test_differentiating_what_backprop_returns_is_right():
    def norm_of_first_step(w, x):
        return gf.backprop(loss)(w, x).cotangents[0]["results"][0]["norm"][0]

    expected = jax.grad(lambda w: jnp.linalg.norm(at_site(w, X)))(W)
    np.testing.assert_allclose(jax.grad(norm_of_first_step)(W, X), expected, rtol=1e-5)


def test_differentiating_nan_guards_gradients_is_right():
    got = jax.jit(jax.grad(lambda w: jnp.sum(gf.nan_guard(loss)(w, X)[1] ** 2)))(W)
    np.testing.assert_allclose(got, jax.grad(PENALTIES["grads"][1])(W, X), rtol=1e-5)
