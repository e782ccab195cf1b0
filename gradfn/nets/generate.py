"""Text out of a language model: token by token, each step remembering what came before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradfn.net import Net
from gradfn.params import Params, check


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
        prompt: one token or more.
        n: how many tokens to make.
        temperature: logits are divided by it; 0 always takes the likeliest token.
        top_k: draw from the `top_k` likeliest tokens only.
        seed: the same seed draws the same tokens.

    Raises:
        ParameterError: parameters of other shapes.
        ValueError: an empty prompt, a token that the net does not have, a negative temperature, a `top_k` that
            is not in [1, vocab].

    >>> import jax, gradfn as gf
    >>> net = gf.gpt(gf.GPTConfig(vocab=65, context=8, n_layers=1, n_heads=2, width=4))
    >>> [token] = gf.stream(net, net.init(jax.random.key(0)), [1, 2, 3], 1, temperature=0)
    >>> 0 <= token < 65
    True
    """
    check(net.spec, params)
    seen = [int(token) for token in np.asarray(prompt).reshape(-1)]
    vocab = jax.eval_shape(net.apply, net.spec, jax.ShapeDtypeStruct((1,), jnp.int32)).shape[-1]
    if not seen or min(seen) < 0 or max(seen) >= vocab:
        raise ValueError(f"generate: a prompt is one token or more in [0, {vocab}), came {seen[:20]}")
    if temperature < 0:
        raise ValueError(f"generate: temperature is 0 or more, came {temperature}")
    if top_k is not None and not 1 <= top_k <= vocab:
        raise ValueError(f"generate: top_k is in [1, {vocab}], came {top_k}")
    return _stream(net, params, seen, n, temperature, top_k, jax.random.key(seed))


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
    last = logits[-1]  # [vocab]
    if top_k is not None:
        last = jnp.where(last < jax.lax.top_k(last, top_k)[0][-1], -jnp.inf, last)
    drawn = jax.random.categorical(key, last / jnp.where(temperature > 0, temperature, 1))
    return jnp.where(temperature > 0, drawn, last.argmax()), memory
