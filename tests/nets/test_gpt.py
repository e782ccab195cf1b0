import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.nets.transformer import UNROLLED

SMALL = gf.GPTConfig(vocab=11, context=8, n_layers=2, n_heads=2, width=8)
LLAMA = dataclasses.replace(
    SMALL, positions="rope", norm="rms", feed="swiglu", n_kv_heads=1, hidden=12, bias=False, tied=False
)
TOKENS = jnp.array([3, 1, 4, 1, 5, 9, 2])


@functools.cache
def made(config):
    net = gf.gpt(config)
    params = jax.jit(net.init)(jax.random.key(0))
    # Larger weights than the initial ones, so that blocks matter.
    return net, jax.tree.map(lambda leaf: leaf * 5 if leaf.ndim > 1 else leaf, params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [SMALL, LLAMA, dataclasses.replace(SMALL, n_layers=UNROLLED + 1)], ids=["gpt2", "llama", "loop"]
)
def test_scan_and_remat_give_the_same_values(config):
    net, params = made(config)
    example = (TOKENS[:-1], TOKENS[1:])
    loss, grads = jax.jit(jax.value_and_grad(gf.next_token_loss(net)))(params, example)
    for changes in ({"scan": True}, {"remat": True}, {"scan": True, "remat": True}):
        other = gf.gpt(dataclasses.replace(config, **changes))
        scan = "scan" in changes
        other_params = gf.stack_blocks(params) if scan else params
        other_loss, other_grads = jax.jit(jax.value_and_grad(gf.next_token_loss(other)))(
            other_params, example
        )
        np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
        other_grads = gf.unstack_blocks(other_grads) if scan else other_grads
        chex.assert_trees_all_close(other_grads, grads, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_unstacking_inverts_stacking():
    _, params = made(SMALL)
    stacked = gf.stack_blocks(params)
    assert gf.shapes(stacked) == gf.shapes(gf.gpt(dataclasses.replace(SMALL, scan=True)).spec)
    chex.assert_trees_all_equal(gf.unstack_blocks(stacked), params)


@pytest.mark.parametrize(
    ("config", "scan"),
    [
        pytest.param(LLAMA, False, marks=pytest.mark.slow),
        pytest.param(SMALL, False, marks=pytest.mark.slow),
        pytest.param(SMALL, True, marks=pytest.mark.slow),
        pytest.param(LLAMA, True, marks=pytest.mark.slow),
    ],
)
def test_cached_steps_give_the_logits_of_the_whole_sequence(config, scan):
    net, params = made(dataclasses.replace(config, scan=scan))
    memory, parts, step = net.start(params), [], jax.jit(net.step)
    for tokens in (TOKENS[:3], TOKENS[3:6], TOKENS[6:]):  # two compiles: 3, 3 and 1
        logits, memory = step(params, tokens, memory)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts), jax.jit(net.apply)(params, TOKENS), atol=1e-5)


@pytest.mark.slow
def test_greedy_generation_equals_argmax_over_the_whole_sequence():
    net, params = made(LLAMA)
    tokens, apply = [3, 1], jax.jit(net.apply)
    for i in range(1, 7):
        padded = jnp.array(tokens + [0] * (8 - len(tokens)))  # causal: the padding has no effect
        tokens.append(int(apply(params, padded)[i].argmax()))
    np.testing.assert_array_equal(gf.generate(net, params, [3, 1], 6, temperature=0), tokens[2:])
    np.testing.assert_array_equal(gf.generate(net, params, [3, 1], 6, top_k=1, seed=5), tokens[2:])


