"""`gf.nan_origin` and `gf.nan_guard`: where the first NaN and the first infinity came from.

Both trace the value and the gradients of a function into one program and run it, with a visitor that inspects the
result of every equation. The order of execution decides which was first: each equation and iteration has a *key*
(`where.order_key`), and keys are compared number by number.
"""

# ruff: noqa: SIM905 (lists of words are easier to read as words)

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Bool, Float, Int, PyTree

from gradfn.core.devices import elements_of, replicated
from gradfn.core.signature import transform_of
from gradfn.inspection.causes import ELEMENTWISE, Operand, explain
from gradfn.inspection.where import (
    Loop,
    around,
    dtype_of,
    function_around,
    in_order,
    iteration_text,
    line_of,
    loops_around,
    operation_of,
    order_key,
)
from gradfn.jaxpr import Equation, Program, interpret, trace_without_probabilities
from gradfn.jaxpr.call import Scalar, jit_arrays, scalar
from gradfn.jaxpr.dataflow import Dataflow
from gradfn.jaxpr.interpreter import Evaluate, Path, operation
from gradfn.jaxpr.program import by_position, params_first
from gradfn.jaxpr.varying import any_device, zeros

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


class Event(NamedTuple):
    """A NaN or an infinity, and where it came from.

    Attributes:
        kind: `nan` or `inf`.
        operation: name of the operation, such as `log`; `argument` if it was already in the input.
        within: the library function around the operation (`norm`, `softmax`), or empty.
        phase: `forward`, `backward`, or `recomputed` (forward again, for `jax.checkpoint`).
        scope: the `jax.named_scope` stack; the path of an argument.
        line: the user's source line, `file:line (function)`.
        iteration: the iterations of the loops around it, outermost first, counted from 0.
        loops: kinds and lengths of those loops.
        element: index of the first bad element, or None.
        operands: of the operation; empty if they were not recorded.
        cause: a sentence on the likely cause, or empty.
    """

    kind: str
    operation: str
    within: str = ""
    phase: str = "forward"
    scope: str = ""
    line: str = ""
    iteration: tuple[int, ...] = ()
    loops: tuple[Loop, ...] = ()
    element: tuple[int, ...] | None = None
    operands: tuple[Operand, ...] = ()
    cause: str = ""

    def __str__(self) -> str:
        within = f" (in {self.within})" if self.within else ""
        where = [f"{self.phase}, {self.operation}{within}"]
        where += [iteration_text(loop, i) for loop, i in zip(self.loops, self.iteration, strict=True)]
        where += [f"in scope {self.scope}"] if self.scope and self.operation != "argument" else []
        where += [f"element {list(self.element)}"] if self.element else []
        lines = [", ".join(where)]
        if self.operation == "argument":
            lines = [f"in the argument {self.scope}, before anything was computed"]
        lines += [f"at {self.line}"] * bool(self.line)
        lines += [self.cause] * bool(self.cause)
        lines += [f"operand {i}: {operand}" for i, operand in enumerate(self.operands)]
        return "\n    ".join(lines)


