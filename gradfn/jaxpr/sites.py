"""Sites: the values inside a program that have a name, from three sources.

(a) `name`: values that the user named with `checkpoint_name` (`gf.tap`).
(b) `scope`: the outputs of a `jax.named_scope`: values produced in it and used outside it. Flax Linen, Haiku and
    gradfn open one per module.
(c) `parameter`: where a value derived only from parameters first meets data, named after the parameter's path (the
    product `W1 x` is `W1`, the sum with the bias is `b1`), and the activation function that directly follows a site,
    named `b1:sigmoid`. With this source, every framework has sites.

A value named by several sources is listed once, under the first of them; but a scope entered several times, or named
after a class as Equinox does, yields to the parameter's name. One analysis of the program finds them all: it knows
for each value which parameters it derives from and whether it has met data.

Only what the result depends on counts: for a loss that returns `(scalar, aux)`, that is the scalar. What leaves a
scope for aux alone, such as a new running mean, is not a site; values named by the user always are.

A value made from several parameters is named after the one that most of its elements are from: a scaled weight
`g * W` is `W`, and so is a weight with a low-rank update, `W + A B`. If there is none (a weight that a network
generates, a custom function of a whole tree), it is named after the path that the parameters share, such as `hyper`;
without one, after the custom function, or `h+o` for parameters from `h/...` and `o/...`.

Weights selected by an index (a mixture of experts) and weights updated along their gradient (an inner loop of
training) remain weights: the site is their product with data.
"""

import bisect
import difflib
import fnmatch
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Var
from jax.typing import DTypeLike
from jaxtyping import PyTree

from gradfn.jaxpr.activations import (
    NAMES,
    WITH_A_SETTING,
    Sample,
    constant,
    fresh,
    is_constant,
    is_zero,
    recognize,
    simulate,
    simulate_body,
)
from gradfn.jaxpr.call import value_and_aux
from gradfn.jaxpr.dataflow import Dataflow, Role
from gradfn.jaxpr.interpreter import Equation, Path, bodies, operation, params_of, scope_of
from gradfn.jaxpr.program import Program
from gradfn.jaxpr.reach import Reach, reaching
from gradfn.jaxpr.units import Operand, axis_of_parameter, transposed, units_of
from gradfn.jaxpr.users import RESULT, Users

_IDENTITIES = {
    "name",
    "reshape",
    "transpose",
    "convert_element_type",
    "copy",
    "squeeze",
    "sharding_constraint",
}
_ELEMENTWISE = {"add", "sub", "mul", "div", "add_any", "max", "min", "pow", "select_n", "clamp", "neg"}
_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general"}
_SUMS = {"add", "sub", "add_any"}
_RESHAPES = {*_IDENTITIES, "broadcast_in_dim", "expand_dims", "slice", "rev", "stop_gradient"}


@dataclass(frozen=True)
class Site:
    """One named value of a program.

    Attributes:
        name: by which it is requested.
        path: of the equation that computes it.
        index: of the equation's output.
        shape: of one value.
        dtype: of the value.
        axes: the leading axes that loops and devices add.
        loops: how many entries of the path lead to each of those loops.
        source: of the name: `name` (`gf.tap`), `scope` (`jax.named_scope`) or `parameter`; `backward` of a value named
            in the backward rule of a `jax.custom_vjp`, which only `gf.inspect` has.
        line: the source line, `file:line (function)`.
        scope: its `jax.named_scope` stack.
        kind: the activation function that computes it, or empty.
        units: its axes that are units: those that the parameters of a product or a sum gave it, the last one where none
            did; empty where they were mixed with others since.
        differentiable: false for integers and for values inside a while loop, which have no gradient.
        reaches: what is computed from it: `result`, only `aux` (the gradient is then zero), or `nothing`.
    """

    name: str
    path: Path
    index: int
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[int, ...]
    loops: tuple[int, ...]
    source: str
    line: str
    scope: str
    kind: str
    units: tuple[int, ...]
    differentiable: bool
    reaches: str


Selection = str | Callable[[Site], bool] | Iterable[str] | None


class Use(NamedTuple):
    """An operand, derived only from parameters, of an equation where it meets data.

    `leaves` are the indices of those parameters among the program's inputs, `path` is the equation's, `operand` the
    operand's index. At a scan or while, the operand is a carry; at a cond, it is a branch's result; with the empty
    path, an output of the program.
    """

    path: Path
    operand: int
    leaves: frozenset[int]


