"""Trees of small arrays, stacked as the rows of a few matrices.

A compiled loop that wrote each array of a tree into a column of its own would spend its time on that. Here it writes
one row per dtype, and a call returns one matrix per dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


class Form(NamedTuple):
    """The structure of a tree, and the shape and dtype of each array in it."""

    structure: Any
    leaves: tuple[tuple[tuple[int, ...], str], ...]


@partial(jax.tree_util.register_dataclass, data_fields=["matrices"], meta_fields=["form"])
@dataclass(frozen=True)
class Stacked:
    """Trees of one form, stacked; a pytree of matrices.

    Attributes:
        matrices: `[n, numbers]` by dtype: a row holds the arrays of one tree, flattened, in the order of its leaves.
        form: of each tree (static).

    >>> import jax.numpy as jnp
    >>> stacked = Stacked.zeros({"a": jnp.ones(2), "b": jnp.ones([])}, 4)
    >>> stacked = stacked.with_row(1, {"a": jnp.array([3.0, 4.0]), "b": jnp.array(5.0)})
    >>> print(stacked.matrices["float32"][1], stacked.tree(2)["a"][1])
    [3. 4. 5.] [3. 4.]
    """

    matrices: dict[str, jax.Array]
    form: Form

    @classmethod
    def zeros(cls, tree: PyTree, n: int) -> Stacked:
        """Return a stack with room for `n` trees of arrays (or shapes) like this one."""
        leaves, structure = jax.tree.flatten(tree)
        form = Form(structure, tuple((leaf.shape, leaf.dtype.name) for leaf in leaves))
        sizes: dict[str, int] = {}
        for shape, dtype in form.leaves:
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
        return cls({dtype: jnp.zeros([n, size], dtype) for dtype, size in sizes.items()}, form)

    def __len__(self) -> int:
        return len(next(iter(self.matrices.values())))

    def with_row(self, i: jax.Array | int, tree: PyTree) -> Stacked:
        """Return the same with a tree as row `i`."""
        parts: dict[str, list[jax.Array]] = {dtype: [] for dtype in self.matrices}
        for leaf in jax.tree.leaves(tree):
            parts[leaf.dtype.name].append(leaf.reshape(-1))
        rows = {dtype: jnp.concatenate(each) for dtype, each in parts.items()}
        matrices = {dtype: matrix.at[i].set(rows[dtype]) for dtype, matrix in self.matrices.items()}
        return Stacked(matrices, self.form)

    def tree(self, n: int) -> PyTree:
        """Return a copy of the first `n` trees on the host, as one tree of NumPy arrays `[n, ...]`."""
        matrices = {dtype: np.array(matrix[:n]) for dtype, matrix in self.matrices.items()}
        starts = dict.fromkeys(matrices, 0)
        leaves = []
        for shape, dtype in self.form.leaves:
            start, starts[dtype] = starts[dtype], starts[dtype] + math.prod(shape)
            leaves.append(matrices[dtype][:, start : starts[dtype]].reshape(n, *shape))
        return jax.tree.unflatten(self.form.structure, leaves)

    def joined(self, later: Stacked, n: int) -> Stacked:
        """Return, on the host, the first `n` trees of this stack and those of a later one behind them."""
        matrices: dict[str, Any] = {
            dtype: np.concatenate([matrix[:n], later.matrices[dtype]])[: len(matrix)]
            for dtype, matrix in self.matrices.items()
        }
        return Stacked(matrices, self.form)


def bytes_of(tree: PyTree) -> int:
    """Return the size of a tree of arrays or shapes, in bytes."""
    leaves: Iterable[Any] = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
