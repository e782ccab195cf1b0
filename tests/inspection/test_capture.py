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


def tapped(x):
    return 2 * gf.tap(jnp.tanh(x), "t")


def test_functions_without_arguments_or_outputs_and_with_keywords():
    np.testing.assert_allclose(gf.capture(tapped, keep="t")(X)["t"].value, np.tanh(X), rtol=1e-5)
    constant = gf.capture(lambda: {"t": gf.tap(jnp.ones(2), "t")}, keep="t")()
    np.testing.assert_array_equal(constant["t"].value, np.ones(2))
    assert gf.capture(lambda x: None)(X).output is None

    def scaled(params, x, scale=1.0, *, flip=False):
        return gf.tap(-params * x if flip else params * x * scale, "y")

    at = gf.capture(scaled, keep="y")
    np.testing.assert_allclose(at(2.0, X, scale=3.0)["y"].value, 6 * X, rtol=1e-6)
    np.testing.assert_allclose(at(2.0, X, flip=True)["y"].value, -2 * X, rtol=1e-6)
    np.testing.assert_allclose(at(params=2.0, x=X)["y"].value, 2 * X, rtol=1e-6)


def test_inside_the_branches_of_a_cond_and_the_body_of_a_users_scan():
    at = gf.capture(tapped, keep="t", stats="rms")

    @jax.jit
    def chosen(flag, x):
        return jax.lax.cond(flag, at, lambda x: at(2 * x), x)

    for flag, x in ((True, X), (False, 2 * X)):
        captured = chosen(flag, X)
        np.testing.assert_allclose(captured["t"].value, np.tanh(x), rtol=1e-5)
        np.testing.assert_allclose(captured.output, 2 * np.tanh(x), rtol=1e-5)

    def body(h, _):
        captured = at(h)
        return captured.output, captured

    _, each = jax.lax.scan(body, X, None, length=3)
    h = np.asarray(X)
    for i in range(3):
        np.testing.assert_allclose(each["t"].value[i], np.tanh(h), rtol=1e-5)
        h = 2 * np.tanh(h)
    # The table of stacked captures shows the last one, and says so.
    assert "the last of (3,) captures" in str(each)
    assert "last of" not in str(at(X))


def test_captured_gradients_and_nested_captures():
    loss = lambda params, x: jnp.sum(NET.apply(params, x) ** 2)  # noqa: E731
    captured = gf.capture(jax.grad(loss), keep="a1", stats="rms")(PARAMS, X[0])
    np.testing.assert_allclose(captured["a1"].value, by_hand(PARAMS, X[0])["a1"], rtol=1e-5)
    np.testing.assert_allclose(captured.output["W1"], jax.grad(loss)(PARAMS, X[0])["W1"], rtol=1e-5)
    nested = gf.capture(lambda x: gf.capture(tapped)(x).output, keep="t")(X)
    np.testing.assert_allclose(nested["t"].value, np.tanh(X), rtol=1e-5)
    second = jax.hessian(lambda x: gf.capture(tapped, keep="t", stats=())(x)["t"].value.sum())(X[0])
    np.testing.assert_allclose(jnp.diag(second), -2 * np.tanh(X[0]) / np.cosh(X[0]) ** 2, rtol=1e-4)


def test_integers_complex_values_random_keys_and_effects(capfd):
    def f(params, key, n):
        jax.debug.print("parameter {}", params)
        keys = gf.tap(jax.random.split(key), "keys")
        spectrum = gf.tap(jnp.fft.fft(params * jax.random.normal(keys[0], (4,))), "spectrum")
        return gf.tap(n > 1, "large"), jnp.abs(spectrum)

    captured = jax.jit(gf.capture(f, keep=None))(2.0, jax.random.key(0), jnp.arange(3))
    jax.block_until_ready(captured)
    assert "parameter 2.0" in capfd.readouterr().out
    # Of random keys there are no statistics.
    assert list(captured) == ["params", "spectrum", "large"]
    assert captured["large"].value.tolist() == [False, False, True]
    assert captured["spectrum"].value.dtype == "complex64"
    np.testing.assert_allclose(captured["large"].stats.mean, 1 / 3, rtol=1e-6)


def test_in_a_shard_map_statistics_are_per_device():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    each = jax.shard_map(lambda x: tapped(x), mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    x = jax.random.normal(jax.random.key(2), (4, 3))
    captured = jax.jit(lambda x: gf.capture(each, keep="t", stats="max", along=(x,))(x))(x)
    halves = np.tanh(x).reshape(2, 2, 3)
    np.testing.assert_allclose(captured["t"].value, halves, rtol=1e-5)
    np.testing.assert_allclose(captured["t"].stats.max, np.abs(halves).max((1, 2)), rtol=1e-5)
    tangent = (x / np.cosh(x) ** 2).reshape(2, 2, 3)
    np.testing.assert_allclose(captured["t"].tangent, tangent, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(captured["t"].tangent_stats.max, np.abs(tangent).max((1, 2)), rtol=1e-4)


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
