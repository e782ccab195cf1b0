"""The plan behind `gf.per_example.norms`: which rule finds the norms of which parameter, and one pass that does it."""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr

from gradfn.core.precision import is_narrow, scaled_norm, wide, widen
from gradfn.flatten import flat_products, loss_of_example
from gradfn.jaxpr import Equation, Program, interpret, probe, trace
from gradfn.jaxpr.interpreter import Evaluate, Path
from gradfn.jaxpr.program import hide_objects, is_array, leaf_name
from gradfn.jaxpr.varying import as_varying, varying_axes
from gradfn.jaxpr.views import Meeting, View, parameter_meetings
from gradfn.per_example.ghost import (
    Factors,
    Rule,
    add_up,
    at,
    averaged,
    chunk_for,
    factors,
    fold,
    how,
    in_chunks,
    is_less,
    measure_each,
    measure_gradients,
    multiplies_out,
    norm_of,
    of_real,
    product,
    rule_for,
    safest,
)

SMALL = 1024  # numbers; of a leaf with fewer, every example gets its own copy, however it is used
FALLBACK, DIRECT, UNUSED = "vmap(grad), in chunks", "direct", "unused"


class Call:
    """A loss of one example and what it is called with: `floating` parameters, and the `batch`, flat."""

    def __init__(self, what: str, loss: Callable, params: Any, batch: tuple[Any, ...]) -> None:
        self.size = _size(what, batch)
        batch = jax.tree.map(jnp.asarray, batch)
        # Inside a shard_map each device has examples, gradients and norms of its own, also of what is the same on all.
        arrays = [leaf for leaf in jax.tree.leaves((params, batch)) if is_array(leaf)]
        self.varying = frozenset().union(*map(varying_axes, arrays))
        if self.varying:
            params = jax.tree.map(
                lambda x: as_varying(jnp.asarray(x), self.varying) if is_array(x) else x, params
            )
        self.program = trace(loss_of_example(loss), params, *jax.tree.map(_example, batch))
        self._has_aux = _checked_output(what, self.program)
        program = self.program
        avals = program.jaxpr.in_avals
        # The floating parameters, by their numbers among the program's inputs.
        self.numbers = [
            i
            for i, aval in enumerate(avals)
            if program.owners[i] == 0 and jnp.issubdtype(aval.dtype, jnp.inexact)
        ]
        if not self.numbers:
            came = ", ".join(
                f"{name} {aval.dtype}{list(aval.shape)}"
                for name, owner, aval in zip(program.names, program.owners, avals, strict=True)
                if owner == 0
            )
            raise TypeError(f"{what}: there is no floating parameter; got {came or 'no arrays':.200}")
        self.names = [program.names[i] for i in self.numbers]
        self.floating = [jnp.asarray(program.inputs[i]) for i in self.numbers]
        self.batch = jax.tree.leaves(batch)
        self._n_params = sum(owner == 0 for owner in program.owners)

    @property
    def arrays(self) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """All arrays that results depend on: parameters, others beside them, the batch, what the loss closes over."""
        inputs = self.program.inputs[: self._n_params]
        return self.floating, inputs, self.batch, list(self.program.jaxpr.consts)

    def of(self, arrays: tuple[list[Any], list[Any], list[Any], list[Any]]) -> "Call":
        """Return the same call of other arrays."""
        call = copy.copy(self)
        call.floating, inputs, call.batch, consts = arrays
        jaxpr = ClosedJaxpr(self.program.jaxpr.jaxpr, consts)
        inputs = [*inputs, *self.program.inputs[self._n_params :]]
        call.program = dataclasses.replace(self.program, inputs=inputs, jaxpr=jaxpr)
        return call

    def like(self, values: Sequence[Any]) -> Any:
        """Put gradients into the tree of the parameters, of their dtypes."""
        return self.tree([g.astype(x.dtype) for g, x in zip(values, self.floating, strict=True)])

    def inputs(self, floating: Sequence[Any], example: Sequence[Any]) -> list[Any]:
        """Return the program's inputs."""
        inputs = [*self.program.inputs[: self._n_params], *example]
        for i, leaf in zip(self.numbers, floating, strict=True):
            inputs[i] = leaf
        return inputs

    def split(self, outs: Sequence[Any]) -> tuple[Any, Any]:
        """Return the value and aux of the program's outputs."""
        out = self.program.rebuild(outs)
        return (out[0], hide_objects(out[1])) if self._has_aux else (out, None)

    def run(self, floating: Sequence[Any], example: Sequence[Any]) -> tuple[Any, Any]:
        """Return one example's value and aux."""
        closed = self.program.jaxpr
        return self.split(jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *self.inputs(floating, example)))

    def tree(self, values: Sequence[Any]) -> Any:
        """Put one value per floating parameter into the tree of the parameters."""
        by_number = dict(zip(self.numbers, values, strict=True))
        return self.program.like_arguments([by_number.get(i) for i in range(len(self.program.inputs))])[0]