@dataclass(frozen=True)
class NanReport:
    """Where non-finite values came from. `print` shows it.

    Attributes:
        value: the function's value.
        nonfinite_grads: names of the leaves whose gradient is not finite.
        nan: the first NaN that was computed, was in the arguments, or is a constant that reached a result; or None.
        inf: the first infinity computed from finite values; without one, the first that is a constant or in the
            arguments (such as a mask of -inf); or None.
    """

    value: float
    nonfinite_grads: tuple[str, ...]
    nan: Event | None
    inf: Event | None

    @property
    def ok(self) -> bool:
        """Whether value and gradients are finite: any non-finite intermediate value was harmless."""
        return bool(np.isfinite(self.value)) and not self.nonfinite_grads

    def __str__(self) -> str:
        bad = f"not finite: {', '.join(self.nonfinite_grads)}" if self.nonfinite_grads else "finite"
        lines = [f"value {self.value:.6g}; gradients {bad}"]
        harmless = " (harmless: it reached neither the value nor a gradient)" if self.ok else ""
        for kind, event in (("NaN", self.nan), ("inf", self.inf)):
            if event is not None:
                lines.append(f"first {kind}{harmless}: {event}")
        if not self.ok and self.nan is None and self.inf is None:
            lines.append(
                "no operation returned a non-finite value while they were inspected: the compiler fused them "
                "differently, and values are close to overflow"
            )
        return "\n".join(lines)

    __repr__ = __str__


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "nonfinite_grads", "nonfinite_inputs", "keys"],
    meta_fields=["spots", "leaf_names", "input_names"],
)
@dataclass(frozen=True)
class NanRecord:
    """The record of `gf.nan_guard` inside `jit`, a few numbers; `report()` or `print` describes them.

    Stacked by a `lax.scan` over steps, it reports on the first step that was not finite.

    Attributes:
        value: the loss.
        nonfinite_grads: `[leaves]` booleans.
        nonfinite_inputs: `[inputs, 2]` booleans: has a NaN, has an infinity.
        keys: `[3, levels]` int32: the keys of the first NaN, infinity and computed infinity; -1 for none.
        spots: the equations (static).
        leaf_names: names of the differentiated leaves (static).
        input_names: names of the inputs (static).
    """

    value: Float[Array, ""]
    nonfinite_grads: Bool[Array, " leaves"]
    nonfinite_inputs: Bool[Array, "inputs 2"]
    keys: Int[Array, "3 levels"]
    spots: tuple[Spot, ...]
    leaf_names: tuple[str, ...]
    input_names: tuple[str, ...]

    @property
    def ok(self) -> PyTree:
        """Whether value and gradients are finite, a boolean array (one per step where steps are stacked)."""
        return jnp.isfinite(self.value) & ~jnp.any(self.nonfinite_grads, axis=-1)

    def report(self) -> NanReport:
        """Return the report, that of the first step that was not finite if steps are stacked. Not inside `jit`."""
        host = jax.device_get(self)
        if np.ndim(host.value):
            bad = np.flatnonzero(~np.asarray(self.ok).ravel())
            step = np.unravel_index(bad[0] if bad.size else -1, np.shape(host.value))
            host = jax.tree.map(lambda x: x[step], host)
        return _report(host, {})

    def __str__(self) -> str:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self)):
            return "NanRecord, being traced: return it from jit to print it"
        return str(self.report())

    __repr__ = __str__


def nan_origin(f: Callable, argnums: int | Sequence[int] = 0) -> Callable[..., NanReport]:
    """Return a function that finds where the first NaN and the first infinity of `f` and its gradients come from.

    For one call, outside `jit` (inside, use `gf.nan_guard`). Every operation of the forward and the backward pass is
    inspected, including those inside `jit`, `scan`, `cond`, `while`, `vmap`, `jax.checkpoint` and custom derivatives.
    (The backward rule of a `custom_vjp` has the line of the call: jax records no other.) Compiled at the first call
    and, if something is found, once more to record its operands.

    Args:
        f: any JAX function `(*args) -> scalar` or `-> (scalar, aux)`.
        argnums: which positional arguments to differentiate with respect to, as in `jax.grad`; leaves that are not
            floating are skipped.

    Returns:
        A function of the same arguments that returns a `NanReport`.

    Raises:
        TypeError: a function that does not return a floating scalar; a call inside `jit`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gradfn.inspection import nan_origin
        >>> def f(x):
        ...     return jnp.sqrt(jnp.sum(x**2))
        >>> found = nan_origin(f)(jnp.zeros(3))
        >>> found.value, found.nonfinite_grads, found.nan.phase, found.nan.cause
        (0.0, ('x',), 'backward', '0 × inf')
        >>> nan_origin(f)(jnp.ones(3)).nan is None
        True
    """

    def search(*args: PyTree, **kwargs: PyTree) -> NanRecord:
        program, of = _trace(f, argnums, args, kwargs, "nan_origin")
        spots = _spots(program)
        keys, outs = _search(program, spots, program.inputs)
        value, _, grads = program.rebuild(outs)
        return _record(program, of, spots, value, grads, keys, _nonfinite_inputs(program, program.inputs))

    compiled = jit_arrays(search)

    @transform_of(f, "nan_origin", own=0)
    def find(*args: PyTree, **kwargs: PyTree) -> NanReport:
        """Return where the first NaN and the first infinity come from."""
        args, kwargs = by_position(f, args, kwargs) if not args else (args, kwargs)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            raise TypeError(
                "nan_origin: inside jit, use gf.nan_guard, or return the arguments and call it outside"
            )
        # They would stop at what is searched for.
        with jax.debug_nans(False), jax.debug_infs(False):
            record = jax.device_get(compiled(*args, **kwargs))
            program, details = None, {}
            for kind, row in (("nan", 0), ("inf", _inf_row(record))):
                spot, iteration = _decode(record, row)
                if spot is not None:
                    program = program or _trace(f, argnums, args, kwargs, "nan_origin")[0]
                    details[kind] = _details(program, kind, spot, iteration)
        return _report(record, details)

    return find


