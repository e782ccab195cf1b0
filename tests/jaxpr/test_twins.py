"""Sites that share statistics have the same elements, or the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.jaxpr import find_sites, trace_as_written
from gradfn.jaxpr.twins import same_gradients, same_values


def gpt(scan):
    net = gf.gpt(gf.GPTConfig(7, 5, 2, 2, 8, scan=scan))
    text = jax.random.randint(jax.random.key(1), (3, 5), 0, 7)
    return gf.batch_mean(gf.next_token_loss(net)), net.init(jax.random.key(0)), (text, text)


def shapes_and_sums(params, x):
    a = gf.tap(params["W"] * x, "a")
    b = gf.tap(a.reshape(-1), "b")
    # Used twice, in one sum and in two.
    c = gf.tap(b + b, "c")
    d = gf.tap(c + gf.tap(jnp.sin(c), "e"), "d")
    f = gf.tap(jax.nn.relu(d), "f")
    # Of another shape, on whose last axis the fraction of dead units depends.
    g = gf.tap(f.reshape(2, -1), "g")
    h = gf.tap(jnp.sum(g) + 1.0, "h")
    return jnp.sum(h * jnp.cos(g) + jax.lax.stop_gradient(a.reshape(2, -1)))


def small():
    return shapes_and_sums, {"W": jnp.linspace(-1.0, 1.0, 32).reshape(16, 2)}, jnp.ones((16, 2))


@pytest.mark.parametrize("task", [lambda: gpt(False), lambda: gpt(True), small])
def test_shared_statistics_are_those_of_the_values_and_gradients_that_are_kept(task):
    loss, params, x = task()
    stats = (*gf.inspection.summaries.STATS,)
    shared = jax.jit(gf.inspect(loss, stats=stats))(params, x)
    # Of what is kept, every site has statistics of its own.
    own = jax.jit(gf.inspect(loss, stats=stats, keep=None))(params, x)
    assert set(shared.stats) == set(own.stats)
    assert set(shared.grad_stats) == set(own.grad_stats)
    for name, value in own.values.items():
        assert_same(shared[name].stats, own[name].stats)
        if value.ndim and not own[name].site.axes:
            np.testing.assert_allclose(shared[name].stats.rms, np.sqrt(np.mean(value**2)), rtol=1e-5)
    for name, grad in own.value_grads.items():
        assert_same(shared[name].grad_stats, own[name].grad_stats)
        if not own[name].site.axes:
            np.testing.assert_allclose(shared[name].grad_stats.rms, np.sqrt(np.mean(grad**2)), rtol=1e-5)


def assert_same(one, other):
    assert one.names == other.names
    # The sum of elements that cancel depends on their order, by rounding errors of the elements.
    error = 1e-6 * float(np.max(other.rms))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=error)


def test_which_sites_share():
    loss, params, x = small()
    program = trace_as_written(loss, params, x)
    sites = find_sites(program)
    values, gradients = same_values(program, sites), same_gradients(program, sites)
    assert values == {"b": "a"}
    # a, b, c, d and g are used twice; e once, in a sum, and f once, in a reshape.
    assert gradients == {"e": "d", "f": "g"}


def test_half_of_the_gradients_of_a_transformer_are_shared():
    loss, params, x = gpt(False)
    program = trace_as_written(loss, params, x)
    sites = find_sites(program)
    assert len(same_gradients(program, sites)) > 0.45 * len(sites)
    assert same_values(program, sites)["blocks/0/attention/queries"] == "blocks/0/attention/query/b"