def _example(x: Any) -> Any:
    """Return something with the shape and dtype of one example, to trace with."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x[0]
    return as_varying(jnp.zeros(x.shape[1:], x.dtype), varying_axes(x))


def _size(what: str, batch: tuple[Any, ...]) -> int:
    """Return the number of examples, after checks of the batch."""
    leaves = [
        (leaf_name(path[1:], "") or f"argument {path[0].idx + 1}", leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]
    ]
    if not leaves:
        raise ValueError(f"{what}: expected a batch after the parameters, came no array")
    for name, leaf in leaves:
        if not is_array(leaf) or not jnp.shape(leaf):
            came = f"{jnp.result_type(leaf)}[]" if is_array(leaf) else type(leaf).__name__
            raise ValueError(
                f"{what}: {name}: expected an array with the examples along its first axis, came {came}. "
                "What is the same for all examples, close over: lambda params, x: loss(params, x, it)"
            )
    first, size = leaves[0][0], leaves[0][1].shape[0]
    for name, leaf in leaves:
        if leaf.shape[0] != size:
            raise ValueError(
                f"{what}: {name}: expected {size} examples along the first axis, as {first} has, "
                f"came {list(leaf.shape)}"
            )
    if size == 0:
        raise ValueError(f"{what}: {first}: expected at least one example, came {list(leaves[0][1].shape)}")
    return size


def _checked_output(what: str, program: Program) -> bool:
    """Tell whether the loss returned aux, after a check that it returned a floating scalar."""
    out = program.rebuild(program.jaxpr.out_avals)
    has_aux = isinstance(out, tuple) and len(out) == 2
    aval = out[0] if has_aux else out
    if not hasattr(aval, "shape") or aval.shape != () or not jnp.issubdtype(aval.dtype, jnp.floating):
        came = jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", aval)
        raise TypeError(
            f"{what}: the loss of one example is a floating scalar, or (scalar, aux); came {came}. "
            "Give it the loss of a single example: not of a batch, and not gf.batch_mean of one"
        )
    return has_aux


class _Use(NamedTuple):
    """One place where a parameter is used by a rule: which operand, and whether its norm is found in place."""

    leaf: int  # among the floating parameters
    operand: int
    rule: Rule
    view: View
    alone: bool  # no other use adds to the gradient
    real: bool  # the parameter is, though it may be used as a complex number
    spot: bool  # the norm is found in the backward pass; else after it, when all uses are known


class Plan:
    """How the norms of each parameter are found.

    ``direct`` parameters are small against the values around them: every example gets its own copy, and its own
    gradient. ``shared`` ones have rules, ``uses`` by the path of the equation. The rest falls back.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        equations = call.program.equations()
        meetings: dict[int, list[Meeting]] = {i: [] for i in call.numbers}
        for meeting in parameter_meetings(call.program):
            for i in meeting.leaves:
                if meeting.path or meeting.operand == 0:  # aux has no gradient
                    meetings[i].append(meeting)
        self.methods: list[str] = []
        self.direct: list[int] = []
        self.shared: list[int] = []
        self.fallback: list[int] = []
        self.uses: dict[Path, _Use] = {}
        for i, number in enumerate(call.numbers):
            real = not jnp.iscomplexobj(call.floating[i])
            uses = _ruled(i, real, meetings[number], equations)
            if not meetings[number]:
                self.shared.append(i)
                self.methods.append(UNUSED)
            elif uses:
                self.shared.append(i)
                self.uses |= uses
                self.methods.append(_described(list(uses.values())))
            elif _is_small(call.floating[i].size, meetings[number], equations, call.program):
                self.direct.append(i)
                self.methods.append(DIRECT)
            else:
                self.fallback.append(i)
                self.methods.append(FALLBACK)
        self.equations = {path: equations[path] for path in self.uses}
        self.multiplied = {i for i in self.shared if self._is_multiplied(i)}
        avals = [
            var.aval
            for equation in equations.values()
            for var in (*equation.eqn.invars, *equation.eqn.outvars)
        ]
        self.is_narrow = any(is_narrow(getattr(aval, "dtype", bool)) for aval in avals)
        # Their gradients are averages over the batch already: a sum may be beyond the range of a narrow dtype.
        self.averaged = {use.leaf for use in self.uses.values() if use.view.narrow}

    def of(self, arrays: Any) -> "Plan":
        """Return the same plan for other arrays."""
        plan = copy.copy(self)
        plan.call = self.call.of(arrays)
        return plan

    def _is_multiplied(self, i: int) -> bool:
        """Tell whether several uses' gradient is made for each example once all of them are known."""
        paths = [path for path, use in self.uses.items() if use.leaf == i and not use.spot]
        if not paths or any(_leaf_axes(self.uses[path]) is None for path in paths):
            return False
        positions = 0
        for path in paths:
            use, equation = self.uses[path], self.equations[path]
            positions += use.rule.sizes[1] * math.prod(equation.axes[k] for k in _shared_axes(use, equation))
        return is_less(positions, *self.uses[paths[0]].rule.sizes[2:])

    def own(self) -> list[Any]:
        """Return a copy per example of the direct parameters."""
        return [
            jnp.broadcast_to(self.call.floating[i], (self.call.size, *self.call.floating[i].shape))
            for i in self.direct
        ]

    def tokens(self) -> dict[Path, Any]:
        """Return zeros whose gradients are the norms of lone uses, and the cotangents of others."""
        out = {}
        for path, use in self.uses.items():
            equation = self.equations[path]
            aval: Any = equation.eqn.outvars[0].aval
            shape, dtype = ((), _real(aval.dtype)) if use.spot else (aval.shape, aval.dtype)
            out[path] = as_varying(
                jnp.zeros((self.call.size, *equation.axes, *shape), dtype), self.call.varying
            )
        return out

    def losses(
        self, own: list[Any], some: list[Any], tokens: dict[Path, Any], which: Sequence[int], stop: bool
    ) -> tuple[Any, Any]:
        """Return each example's loss, their aux and captures; `some` are the parameters with numbers `which`.

        With `stop` no gradient reaches those whose gradient is made later, in `norms`.
        """

        def one(
            own: list[Any], tokens: Any, zero: Any, example: list[Any], shared: list[Any]
        ) -> tuple[Any, Any]:
            leaves = list(self.call.floating)
            for i, leaf in [*zip(self.direct, own, strict=True), *zip(which, shared, strict=True)]:
                leaves[i] = leaf
            inputs = self.call.inputs(leaves, example)
            visit = functools.partial(self._visit, self.multiplied if stop else set(), zero)
            outs, captures = interpret(self.call.program.jaxpr, visit, self.equations, inputs, tokens)
            value, aux = self.call.split(outs)
            return value, (aux, captures)

        def all_of_them(own: list[Any], shared: list[Any], tokens: Any, batch: list[Any]) -> tuple[Any, Any]:
            zeros = as_varying(jnp.zeros(self.call.size), self.call.varying)
            return jax.vmap(one, (0, 0, 0, 0, None))(own, tokens, zeros, batch, shared)

        return flat_products(all_of_them)(own, some, tokens, self.call.batch)

    def _visit(
        self,
        stopped: set[int],
        zero: Any,
        equation: Equation,
        evaluate: Evaluate,
        inputs: Sequence[Any],
        token: Any,
    ) -> tuple[list[Any], Any]:
        use = self.uses[equation.path]
        rule, V = use.rule, inputs[use.operand]
        left = lax.stop_gradient(rule.left(inputs))
        averages = use.leaf in self.averaged - stopped
        folded = use.spot and not averages and multiplies_out(rule) and not jnp.iscomplexobj(V)
        if folded or averages or use.leaf in stopped:
            inputs = list(inputs)
            inputs[use.operand] = lax.stop_gradient(V)
        (y,) = evaluate(inputs)
        # Even where all examples look up the same rows, positions for instance, each has a cotangent of its own.
        y += zero.astype(y.dtype)
        if averages:
            y = averaged(rule, y, V, self.call.size, left)
        if folded:
            return [fold(rule, y, V, token, left)], None
        if use.spot:
            return [probe(functools.partial(_norm_of, use), y, token, left)], None
        return [probe(lambda g, _: g, y, token)], left

    def norms(
        self, own: Sequence[Any], of_tokens: Mapping[Path, Any], captures: Mapping[Path, Any]
    ) -> tuple[dict[int, Any], dict[int, Any]]:
        """Return the norms `[B]` of the direct and the shared parameters, and sums of gradients made here."""
        n, out, sums = self.call.size, {}, {}
        waiting = dict(zip(self.direct, map(measure_gradients, own), strict=True))
        for i in self.shared:
            paths = [path for path, use in self.uses.items() if use.leaf == i]
            leaf = self.call.floating[i]
            if not paths:
                out[i] = as_varying(jnp.zeros(n, _real(leaf.dtype)), self.call.varying)
            elif self.uses[paths[0]].spot:
                # Of the parts, and of the layers of a scan.
                out[i] = norm_of_norms([of_tokens[path] for path in paths])
            else:
                gathered = [(of_tokens[path], captures[path]) for path in paths]
                factors_of = functools.partial(self._factors, paths)
                if i in self.multiplied:
                    chunk = chunk_for(n, leaf.size)
                    (total,), (out[i],) = in_chunks(
                        functools.partial(products, gathered, factors_of), n, chunk
                    )
                    sums[i] = self._as_leaf(i, paths[0], total)
                else:
                    waiting[i] = measure_each(factors_of, gathered)
        return out | dict(zip(waiting, safest(list(waiting.values())), strict=True)), sums

    def sums(self, which: Sequence[int], own: Sequence[Any], some: Sequence[Any]) -> dict[int, Any]:
        """Return sums over the batch: of each example's own gradients, and of what the backward pass gave `which`."""
        shared = [
            widen(g) * self.call.size if i in self.averaged else g for i, g in zip(which, some, strict=True)
        ]
        return dict(zip([*self.direct, *which], [*map(add_up, own), *shared], strict=True))

    def _factors(self, paths: list[Path], gathered: list[tuple[Any, Any]]) -> list[Factors]:
        """Return one example's gradient from several uses, or from one in a loop."""
        leaf = self.uses[paths[0]].leaf
        aligned = len(paths) > 1 or leaf in self.multiplied
        return [
            _positions(self.uses[path], self.equations[path], g, left, aligned)
            for path, (g, left) in zip(paths, gathered, strict=True)
        ]

    def _as_leaf(self, i: int, path: Path, total: jax.Array) -> jax.Array:
        """Bring a sum of products, `[s, k, n]`, in the parameter's order, into its shape."""
        leaf, axes = self.call.floating[i], _leaf_axes(self.uses[path])
        assert axes is not None
        own, *sides = (sorted(axis for axis in side if axis is not None) for side in axes)
        order = [*own, *sorted(sides)[0], *sorted(sides)[1]]
        total = total.reshape([leaf.shape[axis] for axis in order])
        return total.transpose(sorted(range(len(order)), key=lambda k: order[k])).reshape(leaf.shape)


