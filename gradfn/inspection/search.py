"""Search a program for its first NaN and its first infinity.

A visitor inspects the result of every equation. The order of execution decides which was first: each equation and
iteration has a *key* (`where.order_key`), and keys are compared number by number.

The same code runs within a compiled program, and outside of `jit`, equation by equation. The second needs no program
of its own: jax compiles each operation once per shape, and the layers of a network share theirs.
"""

# ruff: noqa: SIM905 (lists of words are easier to read as words)

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Literal
from jaxtyping import Array, Bool, Int, PyTree

from gradfn.inspection.where import (
    Loop,
    around,
    dtype_of,
    function_around,
    in_order,
    line_of,
    loops_around,
    operation_of,
    order_key,
)
from gradfn.jaxpr import Equation, Program, interpret
from gradfn.jaxpr.dataflow import Dataflow
from gradfn.jaxpr.interpreter import Evaluate, Path, operation

# What is searched for: a NaN that no computed operand had, an infinity, and an infinity computed from finite operands.
# Other infinities are constants (a mask) or passed through. A NaN constant (jnp.var has one) counts where it reaches
# a result.
_KINDS = ("nan", "inf", "made")
_NEVER = np.iinfo(np.int32).max


class Spot(NamedTuple):
    """The description of one equation."""

    path: Path
    operation: str
    # The jitted or custom function around it.
    within: str
    phase: str
    scope: str
    line: str
    loops: tuple[Loop, ...]
    dtype: str
    slope_of: str
    # Per operand: whether it is a NaN or an infinity that is a constant of the program.
    constant: tuple[bool, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "nonfinite_inputs"],
    meta_fields=["spots", "input_names"],
)
@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        keys: `[3, levels]` int32: the keys of the first NaN, infinity and computed infinity; -1 for none.
        nonfinite_inputs: `[inputs, 2]` booleans: has a NaN, has an infinity.
        spots: the equations (static).
        input_names: names of the inputs (static).
    """

    keys: Int[Array, "3 levels"]
    nonfinite_inputs: Bool[Array, "inputs 2"]
    spots: tuple[Spot, ...]
    input_names: tuple[str, ...]

    def first(self, kind: str) -> tuple[Spot | None, tuple[int, ...]]:
        """Return the first equation of a kind (`nan`, `inf`), and the iterations of the loops around it."""
        return self._decode(self.inf_row if kind == "inf" else 0)

    @property
    def inf_row(self) -> int:
        """The row of `keys` for infinities: of those computed from finite values, if there is one."""
        made = np.asarray(self.keys)[_KINDS.index("made")]
        return _KINDS.index("made" if made[0] >= 0 else "inf")

    @property
    def inf_was_computed(self) -> bool:
        """Whether the first infinity was computed from finite values."""
        return self.inf_row == _KINDS.index("made")

    def _decode(self, row: int) -> tuple[Spot | None, tuple[int, ...]]:
        key = [int(k) for k in np.asarray(self.keys)[row]]
        if key[0] < 0:
            return None, ()
        by_key = {order_key(spot.path): spot for spot in self.spots}
        # A key may be padded; no equation's key is a prefix of another's.
        for length in range(1, len(key) + 1, 3):
            still = tuple(0 if i % 3 == 1 else k for i, k in enumerate(key[:length]))
            if still in by_key:
                spot = by_key[still]
                return spot, tuple(_index(loop, key[3 * loop.depth + 1]) for loop in spot.loops)
        raise AssertionError(f"no equation has the key {key}")


def search(
    program: Program, inputs: Sequence[PyTree], spots: Mapping[Path, Spot] | None = None
) -> tuple[Found, list[PyTree]]:
    """Run a program on inputs; return what was found, and the program's outputs."""
    spots = spots_of(program) if spots is None else spots
    keys, outs = _first_keys(program, spots, inputs)
    return Found(keys, _nonfinite_inputs(program, inputs), tuple(spots.values()), _input_names(program)), outs


def nonfinite(arrays: Sequence[PyTree]) -> jax.Array:
    """Return which arrays have a NaN or an infinity, `[arrays]` booleans."""
    worst = [_worst_of([x]) for x in arrays]
    xp = _numpy_for(worst)
    return jnp.asarray(~xp.isfinite(xp.stack(worst)))