Origin = tuple[Path, int]


class _Value(NamedTuple):
    """What is known of a value: its parameters, whether it has met data, and the equation that computes it.

    With both `leaves` and `data` it is a *choice*: parameters selected by an index or updated along a gradient, by the
    equations `chosen_at`. `main` is the parameter that most of its elements are from, `size` the number of elements
    that determine it. `cotangent` marks data of a backward pass. `units` are its axes that are units, if that is known.
    """

    leaves: frozenset[int] = frozenset()
    data: bool = False
    main: int | None = None
    size: int = 0
    chosen_at: frozenset[Origin] = frozenset()
    cotangent: bool = False
    origin: Origin | None = None
    kind: str = ""
    sample: Sample | None = None
    units: tuple[int, ...] | None = None

    @property
    def parametric(self) -> bool:
        return bool(self.leaves) and not self.data

    @property
    def choice(self) -> bool:
        return bool(self.leaves) and self.data

    @property
    def anchor(self) -> Origin | None:
        """The site that this value is, up to reshapes."""
        return self.sample.anchor if self.sample is not None and self.sample.values is None else None

    @property
    def lasting(self) -> "_Value":
        """What remains known from one iteration of a loop to the next."""
        return self._replace(origin=None, kind="", sample=None, units=None)


def _either(values: Sequence[_Value]) -> _Value:
    """Return what is known of a value that is one of several: a carry, or the result of a branch."""
    data = [v for v in values if v.data and not v.leaves]
    if data:
        return _Value(data=True, cotangent=all(v.cotangent for v in data))
    made = [v for v in values if v.leaves]
    if not made:
        return _Value()
    mains = {v.main for v in made}
    return _Value(
        leaves=frozenset().union(*[v.leaves for v in made]),
        data=any(v.data for v in made),
        main=mains.pop() if len(mains) == 1 else None,
        size=max(v.size for v in made),
        chosen_at=frozenset().union(*[v.chosen_at for v in made]),
    )


class _Found(NamedTuple):
    """A site before it has its final name."""

    path: Path
    output: int
    base: str
    source: str
    kind: str
    origin: Origin
    anchor: Origin | None = None
    units: tuple[int, ...] | None = None