def _norm_of(use: _Use, g: Any, left: Any) -> jax.Array:
    """Return the norm of what one use adds to an example's gradient, of the dtype of its token."""
    return norm_of([factors(use.rule, left, g, use.real)]).astype(_real(g.dtype))


def _real(dtype: Any) -> Any:
    """Return the dtype of norms."""
    return jnp.finfo(wide(dtype)).dtype


def products(gathered: Any, factors_of: Callable, start: Any, count: int) -> list[jax.Array]:
    """Return the gradients of some examples from what was gathered of their uses."""
    some = jax.tree.map(lambda x: at(x, start, count), gathered)
    return [jax.vmap(lambda one: product(factors_of(one)))(some)]


def _described(uses: Sequence[_Use]) -> str:
    if len(uses) == 1:
        return how(uses[0].rule) if uses[0].alone else f"{uses[0].rule.kind}, in a loop"
    what = "parts" if uses[0].alone else "uses"
    return f"{len(uses)} {what}: {', '.join(dict.fromkeys(use.rule.kind for use in uses))}"


def _ruled(
    leaf: int, real: bool, meetings: Sequence[Meeting], equations: Mapping[Path, Equation]
) -> dict[Path, _Use]:
    """Return the uses of a parameter if rules cover all of them, else none."""
    uses: dict[Path, _Use] = {}
    for meeting in meetings:
        if meeting.view is None or meeting.path not in equations:
            return {}
        rule = rule_for(equations[meeting.path].eqn, meeting.operand)
        if rule is None or meeting.path in uses:
            return {}
        uses[meeting.path] = _Use(leaf, meeting.operand, rule, meeting.view, False, real, False)
    pairs = itertools.combinations(uses.values(), 2)
    if all(one.view.is_apart_from(other.view) for one, other in pairs):
        for path, use in uses.items():
            alone = not _shared_axes(use, equations[path])
            # Of one position, both sides are small: they wait, so that one test is made of all such norms.
            waits = len(uses) == 1 and use.rule.sizes[1] == 1 and not equations[path].axes
            uses[path] = use._replace(alone=alone, spot=alone and not waits)
        if len(uses) == 1 or all(use.alone for use in uses.values()):
            return uses
    axes = {path: _leaf_axes(use) for path, use in uses.items()}
    if None in axes.values() or len({(a[0], frozenset(a[1:])) for a in axes.values() if a}) > 1:
        return {}
    return uses


