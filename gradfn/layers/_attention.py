"""Attention: each position's query is compared with all keys, and the matching values are averaged."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from gradfn.core.axes import with_axes
from gradfn.core.names import scope, tap
from gradfn.core.net import Net
from gradfn.core.params import Params
from gradfn.layers._attend import Rule, mix
from gradfn.layers._dense import dense
from gradfn.layers._rope import RopeScaling, rope

Cache = dict[str, jax.Array]  # "key" and "value", each [context, kv_heads, size]


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
    score_cap: float | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Return for each query the mean of the values, weighted by softmax(query . key / sqrt(size)).

    Vaswani et al., *Attention Is All You Need*, 2017, section 3.2.1. With fewer key and value heads than query
    heads, each is shared by a group of query heads (Ainslie et al., *GQA*, 2023). The weights are tapped as
    `probabilities` `[heads, T, S]`, or `[kv_heads, group, T, S]` with shared heads. Unless they are inspected, long
    sequences (from 512 queries and keys) are computed in a form that never holds them all: `gf.layers.attention_form`.

    Args:
        query: `[T, heads, size]`.
        key: `[S, kv_heads, size]`, where `kv_heads` divides `heads`.
        value: `[S, kv_heads, size]`.
        mask: `[T, S]` booleans, true where a query may attend; None for everywhere.
        causal: whether a query attends only to keys at its own position and earlier ones. For long sequences better
            than a mask, which is `[T, S]` itself.
        window: the number of keys that a query attends to with `causal`: the one at its own position and those before
            it (Beltagy et al., *Longformer*, 2020; Jiang et al., *Mistral 7B*, 2023); None for all.
        score_cap: each score becomes `score_cap * tanh(score / score_cap)` before masks apply (Gemma Team, *Gemma 2*,
            2024, section 2); None for no cap.
        scale: multiplies the products of queries and keys; `size**-0.5` by default.

    Returns:
        `[T, heads, size]`.

    Raises:
        ValueError: shapes that do not match, a window without `causal` or below 1, or a cap that is not positive.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> query, key, value = jnp.zeros([1, 1, 2]), jnp.ones([2, 1, 2]), jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> gf.layers.attend(query, key, value)
    Array([[[0.5, 0.5]]], dtype=float32)
    """
    (_, heads, size), kv_heads = query.shape, key.shape[1]
    if key.shape != value.shape or key.shape[-1] != size or heads % kv_heads:
        actual = ", ".join(str(list(a.shape)) for a in (query, key, value))
        raise ValueError(
            f"attend: expected query [T, heads, size], key and value [S, kv_heads, size], got {actual}"
        )
    _check_scores("attend", causal, window, score_cap)
    return mix(query, key, value, mask, 0 if causal else None, Rule(window, score_cap, scale))


