"""Reachability: which values of a program its outputs are computed from.

One backward pass over the equations: an equation counts if one of its outputs is needed, and then its operands
are needed too. In loops, what the carry needs is repeated until it no longer grows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from gradfn.jaxpr.interpreter import Path, bodies, scan_split

Needed = Sequence[bool]


@dataclass(frozen=True)
class Reach:
    """What some outputs of a program are computed from.

    By the path of an equation: which of its `outputs` are needed (equations that are not needed are absent)
    and which of its `operands`. By the path of a container's body (that of the container and the body's
    number; empty for the program): which of the body's `results`.
    """

    outputs: dict[Path, Needed] = field(default_factory=dict)
    operands: dict[Path, Needed] = field(default_factory=dict)
    results: dict[Path, Needed] = field(default_factory=dict)

    def holds(self, path: Path, output: int) -> bool:
        """Tell whether an output of an equation is needed."""
        needed = self.outputs.get(path)
        return needed is not None and needed[output]


def reaching(closed: ClosedJaxpr, wanted: Needed) -> Reach:
    """Return what those outputs of a program that are `wanted` are computed from."""
    reach = Reach()
    _body(reach, closed.jaxpr, (), wanted)
    return reach


def _body(reach: Reach, jaxpr: Jaxpr, prefix: Path, wanted: Needed) -> Needed:
    """Go through a body from its results to its inputs; return which inputs are needed."""
    reach.results[prefix] = wanted
    needed = {v for v, w in zip(jaxpr.outvars, wanted, strict=True) if w and not isinstance(v, Literal)}
    for i in reversed(range(len(jaxpr.eqns))):
        eqn, path = jaxpr.eqns[i], (*prefix, i)
        outputs = [v in needed for v in eqn.outvars]
        if not any(outputs) and not _writes(eqn):
            continue
        reach.outputs[path] = outputs
        operands = reach.operands[path] = _equation(reach, eqn, path, outputs)
        needed |= {v for v, w in zip(eqn.invars, operands, strict=True) if w and not isinstance(v, Literal)}
    return [v in needed for v in jaxpr.invars]


def _writes(eqn: JaxprEqn) -> bool:
    """Tell whether an equation may write to a mutable array, which later equations read."""
    return bool(eqn.effects) and any(hasattr(v.aval, "inner_aval") for v in eqn.invars)


def _equation(reach: Reach, eqn: JaxprEqn, path: Path, outputs: Needed) -> Needed:
    kind, inner = bodies(eqn)
    if kind == "cond":
        branches = [_body(reach, jaxpr, (*path, k), outputs) for k, (jaxpr, _) in enumerate(inner)]
        return [True, *_either(*branches)]
    if kind == "scan":
        return _scan(reach, eqn, inner[0][0], path, outputs)
    if kind == "while":
        return _while(reach, eqn, inner[0][0], path, outputs)
    if kind:
        return _body(reach, inner[0][0], (*path, 0), outputs)
    return [True] * len(eqn.invars)


def _scan(reach: Reach, eqn: JaxprEqn, jaxpr: Jaxpr, path: Path, outputs: Needed) -> Needed:
    n_consts, n_carry = scan_split(eqn)
    carry, ys = outputs[:n_carry], outputs[n_carry:]
    while True:
        inputs = _body(reach, jaxpr, (*path, 0), [*carry, *ys])
        grown = _either(carry, inputs[n_consts : n_consts + n_carry])
        if grown == list(carry):
            return [*inputs[:n_consts], *grown, *inputs[n_consts + n_carry :]]
        carry = grown


def _while(reach: Reach, eqn: JaxprEqn, jaxpr: Jaxpr, path: Path, outputs: Needed) -> Needed:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    # What the condition reads decides how often the body runs.
    condition = eqn.params["cond_jaxpr"].jaxpr
    of_condition = _body(Reach(), condition, (), [True] * len(condition.outvars))
    carry = _either(outputs, of_condition[n_cond:])
    while True:
        inputs = _body(reach, jaxpr, (*path, 0), carry)
        grown = _either(carry, inputs[n_body:])
        if grown == list(carry):
            return [*of_condition[:n_cond], *inputs[:n_body], *grown]
        carry = grown


def _either(*several: Needed) -> list[bool]:
    return [any(needed) for needed in zip(*several, strict=True)]
