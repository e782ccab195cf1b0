"""Where the batches of `fit` come from: arrays in a new order each epoch, a function of a key, or the host."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from gradfn.data._arrays import as_arrays, checked
from gradfn.data._batches import epoch_order, n_examples
from gradfn.train.loading import Batches, EachStep, Groups, Loader, Position, Reader, copied, steps_per_group
from gradfn.train.placing import place
from gradfn.train.split import examples_of

# A first batch that took longer than this, in seconds, may have had to start something.
WARM = 0.005


@dataclass(frozen=True)
class Source:
    """How to make the batch of a step.

    Attributes:
        batch_size: examples per batch.
        epoch_steps: steps per epoch; None if there are no epochs.
        order_steps: steps that one order lasts: an epoch, if it covers all data; None if there is only one order.
        arrays: the data, passed to `batch`; where `placed` has not put them on devices yet, they may be on the host.
        order: `epoch -> order`, computed on the host.
        batch: `(arrays, order, row, key) -> batch`, traced into the step.
        tokens: per sequence, if the examples are sequences of tokens.
        first: the batch of step 0, if the host makes the batches.
        indexed: the same as `batch`, for arrays on a mesh; None if `batch` is for those too.
        local: whether the host makes, in each of several processes, that process's rows of a batch alone.
        reader: makes a reader of the batches, from the position that a checkpoint holds; None if the host makes none.
        groups: of batches that the host makes, once the run has started.
    """

    batch_size: int
    epoch_steps: int | None
    order_steps: int | None
    arrays: PyTree
    order: Callable[[int], Any]
    batch: Callable[[PyTree, PyTree, jax.Array, jax.Array], Any]
    tokens: int | None = None
    first: Any = None
    indexed: Callable[[PyTree, PyTree, jax.Array, jax.Array], Any] | None = None
    local: bool = False
    reader: Callable[..., Any] | None = None
    groups: Any = None

    @property
    def sample(self) -> PyTree:
        """An order for tracing, for which the host does not make further batches."""
        return self.order(0) if self.first is None else jax.tree.map(lambda leaf: leaf[None], self.first)

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

    def examples(self) -> int | None:
        """Return the number of examples per batch; None where no array of a batch has axes."""
        arguments = self.arrays, self.sample, np.int32(0), jax.random.key(0)
        found = examples_of(jax.eval_shape(self.batch, *arguments))
        return self.batch_size if self.local and found is not None else found

    def started(self, steps: int, position: Any) -> Source:
        """Return the source for a run of `steps` steps, from the position that its checkpoint holds."""
        if self.reader is None:
            return self
        assert self.order_steps
        n = self.order_steps if position is None else position["group"]
        groups = Groups(self.reader(position), n, self.first, steps)
        return dataclasses.replace(self, order_steps=n, order=groups, groups=groups)

    @property
    def end(self) -> int | None:
        """The number of steps that there are batches for, as far as is known; None where there is no end."""
        return None if self.groups is None else self.groups.end

    def position(self, step: int) -> Any:
        """Return what a checkpoint at a step holds, so that the batches can continue from there."""
        return None if self.groups is None else self.groups.position(step)

    def placed(self, mesh: Mesh | None, axis: str | None = None) -> Source:
        """Return the source with its arrays on the device, or on the devices of a mesh, so that no chunk copies them.

        Args:
            mesh: None for the default device.
            axis: of the mesh, that batches are split over.
        """
        if mesh is None:
            put = lambda tree: jax.tree.map(_to_device, tree)  # noqa: E731
            order = functools.lru_cache(maxsize=2)(lambda epoch: put(self.order(epoch)))
            return dataclasses.replace(self, arrays=put(self.arrays), order=order)

        def place_order(leaf: PyTree) -> PyTree:
            # Batches of the host, [steps, examples, ...]: each device gets its examples.
            rows = self.batch_size // jax.process_count() if self.local else self.batch_size
            if self.first is None or np.shape(leaf)[1:2] != (rows,):
                return place(leaf, mesh)
            spec = PartitionSpec(None, axis)
            if not self.local:
                return place(leaf, mesh, spec)
            shape = (len(leaf), self.batch_size, *leaf.shape[2:])
            return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), leaf, shape)

        order = functools.lru_cache(maxsize=2)(lambda epoch: jax.tree.map(place_order, self.order(epoch)))
        batch = self.batch if self.indexed is None else self.indexed
        return dataclasses.replace(self, arrays=place(self.arrays, mesh), order=order, batch=batch)


def _to_device(leaf: PyTree) -> PyTree:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def source_of(data: PyTree, batch_size: int, seed: int) -> Source:
    """Return the source of the batches for the `data` argument of `fit`.

    Raises:
        ValueError: arrays of different lengths, or a batch larger than the data.
    """
    if isinstance(data, Source):
        return data
    return _from_function(data) if callable(data) else _from_arrays(data, batch_size, seed)


def from_host(batch: Callable[[int], Any], local: bool = False) -> Source:
    """Return data for `fit` that the host makes, for data that do not fit on the device.

    Several batches at a time go to the device, and the next ones are made in a thread while the device works.

    Args:
        batch: `step -> batch`, a pytree of numpy arrays with a leading axis of examples; a pure function of the
            step's number (from 0), so that a resumed run gets the same batches. Of several processes, each makes the
            whole batch, and its devices get their rows of it.
        local: whether each of several processes makes the rows of its own devices alone: process 0 the first rows of
            the batch, and so on, equally many each.

    Returns:
        The `data` argument of `fit`.

    >>> import jax.numpy as jnp, numpy as np, optax, gradfn as gf
    >>> data = gf.train.from_host(lambda step: np.random.default_rng(step).normal(3.0, 1.0, [8]).astype("float32"))
    >>> loss = lambda params, x: jnp.square(params - x).mean()
    >>> fitted = gf.fit(loss, jnp.array(0.0), data, optax.sgd(0.05), 200, progress=False)
    >>> print(fitted.params.round(0))
    3.0
    """
    first, seconds = timed(lambda: batch(0))
    if seconds > WARM:  # the first call may have to open a file
        first, seconds = timed(lambda: batch(0))
    return _from_reader(lambda position: EachStep(batch), first, seconds, None, local)


def from_loader(batches: Batches, local: bool = False) -> Source:
    """Return data for `fit` from a data loader: an iterable of batches, which each epoch iterates over again.

    The next batches are read in a thread while the device works. All batches must have the same shapes. A loader whose
    iterators have a state (grain's do) continues where a checkpoint was written; any other is read again up to there
    by a run that resumes, and must then return the same batches again.

    Args:
        batches: PyTorch's `DataLoader`, grain's loaders and datasets, or anything else that `iter` takes and whose
            batches are pytrees of arrays with a leading axis of examples; or a function of the epoch's number (from 0)
            that returns such an iterable, for instance one that is shuffled with that number as its seed.
        local: whether each of several processes has a loader of the rows of its own devices alone: process 0 the
            first rows of the batch, and so on, equally many each. Its state is not stored.

    Returns:
        The `data` argument of `fit`. Where the loader has a length, that is an epoch.

    Raises:
        ValueError: an iterator, which could be iterated over only once; a loader without batches. `fit` raises it for
            batches that differ in shape or dtype, and, after a checkpoint, where the data end before the last step.

    >>> import jax.numpy as jnp, numpy as np, optax, gradfn as gf
    >>> loader = [np.full([8], value, "float32") for value in (2.0, 4.0)]
    >>> loss = lambda params, x: jnp.square(params - x).mean()
    >>> data = gf.train.from_loader(loader)
    >>> fitted = gf.fit(loss, jnp.array(0.0), data, optax.sgd(0.05), 200, progress=False)
    >>> print(fitted.params.round(0))
    3.0
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            "from_loader: expected an iterable that each epoch can iterate over again, got an iterator "
            f"({type(batches).__name__}). Pass a function that makes it: from_loader(lambda epoch: make_batches())"
        )
    probed = [Loader(batches, resumes=not local)]  # a first run reads on where it stopped
    found, seconds = timed(lambda: probed[0].first(1))
    if not found:
        raise ValueError(
            f"from_loader: expected an iterable of batches, got an empty {type(batches).__name__}"
        )
    _, again = timed(lambda: probed[0].first(2))
    length = probed[0].length

    def reader(position: Position | None) -> Loader:
        return (probed.pop() if probed else Loader(batches, not local)).known(position)

    return _from_reader(reader, found[0], min(seconds, again), length, local)


