"""Attention in blocks against the plain form, and which form is traced."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.layers import _attend

ALL = {"plain": _attend.plain, "blocks": functools.partial(_attend.in_blocks, block=32)}


def arrays(n_queries, n_keys, heads=2, kv_heads=2, size=4):
    rng = np.random.default_rng(0)
    shapes = ([n_queries, heads, size], [n_keys, kv_heads, size], [n_keys, kv_heads, size])
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def agree(found, expected, rtol=1e-5):
    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max() + 1e-30))

    jax.tree.map(compare, found, expected)


def scalar_of(form, mask=None, first=None):
    """Return a scalar function of query, key and value with derivatives of every order."""
    return lambda *qkv: (ALL[form](*qkv, mask, first) ** 3).sum()


def masks(n_queries, n_keys):
    rng = np.random.default_rng(0)
    each = rng.random([n_queries, n_keys]) < 0.7
    each[:, 0] = True
    return {"each": jnp.asarray(each), "shared": jnp.asarray(each[:1])}


@pytest.mark.parametrize(
    ("n_queries", "n_keys", "kv_heads", "mask", "first"),
    [
        (333, 333, 1, None, 0),
        (130, 70, 2, "each", None),
        (130, 130, 1, "shared", 0),
        (100, 150, 2, "each", 50),
        (70, 150, 2, "each", "traced"),
        (100, 40, 2, None, -7),
    ],
)
def test_blocks_compute_the_same_output_and_gradients(n_queries, n_keys, kv_heads, mask, first):
    qkv = arrays(n_queries, n_keys, kv_heads=kv_heads)
    mask = None if mask is None else masks(n_queries, n_keys)[mask]

    def run(form, qkv, first):
        return jax.value_and_grad(scalar_of(form, mask, first), (0, 1, 2))(*qkv)

    if first == "traced":
        found = jax.jit(functools.partial(run, "blocks"))(qkv, 80)
        first = 80
    else:
        found = jax.jit(functools.partial(run, "blocks", first=first))(qkv)
    agree(found, run("plain", qkv, first))


def test_blocks_have_all_derivatives():
    qkv = arrays(70, 70, heads=1, kv_heads=1, size=2)
    along = arrays(70, 70, heads=1, kv_heads=1, size=2)[::-1]

    def derivatives(form):
        f = scalar_of(form, first=0)
        grad = jax.grad(f, (0, 1, 2))
        slope = jax.jvp(f, qkv, along)[1]
        forward_over_reverse = jax.jvp(grad, qkv, along)[1]
        reverse_over_reverse = jax.grad(
            lambda *qkv: sum(jnp.sum(g * v) for g, v in zip(grad(*qkv), along, strict=True))
        )
        return slope, forward_over_reverse, reverse_over_reverse(*qkv)

    found, expected = jax.jit(lambda: derivatives("blocks"))(), jax.jit(lambda: derivatives("plain"))()
    agree(found, expected, 1e-4)
    agree(found[1][0], found[2], 1e-4)


def test_half_precision_is_that_of_the_plain_form():
    qkv = [x.astype(jnp.bfloat16) for x in arrays(70, 70)]
    found, expected = (jax.jit(lambda form=form: ALL[form](*qkv, None, 0))() for form in ("blocks", "plain"))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=2e-2)


def test_blocks_under_vmap_with_one_mask_per_example():
    qkv = [jnp.stack([x, x[::-1]]) for x in arrays(70, 70)]
    padding = jnp.stack([jnp.arange(70) < n for n in (70, 30)])  # [batch, S]

    def run(form):
        return jax.vmap(lambda q, k, v, mask: ALL[form](q, k, v, mask[None], 0))(*qkv, padding)

    agree(run("blocks"), run("plain"))


def test_causal_is_the_mask_of_earlier_positions():
    qkv = arrays(20, 25)
    mask = jnp.arange(20)[:, None] >= jnp.arange(25)[None]
    np.testing.assert_array_equal(gf.layers.attend(*qkv, causal=True), gf.layers.attend(*qkv, mask))
    both = masks(20, 25)["each"]
    np.testing.assert_array_equal(
        gf.layers.attend(*qkv, both, causal=True), gf.layers.attend(*qkv, both & mask)
    )
    np.testing.assert_array_equal(gf.layers.attend(*qkv, both[0]), gf.layers.attend(*qkv, both[:1]))


T = _attend.LONG + 3
CONFIG = gf.GPTConfig(vocab=7, context=T, n_layers=2, n_heads=2, width=4, n_kv_heads=1, positions="rope")


def has_pairs(f, *args):
    """Return whether a traced function holds an array with an element for each pair of positions."""
    shapes = re.findall(r":\w+\[([\d,]*)\]", str(jax.make_jaxpr(f)(*args)))
    return any(shape.split(",").count(str(T)) > 1 for shape in shapes)


def task_of(**changes):
    """Return a loss, parameters, and two sequences with their targets, of lengths for which blocks are used."""
    net = gf.gpt(dataclasses.replace(CONFIG, **changes))
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab, [2, T + 1])
    return gf.next_token_loss(net), net.init(jax.random.key(0)), (tokens[:, :-1], tokens[:, 1:])


def hessian_product(loss):
    return lambda params, batch: gf.curvature.hvp(gf.batch_mean(loss))(params, params, batch)


def gradient_of_norms(loss):
    def total(params, batch):
        return gf.per_example.norms(loss)(params, batch).total.sum()

    return jax.grad(total)


TRANSFORMS = {
    "gradient": lambda loss: jax.value_and_grad(gf.batch_mean(loss)),
    "norms": lambda loss: lambda *args: gf.per_example.norms(loss)(*args).norms,
    "clipped": lambda loss: lambda *args: gf.per_example.clipped_grads(loss, 0.5)(*args).grads,
    "product": hessian_product,
    "gradient of norms": gradient_of_norms,
    "inspected": lambda loss: (
        lambda *args: gf.inspect(gf.batch_mean(loss), sites="*residual")(*args).grad_stats
    ),
}
SLOW = ("norms", "clipped", "gradient of norms", "inspected")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gradient", {"n_layers": 1}),
        ("gradient", {"scan": True}),
        pytest.param("gradient", {"remat": True}, marks=pytest.mark.slow),
        ("product", {"n_layers": 1}),
        *[pytest.param(name, {"n_layers": 1}, marks=pytest.mark.slow) for name in SLOW],
    ],
)
def test_long_sequences_have_no_matrix_of_pairs_and_the_same_results(name, changes):
    loss, *args = task_of(**changes)
    transform = TRANSFORMS[name](loss)
    assert not has_pairs(transform, *args)
    found = jax.jit(transform)(*args)
    with gf.layers.attention_form("plain"):
        assert has_pairs(transform, *args)
        agree(found, jax.jit(transform)(*args), 1e-4)


def test_inspection_of_probabilities_traces_the_plain_form():
    loss, params, batch = task_of(n_layers=1)
    example = batch[0][0], batch[1][0]
    site = "probabilities"
    assert site in gf.sites(loss)(params, example).names
    # Compiled before in blocks, in a function of the user's own.
    compiled = jax.jit(loss)
    value = compiled(params, example)
    captured = jax.jit(gf.capture(compiled, sites=site, keep=site))(params, example)
    pattern = captured[site].value
    assert pattern.shape == (1, 2, T, T)
    np.testing.assert_allclose(pattern.sum(-1), 1, rtol=1e-5)
    assert not np.triu(pattern, 1).any()
    np.testing.assert_allclose(captured.output, value, rtol=1e-5)
    assert has_pairs(gf.inspect(compiled), params, example)
    for sites in ("*residual", ["logits", "queries"], ()):
        assert not has_pairs(gf.capture(compiled, sites=sites), params, example)
        assert not has_pairs(gf.inspect(compiled, sites=sites), params, example)
    assert not has_pairs(gf.patch(compiled, {"*residual": 0.0}), params, example)
    same = jax.jit(gf.patch(compiled, {site: pattern}))
    np.testing.assert_allclose(same(params, example), value, rtol=1e-5)
    assert has_pairs(same, params, example)


@pytest.mark.slow
def test_the_origin_of_a_nan_is_found_in_blocks():
    key = jnp.ones([T, 1, 2]).at[T - 1, 0, 1].set(jnp.inf)

    def f(query):
        return gf.layers.attend(query, key, jnp.ones_like(key), causal=True).sum()

    report = gf.nan_origin(f)(jnp.zeros([T, 1, 2]))
    assert report.nan.operation == "dot_general"
    assert not has_pairs(gf.nan_guard(f), key)


def test_an_unknown_form_raises():
    with (
        pytest.raises(ValueError, match="form must be 'plain', 'blocks' or None, got 'flash'"),
        gf.layers.attention_form("flash"),
    ):
        pass


@pytest.mark.optimized
@pytest.mark.parametrize("scan", [False, True])
def test_memory_grows_with_the_length_not_its_square(scan):
    def temporaries(length):
        net = gf.gpt(dataclasses.replace(CONFIG, context=length, width=16, scan=scan))
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        step = jax.jit(jax.grad(gf.batch_mean(gf.next_token_loss(net))))
        params = jax.eval_shape(net.init, jax.random.key(0))
        return step.lower(params, (tokens, tokens)).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(4096)
    assert long < 4.5 * short
    # A third of what one layer's probabilities take: float32 [heads, T, T].
    assert long < CONFIG.n_heads * 4096**2 * 4 / 3


def dense_formula(query, key, value, window=None, cap=None, scale=None, mask=None):
    """Return causal attention by loops over heads and queries, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mixed = np.zeros_like(query)
    for head in range(query.shape[1]):
        for t in range(len(query)):
            allowed = [s for s in range(len(key)) if s <= t and (window is None or s > t - window)]
            allowed = [s for s in allowed if mask is None or mask[t, s]]
            scores = scale * key[allowed, head // group] @ query[t, head]
            scores = scores if cap is None else cap * np.tanh(scores / cap)
            weights = np.exp(scores - scores.max())
            mixed[t, head] = (weights / weights.sum()) @ value[allowed, head // group]
    return mixed


RULES = [
    {"window": 1},
    {"window": 5, "cap": 2.0, "scale": 0.9},
    {"window": 40},
    {"cap": 0.5},
    {"scale": 1.3},
    {"window": 1000, "cap": 30.0},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_windows_caps_and_scales_are_those_of_the_formula(rule, kv_heads):
    qkv = arrays(70, 70, kv_heads=kv_heads)
    expected = dense_formula(*qkv, **rule)
    of = _attend.Rule(rule.get("window"), rule.get("cap"), rule.get("scale"))
    found = gf.layers.attend(*qkv, causal=True, window=of.window, score_cap=of.cap, scale=of.scale)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(ALL["blocks"](*qkv, None, 0, rule=of), expected, rtol=2e-5, atol=2e-6)
    if of.window:  # as only the compiled program knows it
        blocks = jax.jit(lambda window: ALL["blocks"](*qkv, None, 0, rule=of._replace(window=window)))
        np.testing.assert_allclose(blocks(of.window), expected, rtol=2e-5, atol=2e-6)


def test_a_window_and_a_mask_both_apply():
    qkv, mask = arrays(70, 70), np.array(masks(70, 70)["each"])
    mask[np.arange(70), np.arange(70)] = True
    expected = dense_formula(*qkv, window=7, mask=mask)
    rule = _attend.Rule(window=7)
    for form in ALL.values():
        np.testing.assert_allclose(
            form(*qkv, jnp.asarray(mask), 0, rule=rule), expected, rtol=2e-5, atol=2e-6
        )


@pytest.mark.parametrize("first", [0, 80, "traced"])
def test_gradients_of_windows_in_blocks_are_those_of_the_plain_form(first):
    qkv, rule = arrays(70, 150), _attend.Rule(9, 1.5, 0.7)

    def gradients(form, first):
        return jax.grad(lambda qkv: (ALL[form](*qkv, None, first, rule=rule) ** 3).sum())(qkv)

    if first == "traced":
        agree(jax.jit(functools.partial(gradients, "blocks"))(80), gradients("plain", 80), 1e-4)
    else:
        agree(gradients("blocks", first), gradients("plain", first), 1e-4)


def test_gradients_of_capped_scores_in_a_window_against_finite_differences():
    with jax.enable_x64(True):
        qkv = [np.asarray(x, np.float64) for x in arrays(6, 6, size=2)]
        options = {"window": 3, "cap": 0.8, "scale": 1.1}

        def f(*qkv):
            return (gf.layers.attend(*qkv, causal=True, window=3, score_cap=0.8, scale=1.1) ** 3).sum()

        found = jax.grad(f, (0, 1, 2))(*map(jnp.asarray, qkv))
        for i, gradient in enumerate(found):
            for index in [(0, 0, 0), (2, 1, 1), (5, 0, 1)]:
                ends = []
                for step in (1e-6, -1e-6):
                    moved = [x.copy() for x in qkv]
                    moved[i][index] += step
                    ends.append((dense_formula(*moved, **options) ** 3).sum())
                np.testing.assert_allclose(gradient[index], (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def test_blocks_do_not_compute_scores_outside_of_their_windows():
    qkv = arrays(512, 512)
    run = functools.partial(_attend.in_blocks, block=64)
    text = str(jax.make_jaxpr(lambda: run(*qkv, None, 0, rule=_attend.Rule(window=33)))())
    assert "f32[2,64,96]" in text
    assert "f32[2,64,512]" not in text


def test_windows_and_caps_that_make_no_sense_are_refused():
    qkv = arrays(3, 3)
    with pytest.raises(
        ValueError, match="window must be an integer >= 1 with causal=True, got 2, causal=False"
    ):
        gf.layers.attend(*qkv, window=2)
    with pytest.raises(ValueError, match="window must be an integer >= 1"):
        gf.layers.attention(4, 2, causal=True, window=0)
    with pytest.raises(ValueError, match="score_cap must be above 0, got -1"):
        gf.layers.attend(*qkv, score_cap=-1)
    with pytest.raises(ValueError, match="must be an even number, got 3"):
        gf.layers.attention(8, 2, rope_base=10.0, rope_fraction=0.75)
