"""Describe the location of an equation: its operation, the library function around it, its line, its loops."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradfn.jaxpr import Equation
from gradfn.jaxpr.interpreter import Path, operation, params_of


class Loop(NamedTuple):
    """A loop around an equation.

    Attributes:
        kind: `scan`, `while`, or `shard_map` (a loop over devices).
        depth: the index of the loop among the frames around the equation, outermost first.
        length: the number of iterations; None if unknown.
        reverse: whether a scan runs from the last element to the first.
    """

    kind: str
    depth: int
    length: int | None
    reverse: bool


def loops_around(equation: Equation, equations: Mapping[Path, Equation]) -> tuple[Loop, ...]:
    """Return the loops around an equation, outermost first."""
    return tuple(
        Loop(frame.kind, depth, frame.length, bool(equations[frame.path].eqn.params.get("reverse", False)))
        for depth, frame in enumerate(equation.frames)
        if frame.length is not None or frame.kind == "while"
    )


def iteration_text(loop: Loop, i: int) -> str:
    """Return the text for an iteration of a loop."""
    if loop.kind == "scan":
        return f"scan iteration {i} (of 0 to {loop.length - 1 if loop.length else '?'})"
    return f"device {i}" if loop.kind == "shard_map" else f"run {i} in a while loop"


def order_key(path: Path, loops: Sequence[Loop] = (), iteration: Sequence[int] = ()) -> tuple[int, ...]:
    """Return a key that sorts equations and their iterations by the order of execution.

    For each level of nesting: the equation, the iteration in the order in which the loop runs (the backward pass of a
    scan runs from its end; 0 without a loop), and the body.
    """
    out: list[int] = []
    for equation, body in zip(path[::2], path[1::2], strict=False):
        out += [equation, 0, body]
    for loop, i in zip(loops, iteration, strict=False):
        out[3 * loop.depth + 1] = in_order(loop, i)
    return (*out, path[-1])


def in_order(loop: Loop, i: int) -> int:
    """Convert the index of an iteration to its position in the order of execution, and back."""
    return loop.length - 1 - i if loop.reverse and loop.length is not None else i


def around(equation: Equation, equations: Mapping[Path, Equation]) -> list[Equation]:
    """Return an equation and the containers around it, innermost first."""
    return [equation] + [equations[frame.path] for frame in reversed(equation.frames)]


def line_of(equations: Sequence[Equation]) -> str:
    """Return the innermost line of the user's own code: equations inside library functions have no such line."""
    return next((p.line for p in equations if p.eqn.source_info.traceback and ":" in p.line), "")


def operation_of(equation: Equation) -> str:
    """Return an operation's name, with the name of a function with a custom derivative, or of a `gf.tap`."""
    name = operation(equation.eqn)
    if name in ("custom_jvp_call", "custom_vjp_call"):
        return f"{name.removesuffix('_call')} {_custom_name(equation)}"
    return f"name {params_of(equation.eqn)['name']}" if name == "name" else name


def function_around(containers: Sequence[Equation]) -> str:
    """Return the name of the nearest named function around: library functions hide their own lines."""
    for equation in containers:
        if equation.eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call"):
            return _custom_name(equation)
        name = str(equation.eqn.params.get("name", ""))
        if name and not name.startswith("<"):
            return name.removeprefix("_")
    return ""


def _custom_name(equation: Equation) -> str:
    return str(equation.eqn.params["call_jaxpr"].debug_info.func_src_info).split(" ")[0]


def dtype_of(atom: Any) -> Any:
    """Return the dtype of a variable; bool for the rare variable without a dtype."""
    return getattr(atom.aval, "dtype", np.dtype(bool))