def _shared_axes(use: _Use, equation: Equation) -> list[int]:
    """Return which of a place's leading axes are of loops that use the same numbers again and again."""
    own = {path for path, _ in use.view.loops}
    stacked = [frame for frame in equation.frames if frame.length is not None]
    return [k for k, frame in enumerate(stacked) if frame.path not in own]


_Axes = tuple[frozenset[int | None], ...]  # kept apart, rows, columns


def _leaf_axes(use: _Use) -> _Axes | None:
    """Return the parameter's axes that a use keeps apart, and those on either side of its products."""
    rule, axes, loops = use.rule, use.view.axes, [along for _, along in use.view.loops]
    if axes is None or use.view.part or None in loops or (rule.kind == "convolution" and rule.sizes[0] > 1):
        return None
    apart = [*loops, *[axes[i] for i in rule.own]]
    sides = [[axes[i] for i in side] for side in (rule.rows, rule.columns)]
    return tuple(frozenset(side) - {None} for side in (apart, *sides))


def _positions(use: _Use, equation: Equation, g: jax.Array, left: jax.Array, aligned: bool) -> Factors:
    """Return what a use adds to a gradient, all its iterations as positions of one sum.

    Where other uses add to the same gradient, their numbers are brought into the parameter's order: `aligned`.
    """
    rule, n = use.rule, len(equation.axes)
    right_of = rule.right
    for _ in range(n):
        right_of = jax.vmap(right_of)
    again = _shared_axes(use, equation)
    own = [k for k in range(n) if k not in again]

    def arranged(x: jax.Array) -> jax.Array:  # [*axes, s, f, ...] -> [own * s, again * f, ...]
        sizes = x.shape[n + 2 :]
        x = x.transpose(*own, n, *again, n + 1, *range(n + 2, x.ndim))
        return x.reshape(math.prod(x.shape[: len(own) + 1]), -1, *sizes)

    sides = [arranged(left), arranged(right_of(g, left))]
    found = Factors((sides[0], sides[1]), rule.sizes[2:], (rule.looks_up, False))
    if not aligned:
        return of_real(found, use.real)
    axes = use.view.axes or ()
    shape = equation.eqn.invars[use.operand].aval.shape  # type: ignore[attr-defined]
    ours = [(along, equation.axes[k]) for k, (_, along) in zip(own, use.view.loops, strict=True)]
    ours += [(axes[i], shape[i]) for i in rule.own]
    out = []
    for side, of_side in zip(sides, (rule.rows, rule.columns), strict=True):
        side = _in_order(side, 0, ours)
        if side.ndim == 3:
            side = _in_order(side, 2, [(axes[i], shape[i]) for i in of_side])
        out.append(side)
    rows, columns = (sorted({axes[i] or 0 for i in side}) for side in (rule.rows, rule.columns))
    swapped = rows > columns
    k, m = rule.sizes[2:]
    found = found._replace(sides=(out[0], out[1]))
    if swapped:
        found = Factors((out[1], out[0]), (m, k), (False, rule.looks_up))
    return of_real(found, use.real)


