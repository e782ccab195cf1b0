"""Sites: the values inside a program that have a name, out of three sources.

(a) ``name``: values that the user named with ``checkpoint_name`` (``gf.tap``).
(b) ``scope``: what comes out of a ``jax.named_scope``: produced in it and used outside it. Flax Linen, Haiku
    and gradfn open one per module.
(c) ``parameter``: where a value derived only from parameters first meets data, named after the parameter's
    path (the product ``W1 x`` is ``W1``, the sum with the bias is ``b1``), and the activation function that
    directly follows a site, named ``b1:sigmoid``. With this one, every framework has sites.

A value that several sources name is listed once, under the first of them (but a scope entered several times,
as the class names that Equinox opens are, gives way to the parameter's name). One abstract run over the
program finds them
all: it carries, per value, which parameters it derives from and whether it has met data.
"""

import difflib
import fnmatch
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from gradfn.transform.interpreter import Path, Place, bodies, scan_split, scope_of, walk
from gradfn.transform.program import Program

Selection = str | Callable[["Site"], bool] | Iterable[str] | None

# Functions that jax.nn and the frameworks jit under their own name.
_ACTIVATIONS = {
    *("relu", "relu6", "sigmoid", "tanh", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "softplus"),
    *("hard_tanh", "hard_sigmoid", "hard_silu", "mish", "squareplus", "softmax", "log_softmax"),
}
_IDENTITIES = {
    "name",
    "reshape",
    "transpose",
    "convert_element_type",
    "copy",
    "squeeze",
    "sharding_constraint",
}
_ELEMENTWISE = {"add", "sub", "mul", "div", "add_any", "max", "min", "pow"}


@dataclass(frozen=True)
class Site:
    """One named value of a program.

    ``name`` is how it is asked for; ``path`` and ``index`` say which output of which equation it is.
    ``shape`` and ``dtype`` are those of one value; ``axes`` the leading axes that loops and devices add, and
    ``loops`` how many numbers of the path lead to each of those loops. ``source`` is ``name``, ``scope`` or
    ``parameter``; ``kind`` the activation function that made it, if one did. ``differentiable`` is false for
    integers and for values inside a while loop, which have no gradient.
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
    differentiable: bool


class Use(NamedTuple):
    """An operand, derived only from parameters, of an equation where it meets data.

    ``leaves`` are the numbers of those parameters among the program's inputs; ``path`` the equation and
    ``operand`` which of its operands. A path that ends at a scan or while means a carry, at a cond a branch's
    result; the empty path an output of the program.
    """

    path: Path
    operand: int
    leaves: frozenset[int]


class _Value(NamedTuple):
    """What is known of a value: its parameters, whether it met data, and which equation's output it is."""

    leaves: frozenset[int] = frozenset()
    data: bool = False
    origin: tuple[Path, int] | None = None
    kind: str = ""
    anchor: tuple[Path, int] | None = None  # the site whose value this is, up to reshapes

    @property
    def parametric(self) -> bool:
        return bool(self.leaves) and not self.data


def _join(values: Iterable[_Value]) -> _Value:
    """Return what is known of a value computed from others: data once any is data."""
    values = list(values)
    data = any(v.data for v in values)
    leaves = frozenset[int]() if data else frozenset().union(*[v.leaves for v in values])
    return _Value(leaves, data)


class _Found(NamedTuple):
    """A site before it has its final name."""

    path: Path
    output: int
    base: str
    source: str
    kind: str
    origin: tuple[Path, int]
    anchor: tuple[Path, int] | None = None


