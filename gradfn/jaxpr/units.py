"""The axes of a value that are its units: those that the weights of a product give it.

The units of `W x` are the rows of `W`, wherever the batch is: `jax.vmap` puts it last in `W @ x`, and first in `x @ W`.
Those of a convolution are its channels, and those of a sum with a bias are the axis of the bias. Operations that keep
these axes are followed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from gradfn.jaxpr.interpreter import operation

Axes = tuple[int, ...] | None
"""The axes that are units; empty where they were mixed with others, None where nothing tells."""

_ELEMENTWISE = {
    "add",
    "add_any",
    "sub",
    "mul",
    "div",
    "max",
    "min",
    "pow",
    "select_n",
    "clamp",
    "atan2",
    "rem",
}
_PRODUCTS = {"dot_general", "conv_general_dilated"}
_WINDOWS = {"reduce_window", "reduce_window_max", "reduce_window_sum", "pad", "slice", "rev", "concatenate"}


class Operand(NamedTuple):
    """An operand of an equation.

    Attributes:
        units: its axes that are units.
        weight: whether it is made from parameters.
        chosen: whether data chose it, or a gradient changed it: the axes that it shares with data are then no units.
    """

    units: Axes
    weight: bool
    chosen: bool


def axis_of_parameter(shape: Sequence[int]) -> Axes:
    """Return the axis of a bias or a gain, which are the units of what it is added to or multiplied with."""
    long = [axis for axis, n in enumerate(shape) if n > 1]
    return tuple(long) if len(long) == 1 else None


def units_of(eqn: Any, operands: Sequence[Operand]) -> Axes:
    """Return the axes of an equation's first output that are units."""
    name, shape = operation(eqn), getattr(eqn.outvars[0].aval, "shape", ())
    weights = [operand.weight for operand in operands]
    if name == "dot_general" and sum(weights) == 1:
        return _of_product(eqn, weights.index(True), operands)
    if name == "conv_general_dilated" and weights == [False, True]:
        return (eqn.params["dimension_numbers"].out_spec[1],)
    found = [
        None if operand.units is None else _followed(name, eqn.params, atom.aval, shape, operand.units)
        for atom, operand in zip(eqn.invars, operands, strict=True)
    ]
    # A bias tells only what the value that it is added to does not.
    of_data = {axes for axes, weight in zip(found, weights, strict=True) if axes and not weight}
    known = of_data or {axes for axes in found if axes}
    if len(known) == 1:
        return known.pop()
    return None if all(axes is None for axes in found) else ()


def _of_product(eqn: Any, k: int, operands: Sequence[Operand]) -> Axes:
    """Return the axes of a product that its operand `k` has: those over which the product is batched come first."""
    contracted, batched = eqn.params["dimension_numbers"]
    n_batched = len(batched[k])
    free = [a.aval.ndim - len(c) - n_batched for a, c in zip(eqn.invars, contracted, strict=True)]
    first = n_batched + (free[0] if k else 0)
    shared = () if operands[k].chosen else range(n_batched)
    return (*shared, *range(first, first + free[k])) if free[k] else None


def _followed(
    name: str, params: Any, before: Any, after: Sequence[int], units: tuple[int, ...]
) -> tuple[int, ...]:
    """Return where units are after an operation; empty if it may have mixed them with other axes."""
    shape = before.shape
    if name == "transpose":
        return transposed(units, params["permutation"])
    if name == "broadcast_in_dim":
        moved = tuple(params["broadcast_dimensions"][axis] for axis in units)
    elif name in ("reshape", "squeeze"):
        return _reshaped(shape, after, units)
    elif name.startswith("reduce_") and "axes" in params:
        reduced = params["axes"]
        if any(axis in reduced for axis in units):
            return ()
        return tuple(axis - sum(other < axis for other in reduced) for axis in units)
    elif name not in _PRODUCTS and (
        shape == after or (name in _ELEMENTWISE | _WINDOWS and len(shape) == len(after))
    ):
        moved = units
    else:
        return ()
    return moved if [shape[axis] for axis in units] == [after[axis] for axis in moved] else ()


def transposed(units: tuple[int, ...], permutation: Sequence[int]) -> tuple[int, ...]:
    """Return where units are after a transpose."""
    return tuple(sorted(permutation.index(axis) for axis in units))


def _reshaped(before: Sequence[int], after: Sequence[int], units: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes that a reshape makes of units: neighbors may be merged, and one may be split."""
    out: list[int] = []
    for run in _neighbors(units):
        start = math.prod(before[: run[0]])
        end = start * math.prod(before[axis] for axis in run)
        starts = [math.prod(after[:i]) for i in range(len(after) + 1)]
        axes = [i for i, n in enumerate(after) if n > 1 and start <= starts[i] and starts[i + 1] <= end]
        if math.prod(after[i] for i in axes) * start != end:
            return ()
        out += axes
    return tuple(out)


def _neighbors(axes: Sequence[int]) -> list[list[int]]:
    """Return axes in order, those that follow each other together."""
    runs: list[list[int]] = []
    for axis in sorted(axes):
        if runs and runs[-1][-1] == axis - 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    return runs
