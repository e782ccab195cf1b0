"""Gather parameters that are split over the axis of the batch (FSDP) where a loss computes with them.

A device holds a part of each parameter, and needs all of it to compute its share of the batch. Gathered at the start of
a step, all parameters would be whole on each device at once, and those of stacked layers would go through a `lax.scan`
whole. So the loss is traced, and a parameter is gathered at the equation where it meets data: inside the scan, one
layer at a time, in the dtype that is computed with. The backward pass gathers it again, and splits its gradient.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from gradfn.jaxpr.interpreter import Equation, Evaluate, Path, bodies, interpret
from gradfn.jaxpr.program import trace
from gradfn.jaxpr.views import Meeting, View, parameter_meetings
from gradfn.train.split import Split, without


def gather_where_used(f: Callable, split: Split | None, again: bool = True) -> Callable:
    """Return the same function of `(params, ...)`, which gathers parameters where they are used.

    A parameter that every iteration of a loop reads is gathered before the loop; one that is not used as it is (two are
    multiplied, or a loop carries it) at the start.

    Args:
        f: any JAX function; its parameters are a tree of arrays.
        split: how the parameters are split over a mesh; None if they are not.
        again: gather parameters again for the backward pass, and split their gradients where they are computed.
            Otherwise the equations are those of `f` and the gathering, so that they can be inspected.
    """
    if split is None:
        return f
    specs = {i: spec for i, spec in enumerate(split.specs) if _uses(spec, split)}
    if not specs:
        return f

    @functools.wraps(f)
    def gathered_f(*args: PyTree, **kwargs: PyTree) -> PyTree:
        program = trace(f, *args, **kwargs)
        # The parameters are the program's first inputs.
        meetings = [
            meeting
            for meeting in parameter_meetings(program, into_loops=False)
            if meeting.leaves & specs.keys()
        ]
        early = {i for meeting in meetings if not _is_local(meeting, split) for i in meeting.leaves}
        late: dict[Path, dict[int, PartitionSpec]] = defaultdict(dict)
        for path, operand, leaves, view in meetings:
            if view is not None and not leaves & early:
                late[path][operand] = _spec_of(view, specs[view.leaf])

        def visit(
            equation: Equation, evaluate: Evaluate, inputs: Sequence[PyTree], token: PyTree
        ) -> tuple[PyTree, None]:
            def run(inputs: Sequence[PyTree]) -> list[PyTree]:
                wanted = late[equation.path]
                return evaluate([_gather(x, split, wanted.get(k), again) for k, x in enumerate(inputs)])

            if bodies(equation.eqn)[0] or not again:
                # A container has memory of its own for the backward pass, and is not run twice.
                return run(inputs), None
            # What is saved for the backward pass is the part that the device holds.
            in_loop = any(frame.kind == "scan" for frame in equation.frames)
            return jax.checkpoint(run, prevent_cse=not in_loop)(inputs), None

        inputs = [
            _gather(x, split, specs.get(i) if i in early else None, again)
            for i, x in enumerate(program.inputs)
        ]
        outs, _ = interpret(program.jaxpr, visit, program.equations(late.keys()), inputs)
        return program.rebuild(outs)

    return gathered_f


def _uses(spec: PartitionSpec, split: Split) -> bool:
    """Tell whether an array is split over the axis of the batch."""
    return without(spec, split.axis) != spec


def _is_local(meeting: Meeting, split: Split) -> bool:
    """Tell whether a parameter can be gathered at the equation where it meets data, and not before."""
    view = meeting.view
    if view is None or view.axes is None or not meeting.path:
        return False
    # A loop along a split axis would have a part of it in each iteration.
    spec = split.specs[view.leaf]
    return not any(
        axis is None or _uses(PartitionSpec(*spec[axis : axis + 1]), split) for _, axis in view.loops
    )


def _spec_of(view: View, spec: PartitionSpec) -> PartitionSpec:
    """Return how a view of a parameter is split; the compiler decides about an axis that is cut."""
    entries: tuple[Any, ...] = (*spec, *(None,) * 32)
    cut = {axis for axis, _, _ in view.part}
    return PartitionSpec(
        *(
            None if axis is None else PartitionSpec.UNCONSTRAINED if axis in cut else entries[axis]
            for axis in view.axes or ()
        )
    )


def _gather(x: PyTree, split: Split, spec: PartitionSpec | None, again: bool) -> PyTree:
    """Return an array that is split by `spec` as one that is whole along the axis of the batch; None leaves it."""
    if spec is None:
        return x
    constrain = jax.lax.with_sharding_constraint
    whole, part = (NamedSharding(split.mesh, each) for each in (without(spec, split.axis), spec))
    if not again:
        return constrain(x, whole)

    @jax.custom_vjp
    def gather(x: jax.Array) -> jax.Array:
        return constrain(x, whole)

    gather.defvjp(lambda x: (constrain(x, whole), None), lambda _, g: (constrain(g, part),))
    return gather(x)