def nan_guard(f: Callable) -> Callable[..., tuple[PyTree, PyTree, NanRecord]]:
    """Return a function that computes value and gradients like `jax.value_and_grad`, and where a NaN came from.

    For use inside a compiled training step. While value and gradients are finite, it costs only that test; if they are
    not, the step runs again and every operation is inspected. (Under `vmap` both always run.) It takes three to five
    times as long to compile.

    Args:
        f: any JAX function `(params, *args) -> scalar` or `-> (scalar, aux)`.

    Returns:
        `(params, *args) -> (value, grads, record)`: value is `(scalar, aux)` if the function returns that; grads has
        the tree of the parameters (None for leaves that are not floating); the record is a `NanRecord`: print it, or
        call its `report()`, outside `jit`.

    Raises:
        TypeError: a function that does not return a floating scalar.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gradfn.inspection import nan_guard
        >>> step = jax.jit(nan_guard(lambda w, x: jnp.sum(jnp.log(w * x))))
        >>> value, grads, record = step(jnp.ones(2), jnp.array([1.0, 0.0]))
        >>> record.report().inf.operation
        'log'
        >>> bool(step(jnp.ones(2), jnp.array([1.0, 2.0]))[2].ok)
        True
    """

    @transform_of(f, "nan_guard", own=0)
    def guarded(*args: PyTree, **kwargs: PyTree) -> tuple[PyTree, PyTree, NanRecord]:
        """Return the value, the gradients, and a record of the first NaN and the first infinity."""
        args, kwargs = params_first(f, args, kwargs, "nan_guard")
        program, of = _trace(f, 0, args, kwargs, "nan_guard")
        spots = _spots(program)
        (value, aux), grads = jax.value_and_grad(of.call, has_aux=True)(of.leaves.values)

        def search(inputs: Sequence[PyTree]) -> tuple[jax.Array, jax.Array]:
            keys, _ = _search(program, spots, inputs)
            return keys, _nonfinite_inputs(program, inputs)

        shapes = jax.eval_shape(search, program.inputs)
        keys, inputs = zeros(shapes)
        bad = any_device(~jnp.isfinite(value) | jnp.any(_nonfinite(grads)))
        keys, inputs = lax.cond(bad, search, lambda _: (keys - 1, inputs), program.inputs)
        record = _record(program, of, spots, value, grads, keys, inputs)
        return (value if aux is None else (value, aux)), of.leaves.tree(grads)[0], record

    return guarded


def _trace(
    f: Callable, argnums: int | Sequence[int], args: Sequence[PyTree], kwargs: Mapping[str, Any], what: str
) -> tuple[Program, Scalar]:
    """Trace `(value, aux, gradients by leaf)` of a call, as written."""
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def value_and_grads(*args: PyTree, **kwargs: PyTree) -> tuple[PyTree, PyTree, list[PyTree]]:
        of = scalar(f, args, kwargs, numbers, what)
        (value, aux), grads = jax.value_and_grad(of.call, has_aux=True)(of.leaves.values)
        return value, aux, grads

    program = trace_without_probabilities(value_and_grads, *args, **kwargs)
    return program, scalar(f, args, kwargs, numbers, what)


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
        if not any(_is_inexact(v) for v in eqn.outvars):
            return computed
        if "nonfinite" in operands and "computed" not in operands:
            return ["nonfinite"] * len(eqn.outvars)
        if operation(eqn) not in _PASSIVE or "nonfinite" in operands:
            self.records.append((path, operands))
        return computed


def _spots(program: Program) -> dict[Path, Spot]:
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
        dtype=next(str(dtype_of(v)) for v in equation.eqn.outvars if _is_inexact(v)),
        slope_of=made_by.get(operands[1], "") if halves else "",
        constant=constant,
    )


def _is_inexact(atom: Any) -> bool:
    # The contents of a mutable array (jax.new_ref) are inspected where they are read.
    return jnp.issubdtype(dtype_of(atom), jnp.inexact) and not hasattr(atom.aval, "inner_aval")


def _record(
    program: Program,
    of: Scalar,
    spots: Mapping[Path, Spot],
    value: PyTree,
    grads: Sequence[PyTree],
    keys: jax.Array,
    nonfinite_inputs: jax.Array,
) -> NanRecord:
    names = _input_names(program)
    return NanRecord(value, _nonfinite(grads), nonfinite_inputs, keys, tuple(spots.values()), of.names, names)


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
    return lax.reduce(x * np.array(2.0**-40, x.dtype), np.zeros((), x.dtype), lax.add, range(x.ndim))


