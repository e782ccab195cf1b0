"""Follow every parameter to the equations where it first meets data: its gradient is made from these.

Before that a parameter may be cast, transposed, reshaped or sliced by a scan. The result is a *view* of it, which
contains each of its elements at most once, so the gradient of the view has the norm of the parameter's gradient.
Anything else computed from parameters alone (a product of two, a weight norm) is known as a set of parameters.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import PyTree

from gradfn.core.precision import is_narrow
from gradfn.jaxpr.dataflow import Dataflow, Role
from gradfn.jaxpr.interpreter import Path, bodies, operation, params_of
from gradfn.jaxpr.program import Program

# Their output has the elements of their input, in order.
_SAME = {"convert_element_type", "copy", "copy_p", "name", "reduce_precision", "sharding_constraint"}
# These look up rows of their first operand. Even where the rows do not depend on data, like positions, the parameter
# ends here: the rows are few.
_LOOK_UPS = {"gather", "dynamic_slice"}


class View(NamedTuple):
    """A value that contains elements of one parameter, each at most once, and nothing else.

    `leaf` is the parameter's index among the program's inputs; `axes` the parameter's axis behind each axis of the
    value (None for an added axis of size 1), or None as a whole where a reshape mixed them; `loops` the scans of which
    every iteration has its own part, each with the parameter's axis that it runs along; `part` what is left of sliced
    axes, each as (axis, start, stop); `narrow` whether the value, or one between it and the parameter, has less than
    32 bits.
    """

    leaf: int
    axes: tuple[int | None, ...] | None
    loops: tuple[tuple[Path, int | None], ...] = ()
    part: tuple[tuple[int, int, int], ...] = ()
    narrow: bool = False

    def is_apart_from(self, other: "View") -> bool:
        """Tell whether two views of one parameter have no element in common, as far as slices show."""
        ends = {axis: (start, stop) for axis, start, stop in other.part}
        return any(
            axis in ends and (stop <= ends[axis][0] or ends[axis][1] <= start)
            for axis, start, stop in self.part
        )

    def cut(self, along: int, start: int, stop: int) -> "View":
        """Return the view of a slice along one of the value's axes."""
        axis = self.axes[along] if self.axes else None
        if axis is None:
            return self
        first = next((start for a, start, _ in self.part if a == axis), 0)
        others = tuple(each for each in self.part if each[0] != axis)
        return self._replace(part=(*others, (axis, first + start, first + stop)))


class Meeting(NamedTuple):
    """An operand made from parameters alone, of an equation that mixes it with data.

    `leaves` are the indices of those parameters among the program's inputs; `view` is known where the operand is a
    view of one. A path that ends at a scan, a cond or a while means that the parameters go into it or come out of it
    in a way that is not followed; the empty path is the program's output.
    """

    path: Path
    operand: int
    leaves: frozenset[int]
    view: View | None = None


class _Value(NamedTuple):
    """What is known of a value: its parameters if it has not met data, whether it has, and what it is a view of."""

    leaves: frozenset[int] = frozenset()
    data: bool = False
    view: View | None = None


_CONSTANT, _DATA = _Value(), _Value(data=True)


def parameter_meetings(program: Program, into_loops: bool = True) -> list[Meeting]:
    """Return every equation where a parameter meets data: all that its gradient comes from.

    Parameters are the floating arrays of the program's first argument, data all of the others.

    Args:
        program: the program.
        into_loops: whether a parameter that every iteration of a scan reads is followed into it; otherwise it meets
            data at the scan. Slices, of which each iteration has its own, are always followed.
    """
    analysis = _Meetings(into_loops)
    inputs = [
        _DATA if owner != 0 else _of_parameter(i, aval)
        for i, (owner, aval) in enumerate(zip(program.owners, program.jaxpr.in_avals, strict=True))
    ]
    consts = [_CONSTANT] * len(program.jaxpr.consts)
    analysis.meet((), analysis.run(program.jaxpr, inputs, consts))
    return analysis.records


def _of_parameter(i: int, aval: Any) -> _Value:
    if not jnp.issubdtype(aval.dtype, jnp.inexact):
        return _CONSTANT
    return _Value(frozenset([i]), view=View(i, tuple(range(len(aval.shape))), narrow=is_narrow(aval.dtype)))


def _is_floating(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.inexact)


def _parameters(values: Sequence[_Value]) -> frozenset[int]:
    return frozenset().union(*[v.leaves for v in values])


