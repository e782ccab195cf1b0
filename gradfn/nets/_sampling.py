"""What the next token is sampled from: logits divided by a temperature, without tokens that are too unlikely."""

from __future__ import annotations

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradfn.core.precision import widen


class Form(NamedTuple):
    """What a program that samples is compiled for."""

    top_k: int | None
    sorts: bool  # whether top_p < 1, which needs sorted logits


class Numbers(NamedTuple):
    """What a compiled program takes: see `gf.stream`."""

    temperature: float | jax.Array
    top_p: float | jax.Array
    min_p: float | jax.Array


class Rule(NamedTuple):
    """A rule for sampling."""

    form: Form
    numbers: Numbers


def sampling_rule(
    vocab_size: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Rule:
    """Return a rule, after checking its numbers; they are those of `gf.stream`."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature must be finite and >= 0, got {temperature}")
    if top_k is not None and not 1 <= operator.index(top_k) <= vocab_size:
        raise ValueError(f"generate: top_k must be in [1, {vocab_size}], got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"generate: min_p must be in [0, 1], got {min_p}")
    top_p = 1.0 if top_p is None else float(top_p)
    form = Form(None if top_k is None else operator.index(top_k), top_p < 1)
    return Rule(form, Numbers(float(temperature), top_p, float(min_p or 0)))


def sample(logits: jax.Array, form: Form, numbers: Numbers, key: jax.Array) -> jax.Array:
    """Sample a token by its logits `[vocab_size]`; -1 if the largest one is not finite."""
    # Gumbel noise in bfloat16 is too coarse: of 2,000 equal logits the first would win.
    logits = widen(logits)
    sampled = jax.random.categorical(key, filtered(logits, form, numbers))
    token = jnp.where(numbers.temperature > 0, sampled, logits.argmax())
    return jnp.where(jnp.isfinite(logits.max()), token, -1)


def filtered(logits: jax.Array, form: Form, numbers: Numbers) -> jax.Array:
    """Return logits `[vocab_size]` divided by the temperature, with -inf for tokens that are never sampled.

    A temperature of 0, for which nothing is sampled, counts as 1.
    """
    temperature, top_p, min_p = (jnp.asarray(number, logits.dtype) for number in numbers)
    if form.top_k is not None:
        # By index, because several tokens may have equal logits.
        kept = jnp.zeros(logits.shape, bool).at[jax.lax.top_k(logits, form.top_k)[1]].set(True)
        logits = jnp.where(kept, logits, -jnp.inf)
    # Subtract the maximum, so that a small temperature can overflow to -inf only.
    scaled = (logits - logits.max()) / jnp.where(temperature > 0, temperature, 1)
    if form.sorts:
        order = jnp.argsort(scaled, descending=True, stable=True)
        p = jax.nn.softmax(scaled)[order]
        more_likely = jnp.cumsum(p) - p
        kept = jnp.zeros(logits.shape, bool).at[order].set(more_likely < top_p)
        scaled = jnp.where(kept, scaled, -jnp.inf)
    return jnp.where(scaled >= jnp.log(min_p), scaled, -jnp.inf)
