"""Tangents at sites against central differences in float64 and `jax.jvp` of functions written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

NET = gf.mlp([4, 3, 2])
PARAMS = NET.init(jax.random.key(0))
X = jax.random.normal(jax.random.key(1), (5, 4))


def like(tree, seed=2):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(k, jnp.shape(a)) for k, a in zip(keys, leaves, strict=True)]
    )


def recurrent(params, x):
    """A function with a scan, a checkpoint, a branch and a while loop."""

    @jax.checkpoint
    def step(h, x):
        h = gf.tap(jnp.tanh(params["W"] @ h + x), "h")
        return h, gf.tap(jnp.sum(h * h), "energy")

    h, energies = jax.lax.scan(step, jnp.zeros(3, x.dtype), x)
    h = jax.lax.cond(energies[0] > 0, lambda h: gf.tap(jnp.sin(h), "taken"), lambda h: gf.tap(h, "other"), h)
    _, h = jax.lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, gf.tap(c[1] * params["scale"], "grown")), (0, h)
    )
    return {"h": h, "n": 3, "best": jnp.argmax(h)}


def test_central_differences_in_containers_in_float64():
    with jax.enable_x64(True):
        params = {"W": 0.5 * like(jnp.zeros((3, 3))), "scale": jnp.float64(1.3)}
        x, direction = like(jnp.zeros((4, 3)), 3), like(params, 4)
        params, x, direction = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, x, direction))
        names = ["h", "energy", "taken", "grown"]
        kept = jax.jit(
            lambda *args: gf.capture(recurrent, keep=names, along=(direction, None), stats="rms")(*args)
        )(params, x)
        at = jax.jit(gf.capture(recurrent, sites=names, keep=names, stats=()))
        move = lambda t: at(jax.tree.map(lambda p, d: p + t * d, params, direction), x)  # noqa: E731
        after, before = move(1e-5), move(-1e-5)
        for name in names:
            difference = (after[name].value - before[name].value) / 2e-5
            np.testing.assert_allclose(kept[name].tangent, difference, rtol=1e-6, atol=1e-9)
            rms = np.sqrt(
                np.mean(difference**2, axis=tuple(range(difference.ndim))[len(kept[name].site.axes) :])
            )
            np.testing.assert_allclose(kept[name].tangent_stats.rms, rms, rtol=1e-6)
        np.testing.assert_allclose(kept.output["h"], move(0.0).output["h"], rtol=1e-12)
        np.testing.assert_allclose(
            kept.output_tangent["h"], (after.output["h"] - before.output["h"]) / 2e-5, rtol=1e-6
        )
        assert kept.output_tangent["n"] is None
        assert kept.output_tangent["best"] is None
        # The branch that did not run.
        assert kept["other"].tangent_stats.count == 0


def test_the_tangents_of_an_mlp_under_jit_vmap_and_grad():
    direction = like(PARAMS)

    def by_hand(params, x):
        z1 = params["W1"] @ x + params["b1"]
        a1 = 1 / (1 + jnp.exp(-z1))
        return {"z1": z1, "a1": a1, "z2": params["W2"] @ a1 + params["b2"]}

    captured = jax.jit(
        jax.vmap(gf.capture(NET.apply, keep=None, along=(direction, None), stats="max"), (None, 0))
    )(PARAMS, X)
    values, tangents = jax.vmap(lambda x: jax.jvp(lambda p: by_hand(p, x), (PARAMS,), (direction,)))(X)
    for name, tangent in tangents.items():
        np.testing.assert_allclose(captured[name].value, values[name], rtol=1e-5)
        np.testing.assert_allclose(captured[name].tangent, tangent, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            captured[name].tangent_stats.max, jnp.max(jnp.abs(tangent), axis=-1), rtol=1e-4
        )
    np.testing.assert_allclose(captured.output_tangent, tangents["z2"], rtol=1e-4, atol=1e-6)

    def of_a_direction(d, x):
        return gf.capture(NET.apply, sites="z2", along=(d, None), stats="rms")(PARAMS, x)[
            "z2"
        ].tangent_stats.rms

    # Reverse over forward mode, through a statistic.
    found = jax.grad(of_a_direction)(direction, X[0])
    right = jax.grad(
        lambda d: jnp.sqrt(jnp.mean(jax.jvp(lambda p: by_hand(p, X[0])["z2"], (PARAMS,), (d,))[1] ** 2))
    )(direction)
    np.testing.assert_allclose(found["W1"], right["W1"], rtol=1e-4, atol=1e-6)


def test_one_direction_per_argument_and_per_leaf():
    f = lambda w, x, n: gf.tap(w["a"] * x, "product") + w["b"] * n.astype("float32")  # noqa: E731
    w = {"a": jnp.float32(3), "b": jnp.float32(5)}
    args = w, jnp.float32(2), jnp.int32(7)
    captured = gf.capture(f, keep="product", along=({"a": 1.0, "b": None}, 10.0, None))(*args)
    assert float(captured["product"].tangent) == 2 + 30
    assert float(captured.output_tangent) == 32
    captured = gf.capture(f, keep="product", along=({"a": None, "b": 1.0}, None, None))(*args)
    assert float(captured["product"].tangent) == 0
    assert float(captured.output_tangent) == 7


def test_a_direction_that_enters_at_a_site():
    def f(params, x):
        q = gf.tap((params["W"] @ x).reshape(2, 2), "q")
        return jnp.sum(gf.tap(jnp.tanh(q), "t") ** 2)

    params, x, direction = {"W": like(jnp.zeros((4, 3)))}, like(jnp.zeros(3), 5), like(jnp.zeros((2, 2)), 6)
    captured = jax.jit(lambda d: gf.capture(f, keep=None, along={"q": d}, stats="rms")(params, x))(direction)
    rest = lambda q: (jnp.tanh(q), jnp.sum(jnp.tanh(q) ** 2))  # noqa: E731
    _, (t, out) = jax.jvp(rest, ((params["W"] @ x).reshape(2, 2),), (direction,))
    np.testing.assert_array_equal(captured["q"].tangent, direction)
    np.testing.assert_allclose(captured["t"].tangent, t, rtol=1e-5)
    np.testing.assert_allclose(captured.output_tangent, out, rtol=1e-5)
    # q has the values of W, but the direction enters behind it.
    assert captured["W"].tangent_stats.count == 0
    np.testing.assert_allclose(captured.output, f(params, x), rtol=1e-6)


def test_a_direction_in_one_iteration_of_a_scan():
    def f(w, x):
        return jax.lax.scan(lambda h, _: (gf.tap(h * w, "h"), None), x, None, length=3)[0]

    direction = jnp.array([0.0, 1.0, 0.0])[:, None] * jnp.ones((3, 2))
    captured = gf.capture(f, keep="h", along={"h": direction})(2.0, jnp.ones(2))
    np.testing.assert_array_equal(captured["h"].tangent, [[0, 0], [1, 1], [2, 2]])
    captured = gf.capture(f, keep="h", along={"h": jnp.ones(2)})(2.0, jnp.ones(2))
    np.testing.assert_array_equal(captured["h"].tangent, [[1, 1], [3, 3], [7, 7]])


def test_the_table_has_a_column_of_tangents_only_with_a_direction():
    assert "tangent" not in str(gf.capture(NET.apply)(PARAMS, X[0]))
    captured = gf.capture(NET.apply, along=(like(PARAMS), None))(PARAMS, X[0])
    frame = captured.to_dataframe()
    assert "tangent rms" in str(captured)
    np.testing.assert_allclose(
        frame["tangent rms"], [captured[n].tangent_stats.rms for n in captured], rtol=1e-5
    )


def test_errors_say_what_was_expected():
    f = lambda w, x, n: gf.tap(w["a"] * x, "product") + n.astype("float32")  # noqa: E731
    args = {"a": jnp.ones(2)}, jnp.ones(2), jnp.arange(2)
    for along, message in [
        (({"a": jnp.ones(2)},), "one tangent per positional argument .*: expected 3, got 1"),
        ((None, None, None), "along has no tangent"),
        (({"b": jnp.ones(2)}, None, None), r"along\[0\] must have the structure of argument 0"),
        (
            ({"a": jnp.ones(3)}, None, None),
            r"along\[0\] at a must have the argument's shape \[2\], got \[3\]",
        ),
        (({"a": jnp.ones(2, "complex64")}, None, None), "must be real"),
        ((None, None, jnp.ones(2)), r"dtype int32, which has no tangent. Put None"),
        ({"produkt": jnp.ones(2)}, "there is no site 'produkt'. Did you mean .*product"),
        ({"product": jnp.ones(3)}, r"must have the site's shape \[2\], got \[3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            gf.capture(f, along=along)(*args)
    with pytest.raises(AttributeError, match=r"no tangent here: pass gf.capture\(..., along=\)"):
        gf.capture(f)(*args)["product"].tangent  # noqa: B018
    with pytest.raises(
        AttributeError, match="the tangent of site 'product' was not kept: pass keep='product'"
    ):
        gf.capture(f, along={"product": jnp.ones(2)})(*args)["product"].tangent  # noqa: B018


def test_a_function_with_only_a_backward_rule_has_no_tangents():
    @jax.custom_vjp
    def clipped(x):
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))
    f = lambda w, x: gf.tap(clipped(w * x), "y")  # noqa: E731
    with pytest.raises(TypeError, match=r"jax.custom_vjp has no tangents: .*Define it with jax.custom_jvp"):
        gf.capture(f, along=(1.0, None))(3.0, 2.0)
    # Where no tangent meets it, it may stand.
    g = lambda w, x: gf.tap(w, "w") + clipped(x)  # noqa: E731
    assert float(gf.capture(g, along=(1.0, None))(3.0, 2.0).output_tangent) == 1