def _in_order(x: jax.Array, axis: int, parts: Sequence[tuple[int | None, int]]) -> jax.Array:
    """Bring an axis made of several of the parameter's axes into their order; `parts` are (axis, size)."""
    parts = [part for part in parts if part[0] is not None]
    order = sorted(range(len(parts)), key=lambda i: parts[i][0] or 0)
    if order == list(range(len(parts))):
        return x
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    x = x.reshape(*before, *[size for _, size in parts], *after)
    x = jnp.moveaxis(x, [axis + i for i in order], [axis + i for i in range(len(order))])
    return x.reshape(*before, -1, *after)


def _is_small(
    size: int, meetings: Sequence[Meeting], equations: Mapping[Path, Equation], program: Program
) -> bool:
    """Tell whether a copy of a parameter per example takes no more memory than the values it is used for."""
    if size <= SMALL:
        return True
    around = 0
    for meeting in meetings:
        if not meeting.path:
            return False
        equation = equations[meeting.path]
        outvars: Any = equation.eqn.outvars
        out = sum(math.prod(var.aval.shape) for var in outvars)
        atom: Any = (
            equation.eqn.invars[meeting.operand] if meeting.operand < len(equation.eqn.invars) else None
        )
        if atom is not None and math.prod(atom.aval.shape) > out:
            return False
        around += out * math.prod(equation.axes)
    return size <= around


