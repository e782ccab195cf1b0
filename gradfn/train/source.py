"""Where the batches of `fit` come from: arrays in a new order each epoch, or a function of a key."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from gradfn.data.batches import epoch_order


@dataclass(frozen=True)
class Source:
    """How to make the batch of a step.

    `order(epoch)` is made on the host, once an epoch; `batch(arrays, order, row, key)` is traced into the step.
    """

    batch_size: int
    epoch_steps: int | None  # None: there are no epochs
    arrays: Any
    order: Callable[[int], Any]
    batch: Callable[[Any, Any, jax.Array, jax.Array], Any]

    def epoch(self, step: int) -> int:
        """Return the epoch that a step belongs to."""
        return step // self.epoch_steps if self.epoch_steps else 0

    def row(self, step: int) -> int:
        """Return the row of the epoch's order that a step uses."""
        return step % self.epoch_steps if self.epoch_steps else 0


def source_of(data: Any, batch_size: int, seed: int) -> Source:
    """Return the source that `fit`'s data stand for.

    Raises:
        ValueError: arrays of unlike length, or a batch that is larger than the data.
    """
    return _from_function(data) if callable(data) else _from_arrays(data, batch_size, seed)


def _from_function(make: Callable[[jax.Array], Any]) -> Source:
    batch = jax.eval_shape(make, jax.random.key(0))
    batch_size = jax.tree.leaves(batch)[0].shape[0]
    return Source(batch_size, None, None, lambda epoch: None, lambda arrays, order, row, key: make(key))


def _from_arrays(data: Any, batch_size: int, seed: int) -> Source:
    arrays = jax.tree.map(jnp.asarray, data)
    lengths = {leaf.shape[0] if leaf.ndim else -1 for leaf in jax.tree.leaves(arrays)}
    if len(lengths) != 1 or -1 in lengths:
        found = jax.tree.map(lambda leaf: list(leaf.shape), arrays)
        raise ValueError(f"fit: data are arrays with one leading axis of examples, came {found}")
    n = lengths.pop()
    if not 1 <= batch_size <= n:
        raise ValueError(
            f"fit: batch_size is 1 or more and at most the {n} examples there are, came {batch_size}"
        )

    @functools.lru_cache(maxsize=2)  # this epoch's and the next one's
    def order(epoch: int) -> jax.Array:
        return jnp.asarray(epoch_order(n, batch_size, seed, epoch))  # int32 [steps an epoch, batch]

    def batch(arrays: Any, order: jax.Array, row: jax.Array, key: jax.Array) -> Any:
        return jax.tree.map(lambda array: take_rows(array, order[row]), arrays)

    return Source(batch_size, n // batch_size, arrays, order, batch)


def take_rows(array: jax.Array, index: jax.Array) -> jax.Array:
    """Return `array[index]`: rows `[batch, ...]` of `[examples, ...]`, quickly on every platform.

    XLA:CPU splits a gather over its threads and pays more for that than the copy costs; a loop of row copies
    keeps to one. Where a row is one number, and on accelerators, the gather is the quicker one.
    """
    if array.ndim == 1:
        return array[index]

    def copy_rows(array: jax.Array, index: jax.Array) -> jax.Array:
        def put(i: jax.Array, rows: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_slice_in_dim(array, index[i], 1)  # [1, ...]
            return jax.lax.dynamic_update_slice_in_dim(rows, row, i, 0)

        rows = jnp.zeros((len(index), *array.shape[1:]), array.dtype)
        return jax.lax.fori_loop(0, len(index), put, rows)

    return jax.lax.platform_dependent(array, index, cpu=copy_rows, default=lambda array, index: array[index])
