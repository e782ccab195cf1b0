"""Text out of a language model: token by token, each step remembering what came before."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradfn.core.net import Net
from gradfn.core.params import Params, check
from gradfn.core.precision import widen

_EACH = "Continue each one on its own: [gf.generate(net, params, prompt, n) for prompt in prompts]"


@dataclass(frozen=True, eq=False)
class LanguageModel(Net):
    """A net of a sequence of tokens that can also go on from where it was.

    Args:
        spec: as in `gf.Net`.
        apply: tokens `[T]` -> logits `[T, vocab]`.
        start: `params -> memory`, of nothing yet.
        step: `(params, tokens [T], memory) -> (logits [T, vocab], memory)`: as `apply` to all tokens so far,
            of which it answers for the new ones.
        context: how many tokens a memory holds; None for any number.
    """

    start: Callable[[Params], Any]
    step: Callable[..., Any]
    context: int | None = None


def generate(
    net: LanguageModel,
    params: Params,
    prompt: Sequence[int] | np.ndarray | jax.Array,
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Return `n` tokens that go on from a prompt, all at once: see `gf.stream`.

    >>> import jax, gradfn as gf
    >>> net = gf.gpt(gf.GPTConfig(vocab=65, context=8, n_layers=1, n_heads=2, width=4))
    >>> gf.generate(net, net.init(jax.random.key(0)), [1, 2, 3], 4, top_k=1).shape
    (4,)
    """
    tokens = stream(net, params, prompt, n, temperature=temperature, top_k=top_k, seed=seed)
    return np.fromiter(tokens, np.int32, n)


def stream(
    net: LanguageModel,
    params: Params,
    prompt: Sequence[int] | np.ndarray | jax.Array,
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yield `n` tokens that go on from a prompt, one by one.

    Each step costs one token, as what came before is remembered. Where that would not fit the net's context
    any more, the later half of it is read again and the rest forgotten.

    Args:
        net: from `gf.gpt` or `gf.rnn`.
        params: its parameters.
        prompt: one token or more, integers `[T]`: one prompt, of several each is continued in a call of its own.
        n: how many tokens to make.
        temperature: logits are divided by it, in float32 at least; 0 always takes the likeliest token.
        top_k: draw from the `top_k` likeliest tokens only, of equally likely ones from those that come first.
        seed: the same seed draws the same tokens.

    Raises:
        ParameterError: parameters of other shapes.
        ValueError: an empty prompt, several prompts, a token that the net does not have, a temperature that is
            negative or not finite, a `top_k` that is not in [1, vocab].
        TypeError: a prompt that is text or not integers.
        FloatingPointError: a logit is NaN.

    >>> import jax, gradfn as gf
    >>> net = gf.gpt(gf.GPTConfig(vocab=65, context=8, n_layers=1, n_heads=2, width=4))
    >>> [token] = gf.stream(net, net.init(jax.random.key(0)), [1, 2, 3], 1, temperature=0)
    >>> 0 <= token < 65
    True
    """
    check(net.spec, params)
    seen = _tokens_of(prompt)
    vocab = jax.eval_shape(net.apply, net.spec, jax.ShapeDtypeStruct((1,), jnp.int32)).shape[-1]
    if not seen or min(seen) < 0 or max(seen) >= vocab:
        raise ValueError(f"generate: a prompt is one token or more in [0, {vocab}), came {seen[:20]}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature is 0 or more, came {temperature}")
    if top_k is not None and not 1 <= top_k <= vocab:
        raise ValueError(f"generate: top_k is in [1, {vocab}], came {top_k}")
    if (n := operator.index(n)) < 0:
        raise ValueError(f"generate: n must be an integer >= 0, got {n}")
    return _stream(net, params, seen, n, float(temperature), top_k, jax.random.key(seed))


def _tokens_of(prompt: Any) -> list[int]:
    """Return a prompt's tokens, or raise an error that says what a prompt is."""
    lengths = [np.size(part) for part in prompt if np.ndim(part)] if isinstance(prompt, (list, tuple)) else []
    if len(set(lengths)) > 1:
        raise ValueError(
            f"generate: expected one prompt [T], got {len(lengths):,} of different lengths. {_EACH}"
        )
    tokens = np.asarray(prompt)
    if tokens.dtype.kind in "US":
        raise TypeError("generate: a prompt is tokens, got text. Pass tokenizer.encode(text)")
    if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(
            f"generate: tokens must be integers, got {tokens.dtype}. Cast them: tokens.astype(int)"
        )
    if tokens.ndim > 1 and tokens.size != tokens.shape[-1]:
        raise ValueError(f"generate: expected one prompt [T], got shape {list(tokens.shape)}. {_EACH}")
    return [int(token) for token in tokens.reshape(-1)]


def _stream(
    net: LanguageModel,
    params: Params,
    seen: list[int],
    n: int,
    temperature: float,
    top_k: int | None,
    key: jax.Array,
) -> Iterator[int]:
    context = net.context or len(seen) + n
    new, memory, held = seen[-context:], net.start(params), 0  # tokens to read, and how many the memory holds
    for i in range(n):
        if held + len(new) > context:
            new, memory, held = seen[-max(context // 2, 1) :], net.start(params), 0
        key_i = jax.random.fold_in(key, i)
        token, memory = _next(net.step, top_k, params, np.asarray(new, np.int32), memory, temperature, key_i)
        held += len(new)
        new = [int(token)]
        if new[0] < 0:
            raise FloatingPointError(
                f"generate: the logits after {len(seen):,} tokens contain NaN. gf.nan_origin finds where it began"
            )
        seen.append(new[0])
        yield new[0]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
def _next(
    step: Callable[..., Any],
    top_k: int | None,
    params: Params,
    tokens: jax.Array,
    memory: Any,
    temperature: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, Any]:
    """Read tokens, and draw the next one."""
    logits, memory = step(params, tokens, memory)
    # Noise and temperature need more digits than narrow logits have: of 2,000 equal ones the first would win.
    last = widen(logits[-1])  # [vocab]
    if top_k is not None:
        # By number and not by value, of which several tokens may have the same.
        kept = jnp.zeros(last.shape, bool).at[jax.lax.top_k(last, top_k)[1]].set(True)
        last = jnp.where(kept, last, -jnp.inf)
    # Below the largest, so that a small temperature overflows to -inf alone.
    scaled = (last - last.max()) / jnp.where(temperature > 0, temperature, 1).astype(last.dtype)
    drawn = jnp.where(temperature > 0, jax.random.categorical(key, scaled), last.argmax())
    return jnp.where(jnp.isnan(logits[-1]).any(), -1, drawn), memory
