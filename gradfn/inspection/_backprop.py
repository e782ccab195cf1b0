"""`gf.backprop`: the backward pass of a function, one step per equation, from the loss to the inputs.

Each equation of the forward pass gets a probe on every result (the incoming cotangent) and on every operand that
depends on the arguments (the outgoing cotangent). One backward pass records them all.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Float, PyTree

from gradfn.core.precision import norm
from gradfn.core.signature import transform_of
from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.inspection.where import (
    Loop,
    around,
    dtype_of,
    function_around,
    line_of,
    loops_around,
    operation_of,
    order_key,
)
from gradfn.jaxpr import Equation, Program, interpret, probe, trace_as_written
from gradfn.jaxpr.call import jit_arrays, scalar
from gradfn.jaxpr.dataflow import Dataflow
from gradfn.jaxpr.interpreter import Evaluate, Path, bodies
from gradfn.jaxpr.program import by_position
from gradfn.jaxpr.varying import shapes_of

# These only change the layout of a parameter: their result keeps the parameter's name.
_LAYOUT = {"broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "transpose"}


class Cotangent(NamedTuple):
    """A gradient of the function's value with respect to one result, or one operand, of an equation.

    Attributes:
        name: of an operand that is a leaf of the arguments (`W1`); empty for an intermediate value.
        shape: its shape.
        norm: the root of its sum of squares.
        value: the array with `keep`, else None.
    """

    name: str
    shape: tuple[int, ...]
    norm: float
    value: PyTree = None

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.norm:.3g}".strip()


class Step(NamedTuple):
    """One equation in the backward pass.

    Attributes:
        operation: name of the operation, such as `dot_general`.
        line: the source line of the forward equation, `file:line (function)`.
        scope: its `jax.named_scope` stack.
        within: the library function around it (`softmax`), or empty.
        iteration: the iterations of the scans around it (the devices of a `shard_map`), outermost first.
        incoming: the incoming cotangents, one per floating result.
        outgoing: the outgoing cotangents, one per use of an operand, without operands that have no gradient.
        factor: the norm of the outgoing over that of the incoming cotangents: how much the gradient shrank or grew.
            The gradient of a parameter (the first argument) counts only if there is no other outgoing cotangent.
            0 where the gradient ends, NaN where it was 0 already.
    """

    operation: str
    line: str
    scope: str
    within: str
    iteration: tuple[int, ...]
    incoming: tuple[Cotangent, ...]
    outgoing: tuple[Cotangent, ...]
    factor: float


class StepList(ShowsTable, list[Step]):
    """Steps of a backward pass; `print` shows them as a table."""

    def __getitem__(self, index: PyTree) -> PyTree:
        found = super().__getitem__(index)
        return StepList(found) if isinstance(index, slice) else found

    def sorted(self) -> "StepList":
        """Return the steps from the one that shrinks the gradient most to the one that amplifies it most."""
        return StepList(sorted(self, key=lambda s: (math.isnan(s.factor), s.factor)))

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per step.

        Args:
            rows: at most that many. In a longer table, all iterations of an equation share one row, and the rows
                that stay are those that change the norm of the gradient most. None: every step.
        """
        groups = [[step] for step in self] if rows is None or len(self) <= rows else _by_equation(self)
        caption = "×: the norm of the gradient after the step over that before it"
        if len(groups) < len(self):
            caption += "\n[0:N]: N iterations in one row: norm in of the first, norm out of the last, × per iteration"
        out = TextTable(caption=caption)
        out.add_column("operation", shorten=True)
        out.add_column("shape", drop=4)
        out.add_column("norm in", drop=3)
        out.add_column("×")
        out.add_column("norm out", drop=1)
        out.add_column("gradient of")
        out.add_column("scope", drop=5, shorten=True)
        out.add_column("line", drop=2, shorten="line")
        for group in groups:
            first, last = group[0], group[-1]
            axes = [max(values) for values in zip(*[step.iteration for step in group], strict=True)]
            iterations = [f"[0:{n + 1}]" for n in axes] if len(group) > 1 else [f"[{n}]" for n in axes]
            factor = _geometric_mean([step.factor for step in group])
            out.add_row(
                first.operation + (f" (in {first.within})" if first.within else "") + "".join(iterations),
                ", ".join(str(list(c.shape)) for c in first.incoming),
                math.hypot(*[c.norm for c in first.incoming]),
                factor,
                math.hypot(*[c.norm for c in last.outgoing]),
                ", ".join(dict.fromkeys(c.name for c in first.outgoing if c.name)),
                first.scope,
                first.line.rsplit("/", 1)[-1],
                weight=abs(math.log(factor))
                if 0 < factor < math.inf
                else 0
                if math.isnan(factor)
                else math.inf,
            )
        return out.folded(rows, "steps.table(rows=None)")