class _Analysis(Dataflow[_Value]):
    """Follows parameters and data; the records are sites (`_Found`) and uses of parameters (`Use`)."""

    def __init__(self, names: Sequence[str], everything: bool, reach: Reach) -> None:
        super().__init__()
        self.names = names
        # No argument but the parameters: whatever a scope returns is a site.
        self.everything = everything
        self.reach = reach
        # Choices that have met data since: the site is there.
        self.moved: set[Origin] = set()
        # Where each variable was produced, in which scope, and as which activation function.
        self.produced: dict[Var, tuple[Path, int, str, str]] = {}
        # Containers of the backward pass, and calls of activation functions.
        self.backward: set[Path] = set()
        self.calls: dict[Path, str] = {}

    def constant(self, value: PyTree) -> _Value:
        return _Value(sample=constant(value))

    def join(self, values: Sequence[_Value]) -> _Value:
        return _either(values)

    def bind(self, path: Path, k: int, var: Any, value: _Value, eqn: Any | None) -> _Value:
        if eqn is not None:
            self.produced[var] = (path, k, scope_of(eqn), value.kind)
            value = value if value.origin else value._replace(origin=(path, k))
        return value if value.sample else value._replace(sample=fresh((path, k), var.aval))

    def use(self, path: Path, k: int, var: Any, value: _Value, eqn: Any | None) -> _Value:
        """Record a scope's output: a value used outside the scope that it was produced in."""
        needed = self.reach.operands.get(path, ()) if eqn else self.reach.results.get(path, ())
        if not needed or not needed[k] or var not in self.produced:
            return value
        at, output, scope, kind = self.produced[var]
        if not scope or not _is_inexact(var) or not (value.data or self.everything):
            return value
        if eqn is not None and f"{scope_of(eqn)}/".startswith(f"{scope}/"):
            return value
        origin = value.origin or (at, output)
        kind = kind or recognize(value.sample, var.aval)
        self.records.append(_Found(at, output, scope, "scope", kind, origin, units=value.units))
        return value._replace(sample=fresh((at, output), var.aval, origin))

    def enters(self, path: Path, kind: str, eqn: Any, operands: list[_Value]) -> bool:
        if self._is_backward(path, eqn):
            self.backward.add(path)
        name = params_of(eqn).get("name", "")
        if kind in ("cond", "scan", "while") or name not in NAMES or any(v.leaves for v in operands):
            return True
        # jax.nn.silu and the like are one function, whatever they are made of.
        self.calls[path] = _kind_of_call(bodies(eqn)[1][0], name, eqn, operands)
        return not self.calls[path]

    def choose(self, path: Path, index: _Value, values: Sequence[_Value]) -> _Value:
        out = _either(values)
        self.records += [Use(path, k, v.leaves) for k, v in enumerate(values) if v.parametric and out.data]
        return out

    def into_loop(self, path: Path, operand: int, role: Role, value: _Value) -> _Value:
        return value.lasting

    def out_of_iteration(self, path: Path, operand: int, role: Role, value: _Value) -> _Value:
        return value.lasting

    def grew(self, path: Path, operand: int, old: _Value, new: _Value) -> None:
        if old.parametric and new.data:
            self.records.append(Use(path, operand, old.leaves))

    def _is_backward(self, path: Path, eqn: Any) -> bool:
        return path[:-2] in self.backward or "transpose(" in str(eqn.source_info.name_stack)

    def equation(self, path: Path, eqn: Any, operands: list[_Value]) -> list[_Value]:
        # Effects alone, such as those of `jax.debug.print`.
        if not eqn.outvars:
            return []
        name, aval = operation(eqn), eqn.outvars[0].aval
        live, backward, origin = path in self.reach.outputs, self._is_backward(path, eqn), (path, 0)
        value = _computed(eqn, operands, backward)
        units = units_of(eqn, [Operand(v.units, bool(v.leaves), v.choice) for v in operands])
        value = value._replace(units=units)
        if self.calls.get(path):
            return [self._called(path, eqn, operands, value, live)] * len(eqn.outvars)
        sample, kind = _sampled(eqn, operands, path)
        # Of random keys there are no statistics.
        if name == "name" and not jnp.issubdtype(aval.dtype, jax.dtypes.extended):
            origin = operands[0].origin or origin
            found = _Found(path, 0, params_of(eqn)["name"], "name", kind, origin, units=value.units)
            self.records.append(found)
            sample = fresh(origin, aval, origin)
        parameters = [(k, v) for k, v in enumerate(operands) if v.parametric] if value.data else []
        self.records += [Use(path, k, v.leaves) for k, v in parameters]
        meeting = [v for _, v in parameters] or self._choices(eqn, operands, value, backward)
        if meeting and live and _is_inexact(eqn.outvars[0]) and not _adds_a_penalty(eqn):
            label = self._label(eqn, meeting)
            self.records.append(_Found(path, 0, label, "parameter", kind, origin, units=value.units))
            sample = fresh(origin, aval, origin)
            if value.choice:
                value = value._replace(chosen_at=value.chosen_at | {origin})
        elif live and kind and name not in _IDENTITIES and kind == recognize(sample, eqn.outvars[0].aval):
            self._activation(operands, sample, path, kind, value.units)
        return [
            value._replace(origin=(path, k) if k else origin, kind=kind, sample=None if k else sample)
            for k in range(len(eqn.outvars))
        ]

    def _called(self, path: Path, eqn: Any, operands: list[_Value], value: _Value, live: bool) -> _Value:
        """Return what is known of the output of a call of an activation function."""
        kind = self.calls[path]
        (sample,) = simulate_body(*bodies(eqn)[1][0], [v.sample for v in operands])[:1]
        if live:
            anchored = next((v.sample for v in operands if v.anchor), None)
            self._activation(operands, anchored, path, kind, value.units)
        return value._replace(kind=kind, origin=(path, 0), sample=sample)

    def _choices(self, eqn: Any, operands: list[_Value], value: _Value, backward: bool) -> list[_Value]:
        """Return the choices among the operands, where they meet data: what chose them is then not a site."""
        met = operation(eqn) in _ELEMENTWISE | _PRODUCTS and any(v.data and not v.leaves for v in operands)
        choices = [v for v in operands if v.choice] if met and not value.leaves and not backward else []
        self.moved.update(*[v.chosen_at for v in choices])
        return choices

    def _label(self, eqn: Any, values: Sequence[_Value]) -> str:
        """Return the name of a value made from parameters."""
        main, _ = _main(eqn, values)
        if main is not None:
            return self.names[main]
        leaves = frozenset().union(*[v.leaves for v in values])
        paths = [self.names[i].split("/") for i in sorted(leaves)]
        levels = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
        tops = list(dict.fromkeys(path[0] for path in paths))
        return (
            "/".join(parts[0] for parts in levels)
            or _function_name(eqn)
            or ("+".join(tops) if len(tops) <= 3 else "params")
        )

    def _activation(
        self,
        operands: Sequence[_Value],
        sample: Sample | None,
        path: Path,
        kind: str,
        units: tuple[int, ...] | None,
    ) -> None:
        repeated = any(v.kind == kind for v in operands)
        if kind and not repeated and sample is not None and sample.anchor:
            found = _Found(path, 0, f":{kind}", "parameter", kind, (path, 0), sample.anchor, units)
            self.records.append(found)


