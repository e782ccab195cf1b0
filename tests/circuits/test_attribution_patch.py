"""Attribution patching: against finite differences, exact patches, formulas in plain numpy, and PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

CONFIG = dict(vocab=11, context=6, n_layers=2, n_heads=2, width=8)
NET, SCANNED = (gf.gpt(gf.GPTConfig(**CONFIG, scan=scan)) for scan in (False, True))


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def params():
    """Parameters in float64, larger than GPT-2's start so that every part matters."""
    start = NET.init(jax.random.key(0))
    return jax.tree.map(lambda x: np.asarray(10 * x if x.ndim == 2 else x, np.float64), start)


CLEAN, CORRUPT = np.array([3, 1, 4, 1, 5]), np.array([2, 7, 4, 8, 2])


def metric(logits):
    return logits[-1, 2] - logits[-1, 5]


def patched(edits, tokens=CORRUPT, net=NET):
    return metric(gf.patch(net.apply, edits)(params(), tokens))


@functools.cache
def scores(**settings):
    return gf.circuits.attribution_patch(
        NET.apply, (params(), CLEAN), (params(), CORRUPT), metric, **settings
    )


@functools.cache
def values():
    """The values at the sites that the tests patch, in the clean run and in the corrupt one."""
    run = jax.jit(gf.capture(NET.apply, sites=["*mixed", "*/residual"], keep="*", stats=()))
    return [jax.tree.map(np.asarray, run(params(), tokens).values) for tokens in (CLEAN, CORRUPT)]


def value(name, of_clean=True):
    return values()[0 if of_clean else 1][name]


def test_atp_is_the_derivative_of_the_exact_effect_along_the_line_to_the_other_value():
    result = scores(over="layer x position x head")
    values()
    assert result.scores.shape == (2, 5, 2)
    assert result.labels[0] == ("blocks/0/attention/mixed", "blocks/1/attention/mixed")
    np.testing.assert_allclose(result.clean, metric(NET.apply(params(), CLEAN)), rtol=1e-10)
    np.testing.assert_allclose(result.corrupt, metric(NET.apply(params(), CORRUPT)), rtol=1e-10)

    @jax.jit
    def moved(share, layer_0, layer_1):
        """The metric with one position of one head moved toward the clean value, in the layer whose mask is not 0."""
        edits = {}
        for name, mask in zip(result.labels[0], (layer_0, layer_1), strict=True):
            change = mask[..., None] * (value(name) - value(name, False))
            edits[name] = lambda x, change=change: x + share * change
        return patched(edits)

    for at in np.ndindex(2, 5, 2):
        masks = np.zeros([2, 5, 2])
        masks[at] = 1
        slope = (moved(1e-5, *masks) - moved(-1e-5, *masks)) / 2e-5
        np.testing.assert_allclose(result.scores[at], slope, rtol=1e-6, atol=1e-9)


def test_atp_is_exact_where_the_metric_is_linear_in_the_site():
    # The output is linear in the values, which the attention does not depend on.
    def f(w, x):
        query, key, source = x
        return jax.nn.softmax(query @ key.T) @ gf.tap(source @ w, "values")

    rng = np.random.default_rng(0)
    w, weights = rng.normal(size=[4, 3]), rng.normal(size=[5, 3])
    query, key, clean, corrupt = rng.normal(size=[4, 5, 4])
    result = gf.circuits.attribution_patch(
        *(f, (w, (query, key, clean)), (w, (query, key, corrupt)), lambda y: jnp.sum(weights * y)),
        sites="values",
        over="layer x position x feature",
        axes={"position": 0, "feature": 1},
    )
    attention = np.exp(query @ key.T) / np.exp(query @ key.T).sum(1, keepdims=True)
    # d/dv[s, d] of sum(weights * attention @ v), times the change of v.
    exact = attention.T @ weights * ((clean - corrupt) @ w)
    np.testing.assert_allclose(result.scores[0], exact, rtol=1e-10)


def test_both_directions():
    back = scores(over="layer", into="clean", sites="*residual")
    name = "blocks/1/residual"
    grad = jax.jit(jax.grad(lambda change: patched({name: lambda x: x + change}, CLEAN)))(jnp.zeros([5, 8]))
    np.testing.assert_allclose(back.scores[1], jnp.sum(grad * (value(name, False) - value(name))), rtol=1e-8)
    assert back.into == "clean"
    np.testing.assert_allclose(
        [back.clean, back.corrupt], [scores(over="layer").clean, scores(over="layer").corrupt]
    )