def _by_equation(steps: Sequence[Step]) -> list[list[Step]]:
    """Return the steps in groups: of an equation in a loop, all iterations; of any other, its one step."""
    groups: dict[PyTree, list[Step]] = {}
    counts: Counter[PyTree] = Counter()
    for step in steps:
        shapes = tuple((c.name, c.shape) for c in (*step.incoming, *step.outgoing))
        equation = (step.operation, step.line, step.scope, step.within, shapes, len(step.iteration))
        # One line may hold several such equations: the first of each iteration go together, the second, ...
        count = counts[(equation, step.iteration)]
        counts[(equation, step.iteration)] += 1
        groups.setdefault((equation, count), []).append(step)
    return list(groups.values())


def _geometric_mean(factors: Sequence[float]) -> float:
    if all(0 < factor < math.inf for factor in factors):
        return math.exp(sum(map(math.log, factors)) / len(factors))
    return math.prod(factors)


class _Info(NamedTuple):
    """What is known of an equation before it runs."""

    path: Path
    operation: str
    line: str
    scope: str
    within: str
    loops: tuple[Loop, ...]
    # Index, shape, dtype.
    results: tuple[tuple[int, tuple[int, ...], str], ...]
    # Index, shape, dtype, name.
    operands: tuple[tuple[int, tuple[int, ...], str, str], ...]
    # The names of the first argument's leaves.
    parameters: frozenset[str]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["value", "aux", "cotangents"], meta_fields=["infos"]
)
@dataclass(frozen=True, repr=False)
class Backward(ShowsTable):
    """The backward pass of one call: a list of steps once it is outside `jit`, a pytree of arrays inside.

    Iterate over it, index it, `print` it.

    Attributes:
        value: the function's value.
        aux: the second value that the function returned, or None.
        cotangents: what the probes recorded, per equation (its results and its operands).
        infos: the equations (static).
    """

    value: Float[Array, ""]
    aux: PyTree
    cotangents: tuple[PyTree, ...]
    infos: tuple[_Info, ...]

    @functools.cached_property
    def steps(self) -> StepList:
        """The steps in the order of the backward pass. Not inside `jit`."""
        host = jax.device_get(self.cotangents)
        found = []
        for info, recorded in zip(self.infos, host, strict=True):
            for iteration in itertools.product(*[range(loop.length or 1) for loop in info.loops]):
                step = _step(info, recorded, iteration)
                if step.incoming:
                    found.append((order_key(info.path, info.loops, iteration), step))
        found.sort(key=lambda pair: pair[0], reverse=True)
        return StepList(step for _, step in found)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: PyTree) -> PyTree:
        return self.steps[index]

    def sorted(self) -> StepList:
        """Return the steps from the one that shrinks the gradient most to the one that amplifies it most."""
        return self.steps.sorted()

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per step: see `StepList.table`."""
        return self.steps.table(rows)


def _step(info: _Info, recorded: PyTree, iteration: tuple[int, ...]) -> Step:
    def cotangents(described: Sequence[PyTree], probes: Sequence[PyTree]) -> tuple[Cotangent, ...]:
        out = []
        for (_, shape, _, *name), probed in zip(described, probes, strict=True):
            norm, reached = np.asarray(probed["norm"])[iteration]
            if reached:
                value = np.asarray(probed["value"])[iteration] if "value" in probed else None
                out.append(Cotangent("".join(name), shape, float(norm), value))
        return tuple(out)

    incoming = cotangents(info.results, recorded["results"])
    outgoing = cotangents(info.operands, recorded["operands"])
    onward = [c for c in outgoing if c.name not in info.parameters] or outgoing
    before, after = (math.hypot(*[c.norm for c in cs]) for cs in (incoming, onward))
    factor = after / before if before else math.nan
    return Step(info.operation, info.line, info.scope, info.within, iteration, incoming, outgoing, factor)


def backprop(f: Callable, *, keep: bool = False) -> Callable[..., Backward]:
    """Return a function that shows the backward pass of `f`: one step per equation, in its order.

    Gradients are with respect to all floating arrays in the positional arguments. Equations inside `jit`, `vmap` and
    `jax.checkpoint` are shown in line, those inside a `scan` once per iteration; a `custom_jvp` or `custom_vjp`
    function is one step. Compiled at the first call; it also works inside `jit`, with the result printed outside.

    Args:
        f: any JAX function `(*args) -> scalar` or `-> (scalar, aux)`.
        keep: also return the cotangents, not only their norms.

    Returns:
        A function of the same arguments that returns a `Backward`: iterate over its steps, `print` them, or call
        `.sorted()`.

    Raises:
        TypeError: a function that does not return a floating scalar; no floating array in the arguments; mutable
            arrays (`jax.new_ref`).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gradfn.inspection import backprop
        >>> def f(W, x):
        ...     return jnp.sum(jnp.sin(W @ x))
        >>> for step in backprop(f)(jnp.eye(2), jnp.array([0.0, 1.0])):
        ...     print(step.operation, [str(c) for c in step.outgoing], round(step.factor, 3))
        reduce_sum ['[2] 1.41'] 1.414
        sin ['[2] 1.14'] 0.804
        dot_general ['W [2, 2] 1.14', 'x [2] 1.14'] 1.0
    """

    def run(*args: PyTree, **kwargs: PyTree) -> Backward:
        """Return the backward pass of the call, step by step."""
        args, kwargs = by_position(f, args, kwargs) if not args else (args, kwargs)

        def checked(*args: PyTree, **kwargs: PyTree) -> tuple[PyTree, PyTree]:
            of = scalar(f, args, kwargs, range(len(args)), "backprop")
            return of.call(of.leaves.values)

        of = scalar(f, args, kwargs, range(len(args)), "backprop")
        program = trace_as_written(checked, *args, **kwargs)
        names = [name for name, i in zip(of.names, of.leaves.numbers, strict=True) if program.is_array[i]]
        equations = program.equations()
        if any(hasattr(v.aval, "inner_aval") for e in equations.values() for v in e.eqn.outvars):
            raise TypeError(
                "backprop: expected a function without mutable arrays, got one with jax.new_ref: writing to an array "
                "has no cotangent. Use gf.inspect or gf.nan_origin"
            )
        infos = active_equations(program, names)
        chosen = {info.path: (equations[info.path], info) for info in infos}
        summary = _with_value if keep else _norm

        def visit(
            equation: Equation, evaluate: Evaluate, inputs: Sequence[PyTree], token: PyTree
        ) -> tuple[list[PyTree], None]:
            info, inputs = chosen[equation.path][1], list(inputs)
            for (i, *_), t in zip(info.operands, token["operands"], strict=True):
                inputs[i] = probe(summary, inputs[i], t)
            outs = evaluate(inputs)
            for (i, *_), t in zip(info.results, token["results"], strict=True):
                outs[i] = probe(summary, outs[i], t)
            return outs, None

        def value_of(tokens: Mapping[Path, PyTree]) -> tuple[PyTree, PyTree]:
            only = {path: equation for path, (equation, _) in chosen.items()}
            outs, _ = interpret(program.jaxpr, visit, only, program.inputs, tokens)
            return program.rebuild(outs)

        tokens = {info.path: _tokens(info, equations[info.path], summary) for info in infos}
        (value, aux), recorded = jax.value_and_grad(value_of, has_aux=True)(tokens)
        return Backward(value, aux, tuple(recorded[info.path] for info in infos), infos)

    return transform_of(f, "backprop", own=0)(jit_arrays(run))


def _norm(g: PyTree, residual: PyTree = None) -> dict[str, jax.Array]:
    """Return the norm of a cotangent, and 1 as a mark: probes off the path to the loss are never called."""
    size = norm(g)
    return {"norm": jnp.stack([size, jnp.ones_like(size)])}


def _with_value(g: PyTree, residual: PyTree = None) -> dict[str, jax.Array]:
    return {**_norm(g, residual), "value": g}


def _tokens(info: _Info, equation: Equation, summary: Callable) -> dict[str, list[dict[str, jax.Array]]]:
    def token(atom: Any) -> dict[str, jax.Array]:
        return equation.zeros(shapes_of(summary, atom.aval))

    return {
        "results": [token(equation.eqn.outvars[i]) for i, *_ in info.results],
        "operands": [token(equation.eqn.invars[i]) for i, *_ in info.operands],
    }


def active_equations(program: Program, names: Sequence[str]) -> tuple[_Info, ...]:
    """Return the equations that depend on the floating leaves of the positional arguments.

    Args:
        program: the traced call.
        names: of these leaves, in order.
    """
    left = iter(names)
    labels = [
        next(left) if owner >= 0 and jnp.issubdtype(aval.dtype, jnp.inexact) else None
        for owner, aval in zip(program.owners, program.jaxpr.in_avals, strict=True)
    ]
    influence = _Influence()
    influence.run(program.jaxpr, labels)
    known: dict[Path, list[_Label]] = dict(influence.records)
    equations = program.equations()
    pairs = zip(program.owners, labels, strict=True)
    parameters = frozenset(label for owner, label in pairs if owner == 0 and label is not None)
    return tuple(_info(equations[path], equations, known[path], parameters) for path in sorted(known))


def _info(
    equation: Equation,
    equations: Mapping[Path, Equation],
    labels: Sequence["_Label"],
    parameters: frozenset[str],
) -> _Info:
    containers = around(equation, equations)

    def described(i: int, v: PyTree) -> tuple[int, tuple[int, ...], str]:
        return i, tuple(v.aval.shape), str(v.aval.dtype)

    operands = zip(equation.eqn.invars, labels, strict=True)
    return _Info(
        path=equation.path,
        operation=operation_of(equation),
        line=line_of(containers),
        scope=equation.scope,
        within=function_around(containers[1:]),
        loops=loops_around(equation, equations),
        results=tuple(described(i, v) for i, v in enumerate(equation.eqn.outvars) if _is_float(v)),
        operands=tuple((*described(i, v), name) for i, (v, name) in enumerate(operands) if name is not None),
        parameters=parameters,
    )


# The name of a value that is a leaf; empty for a value computed from leaves, None for one that does not depend on them.
_Label = str | None


class _Influence(Dataflow[_Label]):
    """Follows the leaves; the records are the equations that depend on them, with the operands' labels."""

    def constant(self, value: PyTree) -> _Label:
        return None

    def join(self, values: Sequence[_Label]) -> _Label:
        return values[0] if len(set(values)) == 1 else ""

    def enters(self, path: Path, kind: str, eqn: JaxprEqn, operands: list[_Label]) -> bool:
        return kind != "while"

    def equation(self, path: Path, eqn: JaxprEqn, operands: list[_Label]) -> list[_Label]:
        active = [label for label in operands if label is not None]
        # No gradient passes through a while loop: jax raises if one has to.
        if not active or eqn.primitive.name == "stop_gradient" or bodies(eqn)[0] == "while":
            return [None] * len(eqn.outvars)
        label = active[0] if eqn.primitive.name in _LAYOUT else ""
        outs = [label if _is_float(v) else None for v in eqn.outvars]
        if any(out is not None for out in outs):
            self.records.append((path, operands))
        return outs


def _is_float(atom: Any) -> bool:
    return jnp.issubdtype(dtype_of(atom), jnp.inexact)
