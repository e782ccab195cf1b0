"""Generation with a language model: token by token, with a cache of earlier tokens."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradfn.core.net import Net
from gradfn.core.params import Params, check
from gradfn.core.precision import widen
from gradfn.inspection import Capture
from gradfn.inspection import capture as record

Transform = Callable[[Callable], Callable[..., Capture]]
# A function of the step, its further arguments, and its keyword arguments: `functools.partial` does not compare.
_Applied = tuple[Callable, tuple[Hashable, ...], tuple[tuple[str, Hashable], ...]]

_EACH = "Continue each one on its own: [gf.generate(net, params, prompt, n) for prompt in prompts]"


@dataclass(frozen=True, eq=False)
class LanguageModel(Net):
    """A net of a sequence of tokens that can also continue a sequence from a cached state.

    Args:
        spec: as in `gf.Net`.
        apply: tokens `[T]` -> logits `[T, vocab_size]`.
        start: `params -> state`, the state before the first token.
        step: `(params, tokens [T], state) -> (logits [T, vocab_size], state)`: equals `apply` to all tokens so far,
            but returns the logits of the new ones only.
        context: the number of tokens that a state can hold; None for no limit.
        hidden: `(params, tokens) -> [T, width]`, with `key=` like `apply`: what the head reads; None without a head.
        head: `(params, hidden [T, width]) -> logits [T, vocab_size]`, the rest of `apply`.
        description: as in `gf.Net`.
    """

    start: Callable[[Params], Any]
    step: Callable
    context: int | None = None
    hidden: Callable | None = None
    head: Callable | None = None


@overload
def generate(
    net: LanguageModel,
    params: Params,
    prompt: Sequence[int] | np.ndarray | jax.Array,
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    capture: None = None,
) -> np.ndarray: ...


@overload
def generate(
    net: LanguageModel,
    params: Params,
    prompt: Sequence[int] | np.ndarray | jax.Array,
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    capture: str | Sequence[str] | Transform,
) -> tuple[np.ndarray, list[Capture]]: ...


def generate(
    net: LanguageModel,
    params: Params,
    prompt: Sequence[int] | np.ndarray | jax.Array,
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    capture: str | Sequence[str] | Transform | None = None,
) -> np.ndarray | tuple[np.ndarray, list[Capture]]:
    """Return `n` tokens that continue a prompt: see `gf.stream`. With `capture`, also a list of `n` captures.

    >>> import jax, gradfn as gf
    >>> net = gf.gpt(gf.GPTConfig(vocab=65, context=8, n_layers=1, n_heads=2, width=4))
    >>> gf.generate(net, net.init(jax.random.key(0)), [1, 2, 3], 4, top_k=1).shape
    (4,)
    """
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "seed": seed}
    if capture is None:
        return np.fromiter(stream(net, params, prompt, n, **options), np.int32, n)
    pairs = list(stream(net, params, prompt, n, **options, capture=capture))
    return np.fromiter((token for token, _ in pairs), np.int32, n), [captured for _, captured in pairs]


@overload
def stream(
    net: LanguageModel,
    params: Params,
    prompt: Sequence[int] | np.ndarray | jax.Array,
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    capture: None = None,
) -> Iterator[int]: ...


@overload
def stream(
    net: LanguageModel,
    params: Params,
    prompt: Sequence[int] | np.ndarray | jax.Array,
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    capture: str | Sequence[str] | Transform,
) -> Iterator[tuple[int, Capture]]: ...


def stream(
    net: LanguageModel,
    params: Params,
    prompt: Sequence[int] | np.ndarray | jax.Array,
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    capture: str | Sequence[str] | Transform | None = None,
) -> Iterator[int] | Iterator[tuple[int, Capture]]:
    """Yield `n` tokens that continue a prompt, one at a time.

    Earlier tokens are cached, so each step computes one token only. When the context is full, generation continues
    from the later half of it.

    Args:
        net: from `gf.gpt` or `gf.rnn`.
        params: its parameters.
        prompt: integers `[T]`, T >= 1. Several prompts need one call each.
        n: the number of tokens to generate.
        temperature: divides the logits, in float32 or wider; 0 always takes the most likely token.
        top_k: sample from the `top_k` most likely tokens only; ties go to the smaller index.
        seed: the same seed gives the same tokens.
        capture: what to record of each step: the names or globs of sites of `gf.sites(net.apply)`, whose values are
            kept, or a transform such as `functools.partial(gf.capture, stats=("rms",))`. The stream then yields
            pairs of a token and the `Capture` of the step that it was sampled from, whose `output` are the logits.
            The first step reads the prompt, `[T, ...]`, each further one a single token, `[1, ...]`, until the
            context is full. The last axis of probabilities is as long as the context; later positions have the
            probability 0. Recording is part of the compiled step, whose logits may then differ by rounding.

    Raises:
        ParameterError: parameters of other shapes.
        ValueError: an empty prompt, several prompts, a token outside the vocabulary, a temperature that is
            negative or not finite, a `top_k` outside [1, vocab_size], a site that the step does not have.
        TypeError: a prompt that is text or not integers, or a transform that returns no `Capture`.
        FloatingPointError: a logit is NaN.

    >>> import jax, gradfn as gf
    >>> net = gf.gpt(gf.GPTConfig(vocab=65, context=8, n_layers=1, n_heads=2, width=4))
    >>> [token] = gf.stream(net, net.init(jax.random.key(0)), [1, 2, 3], 1, temperature=0)
    >>> 0 <= token < 65
    True
    >>> for token, captured in gf.stream(net, net.init(jax.random.key(0)), [1, 2, 3], 2, capture="probabilities"):
    ...     print(captured["probabilities"].value.shape)
    (2, 3, 8)
    (2, 1, 8)
    """
    check(net.spec, params)
    tokens = _tokens_of(prompt)
    vocab_size = jax.eval_shape(net.apply, net.spec, jax.ShapeDtypeStruct((1,), jnp.int32)).shape[-1]
    if not tokens or min(tokens) < 0 or max(tokens) >= vocab_size:
        raise ValueError(f"generate: expected one or more tokens in [0, {vocab_size}), got {tokens[:20]}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature must be finite and >= 0, got {temperature}")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"generate: top_k must be in [1, {vocab_size}], got {top_k}")
    if (n := operator.index(n)) < 0:
        raise ValueError(f"generate: n must be an integer >= 0, got {n}")
    applied = None if capture is None else _applied(net, params, tokens, capture)
    return _stream(net, params, tokens, n, float(temperature), top_k, applied, jax.random.key(seed))


def _applied(
    net: LanguageModel, params: Params, tokens: list[int], capture: str | Sequence[str] | Transform
) -> _Applied:
    """Return what records a step in a form that can be compared, so that it is compiled once.

    Raises:
        ValueError: a site that the step does not have.
        TypeError: a transform that returns no `Capture`.
    """
    applied: Any
    if not callable(capture):
        names = (capture,) if isinstance(capture, str) else tuple(capture)
        applied = (record, (), (("keep", names), ("sites", names)))
    elif isinstance(capture, functools.partial):
        keywords = {k: tuple(v) if isinstance(v, list) else v for k, v in capture.keywords.items()}
        applied = (capture.func, capture.args, tuple(sorted(keywords.items())))
    else:
        applied = (capture, (), ())
    try:
        hash(applied)
    except TypeError:
        applied = (capture, (), ())
    state = jax.eval_shape(net.start, params)
    prompt = jax.ShapeDtypeStruct((min(len(tokens), net.context or len(tokens)),), jnp.int32)
    captured = jax.eval_shape(_recording(applied, net.step), params, prompt, state)
    if not isinstance(captured, Capture):
        raise TypeError(
            "generate: capture must be names of sites or a transform that returns a gf.Capture, such as "
            f"functools.partial(gf.capture, keep='logits'); got one that returns a {type(captured).__name__}"
        )
    return applied


def _recording(applied: _Applied, step: Callable) -> Callable:
    transform, args, keywords = applied
    return transform(step, *args, **dict(keywords))


def _tokens_of(prompt: PyTree) -> list[int]:
    """Return the tokens of a prompt, or raise an error if it is not a sequence of integers."""
    lengths = [np.size(part) for part in prompt if np.ndim(part)] if isinstance(prompt, (list, tuple)) else []
    if len(set(lengths)) > 1:
        raise ValueError(
            f"generate: expected one prompt [T], got {len(lengths):,} of different lengths. {_EACH}"
        )
    tokens = np.asarray(prompt)
    if tokens.dtype.kind in "US":
        raise TypeError("generate: expected tokens, got text. Pass tokenizer.encode(text)")
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
    tokens: list[int],
    n: int,
    temperature: float,
    top_k: int | None,
    applied: _Applied | None,
    key: jax.Array,
) -> Iterator[Any]:
    context = net.context or len(tokens) + n
    new, state, cached = tokens[-context:], net.start(params), 0
    for i in range(n):
        if cached + len(new) > context:
            new, state, cached = tokens[-max(context // 2, 1) :], net.start(params), 0
        key_i = jax.random.fold_in(key, i)
        read = np.asarray(new, np.int32)
        token, state, captured = _next(net.step, top_k, applied, params, read, state, temperature, key_i)
        cached += len(new)
        new = [int(token)]
        if new[0] < 0:
            raise FloatingPointError(
                f"generate: the logits after {len(tokens):,} tokens contain NaN. gf.nan_origin finds its origin"
            )
        tokens.append(new[0])
        yield new[0] if applied is None else (new[0], captured)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(5,))
def _next(
    step: Callable,
    top_k: int | None,
    applied: _Applied | None,
    params: Params,
    tokens: jax.Array,
    state: PyTree,
    temperature: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, PyTree, Capture | None]:
    """Read tokens and sample the next one, -1 if a logit is NaN; also return what is recorded of the step."""
    captured = None
    if applied is None:
        logits, state = step(params, tokens, state)
    else:
        captured = _recording(applied, step)(params, tokens, state)
        logits, state = captured.output
        # The state is donated to the next step.
        captured = replace(captured, output=logits)
    # Gumbel noise in bfloat16 is too coarse: of 2,000 equal logits the first would win.
    last = widen(logits[-1])  # [vocab_size]
    if top_k is not None:
        # By index, because several tokens may have equal logits.
        kept = jnp.zeros(last.shape, bool).at[jax.lax.top_k(last, top_k)[1]].set(True)
        last = jnp.where(kept, last, -jnp.inf)
    # Subtract the maximum, so that a small temperature can overflow to -inf only.
    scaled = (last - last.max()) / jnp.where(temperature > 0, temperature, 1).astype(last.dtype)
    token = jnp.where(temperature > 0, jax.random.categorical(key, scaled), last.argmax())
    return jnp.where(jnp.isnan(logits[-1]).any(), -1, token), state, captured