def test_without_layer_all_sites_are_patched_together():
    by_layer = scores(over="layer x position x head").scores
    np.testing.assert_allclose(scores(over="head x position").scores, by_layer.sum(0).T, rtol=1e-10)


@pytest.mark.parametrize("method", ["atp_star", "ig_values"])
def test_layers_in_a_scan_have_the_scores_of_unrolled_ones(method):
    stacked = gf.stack_blocks(params())
    settings = dict(sites="*keys", over="position x layer", method=method)
    result = gf.circuits.attribution_patch(
        SCANNED.apply, (stacked, CLEAN), (stacked, CORRUPT), metric, **settings
    )
    np.testing.assert_allclose(result.scores, scores(**settings).scores, rtol=1e-9, atol=1e-13)
    assert result.labels[1] == ("keys[0]", "keys[1]")


def test_the_fixed_score_of_queries_and_keys_is_exact_where_what_follows_is_linear():
    # One head, whose output is the function's: linear in the probabilities.
    def f(w, x):
        query, key, value = (gf.tap(x @ w[i], name) for i, name in enumerate(("queries", "keys", "values")))
        scores = jnp.einsum("thd,shd->hts", query, key)
        weights = gf.tap(jax.nn.softmax(10.0 * scores), "probabilities")
        return jnp.einsum("hts,shd->thd", weights, value)

    rng = np.random.default_rng(1)
    w, clean, corrupt = rng.normal(size=[3, 2, 3]), rng.normal(size=[4, 2, 2]), rng.normal(size=[4, 2, 2])
    # `x @ w[i]` is [T, heads, size] for x [T, heads, 2].
    read = rng.normal(size=[4, 2, 3])
    run = functools.partial(
        gf.circuits.attribution_patch, f, (w, clean), (w, corrupt), lambda y: jnp.sum(read * y)
    )
    for i, name in enumerate(("queries", "keys")):
        result = run(sites=name, over="position x head", method="atp_qk")
        plain = run(sites=name, over="position x head", method="atp")
        exact = np.zeros([4, 2])
        for t, h in np.ndindex(4, 2):
            new = (corrupt @ w[i]).copy()
            new[t, h] = (clean @ w[i])[t, h]
            exact[t, h] = np.sum(read * gf.patch(f, {name: new})(w, corrupt)) - result.corrupt
        np.testing.assert_allclose(result.scores, exact, rtol=1e-9, atol=1e-12)
        # Saturated attention: the plain estimate misses most of it.
        assert np.abs(plain.scores - exact).max() > 0.5 * np.abs(exact).max()


def test_dropped_gradients_are_those_of_a_model_that_stops_them_in_one_layer():
    result = scores(over="layer x head", method="atp_grad_drop")
    names = result.labels[0]

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(dropped):
        def f(added):
            edits = {name: lambda x, name=name: x + added[name] for name in names}
            for part in ("attention_out", "feed_out"):
                edits[f"blocks/{dropped}/{part}"] = jax.lax.stop_gradient
            return patched(edits)

        return jax.grad(f)({name: jnp.zeros([5, 2, 4]) for name in names})

    expected = np.zeros([2, 2])
    for dropped in range(2):
        grads = gradients(dropped)
        for i, name in enumerate(names):
            product = (value(name) - value(name, False)) * grads[name]
            expected[i] += np.abs(product.sum((0, 2))) / (2 - 1)
    np.testing.assert_allclose(result.scores, expected, rtol=1e-8)
    # Queries with both fixes: the change of probabilities, times the gradients that are dropped.
    assert scores(over="layer x head", sites="*queries", method="atp_star").scores.shape == (2, 2)


def test_gradients_integrated_over_the_inputs_add_up_to_the_difference_of_the_metric():
    result = scores(over="position", sites="embedded", method="ig_inputs", steps=64)
    np.testing.assert_allclose(result.scores.sum(), result.clean - result.corrupt, rtol=2e-3)
    few = scores(over="position", sites="embedded", method="atp")
    assert abs(few.scores.sum() - result.clean + result.corrupt) > 0.1 * abs(result.clean - result.corrupt)


