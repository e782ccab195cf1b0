"""The abstract interpreter: what is known of every value of a program, without computing it.

An analysis is a lattice and a rule. The lattice is what can be known of a value: `constant` says what is known of a
constant, `join` what is known of a value that is one of several. The rule, `equation`, says what is known of an
equation's outputs, given what is known of its operands. `Dataflow` applies them to a program: inside jit, remat,
shard_map and, with `enter_custom`, functions with a custom derivative, in all branches of a cond, and in scan and
while until what is known of their carries reaches a fixpoint.

What an analysis finds goes into `records`. Iterations of a loop before its fixpoint leave no records.
"""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import PyTree

from gradfn.jaxpr.interpreter import Path, bodies, scan_split

V = TypeVar("V")
Role = str  # `const`, `carry`, `slice` (of what a scan runs along), `stack` (of what it returns)


class Dataflow(Generic[V]):
    """An analysis of a program. Subclasses define the lattice and the rule, and override the hooks they need.

    Attributes:
        enter_custom: whether the insides of `custom_jvp` and `custom_vjp` functions are analyzed.
        records: what was found.
    """

    enter_custom = False

    def __init__(self) -> None:
        self.records: list[Any] = []

    def constant(self, value: PyTree) -> V:
        """Return what is known of a constant."""
        raise NotImplementedError

    def join(self, values: Sequence[V]) -> V:
        """Return what is known of a value that is one of several."""
        raise NotImplementedError

    def equation(self, path: Path, eqn: JaxprEqn, operands: list[V]) -> Sequence[V]:
        """Return what is known of an equation's outputs."""
        raise NotImplementedError

    def enters(self, path: Path, kind: str, eqn: JaxprEqn, operands: list[V]) -> bool:
        """Tell whether a container is entered; otherwise it is treated like any other equation."""
        return True

    def bind(self, path: Path, k: int, var: Any, value: V, eqn: JaxprEqn | None) -> V:
        """Return what is known of a variable: output `k` of the equation at `path`.

        Without an equation it is an input of the body at `path`, and `k` counts down from -1.
        """
        return value

    def use(self, path: Path, k: int, var: Any, value: V, eqn: JaxprEqn | None) -> V:
        """Return what is known of a variable once it is operand `k` of the equation at `path`.

        Without an equation it is result `k` of the body at `path`.
        """
        return value

    def choose(self, path: Path, index: V, values: Sequence[V]) -> V:
        """Return what is known of an output of a cond, given its index and the results of its branches."""
        return self.join(values)

    def into_loop(self, path: Path, operand: int, role: Role, value: V) -> V:
        """Return what the first iteration of a scan or while knows of an operand."""
        return value

    def out_of_iteration(self, path: Path, operand: int, role: Role, value: V) -> V:
        """Return what is known of a result after an iteration: the next carry, or one element of a stack."""
        return value

    def grew(self, path: Path, operand: int, old: V, new: V) -> None:
        """Record that more is possible for a carry after some iterations than before: `old` became `new`."""

    def run(self, closed: ClosedJaxpr, inputs: Sequence[V], consts: Sequence[V] | None = None) -> list[V]:
        """Analyze a program, given what is known of its inputs; return what is known of its outputs."""
        consts = [self.constant(c) for c in closed.consts] if consts is None else consts
        return self.body(closed.jaxpr, consts, inputs)

    def body(self, jaxpr: Jaxpr, consts: Sequence[V], inputs: Sequence[V], prefix: Path = ()) -> list[V]:
        """Analyze a body of a program; return what is known of its results."""
        known = enumerate(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
        env = {var: self.bind(prefix, -1 - k, var, value, None) for k, (var, value) in known}
        uses = type(self).use is not Dataflow.use

        def read(path: Path, atoms: Sequence[Var | Literal], eqn: JaxprEqn | None = None) -> list[V]:
            if uses:
                for k, atom in enumerate(atoms):
                    if not isinstance(atom, Literal):
                        env[atom] = self.use(path, k, atom, env[atom], eqn)
            return [self.constant(a.val) if isinstance(a, Literal) else env[a] for a in atoms]

        for i, eqn in enumerate(jaxpr.eqns):
            path = (*prefix, i)
            operands = read(path, eqn.invars, eqn)
            kind, inner = bodies(eqn, self.enter_custom)
            if inner and self.enters(path, kind, eqn, operands):
                outs = self._container(path, kind, eqn, inner, operands)
            else:
                outs = self.equation(path, eqn, operands)
            for k, (var, value) in enumerate(zip(eqn.outvars, outs, strict=True)):
                env[var] = self.bind(path, k, var, value, eqn)
        return read(prefix, jaxpr.outvars)

    def _container(
        self,
        path: Path,
        kind: str,
        eqn: JaxprEqn,
        inner: Sequence[tuple[Jaxpr, Sequence[PyTree]]],
        operands: list[V],
    ) -> Sequence[V]:
        def run(k: int, operands: Sequence[V]) -> list[V]:
            jaxpr, consts = inner[k]
            return self.body(jaxpr, [self.constant(c) for c in consts], operands, (*path, k))

        if kind == "cond":
            index, *rest = operands
            branches = [run(k, rest) for k in range(len(inner))]
            return [self.choose(path, index, values) for values in zip(*branches, strict=True)]
        if kind not in ("scan", "while"):
            return run(0, operands)
        skipped, n_consts, n_carry = loop_split(kind, eqn)
        first, after = skipped + n_consts, skipped + n_consts + n_carry
        roles: list[Role] = ["const"] * first + ["carry"] * n_carry + ["slice"] * (len(operands) - after)
        known = [
            self.into_loop(path, k, role, v) for k, (role, v) in enumerate(zip(roles, operands, strict=True))
        ]
        mark = len(self.records)
        while True:
            outs = [
                self.out_of_iteration(path, first + k, "carry" if k < n_carry else "stack", value)
                for k, value in enumerate(run(0, known[skipped:]))
            ]
            carry = known[first:after]
            joined = [self.join(pair) for pair in zip(carry, outs[:n_carry], strict=True)]
            if joined == carry:
                return [*carry, *outs[n_carry:]]
            del self.records[mark:]
            for k, (old, new) in enumerate(zip(carry, joined, strict=True)):
                if old != new:
                    self.grew(path, first + k, old, new)
            mark = len(self.records)
            known[first:after] = joined


def loop_split(kind: str, eqn: JaxprEqn) -> tuple[int, int, int]:
    """Return how many operands only a loop's condition reads, its constants and its carries."""
    if kind == "while":
        return eqn.params["cond_nconsts"], eqn.params["body_nconsts"], len(eqn.outvars)
    return (0, *scan_split(eqn))
