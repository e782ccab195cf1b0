"""Sampling follows the softmax of the logits that are kept, for one prompt and for several."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.nets._generate import _next, _next_of_all, _read, _replaced
from gradfn.nets._sampling import filtered, sampling_rule

N = 2000


def constant(n=N):
    """Return a language model whose logits are its parameters, whatever the tokens."""
    spec = {"logits": gf.Param([n])}

    def apply(params, tokens):
        return jnp.broadcast_to(params["logits"][None], (len(tokens), n))

    return gf.LanguageModel(
        spec, apply, lambda params: (), lambda params, tokens, memory: (apply(params, tokens), ())
    )


net = constant()


def sample(logits, n, **options):
    return gf.generate(net, {"logits": logits}, [0], n, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_equal_tokens_are_equally_likely_in_every_dtype(dtype):
    tokens = sample(jnp.zeros(N, dtype), 1000)
    error = 577.35 / 1000**0.5  # standard error of the mean of 1,000 uniform samples from 2,000
    assert abs(tokens.mean() - 999.5) < 4 * error
    assert abs(tokens.std() - 577.35) < 40
    assert len(set(tokens.tolist())) > 700  # the expectation is 787


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("temperature", [0.7, np.float64(1.5), jnp.bfloat16(3)])
def test_samples_follow_the_softmax(dtype, temperature):
    few = jnp.asarray([0.0, 1.0, 2.0, -1.0], dtype)
    logits = jnp.full(N, -np.inf, dtype).at[jnp.array([5, 900, 1500, 1999])].set(few)
    p = np.exp(np.asarray(few, np.float64) / float(temperature))
    p /= p.sum()
    tokens = sample(logits, 600, temperature=temperature)
    found = [(tokens == i).mean() for i in (5, 900, 1500, 1999)]
    np.testing.assert_allclose(found, p, atol=4 * 0.5 / 600**0.5)


def test_top_k_keeps_k_tokens_of_equal_logits():
    logits = jnp.zeros(N, jnp.bfloat16).at[1000].set(1.0)
    assert set(sample(logits, 100, top_k=3).tolist()) == {0, 1, 1000}
    assert set(sample(logits, 20, top_k=1).tolist()) == {1000}
    assert set(sample(jnp.zeros(N), 20, top_k=1).tolist()) == {0}


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 0])
def test_a_small_temperature_takes_the_most_likely_token(temperature):
    logits = jnp.linspace(-3.0, 3.0, N).at[7].set(3.5)
    assert set(sample(logits, 20, temperature=temperature).tolist()) == {7}


def test_nan_logits_raise():
    for wrong in (jnp.zeros(N).at[3].set(jnp.nan), jnp.zeros(N).at[3].set(jnp.inf), jnp.full(N, -jnp.inf)):
        with pytest.raises(FloatingPointError, match="largest of the logits after 1 tokens is not finite"):
            sample(wrong, 5)
    with pytest.raises(FloatingPointError, match="after 1 tokens of prompt 0 is not finite"):
        gf.generate(net, {"logits": jnp.zeros(N).at[3].set(jnp.nan)}, [[0], [0, 1]], 1, stop=0)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (
            np.ones([2, 2], int),
            ValueError,
            r"a prompt \[T\] or a list of prompts, got shape \[2, 2\].*list\(prompts\)",
        ),
        ([[1, 2], [[3]]], ValueError, r"prompt 1: expected a prompt \[T\].*got shape \[1, 1\]"),
        ([[1, 2], []], ValueError, "one or more tokens in prompt 1, got none"),
        ([[1, 2], [3, N]], ValueError, rf"tokens in \[0, {N}\) in prompt 1, got {N}"),
        ([3, -1], ValueError, rf"tokens in \[0, {N}\), got -1"),
        ([[1], "be"], TypeError, r"prompt 1: expected tokens, got text"),
        ([1.7, 2.2], TypeError, r"tokens must be integers, got float64\. Cast"),
        (jnp.ones(3), TypeError, "tokens must be integers, got float32"),
        ([True, False], TypeError, "tokens must be integers, got bool"),
        ("to be", TypeError, r"expected tokens, got text\. Pass tokenizer\.encode"),
        (["to", "be"], TypeError, "got text"),
        (b"to be", TypeError, "got text"),
        ([], ValueError, "expected one or more tokens"),
        ([1, None], TypeError, "must be integers, got object"),
    ],
)
def test_invalid_prompts_raise(prompt, error, message):
    with pytest.raises(error, match=message):
        gf.generate(net, {"logits": jnp.zeros(N)}, prompt, 1)


def test_a_prompt_may_be_any_sequence_of_integers():
    logits = jnp.zeros(N).at[7].set(1.0)
    for prompt in (3, (1, 2), np.uint16([1, 2]), jnp.array([1, 2]), [np.int64(4)], range(3)):
        assert gf.generate(net, {"logits": logits}, prompt, 2, temperature=0).tolist() == [7, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, "temperature must be finite and >= 0, got nan"),
        ({"temperature": float("inf")}, "temperature must be finite and >= 0, got inf"),
        ({"n": -1}, "n must be an integer >= 0, got -1"),
        ({"top_k": 0}, rf"top_k must be in \[1, {N}\], got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": float("nan")}, r"top_p must be in \(0, 1\], got nan"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
        ({"stop": [3, N]}, rf"stop: expected tokens in \[0, {N}\), got {N}"),
    ],
)
def test_invalid_options_raise(options, message):
    for prompt in ([1], [[1], [2]]):
        with pytest.raises(ValueError, match=message):
            gf.generate(net, {"logits": jnp.zeros(N)}, **{"prompt": prompt, "n": 1} | options)


def kept(logits, **options):
    """Return the tokens that are sampled from, and their probabilities."""
    scaled = filtered(jnp.asarray(logits), *sampling_rule(len(logits), **options))
    return np.flatnonzero(np.isfinite(scaled)).tolist(), np.asarray(jax.nn.softmax(scaled))


def test_the_tokens_that_are_kept():
    p = np.array([0.1, 0.4, 0.02, 0.3, 0.18])
    logits = jnp.log(jnp.asarray(p))
    for options, expected in [
        ({"top_k": 2}, [1, 3]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"top_p": 1e-6}, [1]),
        ({"top_p": 1.0, "min_p": 0.0}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.24}, [0, 1, 3, 4]),
        ({"min_p": 0.26}, [1, 3, 4]),
        ({"min_p": 1.0}, [1]),
        # of what top_k leaves, 0.4 is more than half
        ({"top_k": 2, "top_p": 0.5}, [1]),
        # squared probabilities
        ({"temperature": 0.5, "top_p": 0.8}, [1, 3]),
        ({"temperature": 0.5, "min_p": 0.25}, [1, 3]),
    ]:
        tokens, probabilities = kept(logits, **options)
        assert tokens == expected, options
        q = np.where(np.isin(np.arange(5), expected), p, 0) ** (1 / options.get("temperature", 1.0))
        np.testing.assert_allclose(probabilities, q / q.sum(), rtol=1e-5)
    # Equal probabilities: the first ones are kept.
    assert kept(jnp.zeros(8), top_p=0.5)[0] == [0, 1, 2, 3]
    assert kept(jnp.zeros(8), min_p=1.0)[0] == [*range(8)]


def test_the_tokens_that_are_kept_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers").generation.logits_process
    random = np.random.default_rng(0)
    for i in range(200):
        logits = random.normal(scale=random.uniform(0.1, 5), size=[1, 60]).astype(np.float32)
        options = {
            "temperature": random.uniform(0.2, 3),
            "top_k": int(random.integers(1, 61)),
            "top_p": random.uniform(0.01, 1),
            "min_p": random.uniform(0, 1),
        }
        options = {name: options[name] for name in options if random.random() < 0.6}
        scores = torch.tensor(logits)
        for name, kind in [
            ("temperature", "Temperature"),
            ("top_k", "TopK"),
            ("top_p", "TopP"),
            ("min_p", "MinP"),
        ]:
            if name in options:
                scores = getattr(warpers, f"{kind}LogitsWarper")(options[name])(None, scores)
        expected = torch.softmax(scores, -1)[0].numpy()
        tokens, probabilities = kept(logits[0], **options)
        assert tokens == np.flatnonzero(np.isfinite(scores[0].numpy())).tolist(), (i, options)
        np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-7)


def test_samples_are_those_that_are_kept():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.02, 0.3, 0.18]))
    few, params = constant(5), {"logits": logits}
    for options, expected in [({"top_p": 0.71}, {1, 3, 4}), ({"min_p": 0.24}, {0, 1, 3, 4})]:
        tokens = gf.generate(few, params, [[0]] * 100, 2, **options)
        assert set(np.concatenate(tokens).tolist()) == expected
    assert set(gf.generate(few, params, [0], 9, temperature=0, top_p=0.1, min_p=0.9).tolist()) == {1}


# Several prompts

CONFIG = gf.GPTConfig(vocab=17, context=12, n_layers=2, n_heads=2, width=8, positions="rope")
MODELS = {
    "gpt": gf.gpt(CONFIG),
    "scanned": gf.gpt(dataclasses.replace(CONFIG, scan=True, positions="learned")),
    # Its rotations depend on the length so far, so that parts of a prompt do not give the values of the whole.
    "dynamic": gf.gpt(dataclasses.replace(CONFIG, rope_scaling=gf.RopeScaling("dynamic", 4.0, 2))),
    "rnn": gf.rnn(17, 8, "lstm", 2),
}
PROMPTS = [[3, 1, 4], [1], np.arange(16)]


@pytest.mark.parametrize("kind", MODELS)
def test_several_prompts_are_continued_as_each_on_its_own(kind):
    model = MODELS[kind]
    # Larger than at initialization, where every position has almost the same logits.
    params = jax.tree.map(lambda p: 5 * p, model.init(jax.random.key(0)))
    # Past the context, at different steps.
    together = gf.generate(model, params, PROMPTS, 15, seed=7, top_p=0.95)
    alone = [gf.generate(model, params, PROMPTS[i], 15, seed=7 + i, top_p=0.95) for i in range(len(PROMPTS))]
    assert [tokens.dtype for tokens in together] == [np.int32] * len(PROMPTS)
    np.testing.assert_array_equal(together, alone)
    assert len({tuple(tokens.tolist()) for tokens in alone}) == len(PROMPTS)
    # A continuation ends after its own stop token; the others continue.
    stop = {int(together[0][3]), int(together[2][0])}
    stopped = gf.generate(model, params, PROMPTS, 15, seed=7, top_p=0.95, stop=stop)
    for tokens, whole in zip(stopped, together):
        ends = np.flatnonzero(np.isin(whole, [*stop]))
        np.testing.assert_array_equal(tokens, whole[: ends[0] + 1] if len(ends) else whole)
    one = gf.generate(model, params, PROMPTS[0], 15, seed=7, top_p=0.95, stop=int(together[0][3]))
    np.testing.assert_array_equal(one, stopped[0][: len(one)])
    assert one[-1] == together[0][3]


def test_no_program_is_compiled_again_for_other_numbers_prompts_or_lengths():
    model = MODELS["gpt"]
    params = model.init(jax.random.key(0))
    gf.generate(model, params, [[1], [*range(12)]], 2, top_p=0.5)
    gf.generate(model, params, [1], 2, top_p=0.5)
    sizes = [f._cache_size() for f in (_next, _next_of_all, _read, _replaced)]
    gf.generate(
        model, params, [[3, 4, 5], [*range(10)]], 14, top_p=0.7, min_p=0.1, temperature=0.5, seed=3, stop=2
    )
    gf.generate(model, params, [2], 3, top_p=0.6, min_p=0.2, temperature=0)
    assert [f._cache_size() for f in (_next, _next_of_all, _read, _replaced)] == sizes


def test_no_tokens_and_a_context_of_one():
    model = gf.gpt(dataclasses.replace(CONFIG, context=1))
    params = model.init(jax.random.key(0))
    assert [len(tokens) for tokens in gf.generate(model, params, [[1], [2, 3]], 0)] == [0, 0]
    assert len(gf.generate(model, params, [1], 0)) == 0
    np.testing.assert_array_equal(
        gf.generate(model, params, [[1], [2, 3]], 3),
        [gf.generate(model, params, [1], 3), gf.generate(model, params, [2, 3], 3, seed=1)],
    )


def test_what_takes_one_prompt_refuses_several():
    params = {"logits": jnp.zeros(N)}
    with pytest.raises(ValueError, match=r"capture records one prompt, got 2\. Pass them one at a time"):
        gf.generate(net, params, [[1], [2]], 1, capture="logits")
    with pytest.raises(ValueError, match=r"one prompt \[T\], got 2\. gf\.generate continues several"):
        gf.stream(net, params, [[1], [2]], 1)
    for stop in ("\n", [".", "!"], b"x"):
        with pytest.raises(TypeError, match=r"stop must be tokens, got text.*gf\.data\.stop_at"):
            gf.generate(net, params, [1], 1, stop=stop)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_initial_parameters_are_drawn_in_float32(dtype):
    shape = (500, 400)
    for init in (None, jax.nn.initializers.normal(20**-1)):
        narrow = gf.Param(shape, init, dtype).make(jax.random.key(0))
        assert narrow.dtype == dtype
        wide = gf.Param(shape, init).make(jax.random.key(0))
        np.testing.assert_array_equal(narrow, wide.astype(dtype))
    assert abs(np.asarray(narrow, np.float64).mean()) < 4 * 0.05 / 200_000**0.5