@pytest.mark.slow
def test_generation_samples_the_softmax_reproducibly():
    net, params = made(SMALL)
    logits = net.apply(params, jnp.array([3]))[-1]
    samples = np.concatenate([gf.generate(net, params, [3], 1, seed=seed, top_k=4) for seed in range(200)])
    top = set(np.argsort(logits)[-4:].tolist())
    assert set(samples.tolist()) == top
    weights = np.exp(logits - logits.max()) * np.isin(np.arange(11), list(top))
    np.testing.assert_allclose(np.bincount(samples, minlength=11) / 200, weights / weights.sum(), atol=0.12)
    again = [gf.generate(net, params, [3], 5, seed=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(again[0], again[1])
    assert (again[0] != again[2]).any()


@pytest.mark.slow
def test_generation_past_the_context_restarts_from_its_later_half():
    net, params = made(SMALL)
    tokens = [3, 1, 4, 1, 5, 9]
    found = gf.generate(net, params, tokens, 9, temperature=0)
    assert len(found) == 9
    # The cache holds 8 tokens: six of the prompt and two generated ones. Then the last four are read again.
    read = [*tokens, *found[:3].tolist()]
    assert found[3] == net.apply(params, jnp.array(read[-4:]))[-1].argmax()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "expected one or more tokens, got none"),
        ({"prompt": [11]}, r"expected tokens in \[0, 11\), got 11"),
        ({"temperature": -1}, "temperature must be finite and >= 0, got -1"),
        ({"top_k": 12}, r"top_k must be in \[1, 11\], got 12"),
    ],
)
def test_generation_checks_its_arguments(changes, message):
    net, params = made(SMALL)
    with pytest.raises(ValueError, match=message):
        gf.generate(net, params, **{"prompt": [1], "n": 1} | changes)


def test_the_parameter_count_equals_gpt2():
    assert gf.count(gf.gpt(gf.GPTConfig()).spec) == 124_439_808
    tiny_llama = gf.GPTConfig(32000, 2048, 22, 32, 2048, 4, None, 5632, "rope", "rms", "swiglu", False, False)
    assert gf.count(gf.gpt(tiny_llama).spec) == 1_100_048_384


@pytest.mark.slow
def test_initial_weights_follow_gpt2():
    for scan in (False, True):
        config = gf.GPTConfig(vocab=50, context=64, n_layers=2, n_heads=2, width=64, scan=scan)
        params = jax.jit(gf.gpt(config).init)(jax.random.key(0))
        params = gf.unstack_blocks(params) if scan else params
        for W, width in (
            (params["embed"]["W"], 0.02),
            (params["positions"]["W"], 0.02),
            (params["blocks"]["1"]["attention"]["query"]["W"], 0.02),
            (params["blocks"]["1"]["attention"]["out"]["W"], 0.01),  # / sqrt(2 * 2 layers)
            (params["blocks"]["0"]["feed"]["down"]["W"], 0.01),
        ):
            np.testing.assert_allclose(W.std(), width, rtol=0.1)
        assert (params["blocks"]["0"]["feed"]["up"]["W"] != params["blocks"]["1"]["feed"]["up"]["W"]).all()


@pytest.mark.slow
def test_dropout_needs_a_key_and_is_the_same_scanned_or_unrolled():
    net, params = made(dataclasses.replace(SMALL, dropout=0.5))
    scanned = gf.gpt(dataclasses.replace(SMALL, dropout=0.5, scan=True))
    still = jax.jit(gf.gpt(SMALL).apply)(params, TOKENS)
    np.testing.assert_array_equal(jax.jit(net.apply)(params, TOKENS), still)
    noisy = jax.jit(net.apply)(params, TOKENS, key=jax.random.key(1))
    assert (noisy != still).all()
    also = jax.jit(scanned.apply)(gf.stack_blocks(params), TOKENS, key=jax.random.key(1))
    np.testing.assert_allclose(also, noisy, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_it_computes_in_bfloat16_with_float32_parameters():
    net, params = made(SMALL)
    rough = gf.gpt(dataclasses.replace(SMALL, compute="bfloat16"))
    assert "bf16" in str(jax.make_jaxpr(rough.apply)(params, TOKENS))
    logits = jax.jit(rough.apply)(params, TOKENS)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, jax.jit(net.apply)(params, TOKENS), atol=0.1)
    grads = jax.jit(jax.grad(gf.next_token_loss(rough)))(params, (TOKENS[:-1], TOKENS[1:]))
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert len(gf.generate(rough, params, [1], 3)) == 3