# These pass values through, and never return a new NaN or infinity. (`gather` may: jax fills in NaN for an index out
# of bounds. So may `convert_element_type`, of a number too large for float16.)
_PASSIVE = frozenset(
    "abs broadcast_in_dim clamp concatenate copy copy_p cummax cummin dynamic_slice dynamic_update_slice erf "
    "erfc expand_dims iota logistic max min name neg pad random_bits reduce_max reduce_min reshape rev select_n "
    "sharding_constraint sign slice sort split squeeze stop_gradient tanh transpose".split()
)


class _Constants(Dataflow[str]):
    """Distinguishes constants of the program from what it computes.

    A value is a finite `number`, `nonfinite` if it is made only of constants with a NaN or an infinity among them, or
    `computed`. The records are the equations that may return a new NaN or infinity, with what is known of their
    operands.
    """

    enter_custom = True

    def constant(self, value: PyTree) -> str:
        if isinstance(value, jax.core.Tracer) or np.ndim(value) or not _is_number(value):
            return "computed"
        return "number" if bool(np.isfinite(np.asarray(value, np.complex128))) else "nonfinite"

    def join(self, values: Sequence[str]) -> str:
        return values[0] if len(set(values)) == 1 else "computed"

    def equation(self, path: Path, eqn: JaxprEqn, operands: list[str]) -> list[str]:
        computed = ["computed"] * len(eqn.outvars)
        if not any(is_inexact(v) for v in eqn.outvars):
            return computed
        if "nonfinite" in operands and "computed" not in operands:
            return ["nonfinite"] * len(eqn.outvars)
        if operation(eqn) not in _PASSIVE or "nonfinite" in operands:
            self.records.append((path, operands))
        return computed


def spots_of(program: Program) -> dict[Path, Spot]:
    """Return every equation, also inside containers, that may return a new NaN or infinity."""
    equations = program.equations(enter_custom=True)
    made_by = {v: e.eqn.primitive.name for e in equations.values() for v in e.eqn.outvars}
    constants, closed = _Constants(), program.jaxpr
    constants.run(closed, ["computed"] * len(closed.in_avals), ["computed"] * len(closed.consts))
    return {
        path: _spot(equations[path], equations, made_by, tuple(known == "nonfinite" for known in operands))
        for path, operands in constants.records
    }


def _is_number(value: PyTree) -> bool:
    return not jnp.issubdtype(jnp.result_type(value), jax.dtypes.extended)


def _spot(
    equation: Equation,
    equations: Mapping[Path, Equation],
    made_by: Mapping[PyTree, str],
    constant: tuple[bool, ...],
) -> Spot:
    containers = around(equation, equations)
    stacks = [str(p.eqn.source_info.name_stack) for p in containers]
    phase = "backward" if any("transpose(" in stack for stack in stacks) else "forward"
    if any("rematted_computation" in stack for stack in stacks):
        phase = "recomputed"
    operands: list[PyTree] = equation.eqn.invars
    # jax has d sqrt(x) = 0.5 / sqrt(x).
    halves = equation.eqn.primitive.name == "div" and getattr(operands[0], "val", None) == 0.5
    return Spot(
        path=equation.path,
        operation=operation_of(equation),
        within=function_around(containers[1:]),
        phase=phase,
        scope=re.sub(r"/?rematted_computation", "", equation.scope).removeprefix("/"),
        line=line_of(containers),
        loops=loops_around(equation, equations),
        dtype=next(str(dtype_of(v)) for v in equation.eqn.outvars if is_inexact(v)),
        slope_of=made_by.get(operands[1], "") if halves else "",
        constant=constant,
    )


def is_inexact(atom: Any) -> bool:
    """Tell whether a variable may be a NaN."""
    # The contents of a mutable array (jax.new_ref) are inspected where they are read.
    return jnp.issubdtype(dtype_of(atom), jnp.inexact) and not hasattr(atom.aval, "inner_aval")


