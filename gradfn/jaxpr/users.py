"""The equations that compute and use each value of a program."""

from collections import defaultdict
from collections.abc import Mapping

from jax.extend.core import Jaxpr, Literal, Var

from gradfn.jaxpr.interpreter import Path, bodies

RESULT = -1
"""Stands for the results of a body among the users of a value."""


class Users:
    """The equations that compute and use the values of each body of a program, each body looked up once."""

    def __init__(self, jaxpr: Jaxpr) -> None:
        self._known: dict[Path, tuple[Jaxpr, Mapping[Var, list[int]]]] = {(): (jaxpr, _users(jaxpr))}
        self._computed: dict[Path, Mapping[Var, tuple[int, int]]] = {}

    def body(self, path: Path) -> tuple[Jaxpr, Mapping[Var, list[int]]]:
        """Return a body, and the equations that use each of its values.

        Args:
            path: of the body: its container's path, then the index of the body; empty for the whole program.

        Returns:
            The body; and by variable, one entry per use: the index of an equation, or `RESULT`.
        """
        if path not in self._known:
            outer, _ = self.body(path[:-2])
            jaxpr = bodies(outer.eqns[path[-2]])[1][path[-1]][0]
            self._known[path] = jaxpr, _users(jaxpr)
        return self._known[path]

    def computed(self, path: Path) -> Mapping[Var, tuple[int, int]]:
        """Return, by the variables of a body, the equation that computes each and the index of its output."""
        if path not in self._computed:
            eqns = enumerate(self.body(path)[0].eqns)
            self._computed[path] = {v: (i, k) for i, eqn in eqns for k, v in enumerate(eqn.outvars)}
        return self._computed[path]


def _users(jaxpr: Jaxpr) -> Mapping[Var, list[int]]:
    users: dict[Var, list[int]] = defaultdict(list)
    for i, atoms in (*enumerate(eqn.invars for eqn in jaxpr.eqns), (RESULT, jaxpr.outvars)):
        for atom in atoms:
            if not isinstance(atom, Literal):
                users[atom].append(i)
    return users