def _worst_of(arrays: Sequence[PyTree]) -> jax.Array:
    """Return the worst of several arrays, 0 for no arrays; in float64 if that is enabled."""
    wide = jnp.result_type(float)
    return sum([_worst(x).astype(wide) for x in arrays], jnp.zeros((), wide))


def _nonfinite(arrays: Sequence[PyTree]) -> jax.Array:
    wide = jnp.result_type(float)
    return ~jnp.isfinite(jnp.stack([_worst(x).astype(wide) for x in arrays]))


def _input_names(program: Program) -> tuple[str, ...]:
    names = [
        name if owner == 0 else f"{name} of {'argument ' + str(owner) if owner > 0 else 'the keywords'}"
        for name, owner in zip(program.names, program.owners, strict=True)
    ]
    return (*names, *["a constant that the function closes over"] * len(program.jaxpr.consts))


def _nonfinite_inputs(program: Program, inputs: Sequence[PyTree]) -> jax.Array:
    variables = [*program.jaxpr.jaxpr.invars, *program.jaxpr.jaxpr.constvars]
    values = [*inputs, *program.jaxpr.consts]
    worst = [_worst_of([x] * _is_inexact(v)) for v, x in zip(variables, values, strict=True)]
    table = jnp.stack(worst or [_worst_of([])])
    return jnp.stack([jnp.isnan(table), jnp.isinf(table)], axis=-1)


def _search(
    program: Program, spots: Mapping[Path, Spot], inputs: Sequence[PyTree]
) -> tuple[jax.Array, list[PyTree]]:
    """Run the program; return the keys of the first of each kind, `[3, levels]`, and the program's outputs."""
    # One equation's result is another's operand. The value is kept, so that its id stays its own.
    known: dict[int, tuple[PyTree, jax.Array]] = {}

    def worst(x: PyTree, keep: bool = False) -> jax.Array:
        if id(x) in known:
            return known[id(x)][1]
        found = _worst_of([x])
        if keep:
            known[id(x)] = (x, found)
        return found

    def visit(
        equation: Equation, evaluate: Evaluate, inputs: Sequence[PyTree], token: None
    ) -> tuple[list[PyTree], jax.Array]:
        outs = evaluate(inputs)
        # NaN and infinity survive further sums.
        none = _worst_of([])
        # Of computed operands, and of constants.
        before: list[list[PyTree]] = [[], []]
        for v, x, constant in zip(equation.eqn.invars, inputs, spots[equation.path].constant, strict=True):
            if _is_inexact(v):
                before[constant].append(worst(x))
        after = [worst(x, True) for v, x in zip(equation.eqn.outvars, outs, strict=True) if _is_inexact(v)]
        found = jnp.stack([sum(after, none), sum(before[False], none), sum(before[True], none)])
        return outs, _runs(found) if equation.in_while else found

    equations = program.equations(spots, enter_custom=True)
    outs, captures = interpret(program.jaxpr, visit, equations, inputs, merge=_merge_runs)
    return _first_of_all(captures, list(spots.values())), outs


def _runs(worst: jax.Array) -> jax.Array:
    """Convert the worst, `[..., (after, computed, constant)]`, to counts.

    These are the number of runs and, for each kind, the run in which it was first, from 1; 0 for never.
    """
    after, computed, constant = worst[..., 0], worst[..., 1], worst[..., 2]
    made = jnp.isinf(after) & jnp.isfinite(computed + constant)
    flags = [jnp.ones_like(made), jnp.isnan(after) & ~jnp.isnan(computed), jnp.isinf(after), made]
    return jnp.stack(flags, axis=-1).astype(jnp.int32)


def _merge_runs(old: jax.Array, new: jax.Array) -> jax.Array:
    """Merge the counts of two parts of a while loop: runs add up, and of two first runs the earlier one counts."""
    runs = old[..., :1]
    later = jnp.where(new[..., 1:] > 0, runs + new[..., 1:], 0)
    return jnp.concatenate([runs + new[..., :1], jnp.where(old[..., 1:] > 0, old[..., 1:], later)], axis=-1)


