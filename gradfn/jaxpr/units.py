"""The axes of a value that are its units: those that the weights of a product give it.

The units of `W x` are the rows of `W`, wherever the batch is: `jax.vmap` puts it last in `W @ x`, and first in `x @ W`.
Those of a convolution are its channels. Operations that keep these axes are followed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gradfn.jaxpr.interpreter import operation

Axes = tuple[int, ...] | None

_WINDOWS = {"reduce_window", "reduce_window_max", "reduce_window_sum", "pad", "slice", "rev", "concatenate"}


def units_of(eqn: Any, operands: Sequence[Axes], weights: Sequence[bool]) -> Axes:
    """Return the axes of an equation's first output that are units, or None where no product tells.

    Args:
        eqn: the equation.
        operands: the axes of each operand that are units.
        weights: which operands are made from parameters.
    """
    name, params, out = operation(eqn), eqn.params, eqn.outvars[0].aval
    shape = getattr(out, "shape", ())
    if name == "dot_general" and sum(weights) == 1:
        return _of_product(eqn, weights.index(True))
    if name == "conv_general_dilated" and list(weights) == [False, True]:
        return (params["dimension_numbers"].out_spec[1],)
    if name == "transpose" and operands[0] is not None:
        return tuple(sorted(params["permutation"].index(axis) for axis in operands[0]))
    if name == "broadcast_in_dim" and operands[0] is not None:
        axes = tuple(params["broadcast_dimensions"][axis] for axis in operands[0])
        return axes if _sizes(shape, axes) == _sizes(eqn.invars[0].aval.shape, operands[0]) else None
    if name in ("reshape", "squeeze") and operands[0] is not None:
        return _reshaped(eqn.invars[0].aval.shape, shape, operands[0])
    known = set()
    for atom, axes in zip(eqn.invars, operands, strict=True):
        before = getattr(atom.aval, "shape", ())
        follows = len(before) == len(shape) if name in _WINDOWS else before == shape
        if axes is not None and follows and _sizes(before, axes) == _sizes(shape, axes):
            known.add(axes)
    return known.pop() if len(known) == 1 else None


def _of_product(eqn: Any, k: int) -> Axes:
    """Return the axes of a product that its operand `k` has: those over which the product is batched come first."""
    (contracted, batched) = eqn.params["dimension_numbers"]
    n_batched = len(batched[k])
    free = [a.aval.ndim - len(c) - n_batched for a, c in zip(eqn.invars, contracted, strict=True)]
    first = n_batched + (free[0] if k else 0)
    return (*range(n_batched), *range(first, first + free[k])) if free[k] else None


def _sizes(shape: Sequence[int], axes: Sequence[int]) -> list[int]:
    return [shape[axis] for axis in axes]


def _reshaped(before: Sequence[int], after: Sequence[int], axes: Sequence[int]) -> Axes:
    """Return where axes are after a reshape, if it keeps each of them."""
    kept = []
    for axis in axes:
        ahead = math.prod(before[:axis])
        found = [i for i, n in enumerate(after) if n == before[axis] and math.prod(after[:i]) == ahead]
        if not found:
            return None
        kept.append(found[-1])
    return tuple(kept)