@functools.partial(jax.jit, inline=True)
def _worst(x: PyTree) -> jax.Array:
    """Return a scalar: NaN if an array has a NaN, else infinity if it has one, else a finite number.

    It is a sum, scaled down so that finite elements cannot add up to infinity. A maximum would not work: XLA's CPU
    backend loses NaNs in arrays of more than a few hundred elements.
    """
    x = jnp.asarray(x)
    if x.dtype.itemsize < 4:
        # The sums of narrow dtypes overflow.
        x = x.astype(jnp.float32)
    x = lax.abs(x)
    found = lax.reduce(x * np.array(2.0**-40, x.dtype), np.zeros((), x.dtype), lax.add, range(x.ndim))
    return found.astype(jnp.result_type(float))


def _worst_of(arrays: Sequence[PyTree]) -> PyTree:
    """Return the worst of several arrays, 0 for no arrays; a number on the host where nothing is being traced."""
    found = [_worst(x) for x in arrays]
    known = [x if isinstance(x, jax.core.Tracer) else np.asarray(x) for x in found]
    return sum(known, np.zeros((), jnp.result_type(float)))


def _numpy_for(values: Iterable[PyTree]) -> ModuleType:
    """Return `jax.numpy` if any value is being traced, else `numpy`, which compiles nothing."""
    return jnp if any(isinstance(x, jax.core.Tracer) for x in values) else np


def _input_names(program: Program) -> tuple[str, ...]:
    names = [
        name if owner == 0 else f"{name} of {'argument ' + str(owner) if owner > 0 else 'the keywords'}"
        for name, owner in zip(program.names, program.owners, strict=True)
    ]
    return (*names, *["a constant that the function closes over"] * len(program.jaxpr.consts))


def _nonfinite_inputs(program: Program, inputs: Sequence[PyTree]) -> jax.Array:
    variables = [*program.jaxpr.jaxpr.invars, *program.jaxpr.jaxpr.constvars]
    values = [*inputs, *program.jaxpr.consts]
    worst = [_worst_of([x] * is_inexact(v)) for v, x in zip(variables, values, strict=True)] or [
        _worst_of([])
    ]
    xp = _numpy_for(worst)
    table = xp.stack(worst)
    return jnp.asarray(xp.stack([xp.isnan(table), xp.isinf(table)], axis=-1))


def _first_keys(
    program: Program, spots: Mapping[Path, Spot], inputs: Sequence[PyTree]
) -> tuple[jax.Array, list[PyTree]]:
    """Run the program; return the keys of the first of each kind, `[3, levels]`, and the program's outputs."""
    # One equation's result is another's operand, in the same body.
    known: dict[tuple[Path, PyTree], PyTree] = {}

    def visit(
        equation: Equation, evaluate: Evaluate, inputs: Sequence[PyTree], token: None
    ) -> tuple[list[PyTree], PyTree]:
        outs = evaluate(inputs)
        eqn, body = equation.eqn, equation.path[:-1]
        # Of computed operands, and of constants.
        before = [_worst_of([]), _worst_of([])]
        for v, x, constant in zip(eqn.invars, inputs, spots[equation.path].constant, strict=True):
            if is_inexact(v):
                literal = isinstance(v, Literal)
                before[constant] += _worst_of([x]) if literal or (body, v) not in known else known[body, v]
        after = {(body, v): _worst_of([x]) for v, x in zip(eqn.outvars, outs, strict=True) if is_inexact(v)}
        known.update(after)
        found = [sum(after.values(), _worst_of([])), *before]
        xp = _numpy_for(found)
        return outs, _runs(xp.stack(found)) if equation.in_while else xp.stack(found)

    equations = program.equations(spots, enter_custom=True)
    outs, captures = interpret(program.jaxpr, visit, equations, inputs, merge=_merge_runs)
    return _first_of_all(captures, list(spots.values())), outs


def _runs(worst: jax.Array) -> jax.Array:
    """Convert the worst, `[..., (after, computed, constant)]`, to counts.

    These are the number of runs and, for each kind, the run in which it was first, from 1; 0 for never.
    """
    xp = _numpy_for([worst])
    after, computed, constant = worst[..., 0], worst[..., 1], worst[..., 2]
    made = xp.isinf(after) & xp.isfinite(computed + constant)
    flags = [xp.ones_like(made), xp.isnan(after) & ~xp.isnan(computed), xp.isinf(after), made]
    return xp.stack(flags, axis=-1).astype(np.int32)