def _first_of_all(captures: Mapping[Path, jax.Array], spots: Sequence[Spot]) -> jax.Array:
    """Return the smallest key of each kind: `[3, levels]`, a row of -1 for none."""
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
    table = jnp.stack(rows)  # [groups, kinds, levels]
    chosen = _smallest(list(jnp.moveaxis(table, -1, 0)), table[..., 0] >= 0)
    return jnp.take_along_axis(table, chosen[None, :, None], axis=0)[0]


def _first_of_group(captures: Sequence[jax.Array], group: Sequence[Spot], levels: int) -> jax.Array:
    """Return the smallest key of each kind, `[3, levels]`, among equations in the same loops."""
    loops = group[0].loops
    counted = any(loop.length is None for loop in loops)
    worst = jnp.stack(captures, axis=-2)  # [*iterations, spots, 3 or, if runs are counted, 4]
    worst = jnp.flip(worst, [i for i, loop in enumerate(_with_axis(loops)) if loop.reverse])
    counts = (worst if counted else _runs(worst))[..., 1:]
    *shape, kinds = counts.shape
    flat = counts.reshape(-1, kinds)
    # All of them are in the same iterations of the same loops: they ran in this order.
    chosen = jnp.argmax(flat > 0, axis=0)
    if counted:
        outside = math.prod(loop.length or 1 for loop in itertools.takewhile(lambda loop: loop.length, loops))
        order = lax.broadcasted_iota(jnp.int32, flat.shape, 0)
        chosen = _smallest([order // (len(flat) // outside), flat, order], flat > 0)
    *iteration, spot = jnp.unravel_index(chosen, shape)
    static = np.array(
        [order_key(spot.path) + (0,) * (levels - len(order_key(spot.path))) for spot in group], np.int32
    )
    rows = jnp.asarray(static)[spot]  # [kinds, levels]
    for loop in loops:
        # A while loop has no axis of iterations: the counts are the run.
        i = jnp.take_along_axis(flat, chosen[None], axis=0)[0] if loop.length is None else iteration.pop(0)
        rows = rows.at[:, 3 * loop.depth + 1].set(i.astype(jnp.int32))
    return jnp.where(jnp.any(flat > 0, axis=0)[:, None], rows, -1)


def _with_axis(loops: Sequence[Loop]) -> list[Loop]:
    return [loop for loop in loops if loop.length is not None]


def _smallest(columns: Sequence[jax.Array], among: jax.Array) -> jax.Array:
    """Return, per column of `among [n, kinds]`, the smallest row, comparing one number after the other."""
    left = among
    for column in columns:
        column = jnp.where(left, column, _NEVER)
        left = left & (column == jnp.min(column, axis=0, keepdims=True))
    return jnp.argmax(left, axis=0)


def _decode(record: NanRecord, row: int) -> tuple[Spot | None, tuple[int, ...]]:
    """Return the equation of a key, and the iterations of the loops around it."""
    key = [int(k) for k in np.asarray(record.keys)[row]]
    if key[0] < 0:
        return None, ()
    by_key = {order_key(spot.path): spot for spot in record.spots}
    # A key may be padded; no equation's key is a prefix of another's.
    for length in range(1, len(key) + 1, 3):
        still = tuple(0 if i % 3 == 1 else k for i, k in enumerate(key[:length]))
        if still in by_key:
            spot = by_key[still]
            return spot, tuple(_index(loop, key[3 * loop.depth + 1]) for loop in spot.loops)
    raise AssertionError(f"no equation has the key {key}")


def _index(loop: Loop, run: int) -> int:
    return run - 1 if loop.length is None else in_order(loop, run)


def _inf_row(record: NanRecord) -> int:
    made = np.asarray(record.keys)[_KINDS.index("made")]
    return _KINDS.index("made" if made[0] >= 0 else "inf")


class _Details(NamedTuple):
    element: tuple[int, ...] | None
    operands: tuple[Operand, ...]


def _report(record: NanRecord, details: Mapping[str, _Details]) -> NanReport:
    nan = _event("nan", *_decode(record, 0), details)
    inf = _event("inf", *_decode(record, _inf_row(record)), details)
    inputs = np.asarray(record.nonfinite_inputs)
    if inputs[:, 0].any():
        nan = Event("nan", "argument", scope=record.input_names[int(inputs[:, 0].argmax())])
    if _inf_row(record) == _KINDS.index("inf"):
        if inf is not None:
            inf = inf._replace(cause="a constant in the program, as in a mask")
        if inputs[:, 1].any():
            inf = Event("inf", "argument", scope=record.input_names[int(inputs[:, 1].argmax())])
    bad = tuple(n for n, is_bad in zip(record.leaf_names, record.nonfinite_grads, strict=True) if is_bad)
    return NanReport(float(record.value), bad, nan, inf)


def _event(
    kind: str, spot: Spot | None, iteration: tuple[int, ...], details: Mapping[str, _Details]
) -> Event | None:
    if spot is None:
        return None
    element, operands = details.get(kind, _Details(None, ()))
    return Event(
        kind=kind,
        operation=spot.operation,
        within=spot.within,
        phase=spot.phase,
        scope=spot.scope,
        line=spot.line,
        iteration=iteration,
        loops=spot.loops,
        element=element,
        operands=operands,
        cause=explain(spot.operation, kind, operands, spot.dtype, spot.slope_of),
    )


def _details(program: Program, kind: str, spot: Spot, iteration: tuple[int, ...]) -> _Details:
    """Run the program once more, to record the operands of one equation in one iteration."""
    equation = program.equations([spot.path], enter_custom=True)[spot.path]
    outs: list[PyTree] = [v for v in equation.eqn.outvars if _is_inexact(v)]
    operands: list[PyTree] = [v for v in equation.eqn.invars if _is_inexact(v)]
    shape: tuple[int, ...] = tuple(outs[0].aval.shape)
    pointwise = len(equation.eqn.outvars) == 1 and spot.operation in ELEMENTWISE
    is_bad = jnp.isnan if kind == "nan" else jnp.isinf

    def visit(
        equation: Equation, evaluate: Evaluate, inputs: Sequence[PyTree], token: None
    ) -> tuple[list[PyTree], jax.Array]:
        results = evaluate(inputs)
        known = [x for v, x in zip(equation.eqn.outvars, results, strict=True) if _is_inexact(v)]
        bad = replicated(is_bad(known[0])).reshape(-1)
        element = jnp.unravel_index(jnp.argmax(bad), shape) if bad.size else [jnp.zeros((), int)] * len(shape)
        found = jnp.any(jnp.stack([jnp.any(is_bad(x)) for x in known]))
        numbers = [found, *element]
        for v, x in zip(equation.eqn.invars, inputs, strict=True):
            if _is_inexact(v):
                numbers += _numbers(jnp.asarray(x), element if pointwise else None)
        wide = jnp.float64 if any(x.dtype == jnp.float64 for x in known) else jnp.float32
        return results, jnp.stack([jnp.asarray(n).astype(wide) for n in numbers])

    def keep_first(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(old[..., :1] > 0, old, new)

    @jax.jit
    def run(inputs: Sequence[PyTree]) -> jax.Array:
        _, captures = interpret(program.jaxpr, visit, {spot.path: equation}, inputs, merge=keep_first)
        return captures[spot.path]

    index = tuple(i for loop, i in zip(spot.loops, iteration, strict=True) if loop.length is not None)
    numbers = np.asarray(run(program.inputs))[index].tolist()
    if not numbers[0]:
        # Compiled differently, the program gave other numbers.
        return _Details(None, ())
    element = tuple(int(i) for i in numbers[1 : 1 + len(shape)])
    rest = numbers[1 + len(shape) :]
    found = []
    for i, v in enumerate(operands):
        low, high, zeros, nans, infs, minus_infs, at = rest[7 * i : 7 * i + 7]
        counts = (int(zeros), int(nans), int(infs), int(minus_infs))
        known = pointwise and tuple(v.aval.shape) in (shape, ())
        found.append(
            Operand(str(v.aval.dtype), tuple(v.aval.shape), low, high, *counts, at if known else None)
        )
    return _Details(element if len(outs) == 1 else None, tuple(found))


def _numbers(x: jax.Array, element: Sequence[PyTree] | None) -> list[jax.Array]:
    """Return lowest and highest finite value, counts of zeros, NaN, inf, -inf, and the value at an element."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.abs(x)
    x = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    finite = jnp.isfinite(x)
    none = ~jnp.any(finite)
    low = jnp.min(jnp.where(finite, x, jnp.inf), initial=jnp.inf)
    high = jnp.max(jnp.where(finite, x, -jnp.inf), initial=-jnp.inf)
    nan = jnp.full((), jnp.nan, x.dtype)
    at = nan
    if element is not None:
        at = elements_of(x, [i[None] for i in element])[0] if x.ndim else x
    counts = [jnp.sum(c) for c in (x == 0, jnp.isnan(x), x == jnp.inf, x == -jnp.inf)]
    return [jnp.where(none, nan, low), jnp.where(none, nan, high), *counts, at]