def test_the_scanned_program_does_not_grow_with_depth():
    def size(n_layers):
        net = gf.gpt(dataclasses.replace(SMALL, n_layers=n_layers, scan=True))
        grad = jax.grad(gf.next_token_loss(net))
        return len(
            str(jax.make_jaxpr(grad)(jax.tree.map(lambda p: jnp.zeros(p.shape), net.spec), (TOKENS, TOKENS)))
        )

    assert size(24) < 1.02 * size(UNROLLED + 1)


def test_a_few_scanned_blocks_compile_without_a_loop():
    def compiled(config):
        net = gf.gpt(config)
        params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), net.spec)
        return jax.jit(jax.grad(gf.next_token_loss(net))).lower(params, (TOKENS, TOKENS)).compile().as_text()

    def products(text):
        return text.count(" dot(")

    def loops(text):
        return text.count(" while(")

    unrolled, scanned = (compiled(dataclasses.replace(SMALL, scan=scan)) for scan in (False, True))
    assert loops(scanned) == loops(unrolled)  # XLA may make loops of other operations
    assert products(scanned) == products(unrolled)
    assert loops(compiled(dataclasses.replace(SMALL, scan=True, n_layers=UNROLLED + 1))) > loops(unrolled)
    assert loops(compiled(dataclasses.replace(SMALL, scan=True, remat=True))) > loops(unrolled)


def test_inspection_names_all_values_of_all_blocks():
    parts = ["attention_norm", "attention/queries", "attention/probabilities", "attention/mixed"]
    parts += ["attention_out", "residual_mid", "feed_norm", "feed/hidden", "feed_out", "residual"]
    net, params = made(SMALL)
    names = gf.sites(net.apply)(params, TOKENS).names
    assert {f"blocks/{i}/{part}" for i in range(2) for part in parts} <= set(names)
    assert {"embedded", "final_norm", "logits"} <= set(names)
    scanned = gf.gpt(dataclasses.replace(SMALL, scan=True))
    listed = {site.name: site for site in gf.sites(scanned.apply)(gf.stack_blocks(params), TOKENS)}
    for part in parts:
        name = part.split("/")[-1] if part.split("/")[-1] in listed else f"blocks/{part}"
        assert listed[name].axes == (2,)


def test_wrong_tokens_and_configs_raise():
    net, params = made(SMALL)
    with pytest.raises(ValueError, match=r"T <= 8, got shape \[9\]"):
        net.apply(params, jnp.zeros(9, jnp.int32))
    with pytest.raises(ValueError, match=r"got shape \[2, 3\]\. For a batch: jax.vmap"):
        net.apply(params, jnp.zeros([2, 3], jnp.int32))
    with pytest.raises(ValueError, match="positions must be one of learned, sinusoidal, rope; got 'rotary'"):
        gf.GPTConfig(positions="rotary")
    with pytest.raises(ValueError, match="n_layers must be an integer >= 1, got 0"):
        gf.GPTConfig(n_layers=0)


def test_the_loss_of_a_sequence_is_the_mean_over_its_counted_tokens():
    logits = np.random.default_rng(0).normal(size=[4, 5]).astype(np.float32)
    targets = np.array([2, -1, 0, -1])
    net = gf.Net({}, lambda params, tokens: jnp.asarray(logits))
    found = gf.next_token_loss(net)({}, (TOKENS[:4], targets))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found, -(np.log(p[0, 2]) + np.log(p[2, 0])) / 2, rtol=1e-5)
    assert gf.next_token_loss(net)({}, (TOKENS[:4], np.full(4, -1))) == 0
