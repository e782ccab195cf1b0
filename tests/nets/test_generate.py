"""Sampling follows the softmax of the logits in every dtype, and invalid prompts and options raise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

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
    with pytest.raises(FloatingPointError, match=r"logits after 1 tokens contain NaN\. gf\.nan_origin"):
        sample(jnp.zeros(N).at[3].set(jnp.nan), 5)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (
            [[1, 2], [3, 4]],
            ValueError,
            r"expected one prompt \[T\], got shape \[2, 2\].*for prompt in prompts",
        ),
        ([[1, 2], [3]], ValueError, "got 2 of different lengths"),
        ([np.array([1, 2]), np.array([3])], ValueError, "got 2 of different lengths"),
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
    for prompt in (3, (1, 2), np.uint16([1, 2]), jnp.array([[1, 2]]), [np.int64(4)], range(3)):
        assert gf.generate(net, {"logits": logits}, prompt, 2, temperature=0).tolist() == [7, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, "temperature must be finite and >= 0, got nan"),
        ({"temperature": float("inf")}, "temperature must be finite and >= 0, got inf"),
        ({"n": -1}, "n must be an integer >= 0, got -1"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        gf.generate(net, {"logits": jnp.zeros(N)}, **{"prompt": [1], "n": 1} | options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_initial_parameters_are_drawn_in_float32(dtype):
    shape = (500, 400)
    for init in (None, jax.nn.initializers.normal(20**-1)):
        narrow = gf.Param(shape, init, dtype).make(jax.random.key(0))
        assert narrow.dtype == dtype
        wide = gf.Param(shape, init).make(jax.random.key(0))
        np.testing.assert_array_equal(narrow, wide.astype(dtype))
    assert abs(np.asarray(narrow, np.float64).mean()) < 4 * 0.05 / 200_000**0.5