def _computed(eqn: Any, operands: Sequence[_Value], backward: bool) -> _Value:
    """Return what is known of an equation's output: data if any operand is, unless the equation chooses."""
    made = [v for v in operands if v.leaves]
    data = [v for v in operands if v.data]
    met = [v for v in data if not v.leaves]
    if not made:
        return _Value(data=bool(data), cotangent=bool(data) and (backward or all(v.cotangent for v in data)))
    if not data or _chooses(eqn, operands, met):
        main, size = _main(eqn, made)
        return _Value(
            leaves=frozenset().union(*[v.leaves for v in made]),
            data=bool(data),
            main=main,
            size=size,
            chosen_at=frozenset().union(*[v.chosen_at for v in made]),
        )
    return _Value(data=True, cotangent=backward)


def _chooses(eqn: Any, operands: Sequence[_Value], met: Sequence[_Value]) -> bool:
    """Tell whether an equation on parameters and data returns parameters: selected, updated or only reshaped."""
    name = operation(eqn)
    if name == "select_n":
        return not any(v.data and not v.leaves for v in operands[1:])
    if name in ("gather", "dynamic_slice"):
        # One row of a table is an embedding: data. A matrix is a weight.
        return bool(operands[0].leaves) and sum(n > 1 for n in eqn.params["slice_sizes"]) > 1
    if name in _SUMS and met:
        return all(v.cotangent for v in met)
    one = len([v for v in operands if v.leaves or v.data]) == 1
    return not met and (name in _SUMS or (one and name in _RESHAPES | _ELEMENTWISE))


def _main(eqn: Any, values: Sequence[_Value]) -> tuple[int | None, int]:
    """Return the parameter that most elements of a value are from, if there is one, and the number of elements."""
    size = max(v.size for v in values)
    out = min(size, math.prod(eqn.outvars[0].aval.shape))
    leaves = frozenset().union(*[v.leaves for v in values])
    if len(leaves) == 1:
        return min(leaves), out
    mixed = operation(eqn) not in _ELEMENTWISE | _RESHAPES
    mains = {v.main for v in values if mixed or v.size == size}
    return (mains.pop() if len(mains) == 1 else None), out


def _adds_a_penalty(eqn: Any) -> bool:
    """Tell whether an equation adds a weight penalty, a number computed from parameters, to the loss."""
    return operation(eqn) in _ELEMENTWISE and all(a.aval.shape == () for a in eqn.invars)


def _function_name(eqn: Any) -> str:
    """Return the name of a custom_jvp or custom_vjp function."""
    if not bodies(eqn, enter_custom=True)[1]:
        return ""
    info = getattr(eqn.params["call_jaxpr"].jaxpr, "debug_info", None)
    return params_of(eqn).get("name") or str(getattr(info, "func_src_info", "") or "").split(" at ")[0]


def _is_inexact(atom: Any) -> bool:
    return _is_inexact_dtype(atom.aval.dtype)


@functools.cache
def _is_inexact_dtype(dtype: DTypeLike) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact)


