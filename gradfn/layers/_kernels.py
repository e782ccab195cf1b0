"""Attention by a kernel of the device: cuDNN's on NVIDIA GPUs, on TPUs the one that jax ships.

A kernel never writes the probabilities to memory, forward or backward. It has a backward rule of its own, but neither
forward mode nor second derivatives. Masks other than the causal one are left to blocks: cuDNN's would need the mask of
each example as `[heads, T, T]` numbers, the TPU's one that is known when tracing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import PyTree

Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def kernel_for(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    first: PyTree,
    scale: float | None = None,
) -> Kernel | None:
    """Return a kernel for arrays like these, a function of query, key and value; None if there is none.

    The arguments are those of `mix`, without windows and caps, which are left to blocks. A kernel is for the default
    device, because it cannot be traced where its library is missing.
    """
    causal = isinstance(first, int) and first == 0
    if mask is not None or not (causal or first is None):
        return None
    device = getattr(jax.config, "jax_default_device", None)
    platform = getattr(device, "platform", device) or jax.default_backend()
    if platform in ("gpu", "cuda"):
        return _cudnn(query, key, value, causal, scale)
    return _splash(query, key, causal, scale) if platform == "tpu" else None


def _cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, causal: bool, scale: float | None
) -> Kernel | None:
    # Under vmap it needs a batch axis of all three arrays, which they have where a sequence attends to itself.
    if query.dtype not in (jnp.float16, jnp.bfloat16) or len(query) != len(key):
        return None

    def kernel(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            query, key, value, scale=scale, is_causal=causal, implementation="cudnn"
        )

    def total(*arrays: jax.Array) -> jax.Array:
        return kernel(*arrays).astype(jnp.float32).sum()

    # It raises where cuDNN is not installed, or does not support the shapes forward or backward.
    try:
        jax.eval_shape(jax.grad(total, (0, 1, 2)), query, key, value)
    except (RuntimeError, ValueError):
        return None
    return kernel


def _splash(
    query: jax.Array, key: jax.Array, causal: bool, scale: float | None = None, **options: Any
) -> Kernel | None:
    """Return the TPU's kernel; its blocks are multiples of 128 queries and keys."""
    (n_queries, heads, size), n_keys = query.shape, len(key)
    scale = size**-0.5 if scale is None else scale
    if n_queries % 128 or n_keys % 128 or not _is_on_one_device():
        return None
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    q, kv = (next(n for n in (512, 256, 128) if length % n == 0) for length in (n_queries, n_keys))
    blocks = splash.BlockSizes(
        block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv
    )
    pairs = (splash.CausalMask if causal else splash.FullMask)((n_queries, n_keys))
    attend = splash.make_splash_mha(
        splash.MultiHeadMask([pairs] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=1, **options
    )

    def kernel(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        by_head = [x.transpose(1, 0, 2) for x in (query * scale, key, value)]  # [heads, T, size]
        return attend(*by_head).transpose(1, 0, 2)

    return kernel


def _is_on_one_device() -> bool:
    """Return whether each array is on one device as the program runs: XLA cannot divide a Pallas kernel."""
    axes = jax.sharding.get_abstract_mesh().axis_types
    in_shard_map = bool(axes) and all(axis == AxisType.Manual for axis in axes)
    return jax.device_count() == 1 or in_shard_map
