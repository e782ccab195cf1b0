"""Attention: each position asks, all positions answer in proportion to how well they match."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gradfn.core.names import scope, tap
from gradfn.core.net import Net
from gradfn.core.params import Params
from gradfn.core.precision import wide
from gradfn.layers._dense import dense
from gradfn.layers._embed import rope

Cache = dict[str, jax.Array]  # "key" and "value", each [context, kv_heads, size]


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Return for each query the mean of the values, weighted by softmax(query . key / sqrt(size)).

    Vaswani et al., *Attention Is All You Need*, 2017, section 3.2.1. Fewer key and value heads than query
    heads make groups of query heads share them (Ainslie et al., *GQA*, 2023). The weights are tapped as
    `probabilities` `[heads, T, S]` (`[kv_heads, group, T, S]` where groups share).

    Args:
        query: `[T, heads, size]`.
        key: `[S, kv_heads, size]`, where `kv_heads` divides `heads`.
        value: `[S, kv_heads, size]`.
        mask: `[T, S]` booleans, true where a query may look; None for everywhere.

    Returns:
        `[T, heads, size]`.

    Raises:
        ValueError: shapes that do not fit.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> query, key, value = jnp.zeros([1, 1, 2]), jnp.ones([2, 1, 2]), jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> gf.layers.attend(query, key, value)
    Array([[[0.5, 0.5]]], dtype=float32)
    """
    (n_queries, heads, size), kv_heads = query.shape, key.shape[1]
    if key.shape != value.shape or key.shape[-1] != size or heads % kv_heads:
        came = ", ".join(str(list(a.shape)) for a in (query, key, value))
        raise ValueError(
            f"attend: expected query [T, heads, size], key and value [S, kv_heads, size], came {came}"
        )
    group = heads // kv_heads
    if group > 1:
        query = query.reshape(n_queries, kv_heads, group, size)
    letters = ("tkgd", "kgts") if group > 1 else ("tkd", "kts")
    scores = jnp.einsum(
        f"{letters[0]},skd->{letters[1]}", query * size**-0.5, key, preferred_element_type=wide(query.dtype)
    )
    if mask is not None:
        mask = mask.reshape((1,) * (scores.ndim - 2) + mask.shape)  # [T, S] -> [1, ..., T, S]
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    probabilities = tap(jax.nn.softmax(scores, -1).astype(value.dtype), "probabilities")
    mixed = jnp.einsum(f"{letters[1]},skd->{letters[0]}", probabilities, value)
    return mixed.reshape(n_queries, heads, size)


def attention(
    width: int,
    n_heads: int,
    n_kv_heads: int | None = None,
    head_size: int | None = None,
    causal: bool = False,
    bias: bool = True,
    rope_base: float | None = None,
) -> Net:
    """Return multi-head attention: of a sequence over itself, or over another (cross attention).

    Vaswani et al., *Attention Is All You Need*, 2017. Queries, keys, values and what they give before the
    last product are tapped as `queries`, `keys`, `values` and `mixed`, the weights as `probabilities`.

    Args:
        width: features of a position.
        n_heads: heads, each with its own queries.
        n_kv_heads: heads of keys and values; as many as `n_heads` unless told. Fewer are shared by groups.
        head_size: features of a head; `width / n_heads` unless told.
        causal: whether a position sees only itself and those before it.
        bias: whether the four products have biases.
        rope_base: turn queries and keys by their positions (`gf.layers.rope`) with this base.

    Returns:
        A net `[T, width] -> [T, width]` with `query`, `key`, `value` and `out`, each `{"W", "b"}`. Called

        - `apply(params, x)`: x attends over itself;
        - `apply(params, x, memory)`: x attends over `memory` `[S, width]` (never with `causal`);
        - `apply(params, x, cache=cache, start=n)`: x goes on from `n` positions whose keys and values are in
          the cache (`kv_cache`); it answers `(y, cache)`, the cache with the new positions in it.

    Raises:
        ValueError: heads that do not divide the width, or each other.
        ParameterError: an input of another size.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> layer = gf.layers.attention(128, 4, causal=True)
    >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones([10, 128])).shape
    (10, 128)
    """
    n_kv_heads = n_kv_heads or n_heads
    if head_size is None and width % n_heads:
        raise ValueError(f"attention: n_heads divides width, came width {width}, n_heads {n_heads}")
    if n_heads % n_kv_heads:
        raise ValueError(f"attention: n_kv_heads divides n_heads, came {n_heads} and {n_kv_heads}")
    size = head_size or width // n_heads
    to_heads = {"query": n_heads, "key": n_kv_heads, "value": n_kv_heads}
    layers = {name: dense(width, n * size, bias) for name, n in to_heads.items()}
    out = dense(n_heads * size, width, bias)

    def heads(params: Params, name: str, x: jax.Array) -> jax.Array:
        with scope(name):
            z = layers[name].apply(params[name], x)
            return z.reshape(len(x), to_heads[name], size)  # [T, heads * size] -> [T, heads, size]

    def apply(
        params: Params,
        x: jax.Array,
        memory: jax.Array | None = None,
        *,
        cache: Cache | None = None,
        start: Any = 0,
    ) -> Any:
        if memory is not None and (causal or cache is not None or rope_base is not None):
            raise ValueError("attention: memory is for attention that is not causal, without cache and rope")
        if cache is not None and not causal:
            raise ValueError("attention: a cache is for causal attention")
        source = x if memory is None else memory
        query, key, value = (
            heads(params, name, x if name == "query" else source) for name in ("query", "key", "value")
        )
        positions = start + jnp.arange(len(x))  # [T]
        if rope_base is not None:
            query, key = rope(query, positions, rope_base), rope(key, positions, rope_base)
        query, key, value = tap(query, "queries"), tap(key, "keys"), tap(value, "values")
        if cache is not None:
            cache = {
                "key": jax.lax.dynamic_update_slice_in_dim(cache["key"], key, start, 0),
                "value": jax.lax.dynamic_update_slice_in_dim(cache["value"], value, start, 0),
            }
            key, value = cache["key"], cache["value"]
        seen = positions[:, None] >= jnp.arange(len(key))[None] if causal else None  # [T, S]
        mixed = tap(attend(query, key, value, seen), "mixed").reshape(len(x), n_heads * size)
        with scope("out"):
            y = out.apply(params["out"], mixed)
        return y if cache is None else (y, cache)

    return Net({name: layer.spec for name, layer in layers.items()} | {"out": out.spec}, apply)


def kv_cache(context: int, n_kv_heads: int, head_size: int, dtype: Any = jnp.float32) -> Cache:
    """Return an empty cache for the keys and values of `context` positions.

    >>> import gradfn as gf
    >>> gf.shapes(gf.layers.kv_cache(64, 2, 32))
    {'key': [64, 2, 32], 'value': [64, 2, 32]}
    """
    empty = jnp.zeros((context, n_kv_heads, head_size), dtype)
    return {"key": empty, "value": empty}