class _Meetings(Dataflow[_Value]):
    """Follows parameters until they meet data; the records are the meetings."""

    def __init__(self, into_loops: bool) -> None:
        super().__init__()
        self.into_loops = into_loops

    def meet(self, path: Path, values: Sequence[_Value], first: int = 0) -> None:
        """Record the parameters among values that meet data."""
        self.records += [Meeting(path, first + k, v.leaves, v.view) for k, v in enumerate(values) if v.leaves]

    def constant(self, value: PyTree) -> _Value:
        return _CONSTANT

    def join(self, values: Sequence[_Value]) -> _Value:
        return _DATA if any(v.data for v in values) else _Value(_parameters(values))

    def bind(self, path: Path, k: int, var: Any, value: _Value, eqn: Any | None) -> _Value:
        # No gradient flows through values that are not floating.
        return value if _is_floating(var) else _Value(data=value.data)

    def enters(self, path: Path, kind: str, eqn: Any, operands: list[_Value]) -> bool:
        return kind in ("jit", "remat", "scan", "cond")

    def choose(self, path: Path, index: _Value, values: Sequence[_Value]) -> _Value:
        out = self.join([index, *values])
        if out.data:
            self.meet(path, values)
        return out

    def into_loop(self, path: Path, operand: int, role: Role, value: _Value) -> _Value:
        return _slice_of(value, path) if role == "slice" else self._carried(path, operand, role, value)

    def out_of_iteration(self, path: Path, operand: int, role: Role, value: _Value) -> _Value:
        return value._replace(view=None) if role == "stack" else self._carried(path, operand, role, value)

    def _carried(self, path: Path, operand: int, role: Role, value: _Value) -> _Value:
        """End at a carry: what becomes of a parameter from iteration to iteration is not followed."""
        if not value.leaves or (role != "carry" and (self.into_loops or role != "const")):
            return value
        self.meet(path, [value], operand)
        return _DATA

    def equation(self, path: Path, eqn: Any, operands: list[_Value]) -> list[_Value]:
        n, leaves, name = len(eqn.outvars), _parameters(operands), eqn.primitive.name
        data = any(v.data for v in operands)
        if name == "stop_gradient" or not leaves:
            return [_Value(data=data)] * n
        if data or (name in _LOOK_UPS and operands[0].view is not None) or bodies(eqn)[0] == "while":
            if any(map(_is_floating, eqn.outvars)):
                self.meet(path, operands)
            return [_DATA] * n
        return [_Value(leaves, view=view) for view in _viewed(eqn, operands)]


def _slice_of(value: _Value, path: Path) -> _Value:
    """Return what is known of the slice that one iteration of a scan gets."""
    if value.view is None:
        return value
    view = value.view
    along = view.axes[0] if view.axes else None
    return value._replace(
        view=view._replace(axes=view.axes and view.axes[1:], loops=(*view.loops, (path, along)))
    )


def _viewed(eqn: Any, operands: list[_Value]) -> list[View | None]:
    """Return the views that the outputs of an equation on parameters are, None for outputs that are not views."""
    name, view, params = operation(eqn), operands[0].view, params_of(eqn)
    nothing: list[View | None] = [None] * len(eqn.outvars)
    if view is None or any(v.leaves for v in operands[1:]):
        return nothing
    axes = view.axes
    before, after = (tuple(atom.aval.shape) for atom in (eqn.invars[0], eqn.outvars[0]))
    if name in _SAME:
        return [view._replace(narrow=view.narrow or is_narrow(eqn.outvars[0].aval.dtype))]
    # Transposed first, as by order="F".
    if name == "reshape" and params["dimensions"] is not None:
        order = tuple(params["dimensions"])
        before, axes = tuple(before[i] for i in order), axes and tuple(axes[i] for i in order)
    if name == "transpose":
        return [view._replace(axes=axes and tuple(axes[i] for i in params["permutation"]))]
    if name == "broadcast_in_dim" and math.prod(before) != math.prod(after):
        return nothing
    if name in ("reshape", "squeeze", "expand_dims", "broadcast_in_dim"):
        return [view._replace(axes=_without_ones(axes, before, after))]
    if name == "rev":
        return [view._replace(axes=None)]
    if name == "slice":
        for i, (start, stop) in enumerate(zip(params["start_indices"], params["limit_indices"], strict=True)):
            view = view.cut(i, start, stop) if (start, stop) != (0, before[i]) else view
        return [view._replace(axes=None) if params["strides"] else view]
    if name == "split":
        stops = list(itertools.accumulate(params["sizes"]))
        starts = [0, *stops[:-1]]
        return [view.cut(params["axis"], *ends) for ends in zip(starts, stops, strict=True)]
    return nothing


def _without_ones(
    axes: tuple[int | None, ...] | None, before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[int | None, ...] | None:
    """Return the axes after a reshape that only adds and removes axes of size 1, else None."""
    if axes is None or [n for n in before if n != 1] != [n for n in after if n != 1]:
        return None
    kept = iter([axis for axis, n in zip(axes, before, strict=True) if n != 1])
    return tuple(next(kept) if n != 1 else None for n in after)