def _from_reader(
    reader: Callable[[Position | None], Reader],
    batch: PyTree,
    seconds: float,
    epoch_steps: int | None,
    local: bool,
) -> Source:
    """Return the source of batches that a reader makes, from the first one and the time that one takes."""
    first = copied(as_arrays(batch, "batch", scalars=True))

    def row_of(arrays: PyTree, order: Any, row: jax.Array, key: jax.Array) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[row], order)

    size = _batch_size(first) * (jax.process_count() if local else 1)
    n = steps_per_group(first, seconds)

    def group(number: int) -> PyTree:  # one alone: a run that has started makes the next one ahead
        return Groups(reader(None), n, first, (number + 1) * n)(number)

    return Source(
        size, epoch_steps, n, None, group, row_of, _tokens(first), first, local=local, reader=reader
    )


def timed(make: Callable[[], PyTree]) -> tuple[PyTree, float]:
    """Return what a function returns, and the seconds that it took."""
    began = time.monotonic()
    return make(), time.monotonic() - began


def _from_function(make: Callable[[jax.Array], Any]) -> Source:
    batch = jax.eval_shape(make, jax.random.key(0))
    # The arrays of a jax.tree_util.Partial are arguments of the program; those of a closure would be constants in it.
    arrays = make if isinstance(make, jax.tree_util.Partial) else jax.tree_util.Partial(make)
    draw = lambda arrays, order, row, key: arrays(key)  # noqa: E731
    return Source(_batch_size(batch), None, None, arrays, lambda epoch: None, draw, _tokens(batch))


def _from_arrays(data: PyTree, batch_size: int, seed: int) -> Source:
    arrays = checked(data)
    n = n_examples(arrays)
    if not 1 <= batch_size <= n:
        raise ValueError(f"fit: batch_size must be in [1, {n}], the number of examples, got {batch_size}")

    @functools.lru_cache(maxsize=2)  # of this epoch and of the next one
    def order(epoch: int) -> np.ndarray:
        return epoch_order(n, batch_size, seed, epoch)  # int32 [steps per epoch, batch]

    def batch(arrays: PyTree, order: jax.Array, row: jax.Array, key: jax.Array) -> PyTree:
        return jax.tree.map(lambda array: take_rows(array, order[row]), arrays)

    def indexed(arrays: PyTree, order: jax.Array, row: jax.Array, key: jax.Array) -> PyTree:
        # The compiler splits an index over devices, and would not split the loop of `take_rows`.
        return jax.tree.map(lambda array: array[order[row]], arrays)

    steps = n // batch_size
    return Source(batch_size, steps, steps, arrays, order, batch, _tokens(arrays), indexed=indexed)


def _batch_size(batch: PyTree) -> int:
    """Return the number of examples: the length of the first array with axes, 1 where there is none."""
    return examples_of(batch) or 1


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
