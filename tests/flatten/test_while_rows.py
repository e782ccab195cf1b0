"""A vmapped `while_loop` whose condition depends on data: each row keeps what its own last iteration made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.jaxpr import interpret, trace

X = jnp.array([[0.5, -1.0, 2.0], [1.5, 0.2, 0.1], [0.3, -0.4, 0.9], [-2.0, 1.0, 0.6]])
TRIPS = jnp.array([1, 4, 2, 3])


def one(w, x, n):
    """Run `n` iterations on one row."""

    def body(state):
        i, x = state
        return i + 1, gf.tap(jnp.tanh(x * w + i.astype(x.dtype)), "h")

    return jax.lax.while_loop(lambda state: state[0] < n, body, (0, x))[1]


def fori(w, x, n):
    return jax.lax.fori_loop(0, n, lambda i, x: gf.tap(jnp.tanh(x * w + i.astype(x.dtype)), "h"), x)


def rows(f):
    return lambda w, x, n: jax.vmap(f, (None, 0, 0))(w, x, n)


def nested(w, x, n):
    """Return the loop in a scan in a cond, vmapped twice."""

    def step(x, _):
        return jax.lax.cond(x[0, 0] < 9.0, lambda x: rows(one)(w, x, n), lambda x: x, x), None

    return jax.vmap(lambda x: jax.lax.scan(step, x, None, length=2)[0])(x[None])[0]


W = jnp.array(0.7)


@pytest.mark.parametrize("f", [rows(one), rows(fori), nested], ids=["while", "fori", "nested"])
def test_a_vmapped_while_gives_the_same_values_when_every_equation_is_visited(f):
    program = trace(f, W, X, TRIPS)
    equations = program.equations()

    def visit(equation, evaluate, inputs, token):
        return evaluate(inputs), None

    outs, _ = jax.jit(lambda *args: interpret(program.jaxpr, visit, equations, args))(*program.inputs)
    np.testing.assert_allclose(outs[0], f(W, X, TRIPS), rtol=1e-6)


@pytest.mark.parametrize("f", [one, fori], ids=["while", "fori"])
def test_a_vmapped_while_is_inspected_with_each_rows_own_last_iteration(f):
    def loss(w, x, n):
        return jnp.sum(jax.lax.stop_gradient(rows(f)(w, x, n)) * w)

    inspection = jax.jit(gf.inspect(loss, keep="h"))(W, X, TRIPS)
    last = np.stack([one(W, x, n) for x, n in zip(X, TRIPS, strict=True)])
    np.testing.assert_allclose(inspection["h"].value, last, rtol=1e-6)
    np.testing.assert_allclose(inspection.stats["h"].rms, np.sqrt(np.mean(last**2)), rtol=1e-6)
    np.testing.assert_allclose(inspection.value, np.sum(last * W), rtol=1e-6)
    nothing = jax.jit(gf.inspect(loss, keep="h"))(W, X, 0 * TRIPS)
    assert float(nothing.stats["h"].count) == 0


def test_a_vmapped_while_is_patched_in_every_row():
    got = gf.patch(rows(one), {"h": lambda h: h + 1})(W, X, TRIPS)

    def by_hand(x, n):
        for i in range(int(n)):
            x = jnp.tanh(x * W + i) + 1
        return x

    np.testing.assert_allclose(
        got, np.stack([by_hand(*row) for row in zip(X, TRIPS, strict=True)]), rtol=1e-6
    )


def falling(w, x):
    """Take the logarithm until it is below 0.3: one more iteration of a finished row would give NaN."""

    def row(x):
        return jax.lax.while_loop(lambda x: x > 0.3, lambda x: jnp.log(x), x)

    return jnp.sum(jax.lax.stop_gradient(jax.vmap(row)(x)) + 0.5) * w


def test_a_finished_row_of_a_vmapped_while_is_not_blamed_for_a_nan():
    x = jnp.array([1.05, 50.0])  # log(1.05) = 0.05 ends; one more log would be negative, then NaN
    report = gf.nan_origin(falling)(W, x)
    assert report.ok
    assert report.nan is None
    (_, grads, record) = jax.jit(gf.nan_guard(falling))(W, x)
    assert bool(record.ok)
    np.testing.assert_allclose(grads, jax.grad(falling)(W, x), rtol=1e-6)


def test_the_origin_of_a_nan_in_a_vmapped_while_is_found():
    def f(w, x, n):
        def row(x, n):
            return jax.lax.fori_loop(0, n, lambda i, x: jnp.log(x), x)

        return w * jnp.sum(jax.lax.stop_gradient(jax.vmap(row)(x, n)))

    report = gf.nan_origin(f)(W, jnp.array([1.05, 3.0]), jnp.array([1, 4]))
    assert report.nan.operation == "log"
    assert report.nan.iteration == (3,)  # log log log 3 < 0
