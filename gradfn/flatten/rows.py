"""Rows: the operations between products, with their leading axes merged into one.

An operation on `[batch, time, ...]` that treats every position independently is the same operation on `[batch * time,
...]`. `row_equations` finds such equations that are connected to given values, `in_rows` evaluates one.
"""

# ruff: noqa: SIM905 (lists of words are easier to read as words)

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jaxtyping import PyTree

from gradfn.jaxpr.interpreter import Path, bodies, operation, stands_for

Value = tuple[Path, PyTree]  # the path of a body, and a variable of it

_ELEMENTWISE = set(
    "abs add add_any and ceil clamp convert_element_type copy cos div eq erf erf_inv erfc exp exp2 expm1 floor ge "
    "gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow rem round rsqrt select_n sign "
    "sin sqrt square stop_gradient sub tan tanh xor".split()
)
_REDUCTIONS = set("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin".split())


def row_equations(eqns: Mapping[Path, PyTree], starts: Iterable[tuple[Value, int]]) -> dict[Path, int]:
    """Return the equations that are connected to some values and work on each of their rows independently.

    Args:
        eqns: all of a program, by path.
        starts: values, each with the number of leading axes of its rows.

    Returns:
        By path, the number of leading axes of the rows.
    """
    users: dict[Value, list[Path]] = defaultdict(list)
    same: dict[Value, list[Value]] = defaultdict(list)  # outside and inside
    for path, eqn in eqns.items():
        for value in values_of(path, (*eqn.invars, *eqn.outvars)):
            users[value].append(path)
        for outer, inner in _across(path, eqn):
            same[outer].append(inner)
            same[inner].append(outer)

    found: dict[Path, int] = {}
    known: set[Value] = set()
    todo = list(starts)
    while todo:
        value, n = todo.pop()
        if value in known:
            continue
        known.add(value)
        todo += [(other, n) for other in same[value]]
        for path in users[value]:
            eqn = eqns[path]
            if path not in found and _works_on_rows(eqn, n):
                found[path] = n
                lead = eqn.outvars[0].aval.shape[:n]
                alike = [atom for atom in (*eqn.invars, *eqn.outvars) if atom.aval.shape[:n] == lead]
                todo += [(other, n) for other in values_of(path, alike)]
    # A value that has a name keeps its shape, but is followed on both sides.
    return {path: n for path, n in found.items() if operation(eqns[path]) != "name"}


def values_of(path: Path, atoms: Iterable[PyTree]) -> list[Value]:
    """Return the operands or results of the equation at a path that are not literals."""
    return [(path[:-1], atom) for atom in atoms if not isinstance(atom, Literal)]


def _across(path: Path, eqn: Any) -> Iterator[tuple[Value, Value]]:
    """Yield pairs of a value outside a jit, or a choice by platform, and the same value inside it."""
    choice = stands_for(eqn) is not None
    kind, inner = bodies(eqn, enter_choices=True)
    if kind == "jit" or choice:
        operands = eqn.invars[1:] if choice else eqn.invars
        for k, (body, _) in enumerate(inner):
            for outer, own in zip((*operands, *eqn.outvars), (*body.invars, *body.outvars), strict=True):
                if not isinstance(outer, Literal) and not isinstance(own, Literal):
                    yield (path[:-1], outer), ((*path, k), own)


def _works_on_rows(eqn: Any, n: int) -> bool:
    """Tell whether an equation treats all rows alike, where the first n axes are those of the rows."""
    name, operands, out = operation(eqn), [a.aval.shape for a in eqn.invars], eqn.outvars[0].aval.shape
    if len(out) < n or any(any(spec_of(atom)) for atom in (*eqn.invars, *eqn.outvars)):
        return False
    if name in _ELEMENTWISE or name == "name":
        return all(len(shape) in (0, len(out)) for shape in operands)
    if name in _REDUCTIONS:
        return min(eqn.params["axes"]) >= n
    if name == "broadcast_in_dim":
        axes = tuple(eqn.params["broadcast_dimensions"])
        return len(operands) == 1 and axes[:n] == tuple(range(n)) and operands[0][:n] == out[:n]
    return False


def spec_of(atom: Any) -> tuple[PyTree, ...]:
    """Return how a value's axes are sharded over devices, as far as its type shows."""
    sharding = getattr(atom.aval, "sharding", None)
    return tuple(sharding.spec) if sharding is not None else ()


def in_rows(eqn: Any, inputs: Sequence[PyTree], n: int) -> jax.Array:
    """Evaluate an equation on operands whose n leading axes are merged into one, as are those of the result."""
    out, params = eqn.outvars[0].aval.shape, dict(eqn.params)
    merged = (math.prod(out[:n]), *out[n:])
    if "axes" in params:
        params["axes"] = tuple(int(axis) - n + 1 for axis in params["axes"])
    if eqn.primitive.name == "broadcast_in_dim":
        axes = params["broadcast_dimensions"]
        params |= {"shape": merged, "broadcast_dimensions": (0, *(int(axis) - n + 1 for axis in axes[n:]))}
    operands = [_merged(x, n, out[:n]) for x in inputs]
    return eqn.primitive.bind(*operands, **params)


def _merged(x: PyTree, n: int, lead: tuple[int, ...]) -> PyTree:
    """Return an operand with its leading axes merged; they are those of the result, or of size 1."""
    shape = jnp.shape(x)
    if not shape:
        return x
    if math.prod(shape[:n]) == 1:
        return x.reshape(1, *shape[n:])  # [1, 1, ...] -> [1, ...]
    # [batch or 1, time or 1, ...] -> [batch * time, ...]
    return jnp.broadcast_to(x, lead + shape[n:]).reshape(math.prod(lead), *shape[n:])