def _sampled(eqn: Any, operands: list[_Value], path: Path) -> tuple[Sample | None, str]:
    """Return an output's sample, and the activation function that the equation completes.

    The activation function of a value that is not computed from a site is recognized where the value gets a name.
    """
    name, samples = operation(eqn), [v.sample for v in operands]
    if not eqn.outvars:
        return None, ""
    aval = eqn.outvars[0].aval
    if name in _IDENTITIES:
        kind = operands[0].kind or recognize(samples[0], eqn.invars[0].aval)
        root = samples[0] is not None and samples[0].values is None and samples[0].root is not None
        return fresh((path, 0), aval, operands[0].anchor) if root else simulate(eqn, samples), kind
    inner = bodies(eqn, enter_custom=True)[1]
    if inner:
        sample = next(iter(simulate_body(*inner[0], samples)), None)
        return sample, _kind_of_call(inner[0], params_of(eqn).get("name", ""), eqn, operands)
    sample = simulate(eqn, samples)
    if sample is not None and sample.anchor:
        recognized = recognize(sample, aval)
        if recognized:
            return sample, recognized
    if name == "max" and any(map(is_zero, samples)):
        return sample, "relu"
    return sample, {"logistic": "sigmoid", "tanh": "tanh"}.get(name, "")


def _kind_of_call(
    body: tuple[Jaxpr, Sequence[PyTree]], name: str, eqn: Any, operands: Sequence[_Value]
) -> str:
    """Return the activation function that a jitted or custom function is of its arguments."""
    jaxpr, consts = body
    arguments = [
        v.sample if is_constant(v.sample) else fresh(k, atom.aval)
        for k, (v, atom) in enumerate(zip(operands, eqn.invars, strict=True))
    ]
    outs = simulate_body(jaxpr, consts, arguments)
    if not outs:
        return ""
    if name in NAMES and (outs[0] is None or name in WITH_A_SETTING):
        return name
    return recognize(outs[0], eqn.outvars[0].aval)


def _analyze(program: Program, reach: Reach) -> _Analysis:
    has_data = any(owner != 0 for owner in program.owners)
    inputs = [
        _Value(frozenset([i]), main=i, size=math.prod(aval.shape), units=axis_of_parameter(aval.shape))
        if owner == 0 and jnp.issubdtype(aval.dtype, jnp.inexact)
        else _Value(data=owner != 0)
        for i, (owner, aval) in enumerate(zip(program.owners, program.jaxpr.in_avals, strict=True))
    ]
    closed = program.jaxpr
    # Data are constants in a loss that takes only parameters, and in one that needs their values.
    data = bool(closed.consts) and (program.fixed_data or not has_data)
    analysis = _Analysis(program.names, everything=not has_data and not data, reach=reach)
    consts = [_Value(data=data, sample=constant(c)) for c in closed.consts]
    with np.errstate(all="ignore"):
        outs = analysis.run(closed, inputs, consts)
    analysis.records += [Use((), k, v.leaves) for k, v in enumerate(outs) if v.parametric]
    return analysis


def parameter_uses(program: Program) -> list[Use]:
    """Return every use of a parameter, or of a value derived only from parameters, in an equation with data.

    The parameters are the program's first argument, the data all others. One leaf may have several uses (tied
    weights) and one use several leaves.
    """
    return [use for use in _analyze(program, Reach()).records if isinstance(use, Use)]


def _outputs(program: Program) -> tuple[list[bool], list[bool]]:
    """Return which outputs are the function's result, and which are the first of `(first, aux)`.

    The result is all of them, unless the function returns `(scalar, aux)`, like a loss: then it is the scalar.
    """
    everything = [True] * len(program.jaxpr.out_avals)
    out = program.rebuild(program.jaxpr.out_avals)
    value, _ = value_and_aux(out)
    if value is out:
        return everything, everything
    n = sum(leaf is None for leaf in program.objects[: len(jax.tree.leaves(value))])
    first = [k < n for k in range(len(everything))]
    is_loss = getattr(value, "shape", None) == () and jnp.issubdtype(value.dtype, jnp.inexact)
    return (first if is_loss else everything), first


def _parameter_order(program: Program, uses: Iterable[Use]) -> tuple[str, ...]:
    """Return the names of the parameters that meet data, in the order in which the program first uses each."""
    return tuple(dict.fromkeys(program.names[leaf] for use in uses for leaf in sorted(use.leaves)))


def find_sites(program: Program) -> list[Site]:
    """Return all sites of a program in the order in which it computes them."""
    return find_sites_and_order(program)[0]


