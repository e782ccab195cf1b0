"""Shuffled batches, whose order depends on the seed and the epoch alone."""

import itertools
from collections.abc import Iterator
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import PyTree

from gradfn.data._arrays import MOST_EXAMPLES, as_arrays
from gradfn.data._checks import integer

Data = TypeVar("Data")


def epoch_order(n: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Shuffle one epoch: row s contains the indices of the examples of step s.

    A pure function of its four arguments (a numpy generator is seeded with `[seed, epoch]`), so a resumed run
    sees the same batches as an uninterrupted one. The last partial batch is dropped; reshuffling changes which
    examples it contains.

    Args:
        n: the number of examples.
        batch_size: examples per step, at most `n`.
        seed: from 0 to 2**32 - 1.
        epoch: from 0 to 2**32 - 1.

    Returns:
        Indices [n // batch_size, batch_size] int32 in [0, n), each at most once.

    Raises:
        ValueError: no examples, a batch larger than the data, a seed or epoch out of range; TypeError: an
            argument that is not an integer.

    >>> import gradfn as gf
    >>> gf.data.epoch_order(5, 2, seed=0, epoch=0).shape
    (2, 2)
    """
    n = integer("n (the number of examples)", n, 0)
    if n > MOST_EXAMPLES:
        raise ValueError(
            f"n (the number of examples) must be at most {MOST_EXAMPLES:,}, got {n:,}. Use gf.train.from_host"
        )
    batch_size = integer("batch_size", batch_size, 1)
    # Numpy concatenates the 32-bit words of both: without these bounds, two pairs could give the same list.
    seed, epoch = integer("seed", seed, 0, 2**32 - 1), integer("epoch", epoch, 0, 2**32 - 1)
    if n == 0:
        raise ValueError("expected at least one example, got n = 0")
    if batch_size > n:
        raise ValueError(f"batch_size must be at most the number of examples, {n:,}, got {batch_size:,}")
    steps = n // batch_size
    order = np.random.default_rng([seed, epoch]).permutation(n)[: steps * batch_size]
    return order.astype(np.int32).reshape(steps, batch_size)  # [steps*batch_size] -> [steps, batch_size]


def batches(data: Data, size: int, seed: int = 0, epochs: int | None = 1) -> Iterator[Data]:
    """Yield shuffled batches of any tree of arrays, for a training loop of your own.

    Epoch e visits the examples in the order of `epoch_order(n, size, seed, e)`. The last partial batch is
    dropped, so all batches have one shape and a jitted step compiles once.

    Args:
        data: a tree (pytree) of arrays with one leading length n, such as `(images, labels)`. Data frames and
            series (by position, not by label), lists and PyTorch tensors become arrays.
        size: examples per batch, at most n.
        seed: from 0 to 2**32 - 1.
        epochs: the number of passes over the data; None for no limit.

    Returns:
        An iterator of trees like `data`, each array [size, ...].

    Raises:
        ValueError: at the call rather than at the first batch: no arrays or examples, arrays of different
            lengths or that are not numeric, a batch larger than the data, a seed out of range; TypeError: an
            argument that is not an integer.

    >>> import gradfn as gf, numpy as np
    >>> x, y = np.arange(6.0), np.arange(6)
    >>> [(x.shape, y.dtype.kind) for x, y in gf.data.batches((x, y), size=3)]
    [((3,), 'i'), ((3,), 'i')]
    """
    data = as_arrays(data)
    n = n_examples(data)
    if epochs is not None:
        integer("epochs", epochs, 0)
    epoch_order(n, size, seed, 0)  # check the arguments now rather than at the first batch

    def generate() -> Iterator[Data]:
        for epoch in itertools.count() if epochs is None else range(epochs):
            for rows in epoch_order(n, size, seed, epoch):
                yield jax.tree.map(lambda a, rows=rows: a[rows], data)

    return generate()


def n_examples(data: PyTree) -> int:
    """Return the common leading length of all arrays of a tree; raise a ValueError that names two that differ."""
    leaves = jax.tree_util.tree_leaves_with_path(data)
    lengths = {"data" + jax.tree_util.keystr(path): leaf.shape[0] for path, leaf in leaves}
    if not lengths:
        raise ValueError(f"expected data with at least one array, got {data!r:.60}")
    first, n = next(iter(lengths.items()))
    other = next((name for name in lengths if lengths[name] != n), None)
    if other is not None:
        differ = f"{first:.60}: {n:,}, {other:.60}: {lengths[other]:,}"
        raise ValueError(f"all arrays must have one row per example, but their lengths differ: {differ}")
    return int(n)