def attention(
    width: int,
    n_heads: int,
    n_kv_heads: int | None = None,
    head_size: int | None = None,
    causal: bool = False,
    bias: bool | Literal["qkv"] = True,
    rope_base: float | None = None,
    rope_scaling: RopeScaling | None = None,
    qk_norm: Net | None = None,
    rope_fraction: float = 1.0,
    rope_base_local: float | None = None,
    window: int | None = None,
    score_cap: float | None = None,
    scale: float | None = None,
) -> Net:
    """Return multi-head attention: self-attention, or cross-attention over a second sequence.

    Vaswani et al., *Attention Is All You Need*, 2017. Tapped are `queries`, `keys`, `values`, the attention
    weights `probabilities`, and the weighted values before the output projection, `mixed`.

    Args:
        width: features of a position.
        n_heads: attention heads.
        n_kv_heads: heads of keys and values; `n_heads` by default. Fewer are shared by groups of query heads.
        head_size: features per head; `width / n_heads` by default.
        causal: whether a position attends only to itself and earlier positions.
        bias: whether the four projections have biases; `"qkv"` for all but the output projection.
        rope_base: rotate queries and keys by their positions (`gf.layers.rope`) with this base; None for no rotation.
        rope_scaling: how the frequencies of the rotation change for long sequences (`gf.RopeScaling`).
        qk_norm: a net of one head's features (`gf.layers.rms_norm(head_size)`) for its queries and keys before they
            are rotated (Dehghani et al., *Scaling Vision Transformers to 22 Billion Parameters*, 2023, section 2).
        rope_fraction: the fraction of each head's features that is rotated, the first ones.
        rope_base_local: the base where a window applies; `rope_base` by default.
        window: the number of keys that a position attends to, as in `gf.layers.attend`.
        score_cap: a bound of the scores, as in `gf.layers.attend`.
        scale: multiplies the products of queries and keys; `head_size**-0.5` by default.

    Returns:
        A net `[T, width] -> [T, width]` with `query`, `key`, `value` and `out`, each `{"W", "b"}`, and with `qk_norm`
        `query_norm` and `key_norm`, with its parameters. Called

        - `apply(params, x)`: `x` attends to itself;
        - `apply(params, x, memory)`: `x` attends to `memory` `[S, width]` (never with `causal`);
        - `apply(params, x, cache=cache, start=n)`: `x` continues `n` positions whose keys and values are in the
          cache (`kv_cache`); returns `(y, cache)`, where the cache includes the new positions.
        - `apply(params, x, local=False)`: without the window and with `rope_base`. A layer of a scanned stack may
          be local or not by a boolean array `[]`; then all scores are computed and those outside the window masked.

        A cache holds the whole context, with a window too.

    Raises:
        ValueError: `n_heads` does not divide `width`, `n_kv_heads` does not divide `n_heads`, or another `bias`; a
            window without `causal`; a fraction of the features that is odd.
        ParameterError: an input of another size.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> layer = gf.layers.attention(128, 4, causal=True)
    >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones([10, 128])).shape
    (10, 128)
    """
    n_kv_heads = n_kv_heads or n_heads
    if head_size is None and width % n_heads:
        raise ValueError(f"attention: n_heads must divide width, got n_heads {n_heads}, width {width}")
    if n_heads % n_kv_heads:
        raise ValueError(
            f"attention: n_kv_heads must divide n_heads, got n_kv_heads {n_kv_heads}, n_heads {n_heads}"
        )
    if bias not in (True, False, "qkv"):
        raise ValueError(f"attention: bias must be True, False or 'qkv', got {bias!r}")
    size = head_size or width // n_heads
    _check_scores("attention", causal, window, score_cap)
    rotated = int(size * rope_fraction)
    if rope_base is not None and (rotated % 2 or not 0 < rotated <= size):
        raise ValueError(
            f"attention: rope_fraction {rope_fraction} of {size} features must be an even number, got {rotated}"
        )
    to_heads = {"query": n_heads, "key": n_kv_heads, "value": n_kv_heads}
    layers = {name: dense(width, n * size, bool(bias)) for name, n in to_heads.items()}
    out = dense(n_heads * size, width, bias is True)

    def heads(params: Params, name: str, x: jax.Array) -> jax.Array:
        with scope(name):
            z = layers[name].apply(params[name], x)
            z = z.reshape(len(x), to_heads[name], size)  # [T, heads * size] -> [T, heads, size]
        if qk_norm is None or name == "value":
            return z
        with scope(f"{name}_norm"):
            return qk_norm.apply(params[f"{name}_norm"], z)

    def rotate(x: jax.Array, positions: jax.Array, length: PyTree, local: PyTree) -> jax.Array:
        def by(base: PyTree, scaling: RopeScaling | None) -> jax.Array:
            turned = rope(x[..., :rotated], positions, base, scaling, length)
            return turned if rotated == size else jnp.concatenate([turned, x[..., rotated:]], -1)

        if rope_base_local is None or local is False:
            return by(rope_base, rope_scaling)
        inside = by(rope_base_local, None)
        return inside if local is True else jnp.where(local, inside, by(rope_base, rope_scaling))

    def apply(
        params: Params,
        x: jax.Array,
        memory: jax.Array | None = None,
        *,
        cache: Cache | None = None,
        start: PyTree = 0,
        local: PyTree = True,
    ) -> PyTree:
        if memory is not None and (causal or cache is not None or rope_base is not None):
            raise ValueError("attention: memory cannot be combined with causal=True, a cache or rope_base")
        if cache is not None and not causal:
            raise ValueError("attention: a cache needs causal=True")
        source = x if memory is None else memory
        query, key, value = (
            heads(params, name, x if name == "query" else source) for name in ("query", "key", "value")
        )
        if rope_base is not None:
            positions = start + jnp.arange(len(x))  # [T]
            length = start + len(x)
            query, key = (rotate(z, positions, length, local) for z in (query, key))
        query, key, value = tap(query, "queries"), tap(key, "keys"), tap(value, "values")
        if cache is not None:
            cache = {
                "key": jax.lax.dynamic_update_slice_in_dim(cache["key"], key, start, 0),
                "value": jax.lax.dynamic_update_slice_in_dim(cache["value"], value, start, 0),
            }
            key, value = cache["key"], cache["value"]
        rule = Rule(_window(window, local, len(key)), score_cap, scale)
        mixed = tap(mix(query, key, value, None, start if causal else None, rule), "mixed")
        mixed = mixed.reshape(len(x), n_heads * size)  # [T, heads, size] -> [T, heads * size]
        with scope("out"):
            y = out.apply(params["out"], mixed)
        return y if cache is None else (y, cache)

    rows = {"query": ("heads", n_heads), "key": ("kv_heads", n_kv_heads), "value": ("kv_heads", n_kv_heads)}
    spec = {name: with_axes(layer.spec, rows[name], "embed") for name, layer in layers.items()}
    spec["out"] = with_axes(out.spec, "embed", ("heads", n_heads))
    if qk_norm is not None:
        spec |= {f"{name}_norm": with_axes(qk_norm.spec, None) for name in ("query", "key")}
    return Net(spec, apply)


def _window(window: int | None, local: PyTree, n_keys: int) -> PyTree:
    """Return the window of a call of a layer: an array if only the compiled program knows whether it is local."""
    if window is None or local is False:
        return None
    return window if local is True else jnp.where(local, window, n_keys)


def _check_scores(name: str, causal: bool, window: int | None, score_cap: float | None) -> None:
    if window is not None and (window < 1 or not causal):
        raise ValueError(
            f"{name}: window must be an integer >= 1 with causal=True, got {window}, causal={causal}"
        )
    if score_cap is not None and not score_cap > 0:
        raise ValueError(f"{name}: score_cap must be above 0, got {score_cap}")


def kv_cache(context: int, n_kv_heads: int, head_size: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """Return an empty cache for the keys and values of `context` positions.

    >>> import gradfn as gf
    >>> gf.shapes(gf.layers.kv_cache(64, 2, 32))
    {'key': [64, 2, 32], 'value': [64, 2, 32]}
    """
    empty = jnp.zeros((context, n_kv_heads, head_size), dtype)
    return {"key": empty, "value": empty}
