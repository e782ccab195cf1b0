"""Generation with a language model: token by token, with a cache of earlier tokens."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradfn.core.net import Net
from gradfn.core.params import Params, check
from gradfn.inspection import Capture
from gradfn.inspection import capture as record
from gradfn.nets._sampling import Form, Numbers, Rule, sample, sampling_rule

Transform = Callable[[Callable], Callable[..., Capture]]
# A function of the step, its further arguments, and its keyword arguments: `functools.partial` does not compare.
_Applied = tuple[Callable, tuple[Hashable, ...], tuple[tuple[str, Hashable], ...]]

Prompt = Sequence[int] | np.ndarray | jax.Array

READ = 8  # several prompts are read in pieces of 1, 8, 64, ... tokens, so that few programs are compiled


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
        in_parts: whether `step` gives the same for tokens in several parts as for all at once, up to rounding. Dynamic
            RoPE does not: it rotates by the length so far.
        description: as in `gf.Net`.
    """

    start: Callable[[Params], Any]
    step: Callable
    context: int | None = None
    hidden: Callable | None = None
    head: Callable | None = None
    in_parts: bool = True


@overload
def generate(
    net: LanguageModel,
    params: Params,
    prompt: Prompt,
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: int | Collection[int] = (),
    seed: int = 0,
    capture: None = None,
) -> np.ndarray: ...


@overload
def generate(
    net: LanguageModel,
    params: Params,
    prompt: Sequence[Prompt],
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: int | Collection[int] = (),
    seed: int = 0,
    capture: None = None,
) -> list[np.ndarray]: ...


@overload
def generate(
    net: LanguageModel,
    params: Params,
    prompt: Prompt,
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: int | Collection[int] = (),
    seed: int = 0,
    capture: str | Sequence[str] | Transform,
) -> tuple[np.ndarray, list[Capture]]: ...


def generate(
    net: LanguageModel,
    params: Params,
    prompt: Prompt | Sequence[Prompt],
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: int | Collection[int] = (),
    seed: int = 0,
    capture: str | Sequence[str] | Transform | None = None,
) -> np.ndarray | list[np.ndarray] | tuple[np.ndarray, list[Capture]]:
    """Return up to `n` tokens that continue a prompt, or one array of them for each of several prompts.

    Several prompts, which may differ in length, are continued together: each step computes the next token of all of
    them. Up to rounding, continuation `i` is that of `generate(net, params, prompts[i], n, seed=seed + i)`.

    Args:
        net: as in `gf.stream`.
        params: as in `gf.stream`.
        prompt: integers `[T]`, or a list of such prompts.
        n: the number of tokens to generate, for each prompt.
        temperature: as in `gf.stream`, like `top_k`, `top_p` and `min_p`.
        top_k: of the most likely tokens.
        top_p: of the probability.
        min_p: of the probability of the most likely token.
        stop: tokens that end a continuation, which includes them. One prompt's end does not end those of the others.
        seed: of the first prompt; the next one has `seed + 1`, and so on.
        capture: as in `gf.stream`, for one prompt.

    Returns:
        int32 `[N]`, where N < n only if the last token is one of `stop`; for several prompts a list of these; with
        `capture` also a list of `N` captures.

    Raises:
        ParameterError: as in `gf.stream`, like the others.
        ValueError: also several prompts with `capture`.
        TypeError: a prompt that is text or not integers.
        FloatingPointError: the largest logit is not finite.

    >>> import jax, gradfn as gf
    >>> net = gf.gpt(gf.GPTConfig(vocab=65, context=8, n_layers=1, n_heads=2, width=4))
    >>> params = net.init(jax.random.key(0))
    >>> gf.generate(net, params, [1, 2, 3], 4, top_k=1).shape
    (4,)
    >>> [tokens.shape for tokens in gf.generate(net, params, [[1, 2, 3], [4]], 6, top_p=0.9)]
    [(6,), (6,)]
    """
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    options |= {"stop": stop, "seed": seed}
    if _is_several(prompt):
        if capture is not None:
            raise ValueError(
                f"generate: capture records one prompt, got {len(prompt)}. Pass them one at a time: "
                "[gf.generate(net, params, prompt, n, capture=...) for prompt in prompts]"
            )
        if not net.in_parts:
            options.pop("seed")
            return [
                generate(net, params, tokens, n, seed=seed + i, **options) for i, tokens in enumerate(prompt)
            ]
        return _together(net, params, [*prompt], n, **options)
    one: Any = prompt
    if capture is None:
        return np.fromiter(stream(net, params, one, n, **options), np.int32)
    pairs = list(stream(net, params, one, n, **options, capture=capture))
    return np.array([token for token, _ in pairs], np.int32), [captured for _, captured in pairs]


@overload
def stream(
    net: LanguageModel,
    params: Params,
    prompt: Prompt,
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: int | Collection[int] = (),
    seed: int = 0,
    capture: None = None,
) -> Iterator[int]: ...