class _Analysis:
    """The abstract run; ``found`` and ``uses`` fill up as it goes."""

    def __init__(self, names: Sequence[str], everything: bool) -> None:
        self.names = names
        self.everything = everything  # no argument but the parameters: whatever a scope gives is a site
        self.found: list[_Found] = []
        self.uses: list[Use] = []

    def body(self, jaxpr: Jaxpr, inputs: Sequence[_Value], consts: _Value, prefix: Path) -> list[_Value]:
        env = dict.fromkeys(jaxpr.constvars, consts) | dict(zip(jaxpr.invars, inputs, strict=True))
        scopes: dict[Any, tuple[Path, int, str, str]] = {}  # where each variable was produced

        def read(atom: Any) -> _Value:
            return _Value(kind=_literal(atom)) if isinstance(atom, Literal) else env[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            path, scope = (*prefix, i), scope_of(eqn)
            for atom in eqn.invars:
                self._leaving(scopes, env, atom, scope)
            operands = [read(atom) for atom in eqn.invars]
            kind, inner = bodies(eqn)
            outs = (
                self.container(kind, eqn, inner, operands, path)
                if inner
                else self.equation(eqn, operands, path)
            )
            for k, (var, value) in enumerate(zip(eqn.outvars, outs, strict=True)):
                env[var] = value
                scopes[var] = (path, k, scope, value.kind)
        for atom in jaxpr.outvars:
            self._leaving(scopes, env, atom, "")
        return [read(atom) for atom in jaxpr.outvars]

    def _leaving(self, scopes: dict, env: dict, atom: Any, used_in: str) -> None:
        """Note a scope's output: a value used outside the scope that it was produced in."""
        if isinstance(atom, Literal) or atom not in scopes:
            return
        path, k, scope, kind = scopes[atom]
        inside = f"{used_in}/".startswith(f"{scope}/")
        value = env[atom]
        if scope and not inside and _is_float(atom) and (value.data or self.everything):
            origin = value.origin or (path, k)
            self.found.append(_Found(path, k, scope, "scope", kind, origin))
            env[atom] = value._replace(anchor=origin)

    def equation(self, eqn: JaxprEqn, operands: list[_Value], path: Path) -> list[_Value]:
        name = eqn.primitive.name
        value = _join(operands)
        origin, anchor = (path, 0), None
        kind = _kind(eqn, operands)
        if name in _IDENTITIES or name == "neg" or kind in ("exp", "1+exp"):
            anchor = next((v.anchor for v in operands if v.anchor), None)
        if name == "name":
            origin = anchor = operands[0].origin or (path, 0)
            self.found.append(_Found(path, 0, eqn.params["name"], "name", kind, origin))
        meeting = [(k, v) for k, v in enumerate(operands) if v.parametric] if value.data else []
        self.uses += [Use(path, k, v.leaves) for k, v in meeting]
        if meeting and _is_float(eqn.outvars[0]) and not self._adds_a_penalty(eqn, meeting):
            base = self.names[min(meeting[0][1].leaves)]
            self.found.append(_Found(path, 0, base, "parameter", kind, origin))
            anchor = origin
        elif kind in _ACTIVATIONS and name not in _IDENTITIES:
            self._activation(operands, path, kind, origin)
        return [
            value._replace(origin=(path, k) if k else origin, kind=kind, anchor=anchor)
            for k in range(len(eqn.outvars))
        ]

    def _adds_a_penalty(self, eqn: Any, meeting: list[tuple[int, _Value]]) -> bool:
        """Tell a weight penalty, a number computed from parameters and added to the loss, from a layer."""
        return eqn.primitive.name in _ELEMENTWISE and all(a.aval.shape == () for a in eqn.invars)

    def _activation(self, operands: list[_Value], path: Path, kind: str, origin: tuple[Path, int]) -> None:
        anchors = [v.anchor for v in operands if v.anchor]
        if anchors:
            self.found.append(_Found(path, 0, f":{kind}", "parameter", kind, origin, anchors[0]))

    def container(
        self,
        kind: str,
        eqn: JaxprEqn,
        inner: list[tuple[Jaxpr, Sequence[Any]]],
        operands: list[_Value],
        path: Path,
    ) -> list[_Value]:
        def run(k: int, operands: list[_Value]) -> list[_Value]:
            jaxpr, _ = inner[k]
            return self.body(jaxpr, operands, _Value(), (*path, k))

        if kind == "cond":
            branches = [run(k, operands[1:]) for k in range(len(inner))]
            outs = [_join(values) for values in zip(*branches, strict=True)]
            for k, (values, out) in enumerate(zip(zip(*branches, strict=True), outs, strict=True)):
                self.uses += [Use(path, k, v.leaves) for v in values if v.parametric and out.data]
            return [v._replace(origin=(path, k)) for k, v in enumerate(outs)]
        if kind in ("scan", "while"):
            return self._loop(kind, eqn, run, operands, path)
        name = eqn.params.get("name", "")
        if name in _ACTIVATIONS:  # jax.nn.gelu and the like: one function, whatever it is made of
            value = _join(operands)._replace(kind=name, origin=(path, 0))
            self._activation(operands, path, name, (path, 0))
            return [value] * len(eqn.outvars)
        return run(0, operands)

    def _loop(
        self, kind: str, eqn: JaxprEqn, run: Callable, operands: list[_Value], path: Path
    ) -> list[_Value]:
        if kind == "while":
            operands = operands[eqn.params["cond_nconsts"] :]
            n_consts, n_carry = eqn.params["body_nconsts"], len(eqn.outvars)
        else:
            n_consts, n_carry = scan_split(eqn)
        first = n_consts
        operands = [v._replace(origin=None, anchor=None) for v in operands]
        known, uses = list(self.found), list(self.uses)
        while True:  # until what is known of the carry stays as it is: it only grows, so this ends
            outs = run(0, operands)
            carry = [
                _join(pair) for pair in zip(operands[first : first + n_carry], outs[:n_carry], strict=True)
            ]
            carry = [_Value(v.leaves, v.data) for v in carry]
            if carry == [_Value(v.leaves, v.data) for v in operands[first : first + n_carry]]:
                break
            met = [
                (k, v)
                for k, (v, c) in enumerate(zip(operands[first:], carry, strict=False))
                if v.parametric and c.data
            ]
            uses += [Use(path, first + k, v.leaves) for k, v in met]
            operands[first : first + n_carry] = carry
            self.found, self.uses = list(known), list(uses)
        return [_Value(v.leaves, v.data, (path, k)) for k, v in enumerate(outs)]


def _is_float(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.inexact)  # complex as well


def _literal(atom: Literal) -> str:
    return (
        {0j: "0", 1 + 0j: "1"}.get(complex(atom.val), "")
        if jnp.ndim(atom.val) == 0 and _is_float(atom)
        else ""
    )


def _kind(eqn: JaxprEqn, operands: list[_Value]) -> str:
    """Return which activation function an equation completes; also the steps to a sigmoid."""
    name, kinds = eqn.primitive.name, [v.kind for v in operands]
    if name in _IDENTITIES:
        return kinds[0]
    if name == "max" and "0" in kinds:
        return "relu"
    if name == "add" and set(kinds) == {"exp", "1"}:
        return "1+exp"
    if name == "div" and kinds == ["1", "1+exp"]:
        return "sigmoid"
    if name in ("custom_jvp_call", "custom_vjp_call"):
        return _kind_of_body(eqn)
    return {"logistic": "sigmoid", "tanh": "tanh", "exp": "exp"}.get(name, "")


def _kind_of_body(eqn: JaxprEqn) -> str:
    _, inner = bodies(eqn, enter_custom=True)
    jaxpr, _ = inner[0]
    run = _Analysis((), False)
    outs = run.body(jaxpr, [_Value()] * len(jaxpr.invars), _Value(), ())
    return outs[0].kind if outs and outs[0].kind in _ACTIVATIONS else ""


def _analyse(program: Program) -> _Analysis:
    has_data = any(owner != 0 for owner in program.owners)
    inputs = [
        _Value(frozenset([i]))
        if owner == 0 and jnp.issubdtype(aval.dtype, jnp.inexact)
        else _Value(data=owner != 0)
        for i, (owner, aval) in enumerate(zip(program.owners, program.jaxpr.in_avals, strict=True))
    ]
    # Data are constants in a loss that takes nothing but parameters, and in one that needs their values.
    consts = bool(program.jaxpr.consts) and (program.fixed_data or not has_data)
    analysis = _Analysis(program.names, everything=not has_data and not consts)
    outs = analysis.body(program.jaxpr.jaxpr, inputs, _Value(data=consts), ())
    analysis.uses += [Use((), k, v.leaves) for k, v in enumerate(outs) if v.parametric]
    return analysis


def parameter_uses(program: Program) -> list[Use]:
    """Return every use of a parameter, or of a value derived only from parameters, in an equation with data.

    The parameters are the program's first argument, the data all others. One leaf may have several uses (tied
    weights) and one use several leaves.
    """
    return _analyse(program).uses


def parameter_order(program: Program) -> tuple[str, ...]:
    """Return the names of the parameters that data meet, in the order in which the program first uses each."""
    uses = parameter_uses(program)
    return tuple(dict.fromkeys(program.names[leaf] for use in uses for leaf in sorted(use.leaves)))


def find_sites(program: Program) -> list[Site]:
    """Return all sites of a program in the order in which it computes them."""
    places = {place.path: place for place in walk(program.jaxpr)}
    by_origin: dict[tuple[Path, int], _Found] = {}
    everything = _analyse(program).found
    outputs = Counter(
        places[f.path].scope for f in {f.origin: f for f in everything if f.source == "scope"}.values()
    )

    def rank(found: _Found) -> int:
        if found.source == "scope" and outputs[places[found.path].scope] > 1:
            return 3  # a name that would need a number says less than the parameter's, if it has one
        return {"name": 0, "scope": 1, "parameter": 2}[found.source]

    for found in sorted(everything, key=rank):
        if found.source == "name":  # a value may well have two names of its own
            by_origin[(found.path, found.output)] = found
        named = by_origin.setdefault(found.origin, found)
        if named is not found and found.kind and not named.kind:
            by_origin[found.origin] = named._replace(kind=found.kind)
    unique = {(f.path, f.output): f for f in by_origin.values()}.values()
    ordered = sorted(unique, key=lambda f: (*f.path, float("inf")))
    names = _final_names(ordered, places)
    return [_site(f, name, places[f.path]) for f, name in zip(ordered, names, strict=True)]


def _site(found: _Found, name: str, place: Place) -> Site:
    aval: Any = place.eqn.outvars[found.output].aval
    return Site(
        name=name,
        path=found.path,
        index=found.output,
        shape=tuple(aval.shape),
        dtype=str(aval.dtype),
        axes=place.axes,
        loops=tuple(len(f.path) for f in place.frames if f.length is not None),
        source=found.source,
        line=place.line,
        scope=place.scope,
        kind=found.kind if found.kind in _ACTIVATIONS else "",
        differentiable=jnp.issubdtype(aval.dtype, jnp.inexact) and not place.in_while,
    )


def _final_names(found: list[_Found], places: dict[Path, Place]) -> list[str]:
    """Make names unique: a repeated one gets its scope in front where those differ, else a number."""
    scopes = [places[f.path].scope for f in found]
    bases = [scope if f.source == "scope" else f.base for f, scope in zip(found, scopes, strict=True)]
    groups = {b: [i for i, x in enumerate(bases) if x == b and found[i].source == "name"] for b in bases}
    for base, members in groups.items():
        if len(members) > 1 and len({scopes[i] for i in members}) == len(members):
            for i in members:
                bases[i] = "/".join(filter(None, [scopes[i], base]))
    taken: dict[str, int] = {}
    names: dict[int, str] = {}
    follows: dict[Any, int] = {f.origin: i for i, f in enumerate(found)}
    for i in sorted(range(len(found)), key=lambda i: found[i].anchor is not None):
        base = bases[i]
        if found[i].anchor is not None:
            base = names[follows[found[i].anchor]] + base
        counter = itertools.count(taken.get(base, 0))
        name = next(n for n in (f"{base}.{k}" if k else base for k in counter) if n not in names.values())
        taken[base] = taken.get(base, 0) + 1
        names[i] = name
    return [names[i] for i in range(len(found))]


def select(sites: Sequence[Site], wanted: Selection, what: str = "sites") -> list[Site]:
    """Choose sites by exact name, glob (``*attn*``), a list of those, or a function of the site; None is all.

    Raises:
        ValueError: a name or glob matches nothing; the message lists near names.
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
            raise ValueError(_unknown(pattern, names, what))
        chosen.update(hits)
    return [site for site in sites if site.name in chosen]


def _unknown(pattern: str, names: list[str], what: str) -> str:
    if not names:
        return f"{what}: there is no site {pattern!r}: it has none. Name one: gf.tap(x, {pattern!r})."
    near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4)
    listed = (
        f"Near: {', '.join(near)}."
        if near
        else f"There are: {', '.join(names[:8])}{', ...' * (len(names) > 8)}."
    )
    return f"{what}: there is no site {pattern!r}. {listed} gf.sites(f)(*args) lists all {len(names)}."
