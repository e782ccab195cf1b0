"""Where the batches of `fit` come from: arrays in a new order each epoch, a function of a key, or the host."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradfn.data._arrays import as_arrays, on_device
from gradfn.data._batches import epoch_order, n_examples

# How many steps, and bytes, of batches the host makes at a time at most.
HOST_STEPS, HOST_BYTES = 64, 1 << 24


@dataclass(frozen=True)
class Source:
    """How to make the batch of a step.

    Attributes:
        batch_size: examples per batch.
        epoch_steps: steps per epoch; None if there are no epochs.
        order_steps: steps that one order lasts: an epoch, if it covers all data; None if there is only one order.
        arrays: the data, passed to `batch`.
        order: `epoch -> order`, computed on the host.
        batch: `(arrays, order, row, key) -> batch`, traced into the step.
        tokens: per sequence, if the examples are sequences of tokens.
        first: the batch of step 0, if the host makes the batches.
    """

    batch_size: int
    epoch_steps: int | None
    order_steps: int | None
    arrays: PyTree
    order: Callable[[int], Any]
    batch: Callable[[PyTree, PyTree, jax.Array, jax.Array], Any]
    tokens: int | None = None
    first: Any = None

    @property
    def content(self) -> PyTree:
        """The arrays that distinguish these data from others."""
        return self.arrays if self.first is None else self.first

    def epoch(self, step: int) -> int:
        """Return the number of the order (the epoch) that a step belongs to."""
        return step // self.order_steps if self.order_steps else 0

    def row(self, step: int) -> int:
        """Return the row of that order that a step uses."""
        return step % self.order_steps if self.order_steps else 0

    def placed(self, mesh: jax.sharding.Mesh) -> Source:
        """Return the source with its arrays on all devices of a mesh, so that no chunk of steps has to copy them."""
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        devices = everywhere.device_set

        def place(leaf: PyTree) -> PyTree:
            if not isinstance(leaf, (jax.Array, np.ndarray)):
                return leaf
            there = isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices
            return leaf if there else jax.device_put(leaf, everywhere)

        order = functools.lru_cache(maxsize=2)(lambda epoch: jax.tree.map(place, self.order(epoch)))
        return dataclasses.replace(self, arrays=jax.tree.map(place, self.arrays), order=order)


def source_of(data: PyTree, batch_size: int, seed: int) -> Source:
    """Return the source of the batches for the `data` argument of `fit`.

    Raises:
        ValueError: arrays of different lengths, or a batch larger than the data.
    """
    if isinstance(data, Source):
        return data
    return _from_function(data) if callable(data) else _from_arrays(data, batch_size, seed)


def from_host(batch: Callable[[int], Any]) -> Source:
    """Return data for `fit` that the host makes, for data that do not fit on the device.

    Several batches at a time go to the device, and the next ones are made while the device works.

    Args:
        batch: `step -> batch`, a pytree of numpy arrays with a leading axis of examples; a pure function of the
            step's number (from 0), so that a resumed run gets the same batches.

    Returns:
        The `data` argument of `fit`.

    >>> import jax.numpy as jnp, numpy as np, optax, gradfn as gf
    >>> data = gf.train.from_host(lambda step: np.random.default_rng(step).normal(3.0, 1.0, [8]).astype("float32"))
    >>> loss = lambda params, x: jnp.square(params - x).mean()
    >>> fitted = gf.fit(loss, jnp.array(0.0), data, optax.sgd(0.05), 200, progress=False)
    >>> print(fitted.params.round(0))
    3.0
    """
    shapes = as_arrays(batch(0), "batch", scalars=True)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(shapes))
    n = max(1, min(HOST_STEPS, HOST_BYTES // max(size, 1)))

    @functools.lru_cache(maxsize=2)  # the batches in use, and the next ones
    def order(epoch: int) -> PyTree:
        batches = [
            as_arrays(batch(step), "batch", scalars=True) for step in range(epoch * n, (epoch + 1) * n)
        ]
        return on_device(jax.tree.map(lambda *leaves: np.stack(leaves), *batches), "batch")  # [n, batch, ...]

    def row_of(arrays: PyTree, order: Any, row: jax.Array, key: jax.Array) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[row], order)

    return Source(_batch_size(shapes), None, n, None, order, row_of, _tokens(shapes), first=shapes)


def _from_function(make: Callable[[jax.Array], Any]) -> Source:
    batch = jax.eval_shape(make, jax.random.key(0))
    # The arrays of a jax.tree_util.Partial are arguments of the program; those of a closure would be constants in it.
    arrays = make if isinstance(make, jax.tree_util.Partial) else jax.tree_util.Partial(make)
    draw = lambda arrays, order, row, key: arrays(key)  # noqa: E731
    return Source(_batch_size(batch), None, None, arrays, lambda epoch: None, draw, _tokens(batch))


def _from_arrays(data: PyTree, batch_size: int, seed: int) -> Source:
    arrays = on_device(data)
    n = n_examples(arrays)
    if not 1 <= batch_size <= n:
        raise ValueError(f"fit: batch_size must be in [1, {n}], the number of examples, got {batch_size}")

    @functools.lru_cache(maxsize=2)  # of this epoch and of the next one
    def order(epoch: int) -> jax.Array:
        return jnp.asarray(epoch_order(n, batch_size, seed, epoch))  # int32 [steps per epoch, batch]

    def batch(arrays: PyTree, order: jax.Array, row: jax.Array, key: jax.Array) -> PyTree:
        return jax.tree.map(lambda array: take_rows(array, order[row]), arrays)

    return Source(batch_size, n // batch_size, n // batch_size, arrays, order, batch, _tokens(arrays))


def _batch_size(batch: PyTree) -> int:
    """Return the number of examples: the length of the first array with axes, 1 where there is none."""
    return next((leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.ndim), 1)


def _tokens(batch: PyTree) -> int | None:
    """Return the number of tokens per sequence, where the first array holds integers `[batch, tokens]`."""
    first = next((leaf for leaf in jax.tree.leaves(batch) if leaf.ndim), None)
    tokens = first is not None and first.ndim == 2 and jnp.issubdtype(first.dtype, jnp.integer)
    return first.shape[1] if tokens else None  # type: ignore[union-attr]


def take_rows(array: jax.Array, index: jax.Array) -> jax.Array:
    """Return `array[index]`: rows `[batch, ...]` of `[examples, ...]`, fast on every platform.

    XLA:CPU splits a gather over its threads, which costs more than the copy; a loop of row copies uses one thread.
    Where a row is a scalar, and on accelerators, the gather is faster.
    """
    if array.ndim == 1:
        return array[index]

    def copy_rows(array: jax.Array, index: jax.Array) -> jax.Array:
        def put(i: jax.Array, rows: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_slice_in_dim(array, index[i], 1)  # [1, ...]
            return jax.lax.dynamic_update_slice_in_dim(rows, row, i, 0)

        rows = jnp.zeros((len(index), *array.shape[1:]), array.dtype)
        return jax.lax.fori_loop(0, len(index), put, rows, unroll=4)

    return jax.lax.platform_dependent(array, index, cpu=copy_rows, default=lambda array, index: array[index])
