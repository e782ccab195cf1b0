"""The arrays that a loss holds: frozen weights, a teacher's parameters.

An array in a loss's closure is a constant of every program that is compiled of it: XLA copies it into the program, and
compiles for a minute where it is large. The arrays of a `jax.tree_util.Partial` are arguments of the program instead.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from gradfn.flatten import BatchMean, Loss


def held(loss: Loss) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Loss]]:
    """Return the arrays that a loss holds, and a function from such arrays to the loss.

    Args:
        loss: of a batch. It holds the arrays in it if it is a `jax.tree_util.Partial`, or the `gf.batch_mean` of one.

    >>> import jax.numpy as jnp
    >>> loss = jax.tree_util.Partial(lambda scale, params, batch: scale * params * batch, jnp.array(2.0))
    >>> arrays, of = held(loss)
    >>> len(arrays), of([jnp.array(5.0)])(1.0, 1.0)
    (1, Array(5., dtype=float32, weak_type=True))
    """
    if isinstance(loss, BatchMean):
        arrays, of_example = held(loss.example)
        return arrays, (lambda arrays: BatchMean(of_example(arrays))) if arrays else lambda arrays: loss
    if not isinstance(loss, jax.tree_util.Partial):
        return [], lambda arrays: loss
    leaves, structure = jax.tree.flatten(loss)
    is_array = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]
    others = [None if known else leaf for leaf, known in zip(leaves, is_array, strict=True)]

    def of(arrays: list[jax.Array]) -> Loss:
        left = iter(arrays)
        filled = [next(left) if known else leaf for leaf, known in zip(others, is_array, strict=True)]
        return jax.tree.unflatten(structure, filled)

    return [leaf for leaf, known in zip(leaves, is_array, strict=True) if known], of