def find_sites_and_order(program: Program) -> tuple[list[Site], tuple[str, ...]]:
    """Return the sites of a program, and the names of its parameters in order of first use; one analysis finds both."""
    equations = program.equations()
    outputs, first = _outputs(program)
    reach = reaching(program.jaxpr, outputs)
    # Of several outputs of a scope, those that the function's first output depends on are numbered first.
    foremost = reach if outputs == first else reaching(program.jaxpr, first)
    analysis = _analyze(program, reach)
    everything = [
        f
        for f in analysis.records
        if isinstance(f, _Found) and (f.source != "parameter" or f.origin not in analysis.moved)
    ]
    by_origin: dict[Origin, _Found] = {}
    scopes = Counter(
        equations[f.path].scope
        for f in {f.origin: f for f in everything if f.source == "scope"}.values()
        if foremost.holds(f.path, f.output)
    )

    def rank(found: _Found) -> int:
        if found.source == "scope" and (
            scopes[equations[found.path].scope] > 1
            # The name of a class, as in Equinox.
            or found.base.split("/")[-1].startswith("eqx.")
            or not foremost.holds(found.path, found.output)
        ):
            # The parameter's name, if there is one, says more.
            return 3
        return {"name": 0, "scope": 1, "parameter": 2}[found.source]

    for found in sorted(everything, key=rank):
        # A value may have two names of its own.
        if found.source == "name":
            by_origin[(found.path, found.output)] = found
        named = by_origin.setdefault(found.origin, found)
        if named is not found and found.kind and not named.kind:
            by_origin[found.origin] = named._replace(kind=found.kind)
    users = Users(program.jaxpr.jaxpr)
    kept = [_batch_first(f, users) for f in by_origin.values() if f.anchor is None or f.anchor in by_origin]
    unique = {(f.path, f.output): f for f in kept}.values()
    ordered = sorted(unique, key=lambda f: (*f.path, float("inf")))
    names = _final_names(ordered, _parents(ordered, everything), equations, foremost)
    reached = _reached(ordered, program, reach)
    sites = [
        _site(f, name, equations[f.path], reaches)
        for f, name, reaches in zip(ordered, names, reached, strict=True)
    ]
    return sites, _parameter_order(program, (use for use in analysis.records if isinstance(use, Use)))


def _reached(found: Sequence[_Found], program: Program, reach: Reach) -> list[str]:
    """Return what depends on each site: the `result`, only `aux`, or `nothing`."""
    held = [reach.holds(f.path, f.output) for f in found]
    if all(held):
        return ["result"] * len(found)
    anything = reaching(program.jaxpr, [True] * len(program.jaxpr.out_avals))
    return [
        "result" if yes else "aux" if anything.holds(f.path, f.output) else "nothing"
        for f, yes in zip(found, held, strict=True)
    ]


def _site(found: _Found, name: str, equation: Equation, reaches: str) -> Site:
    aval: Any = equation.eqn.outvars[found.output].aval
    return Site(
        name=name,
        path=found.path,
        index=found.output,
        shape=tuple(aval.shape),
        dtype=str(aval.dtype),
        axes=equation.axes,
        loops=tuple(len(f.path) for f in equation.frames if f.length is not None),
        source=found.source,
        line=equation.line,
        scope=equation.scope,
        kind=found.kind,
        units=last_axis(aval.ndim) if found.units is None else found.units,
        differentiable=jnp.issubdtype(aval.dtype, jnp.inexact) and not equation.in_while,
        reaches=reaches,
    )


def last_axis(ndim: int) -> tuple[int, ...]:
    """Return the axis of the units of a value where no product tells: the last one."""
    return (ndim - 1,) if ndim else ()


def _batch_first(found: _Found, users_in: Users) -> _Found:
    """Return the site after the transpose by which `jax.vmap` moves the batch axis of a product to the front."""
    jaxpr, users_of = users_in.body(found.path[:-1])
    eqn = jaxpr.eqns[found.path[-1]]
    if found.source != "parameter" or operation(eqn) not in _PRODUCTS:
        return found
    users = set(users_of[eqn.outvars[found.output]])
    if len(users) != 1 or RESULT in users:
        return found
    (at,) = users
    user: Any = jaxpr.eqns[at]
    if operation(user) != "transpose" or "vmap(" not in str(user.source_info.name_stack):
        return found
    # A user's own transpose changes the order of the other axes.
    order = user.params["permutation"]
    if list(order[1:]) != sorted(order[1:]):
        return found
    units = None if found.units is None else transposed(found.units, order)
    return found._replace(path=(*found.path[:-1], at), units=units)


