"""Shuffled batches: which examples make up which step, from the seed and the epoch alone."""

import itertools
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import numpy as np

from gradfn.data._arrays import MOST_EXAMPLES, as_arrays
from gradfn.data._checks import whole

Data = TypeVar("Data")


def epoch_order(n: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Shuffle one epoch: row s holds the indices of the examples of step s.

    A pure function of its four arguments (a numpy generator is seeded with `[seed, epoch]`), so that a
    resumed run meets the batches that an uninterrupted one would have. What is left over when `batch_size`
    does not divide `n` is dropped: up to batch_size - 1 examples, others each epoch.

    Args:
        n: how many examples there are.
        batch_size: how many make a step, at most `n`.
        seed: from 0 to 2**32 - 1.
        epoch: counted from 0, below 2**32.

    Returns:
        Indices [n // batch_size, batch_size] int32 in [0, n), each at most once.

    Raises:
        ValueError: no examples, a batch larger than the data, a seed or epoch out of range; TypeError: an
            argument that is not a whole number.

    >>> import gradfn as gf
    >>> gf.data.epoch_order(5, 2, seed=0, epoch=0).shape
    (2, 2)
    """
    n = whole("n (the number of examples)", n, 0)
    if n > MOST_EXAMPLES:
        raise ValueError(
            f"n (the number of examples) must be at most {MOST_EXAMPLES:,}, got {n:,}. Use gf.train.from_host"
        )
    batch_size = whole("batch_size", batch_size, 1)
    # Numpy joins the seed's 32-bit words into one list: without these bounds, two seeds could meet in it.
    seed, epoch = whole("seed", seed, 0, 2**32 - 1), whole("epoch", epoch, 0, 2**32 - 1)
    if n == 0:
        raise ValueError("there are no examples to make batches of: n is 0")
    if batch_size > n:
        raise ValueError(f"batch_size={batch_size:,} is larger than the data, {n:,} examples")
    steps = n // batch_size
    order = np.random.default_rng([seed, epoch]).permutation(n)[: steps * batch_size]
    return order.astype(np.int32).reshape(steps, batch_size)  # [steps*batch_size] -> [steps, batch_size]


def batches(data: Data, size: int, seed: int = 0, epochs: int | None = 1) -> Iterator[Data]:
    """Yield shuffled batches of any tree of arrays, for those who own their training loop.

    Epoch e visits the examples in the order of `epoch_order(n, size, seed, e)`: a partial last batch is
    dropped, so every batch has one shape and a jitted step compiles once.

    Args:
        data: a tree (pytree) of arrays with one leading length n, such as `(images, labels)`. Data frames and
            series (by position, not by label), lists and PyTorch tensors become arrays.
        size: examples per batch, at most n.
        seed: from 0 to 2**32 - 1.
        epochs: how often to go through the data; None for ever.

    Returns:
        An iterator of trees like `data`, each array [size, ...].

    Raises:
        ValueError: at the call and not at the first batch: no arrays or examples, arrays of different
            lengths or not of numbers, a batch larger than the data, a seed out of range; TypeError: an argument
            that is not an integer.

    >>> import gradfn as gf, numpy as np
    >>> x, y = np.arange(6.0), np.arange(6)
    >>> [(x.shape, y.dtype.kind) for x, y in gf.data.batches((x, y), size=3)]
    [((3,), 'i'), ((3,), 'i')]
    """
    data = as_arrays(data)
    n = n_examples(data)
    if epochs is not None:
        whole("epochs", epochs, 0)
    epoch_order(n, size, seed, 0)  # raises now, where the caller can see what was wrong

    def generate() -> Iterator[Data]:
        for epoch in itertools.count() if epochs is None else range(epochs):
            for rows in epoch_order(n, size, seed, epoch):
                yield jax.tree.map(lambda a, rows=rows: a[rows], data)

    return generate()


def n_examples(data: Any) -> int:
    """Return the leading length that all arrays of a tree have, or raise a ValueError that names two that differ."""
    leaves = jax.tree_util.tree_leaves_with_path(data)
    lengths = {"data" + jax.tree_util.keystr(path): leaf.shape[0] for path, leaf in leaves}
    if not lengths:
        raise ValueError(f"there are no arrays in the data to make batches of: {data!r:.60}")
    first, n = next(iter(lengths.items()))
    other = next((name for name in lengths if lengths[name] != n), None)
    if other is not None:
        differ = f"{first:.60}: {n:,}, {other:.60}: {lengths[other]:,}"
        raise ValueError(f"all arrays must have one row per example, but their lengths differ: {differ}")
    return int(n)