def _merge_runs(old: jax.Array, new: jax.Array) -> jax.Array:
    """Merge the counts of two parts of a while loop: runs add up, and of two first runs the earlier one counts."""
    runs = old[..., :1]
    later = jnp.where(new[..., 1:] > 0, runs + new[..., 1:], 0)
    return jnp.concatenate([runs + new[..., :1], jnp.where(old[..., 1:] > 0, old[..., 1:], later)], axis=-1)


def _first_of_all(captures: Mapping[Path, jax.Array], spots: Sequence[Spot]) -> jax.Array:
    """Return the smallest key of each kind: `[3, levels]`, a row of -1 for none."""
    if not any(isinstance(x, jax.core.Tracer) for x in captures.values()):
        captures = jax.device_get(captures)
    levels = max([len(order_key(spot.path)) for spot in spots], default=1)
    # Equations inside the same loops.
    groups: dict[PyTree, list[Spot]] = {}
    for spot in spots:
        groups.setdefault(tuple((loop, spot.path[: 2 * loop.depth + 1]) for loop in spot.loops), []).append(
            spot
        )
    rows = [
        _first_of_group([captures[spot.path] for spot in group], group, levels) for group in groups.values()
    ]
    if not rows:
        return jnp.full((3, levels), -1, jnp.int32)
    xp = _numpy_for(rows)
    table = xp.stack(rows)  # [groups, kinds, levels]
    chosen = _smallest(list(xp.moveaxis(table, -1, 0)), table[..., 0] >= 0)
    return jnp.asarray(xp.take_along_axis(table, chosen[None, :, None], axis=0)[0], jnp.int32)


def _first_of_group(captures: Sequence[jax.Array], group: Sequence[Spot], levels: int) -> jax.Array:
    """Return the smallest key of each kind, `[3, levels]`, among equations in the same loops."""
    xp = _numpy_for(captures)
    loops = group[0].loops
    counted = any(loop.length is None for loop in loops)
    worst = xp.stack(captures, axis=-2)  # [*iterations, spots, 3 or, if runs are counted, 4]
    worst = xp.flip(worst, [i for i, loop in enumerate(_with_axis(loops)) if loop.reverse])
    counts = (worst if counted else _runs(worst))[..., 1:]
    *shape, kinds = counts.shape
    flat = counts.reshape(-1, kinds)
    # All of them are in the same iterations of the same loops: they ran in this order.
    chosen = xp.argmax(flat > 0, axis=0)
    if counted:
        outside = math.prod(loop.length or 1 for loop in itertools.takewhile(lambda loop: loop.length, loops))
        order = xp.broadcast_to(xp.arange(len(flat))[:, None], flat.shape)
        chosen = _smallest([order // (len(flat) // outside), flat, order], flat > 0)
    *iteration, spot = xp.unravel_index(chosen, shape)
    static = [order_key(spot.path) + (0,) * (levels - len(order_key(spot.path))) for spot in group]
    columns = list(xp.moveaxis(xp.asarray(static)[spot], -1, 0))  # [kinds, levels] -> levels * [kinds]
    for loop in loops:
        # A while loop has no axis of iterations: the counts are the run.
        i = xp.take_along_axis(flat, chosen[None], axis=0)[0] if loop.length is None else iteration.pop(0)
        columns[3 * loop.depth + 1] = i
    return xp.where(xp.any(flat > 0, axis=0)[:, None], xp.stack(columns, axis=-1), -1)


def _with_axis(loops: Sequence[Loop]) -> list[Loop]:
    return [loop for loop in loops if loop.length is not None]


def _smallest(columns: Sequence[jax.Array], among: jax.Array) -> jax.Array:
    """Return, per column of `among [n, kinds]`, the smallest row, comparing one number after the other."""
    xp, left = _numpy_for(columns), among
    for column in columns:
        column = xp.where(left, column, _NEVER)
        left = left & (column == xp.min(column, axis=0, keepdims=True))
    return xp.argmax(left, axis=0)


def _index(loop: Loop, run: int) -> int:
    return run - 1 if loop.length is None else in_order(loop, run)
