"""Small arrays of one shape, stacked, where something is computed of each in turn."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import lax

from gradfn.core.devices import on_several_devices

SMALL = 1 << 14
"""Elements of an array that is copied into a stack, at most."""


def stacked(arrays: Iterable[jax.Array]) -> list[jax.Array]:
    """Return the numbers of some arrays in fewer ones: small arrays of one shape and dtype become `[k, *shape]`.

    XLA compiles several kernels for the reduction of each array, in a time that grows faster than their number: the
    norm of the gradients of 400 parameters took a minute to compile, and takes a second of their stacks. Large arrays,
    which a stack would copy, and those on several devices stay as they are.

    >>> import jax.numpy as jnp
    >>> [array.shape for array in stacked([jnp.ones([2, 3]), jnp.ones(3), jnp.zeros([2, 3])])]
    [(2, 2, 3), (1, 3)]
    """
    groups: dict[tuple, list[jax.Array]] = {}
    alone = []
    for array in arrays:
        if array.size <= SMALL and not on_several_devices(array):
            groups.setdefault((array.shape, array.dtype), []).append(array)
        else:
            alone.append(array)
    # The barrier keeps XLA from joining a stack with its reduction, to a kernel with a branch per array.
    return [lax.optimization_barrier(jnp.stack(group)) for group in groups.values()] + alone