def fall_back(
    call: Call, which: Sequence[int], chunk: int, weights: jax.Array | None = None
) -> tuple[dict[int, Any], dict[int, Any]]:
    """Return the norms `[B]`, and the sum of the gradients, of some parameters, by `vmap(grad)` of them.

    With weights `[B]` these are of the weighted gradients.
    """

    def of_one(example: list[Any]) -> list[Any]:
        def loss(leaves: list[Any]) -> Any:
            floating = list(call.floating)
            for i, leaf in zip(which, leaves, strict=True):
                floating[i] = leaf
            return call.run(floating, example)[0]

        return [widen(g) for g in jax.grad(loss)([call.floating[i] for i in which])]

    def of_some(start: Any, count: int) -> list[Any]:
        grads = jax.vmap(of_one)([at(leaf, start, count) for leaf in call.batch])
        return grads if weights is None else [weighted(g, at(weights, start, count)) for g in grads]

    sums, norms = in_chunks(of_some, call.size, chunk)
    return dict(zip(which, norms, strict=True)), dict(zip(which, sums, strict=True))


def weighted(grads: jax.Array, weights: jax.Array) -> jax.Array:
    """Return gradients `[B, ...]`, each times its weight, in float32 at least."""
    grads = widen(grads)
    return grads * weights.astype(grads.dtype).reshape(-1, *[1] * (grads.ndim - 1))


def norm_of_norms(norms: Sequence[jax.Array]) -> jax.Array:
    """Return the norm of what has these norms in parts, `[B]` or `[B, parts]` each, in the widest of their dtypes."""
    dtype = max((x.dtype for x in norms), key=lambda dtype: dtype.itemsize)
    parts = [x.astype(dtype).reshape(x.shape[0], math.prod(x.shape[1:])) for x in norms]
    together = jnp.concatenate(parts, 1)  # [B, parts]
    return together[:, 0] if together.shape[1] == 1 else scaled_norm(together, 1)


def sum_of(values: Any) -> Any:
    """Return the sum of arrays, in the widest of their dtypes."""
    values = list(values)
    widest = max((x.dtype for x in values), key=lambda dtype: dtype.itemsize)
    return functools.reduce(jnp.add, [x.astype(widest) for x in values])