@overload
def stream(
    net: LanguageModel,
    params: Params,
    prompt: Prompt,
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: int | Collection[int] = (),
    seed: int = 0,
    capture: str | Sequence[str] | Transform,
) -> Iterator[tuple[int, Capture]]: ...


def stream(
    net: LanguageModel,
    params: Params,
    prompt: Prompt,
    n: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: int | Collection[int] = (),
    seed: int = 0,
    capture: str | Sequence[str] | Transform | None = None,
) -> Iterator[int] | Iterator[tuple[int, Capture]]:
    """Yield up to `n` tokens that continue a prompt, one at a time.

    Earlier tokens are cached, so each step computes one token only. When the context is full, generation continues
    from the later half of it.

    The logits are divided by the temperature, then `top_k`, `top_p` and `min_p` remove tokens, in this order, and the
    next token is sampled from the softmax of what is left, as in `transformers`. The most likely token always stays.

    Args:
        net: from `gf.gpt` or `gf.rnn`.
        params: its parameters.
        prompt: integers `[T]`, T >= 1. For several prompts see `gf.generate`.
        n: the number of tokens to generate.
        temperature: divides the logits, in float32 or wider; 0 always takes the most likely token.
        top_k: keep the `top_k` most likely tokens; ties go to the smaller index.
        top_p: keep the most likely tokens until their probabilities add up to `top_p`: a token stays if those that are
            more likely have less than that together (Holtzman et al., *The Curious Case of Neural Text
            Degeneration*, 2020, section 3.1).
        min_p: keep the tokens at least `min_p` times as likely as the most likely one (Nguyen et al., *Turning Up the
            Heat: Min-p Sampling*, 2025).
        stop: a token or tokens that end the continuation; the one that does is its last.
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
            negative or not finite, a `top_k` outside [1, vocab_size], a `top_p` outside (0, 1], a `min_p` outside
            [0, 1], a site that the step does not have.
        TypeError: a prompt or `stop` that is text or not integers, or a transform that returns no `Capture`.
        FloatingPointError: the largest logit is not finite.

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
    if _is_several(prompt):
        raise ValueError(
            f"stream: expected one prompt [T], got {len(prompt)}. gf.generate continues several together"
        )
    tokens = _tokens_of(prompt)
    vocab_size = _checked(net, params, [tokens], n)
    rule = sampling_rule(vocab_size, temperature, top_k, top_p, min_p)
    stops = _stops(stop, vocab_size)
    applied = None if capture is None else _applied(net, params, tokens, capture)
    return _stream(net, params, tokens, operator.index(n), rule, stops, applied, jax.random.key(seed))


def _checked(net: LanguageModel, params: Params, prompts: list[list[int]], n: int) -> int:
    """Return the vocabulary size, after checking parameters, prompts and the number of tokens."""
    check(net.spec, params)
    vocab_size = jax.eval_shape(net.apply, net.spec, jax.ShapeDtypeStruct((1,), jnp.int32)).shape[-1]
    for i, tokens in enumerate(prompts):
        which = f" in prompt {i}" if len(prompts) > 1 else ""
        if not tokens:
            raise ValueError(f"generate: expected one or more tokens{which}, got none")
        wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise ValueError(f"generate: expected tokens in [0, {vocab_size}){which}, got {wrong}")
    if operator.index(n) < 0:
        raise ValueError(f"generate: n must be an integer >= 0, got {n}")
    return vocab_size


def _stops(stop: Any, vocab_size: int) -> frozenset[int]:
    if np.asarray(stop).dtype.kind in "US":
        raise TypeError(
            "generate: stop must be tokens, got text. For stop strings: gf.data.stop_at(tokenizer.stream(tokens), stop)"
        )
    stops = frozenset(_tokens_of([*stop] if isinstance(stop, Collection) else stop, "stop: "))
    wrong = next((token for token in stops if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"generate: stop: expected tokens in [0, {vocab_size}), got {wrong}")
    return stops


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


def _is_several(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and any(np.ndim(part) for part in prompt)


def _tokens_of(prompt: PyTree, name: str = "") -> list[int]:
    """Return the tokens of a prompt, or raise an error if it is not a sequence of integers."""
    tokens = np.asarray(prompt)
    if tokens.dtype.kind in "US":
        raise TypeError(f"generate: {name}expected tokens, got text. Pass tokenizer.encode(text)")
    if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(
            f"generate: {name}tokens must be integers, got {tokens.dtype}. Cast them: tokens.astype(int)"
        )
    if tokens.ndim > 1:
        raise ValueError(
            f"generate: {name}expected a prompt [T] or a list of prompts, got shape {list(tokens.shape)}. "
            "Pass the rows of an array as a list: list(prompts)"
        )
    return [int(token) for token in tokens.reshape(-1)]


def _stream(
    net: LanguageModel,
    params: Params,
    tokens: list[int],
    n: int,
    rule: Rule,
    stop: frozenset[int],
    applied: _Applied | None,
    key: jax.Array,
) -> Iterator[Any]:
    context = net.context or len(tokens) + n
    new, state, cached = tokens[-context:], net.start(params), 0
    for i in range(n):
        if cached + len(new) > context:
            new, state, cached = tokens[-_half(context) :], net.start(params), 0
        key_i = jax.random.fold_in(key, i)
        read = np.asarray(new, np.int32)
        token, state, captured = _next(net.step, rule.form, applied, params, read, state, rule.numbers, key_i)
        cached += len(new)
        new = [_finite(int(token), len(tokens))]
        tokens.append(new[0])
        yield new[0] if applied is None else (new[0], captured)
        if new[0] in stop:
            return


def _together(
    net: LanguageModel,
    params: Params,
    prompts: Sequence[Any],
    n: int,
    stop: int | Collection[int],
    seed: int,
    **options: Any,
) -> list[np.ndarray]:
    """Return the continuation of each prompt, computed for all of them in each step."""
    texts = [_tokens_of(prompt, f"prompt {i}: ") for i, prompt in enumerate(prompts)]
    vocab_size = _checked(net, params, texts, n)
    rule = sampling_rule(vocab_size, **options)
    stops = _stops(stop, vocab_size)
    lengths = [len(text) for text in texts]
    context = net.context or max(lengths) + n
    keys = jnp.stack([jax.random.key(seed + i) for i in range(len(texts))])
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(texts)), net.start(params))
    cached = [0] * len(texts)

    def read(i: int, tokens: list[int]) -> None:
        """Start the state of a prompt again, with all tokens but the last, which the next step reads."""
        nonlocal states
        state = net.start(params)
        for part in _pieces(tokens[:-1]):
            state = _read(net.step, params, part, state)
        states, cached[i] = _replaced(states, state, np.int32(i)), len(tokens) - 1

    for i, text in enumerate(texts):
        read(i, text[-context:])
    going = set(range(len(texts))) if n else set()
    step = 0
    while going:
        for i in going:
            if cached[i] == context:
                read(i, texts[i][-_half(context) :])
            cached[i] += 1
        last = np.array([text[-1] for text in texts], np.int32)
        tokens, states = _next_of_all(
            net.step, rule.form, params, last, states, rule.numbers, keys, np.uint32(step)
        )
        step += 1
        for i, token in enumerate(np.asarray(tokens).tolist()):
            if i in going:
                texts[i].append(_finite(token, len(texts[i]), f" of prompt {i}"))
                if token in stops or step == n:
                    going.discard(i)
    return [np.array(text[length:], np.int32) for text, length in zip(texts, lengths, strict=True)]


def _half(context: int) -> int:
    return max(context // 2, 1)


def _pieces(tokens: list[int]) -> Iterator[np.ndarray]:
    """Yield tokens in pieces whose lengths are powers of `READ`, the longest first."""
    at = 0
    while at < len(tokens):
        size = 1
        while size * READ <= len(tokens) - at:
            size *= READ
        yield np.asarray(tokens[at : at + size], np.int32)
        at += size


def _finite(token: int, length: int, which: str = "") -> int:
    if token < 0:
        raise FloatingPointError(
            f"generate: the largest of the logits after {length:,} tokens{which} is not finite. gf.nan_origin finds "
            "the origin of a NaN or an infinity"
        )
    return token


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(5,))
def _next(
    step: Callable,
    form: Form,
    applied: _Applied | None,
    params: Params,
    tokens: jax.Array,
    state: PyTree,
    numbers: Numbers,
    key: jax.Array,
) -> tuple[jax.Array, PyTree, Capture | None]:
    """Read tokens and sample the next one; also return what is recorded of the step."""
    captured = None
    if applied is None:
        logits, state = step(params, tokens, state)
    else:
        captured = _recording(applied, step)(params, tokens, state)
        logits, state = captured.output
        # The state is donated to the next step.
        captured = replace(captured, output=logits)
    return sample(logits[-1], form, numbers, key), state, captured


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
def _next_of_all(
    step: Callable,
    form: Form,
    params: Params,
    tokens: jax.Array,
    states: PyTree,
    numbers: Numbers,
    keys: jax.Array,
    i: jax.Array,
) -> tuple[jax.Array, PyTree]:
    """Read one token `[B]` of each sequence, and sample each one's next token."""

    def one(token: jax.Array, state: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        logits, state = step(params, token[None], state)
        return sample(logits[-1], form, numbers, jax.random.fold_in(key, i)), state

    return jax.vmap(one)(tokens, states, keys)


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(3,))
def _read(step: Callable, params: Params, tokens: jax.Array, state: PyTree) -> PyTree:
    return step(params, tokens, state)[1]


@functools.partial(jax.jit, donate_argnums=(0,))
def _replaced(states: PyTree, state: PyTree, i: jax.Array) -> PyTree:
    """Return the states of several sequences with that of one replaced."""
    return jax.tree.map(lambda several, one: several.at[i].set(one), states, state)