def _parents(found: Sequence[_Found], everything: Sequence[_Found]) -> list[str]:
    """Return, for each site, the path that holds the parameters it is computed with: `enc` for `enc/b1`.

    Those are the parameters that meet data in the site's own equation or, for an activation function, in the
    equation before; else the last ones that met data before it.
    """
    of_parameters = {f.origin: f for f in everything if f.source == "parameter" and f.anchor is None}
    anchors = {f.origin: f.anchor for f in everything if f.anchor is not None}
    in_order = sorted(of_parameters.values(), key=lambda f: f.path)
    paths = [f.path for f in in_order]

    def parent(site: _Found) -> str:
        met = of_parameters.get(site.origin) or of_parameters.get(anchors.get(site.origin, site.origin))
        before = bisect.bisect_left(paths, site.path)
        met = met or (in_order[before - 1] if before else None)
        return met.base.rpartition("/")[0] if met else ""

    return [parent(site) for site in found]


def _final_names(
    found: list[_Found], parents: list[str], equations: dict[Path, Equation], foremost: Reach
) -> list[str]:
    """Return unique names: a repeated one is prefixed by its scope or its parameters' path, or else numbered."""
    scopes = [equations[f.path].scope for f in found]
    bases = [scope if f.source == "scope" else f.base for f, scope in zip(found, scopes, strict=True)]
    groups: dict[str, list[int]] = {}
    for i, base in enumerate(bases):
        if found[i].source == "name":
            groups.setdefault(base, []).append(i)
    for base, members in groups.items():
        distinct = len({scopes[i] for i in members}) == len(members)
        prefixes = scopes if distinct else parents
        if len({prefixes[i] for i in members}) > 1:
            for i in members:
                bases[i] = "/".join(filter(None, [prefixes[i], base]))
    taken: dict[str, int] = {}
    names: dict[int, str] = {}
    given: set[str] = set()
    follows: dict[Origin | None, int] = {f.origin: i for i, f in enumerate(found)}

    def order(i: int) -> tuple[bool, bool]:
        return found[i].anchor is not None, not foremost.holds(found[i].path, found[i].output)

    for i in sorted(range(len(found)), key=order):
        base = bases[i]
        if found[i].anchor is not None:
            base = names[follows[found[i].anchor]] + base
        counter = itertools.count(taken.get(base, 0))
        name = next(n for n in (f"{base}.{k}" if k else base for k in counter) if n not in given)
        given.add(name)
        taken[base] = taken.get(base, 0) + 1
        names[i] = name
    return [names[i] for i in range(len(found))]


def select(sites: Sequence[Site], wanted: Selection, what: str = "sites") -> list[Site]:
    """Return the sites selected by exact name, glob (`*attn*`), a list of these, or a predicate; None selects all.

    Raises:
        ValueError: a name or glob matches nothing; the message lists similar names.
    """
    if wanted is None:
        return list(sites)
    if callable(wanted):
        return [site for site in sites if wanted(site)]
    patterns = [wanted] if isinstance(wanted, str) else list(wanted)
    chosen: set[str] = set()
    names = [site.name for site in sites]
    for pattern in patterns:
        hits = [pattern] if pattern in names else fnmatch.filter(names, pattern)
        if not hits:
            raise ValueError(unknown_site(pattern, names, what))
        chosen.update(hits)
    return [site for site in sites if site.name in chosen]


def unknown_site(pattern: str, names: list[str], what: str) -> str:
    """Return the error for a name or glob that matches no site; `what` is the caller."""
    if not names:
        return f"{what}: there is no site {pattern!r}: the function has no sites. Name one: gf.tap(x, {pattern!r})."
    near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4)
    listed = (
        f"Did you mean {', '.join(near)}?"
        if near
        else f"Sites: {', '.join(names[:8])}{', ...' * (len(names) > 8)}."
    )
    return f"{what}: there is no site {pattern!r}. {listed} gf.sites(f)(*args) lists all {len(names)}."
