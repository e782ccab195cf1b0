"""`capture`: the values inside a function, forward only, against values computed by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

NET = gf.mlp([4, 3, 2])
PARAMS = NET.init(jax.random.key(0))
X = jax.random.normal(jax.random.key(1), (5, 4))


def by_hand(params, x):
    z1 = params["W1"] @ x + params["b1"]
    a1 = 1 / (1 + jnp.exp(-z1))
    return {"z1": z1, "a1": a1, "z2": params["W2"] @ a1 + params["b2"]}


def test_values_and_statistics_are_those_computed_by_hand():
    captured = gf.capture(NET.apply, keep=["z1", "a1"])(PARAMS, X[0])
    expected = by_hand(PARAMS, X[0])
    np.testing.assert_allclose(captured.output, expected["z2"], rtol=1e-5)
    for name in ("z1", "a1"):
        np.testing.assert_allclose(captured[name].value, expected[name], rtol=1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(captured[name].stats.rms, np.sqrt(np.mean(value**2)), rtol=1e-5)
        np.testing.assert_allclose(captured[name].stats.mean, np.mean(value), rtol=1e-4)
    assert list(captured) == ["W1", "z1", "a1", "W2", "z2"]
    assert captured["a1"].grad_stats is None
    with pytest.raises(AttributeError, match="site 'a1' has no gradient here"):
        captured["a1"].grad  # noqa: B018


def test_it_works_in_jit_vmap_scan_and_grad():
    captured = jax.jit(jax.vmap(gf.capture(NET.apply, keep="a1"), (None, 0)))(PARAMS, X)
    expected = jax.vmap(by_hand, (None, 0))(PARAMS, X)
    np.testing.assert_allclose(captured["a1"].value, expected["a1"], rtol=1e-5)
    np.testing.assert_allclose(captured.output, expected["z2"], rtol=1e-5)
    _, scanned = jax.lax.scan(lambda c, x: (c, gf.capture(NET.apply, keep="a1")(PARAMS, x)), 0, X)
    np.testing.assert_allclose(scanned["a1"].value, expected["a1"], rtol=1e-5)
    grads = jax.grad(lambda p: jnp.sum(gf.capture(NET.apply, keep="a1")(p, X[0])["a1"].value ** 2))(PARAMS)
    right = jax.grad(lambda p: jnp.sum(by_hand(p, X[0])["a1"] ** 2))(PARAMS)
    np.testing.assert_allclose(grads["W1"], right["W1"], rtol=1e-5)
    of_rms = jax.grad(lambda p: gf.capture(NET.apply)(p, X[0])["a1"].stats.rms)(PARAMS)
    right = jax.grad(lambda p: jnp.sqrt(jnp.mean(by_hand(p, X[0])["a1"] ** 2)))(PARAMS)
    np.testing.assert_allclose(of_rms["W1"], right["W1"], rtol=1e-5)


def test_any_output_is_returned_as_it_is():
    def f(params, x):
        a = gf.tap(jnp.tanh(x * params), "a")
        return {"integers": jnp.argmax(a), "text": "text", "none": None}, [a, a > 0]

    captured = gf.capture(f, keep=None)(2.0, X)
    assert jax.tree.structure(captured.output) == jax.tree.structure(f(2.0, X))
    assert captured.output[0]["text"] == "text"
    np.testing.assert_allclose(captured["a"].value, np.tanh(2 * X), rtol=1e-5)


def test_iterations_of_a_scan_stand_in_front():
    def f(w, x):
        return jax.lax.scan(lambda h, _: (gf.tap(h * w, "h"), h), x, None, length=3)

    captured = jax.jit(gf.capture(f, keep="h"))(2.0, jnp.ones(2))
    np.testing.assert_array_equal(captured["h"].value, [[2, 2], [4, 4], [8, 8]])
    np.testing.assert_array_equal(captured["h"].stats.max, [2, 4, 8])


def test_nothing_is_differentiated_and_nothing_but_what_was_requested_is_computed():
    program = str(jax.make_jaxpr(gf.capture(NET.apply, sites=(), keep=()))(PARAMS, X[0]))
    assert program.count("dot_general") == 2
    assert "reduce" not in program


def test_errors_name_the_site_and_the_caller():
    with pytest.raises(ValueError, match=r"there is no site 'a9'. Did you mean .*a1"):
        gf.capture(NET.apply, sites="a9")(PARAMS, X[0])
    with pytest.raises(ValueError, match="capture: there is no statistic 'median'"):
        gf.capture(NET.apply, stats="median")
    with pytest.raises(KeyError, match=r"capture: there is no site 'a9'. Did you mean .*a1"):
        gf.capture(NET.apply)(PARAMS, X[0])["a9"]


def test_the_table_shows_values_and_no_gradients():
    captured = gf.capture(NET.apply)(PARAMS, X[0])
    assert "a1" in str(captured)
    assert "grad" not in str(captured)
    assert list(captured.to_dataframe()["site"]) == list(captured)


def layer_norm(p, x):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt(np.mean(centered**2, -1, keepdims=True) + 1e-5) * p["gain"] + p["b"]


@pytest.mark.slow
def test_a_gpts_residual_stream_unrolled_and_scanned():
    config = gf.GPTConfig(vocab=11, context=6, n_layers=2, n_heads=2, width=8)
    net, tokens = gf.gpt(config), jnp.arange(6)
    params = net.init(jax.random.key(0))
    captured = jax.jit(gf.capture(net.apply, keep=None))(params, tokens)
    value = {name: np.asarray(captured[name].value) for name in captured}
    p = jax.device_get(params)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    close(value["embedded"], p["embed"]["W"][tokens] + p["positions"]["W"])
    stream = value["embedded"]
    for i in range(2):
        block = p["blocks"][str(i)]
        middle = stream + value[f"blocks/{i}/attention_out"]
        hidden = (
            layer_norm(block["feed_norm"], middle) @ block["feed"]["up"]["W"].T + block["feed"]["up"]["b"]
        )
        fed = np.asarray(jax.nn.gelu(hidden)) @ block["feed"]["down"]["W"].T + block["feed"]["down"]["b"]
        close(value[f"blocks/{i}/residual_mid"], middle)
        close(value[f"blocks/{i}/feed/up"], hidden)
        stream = middle + fed
        close(value[f"blocks/{i}/residual"], stream)
    close(captured.output, layer_norm(p["final_norm"], stream) @ p["embed"]["W"].T)

    scanned = gf.gpt(dataclasses.replace(config, scan=True))
    stacked = jax.jit(gf.capture(scanned.apply, keep="*residual"))(gf.stack_blocks(params), tokens)
    [name] = stacked.values
    for i in range(2):
        close(stacked[name].value[i], value[f"blocks/{i}/residual"])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_an_equinox_model():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 3, 8, depth=1, key=jax.random.key(0))
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        captured = eqx.filter_jit(gf.capture(lambda model, x: jax.vmap(model)(x), keep=None))(model, X)
        first, last = jax.device_get([(layer.weight.T, layer.bias) for layer in model.layers])
        hidden = np.maximum(np.asarray(X) @ first[0] + first[1], 0)
    np.testing.assert_allclose(captured["layers/0/bias:relu"].value, hidden, rtol=1e-5, atol=1e-6)
    expected = hidden @ last[0] + last[1]
    np.testing.assert_allclose(captured.output, expected, rtol=1e-4, atol=1e-5)
