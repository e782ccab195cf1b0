"""The forms of attention: plain, with all probabilities at once; in blocks of queries; or a kernel of the device.

All compute the same output up to rounding. The plain form holds `[heads, T, S]` probabilities and keeps them for the
backward pass: memory that grows with the square of the length. In blocks it holds those of `BLOCK` queries, and the
backward pass computes them again. In a kernel they never reach memory. `gradfn/core/attention_form.py` says who
chooses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradfn.core.attention_form import LONG, requested
from gradfn.core.names import tap
from gradfn.core.precision import wide
from gradfn.layers._kernels import kernel_for

BLOCK = 128  # queries at a time, at most
GROUPS = 4  # causal blocks see the first 1/4, 2/4, 3/4 or all of the keys


class Rule(NamedTuple):
    """How scores are computed from products of queries and keys, and which of them count.

    Attributes:
        window: how many keys a query attends to, its own position and those before it, where `first` is given: an
            integer, an array (then all scores are computed), or None for all.
        cap: scores become `cap * tanh(score / cap)`; None for no cap.
        scale: of the products; None for `size**-0.5`.
    """

    window: PyTree = None
    cap: float | None = None
    scale: float | None = None


PLAIN_RULE = Rule()


def mix(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    first: PyTree,
    rule: Rule = PLAIN_RULE,
) -> jax.Array:
    """Return the output of attention, in the form for these shapes.

    Args:
        query: `[T, heads, size]`.
        key: `[S, kv_heads, size]`.
        value: `[S, kv_heads, size]`.
        mask: booleans `[T, S]`, or `[1, S]` for all queries, or None.
        first: if queries attend only to keys at their own position and earlier ones, the position of the first query
            (an integer, or an array if it is not known when tracing); else None.
        rule: for the scores.
    """
    if mask is not None:
        mask = jnp.atleast_2d(mask)
    if requested.value == "plain" or min(len(query), len(key)) < LONG:
        return plain(
            query, key, value, mask, first, rule, lambda probabilities: tap(probabilities, "probabilities")
        )
    is_plain = rule.window is None and rule.cap is None
    kernel = (
        kernel_for(query, key, value, mask, first, rule.scale)
        if is_plain and requested.value != "blocks"
        else None
    )
    return kernel(query, key, value) if kernel else in_blocks(query, key, value, mask, first, rule=rule)


def plain(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    first: PyTree,
    rule: Rule = PLAIN_RULE,
    named: Callable[[jax.Array], jax.Array] = lambda probabilities: probabilities,
) -> jax.Array:
    """Return the output of attention from all probabilities at once, which pass through `named`."""
    n_queries, heads, size = query.shape
    group = heads // key.shape[1]
    if group > 1:
        # [T, heads, size] -> [T, kv_heads, group, size]
        query = query.reshape(n_queries, heads // group, group, size)
    scale = size**-0.5 if rule.scale is None else rule.scale
    letters = ("tkgd", "kgts") if group > 1 else ("tkd", "kts")
    scores = jnp.einsum(
        f"{letters[0]},skd->{letters[1]}", query * scale, key, preferred_element_type=wide(query.dtype)
    )
    if rule.cap is not None:
        scores = rule.cap * jnp.tanh(scores / rule.cap)
    if first is not None:
        positions = first + jnp.arange(n_queries)  # [T]
        earlier = positions[:, None] >= jnp.arange(len(key))[None]  # [T, S]
        if rule.window is not None:
            earlier &= positions[:, None] - jnp.arange(len(key))[None] < rule.window
        mask = earlier if mask is None else mask & earlier
    if mask is not None:
        mask = mask.reshape((1,) * (scores.ndim - mask.ndim) + mask.shape)  # [T, S] -> [1, ..., T, S]
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    probabilities = named(jax.nn.softmax(scores, -1).astype(value.dtype))
    mixed = jnp.einsum(f"{letters[1]},skd->{letters[0]}", probabilities, value)
    return mixed.reshape(n_queries, heads, size)  # [T, kv_heads, group, size] -> [T, heads, size]


def in_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    first: PyTree,
    block: int = BLOCK,
    rule: Rule = PLAIN_RULE,
) -> jax.Array:
    """Return the output of attention, computed for at most `block` queries at a time.

    With a window that is known when tracing, the scores outside of the windows of a block are not computed.
    """
    n_queries, n_keys = len(query), len(key)
    n_blocks = -(-n_queries // block)
    rows = -(-n_queries // n_blocks)
    queries = _split(query, n_blocks, rows)
    starts = rows * jnp.arange(n_blocks)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (len(mask), n_keys))
        # [T, S], or [1, S] for all queries -> [blocks, rows or 1, S]
        mask = (
            jnp.broadcast_to(mask, (n_blocks, 1, n_keys)) if len(mask) == 1 else _split(mask, n_blocks, rows)
        )
    # The number of keys that the queries of a block attend to, taken together.
    span = rows + rule.window - 1 if first is not None and isinstance(rule.window, int) else n_keys
    # Later blocks see more keys: in a few groups, each of which sees the keys that its last block sees.
    is_known = isinstance(first, (int, np.integer)) and first >= 0 and span >= n_keys
    groups = min(GROUPS, n_blocks) if is_known else 1
    mixed = []
    for i in range(groups):
        a, b = n_blocks * i // groups, n_blocks * (i + 1) // groups
        end = min(n_keys, int(first) + rows * b) if is_known else n_keys
        blocks = (queries[a:b], starts[a:b], None if mask is None else mask[a:b, :, :end])
        mixed.append(_one_by_one(blocks, key[:end], value[:end], first, rule, span))
    together = jnp.concatenate(mixed)  # [blocks, rows, heads, size]
    return together.reshape(n_blocks * rows, *query.shape[1:])[:n_queries]


def _split(x: jax.Array, n_blocks: int, rows: int) -> jax.Array:
    """Return `[T, ...]` as `[blocks, rows, ...]`, filled with zeros."""
    padded = jnp.pad(x, ((0, n_blocks * rows - len(x)), *[(0, 0)] * (x.ndim - 1)))
    return padded.reshape(n_blocks, rows, *x.shape[1:])


def _one_by_one(
    blocks: PyTree, key: jax.Array, value: jax.Array, first: PyTree, rule: Rule, span: int
) -> jax.Array:
    """Return the output for blocks `(query, start, mask)` one after the other: `[blocks, rows, heads, size]`.

    Of more than `span` keys, each block sees those that end at its last query.
    """
    known = isinstance(rule.window, (int, type(None)))
    window, static = (None, rule) if known else (rule.window, rule._replace(window=None))
    return _compiled(blocks, key, value, first, window, static, span)


# Compiled for calls outside of jit, where a loop would be compiled in each call.
@functools.partial(jax.jit, inline=True, static_argnames=("rule", "span"))
def _compiled(
    blocks: PyTree, key: jax.Array, value: jax.Array, first: PyTree, window: PyTree, rule: Rule, span: int
) -> jax.Array:
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_block(block: PyTree, key: jax.Array, value: jax.Array, window: PyTree) -> jax.Array:
        query, start, mask = block
        of_window = rule if window is None else rule._replace(window=window)
        position: PyTree = None if first is None else first + start
        if span < len(key):
            begin = jnp.clip(position + len(query) - span, 0, len(key) - span)
            key, value = (jax.lax.dynamic_slice_in_dim(x, begin, span) for x in (key, value))
            mask = None if mask is None else jax.lax.dynamic_slice_in_dim(mask, begin, span, axis=-1)
            position = position - begin
        return plain(query, key, value, mask, position, of_window)

    return jax.lax.map(lambda block: of_block(block, key, value, window), blocks)