def test_gradients_are_integrated_over_floating_arguments():
    net = gf.mlp([3, 4, 1], "tanh")
    weights = jax.tree.map(lambda x: 2.0 * x.astype(float), net.init(jax.random.key(1)))
    x, y = jnp.array([1.0, 2.0, -1.0]), jnp.zeros(3)
    result = gf.circuits.attribution_patch(
        net.apply,
        (weights, x),
        (weights, y),
        jnp.sum,
        sites="z1",
        over="unit",
        axes={"unit": 0},
        method="ig_inputs",
        steps=100,
    )
    whole = gf.attribution.integrated_gradients(net.apply, baseline=y, steps=100)(weights, x)
    # From z1 to the input the net is linear, so both divide the same total.
    np.testing.assert_allclose(result.scores.sum(), jnp.sum(whole.attributions), rtol=1e-3)
    np.testing.assert_allclose(result.scores.sum(), result.clean - result.corrupt, rtol=1e-3)


def test_gradients_integrated_over_values_add_up_to_the_exact_patch():
    result = scores(over="layer", sites="*mixed", method="ig_values", steps=32)
    values()
    exact = jax.jit(lambda: [patched({name: value(name)}) for name in result.labels[0]])()
    np.testing.assert_allclose(result.scores, np.array(exact) - result.corrupt, rtol=2e-3)


def test_inside_jit_and_vmap():
    def of(tokens):
        return gf.circuits.attribution_patch(NET.apply, (params(), CLEAN), (params(), tokens), metric)

    result = jax.jit(jax.vmap(of))(jnp.stack([CORRUPT, CLEAN]))
    np.testing.assert_allclose(result.scores[0], scores().scores, rtol=1e-8, atol=1e-12)
    np.testing.assert_array_equal(result.scores[1], 0)


def test_the_largest_come_first():
    result = scores(over="layer x position x head")
    (label, score), *_ = result.top(3)
    assert abs(score) == np.abs(result.scores).max()
    at = [of.index(name) for of, name in zip(result.labels, label, strict=True)]
    assert result.scores[tuple(at)] == score
    assert "blocks" in str(result).splitlines()[3]


def test_rank_correlation_with_the_exact_sweep():
    result = scores(over="layer x position x head")
    pair = (NET.apply, (params(), CLEAN), (params(), CORRUPT), metric)
    sweep = gf.circuits.patch_sweep(*pair, over="layer x position x head")
    spearman = pytest.importorskip("scipy.stats").spearmanr
    expected = spearman(result.scores.ravel(), sweep.effect.ravel()).statistic
    np.testing.assert_allclose(result.compare(sweep), expected, rtol=1e-6)
    assert expected > 0.5
    with pytest.raises(ValueError, match="expected a sweep with the same words"):
        scores(over="head x position").compare(sweep)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(sites="*mixd"), r"attribution_patch: there is no site '\*mixd'"),
        (dict(into="both"), 'into must be "corrupt" or "clean"'),
        (dict(method="eap"), "method must be one of atp, atp_qk"),
        (dict(steps=3), "steps must be an integer >= 1, for ig_inputs and ig_values alone"),
        (dict(method="atp_qk"), "method 'atp_qk' is for queries and keys"),
        (dict(method="atp_grad_drop", layers="blocks/0/*_out"), "needs two layers at least.* selects 1"),
        (dict(method="ig_inputs", path="*residual"), "path must be one site outside of loops"),
        (dict(over="layer x feature"), "over has the word 'feature'"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        scores(**settings)


def test_arguments_and_sites_without_a_gradient_are_refused():
    run = gf.circuits.attribution_patch
    with pytest.raises(ValueError, match=r"expected int64\[5\].*got int64\[4\] in corrupt"):
        run(NET.apply, (params(), CLEAN), (params(), CORRUPT[:4]), metric)
    with pytest.raises(TypeError, match=r"metric must return one floating number, got float64\[11\]"):
        run(NET.apply, (params(), CLEAN), (params(), CORRUPT), lambda logits: logits[-1])

    def f(w, x):
        index = gf.tap(jnp.argmax(x), "index")
        gf.tap(2.0 * x, "unused")
        looped = jax.lax.while_loop(lambda x: x[0] < 9, lambda x: gf.tap(x + 1.0, "inner"), x)
        return w * looped[index]

    for site, message in [
        ("index", "has dtype int"),
        ("unused", "no output"),
        ("inner", "inside a while loop"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(f, (1.0, jnp.ones(2)), (1.0, jnp.zeros(2)), lambda y: y, sites=site, over="layer")
