"""`patch`: the same function with values replaced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import gradfn as gf
from gradfn.inspection import capture, inspect, patch, sites

X = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
PARAMS = {"W": jnp.linspace(-1.0, 2.0, 9).reshape(3, 3), "V": jnp.linspace(1.0, 2.0, 3).reshape(3, 1)}


def f(params, x):
    a = checkpoint_name(jnp.tanh(x @ params["W"]), "a")
    return jnp.sum(a @ params["V"]), a


def test_a_value_or_a_function_takes_the_place_of_a_site():
    ablated, _ = patch(f, {"a": 0.0})(PARAMS, X)
    assert float(ablated) == 0.0
    doubled, a = jax.jit(patch(f, {"a": lambda a: 2 * a}))(PARAMS, X)
    np.testing.assert_allclose(doubled, 2 * f(PARAMS, X)[0], rtol=1e-6)
    np.testing.assert_allclose(a, 2 * f(PARAMS, X)[1], rtol=1e-6)


def test_the_activation_of_another_input_gives_its_result():
    inspection = inspect(f, keep="a")(PARAMS, 3 * X)
    moved, _ = patch(f, {"a": inspection["a"].value})(PARAMS, X)
    np.testing.assert_allclose(moved, f(PARAMS, 3 * X)[0], rtol=1e-6)


def test_gradients_flow_through_functions_and_into_values():
    grads = jax.grad(lambda p: patch(f, {"a": lambda a: a**2})(p, X)[0])(PARAMS)
    by_hand = jax.grad(lambda p: jnp.sum(jnp.tanh(X @ p["W"]) ** 2 @ p["V"]))(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), grads, by_hand)
    into = jax.grad(lambda value: patch(f, {"a": value})(PARAMS, X)[0])(jnp.ones((2, 3)))
    np.testing.assert_allclose(into, jnp.broadcast_to(PARAMS["V"].T, (2, 3)), rtol=1e-6)


def test_in_a_scan_one_value_for_all_iterations_or_one_each():
    def g(w, x):
        def step(c, _):
            c = checkpoint_name(c * w, "c")
            return c, c

        return jax.lax.scan(step, x, None, length=3)[1]

    same = patch(g, {"c": 5.0})(jnp.array(2.0), jnp.ones(2))
    np.testing.assert_array_equal(same, jnp.full((3, 2), 5.0))
    each = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(patch(g, {"c": each})(jnp.array(2.0), jnp.ones(2)), each)
    added = patch(g, {"c": lambda c: c + 1})(jnp.array(2.0), jnp.ones(2))
    np.testing.assert_array_equal(added, jnp.broadcast_to(jnp.array([3.0, 7.0, 15.0])[:, None], (3, 2)))


def test_in_a_while_loop():
    def g(x):
        return jax.lax.while_loop(lambda x: x < 10, lambda x: checkpoint_name(x * 2, "x"), x)

    assert float(patch(g, {"x": lambda x: x + 1})(jnp.array(1.0))) == 15.0  # 1, 3, 7, 15


@pytest.mark.parametrize("scan", [False, True])
def test_an_edited_network_has_the_same_sites_and_shows_the_edited_values(scan):
    net = gf.gpt(gf.GPTConfig(vocab=17, context=6, n_layers=2, n_heads=2, width=8, scan=scan))
    args = net.init(jax.random.key(0)), jnp.arange(6)
    edited = patch(net.apply, {"*residual": lambda x: 2 * x})
    assert sites(edited)(*args).names == sites(net.apply)(*args).names
    doubled = capture(patch(f, {"a": lambda a: 2 * a}), keep="a")(PARAMS, X)
    np.testing.assert_allclose(doubled["a"].value, 2 * f(PARAMS, X)[1], rtol=1e-6)


def test_a_fraction_is_not_rounded_to_an_integer():
    def g(x):
        return jnp.take(x, checkpoint_name(jnp.argmax(x), "i"))

    with pytest.raises(TypeError, match="the value at site 'i' is int32, which cannot represent float32"):
        patch(g, {"i": 0.5})(jnp.ones(2))


def test_integers_and_half_precision_keep_their_type():
    def g(x):
        i = checkpoint_name(jnp.argmax(x), "i")
        return jnp.take(x, i) * checkpoint_name(x.astype(jnp.bfloat16), "h").sum().astype(jnp.float32)

    patched = patch(g, {"i": 0, "h": 1.0})(jnp.array([2.0, 3.0]))
    assert float(patched) == 4.0


def test_errors_say_what_fits():
    with pytest.raises(ValueError, match=r"site 'a' has shape float32\[2, 3\], got \[4\]"):
        patch(f, {"a": jnp.ones(4)})(PARAMS, X)
    with pytest.raises(ValueError, match=r"site 'a' has shape float32\[2, 3\], got \[2\]"):
        patch(f, {"a": lambda a: a.sum(1)})(PARAMS, X)
    with pytest.raises(ValueError, match="patch: there is no site 'b'"):
        patch(f, {"b": 0.0})(PARAMS, X)
