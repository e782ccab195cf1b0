"""Reachability: the values of a program that some of its outputs depend on.

One pass over the equations, from the last to the first (`gradfn.jaxpr.dataflow` runs from the first to the last): if
an output of an equation is needed, so are its operands. Loops are repeated until what their carry needs no longer
grows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from gradfn.jaxpr.dataflow import loop_split
from gradfn.jaxpr.interpreter import Path, bodies

Needed = Sequence[bool]


@dataclass(frozen=True)
class Reach:
    """The values that some outputs of a program depend on.

    Attributes:
        outputs: by the path of an equation, which of its outputs are needed; without equations that are not needed.
        operands: likewise, which of its operands are needed.
        results: by the path of a body (the container's path and the body's index; empty for the program), which of
            its results are needed.
    """

    outputs: dict[Path, Needed] = field(default_factory=dict)
    operands: dict[Path, Needed] = field(default_factory=dict)
    results: dict[Path, Needed] = field(default_factory=dict)

    def holds(self, path: Path, output: int) -> bool:
        """Tell whether an output of an equation is needed."""
        needed = self.outputs.get(path)
        return needed is not None and needed[output]


def reaching(closed: ClosedJaxpr, wanted: Needed) -> Reach:
    """Return the values that the `wanted` outputs of a program depend on."""
    reach = Reach()
    _body(reach, closed.jaxpr, (), wanted)
    return reach


def _body(reach: Reach, jaxpr: Jaxpr, prefix: Path, wanted: Needed) -> Needed:
    """Follow a body from its results to its inputs; return which inputs are needed."""
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
    if kind in ("scan", "while"):
        return _loop(reach, kind, eqn, inner[0][0], path, outputs)
    if kind:
        return _body(reach, inner[0][0], (*path, 0), outputs)
    return [True] * len(eqn.invars)


def _loop(reach: Reach, kind: str, eqn: JaxprEqn, jaxpr: Jaxpr, path: Path, outputs: Needed) -> Needed:
    n_cond, n_consts, n_carry = loop_split(kind, eqn)
    carry, stacks, of_condition = list(outputs[:n_carry]), outputs[n_carry:], list[bool]()
    if kind == "while":
        # What the condition reads determines the number of iterations.
        condition = eqn.params["cond_jaxpr"].jaxpr
        of_condition = list(_body(Reach(), condition, (), [True] * len(condition.outvars)))
        carry = _either(carry, of_condition[n_cond:])
    while True:
        inputs = _body(reach, jaxpr, (*path, 0), [*carry, *stacks])
        grown = _either(carry, inputs[n_consts : n_consts + n_carry])
        if grown == carry:
            return [*of_condition[:n_cond], *inputs[:n_consts], *carry, *inputs[n_consts + n_carry :]]
        carry = grown


def _either(*several: Needed) -> list[bool]:
    return [any(needed) for needed in zip(*several, strict=True)]
