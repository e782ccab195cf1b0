"""Sites that have the same elements as another one, or the same gradient, and need no statistics of their own.

The value of `queries` may be the value of `query/b`, with another shape. And where a value is only used in a sum, its
gradient is the gradient of the sum: that of `W x` is that of `W x + b`. In a transformer this holds for half of the
gradients.
"""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal

from gradfn.jaxpr.interpreter import Path, operation
from gradfn.jaxpr.program import Program
from gradfn.jaxpr.sites import Site
from gradfn.jaxpr.users import RESULT, Users

# These keep the elements and their order.
_SHAPES = {"reshape", "squeeze", "name", "copy"}
_SUMS = {"add", "add_any"}
_Value = tuple[Path, int]


def same_values(program: Program, sites: Sequence[Site]) -> dict[str, str]:
    """Return, for the sites whose values are those of an earlier site up to their shape, that site's name."""
    users = Users(program.jaxpr.jaxpr)
    found: dict[_Value, Site] = {}
    twins: dict[str, str] = {}
    for site in sorted(sites, key=lambda site: site.path):
        origin = _origin(users, (site.path, site.index))
        first = found.setdefault(origin, site)
        # Some statistics of an activation function depend on its kind, and on its units.
        if first is not site and (not (first.kind or site.kind) or _activation(first) == _activation(site)):
            twins[site.name] = first.name
    return twins


def _activation(site: Site) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    return site.kind, site.shape, site.units


def same_gradients(program: Program, sites: Sequence[Site]) -> dict[str, str]:
    """Return, for the sites whose gradients are those of a later site up to their shape, that site's name."""
    users = Users(program.jaxpr.jaxpr)
    found: dict[_Value, Site] = {}
    twins: dict[str, str] = {}
    for site in sorted(sites, key=lambda site: site.path, reverse=True):
        if site.differentiable:
            last = found.setdefault(_end(users, (site.path, site.index)), site)
            if last is not site:
                twins[site.name] = last.name
    return twins


def _origin(users: Users, value: _Value) -> _Value:
    """Return the value that a value is, up to its shape: the first one in its body."""
    path, index = value
    body, _ = users.body(path[:-1])
    eqn = body.eqns[path[-1]]
    while operation(eqn) in _SHAPES and not isinstance(eqn.invars[0], Literal):
        at = users.computed(path[:-1]).get(eqn.invars[0])
        if at is None:
            break
        path, index = (*path[:-1], at[0]), at[1]
        eqn = body.eqns[path[-1]]
    return path, index


def _end(users: Users, value: _Value) -> _Value:
    """Return the value whose gradient is that of a value, up to its shape: the last one in its body."""
    path, index = value
    body, uses = users.body(path[:-1])
    while True:
        of_it = uses.get(body.eqns[path[-1]].outvars[index], [])
        if len(of_it) != 1 or of_it[0] == RESULT:
            return path, index
        eqn = body.eqns[of_it[0]]
        before: Any
        after: Any
        before, after = body.eqns[path[-1]].outvars[index].aval, eqn.outvars[0].aval
        if operation(eqn) not in _SHAPES | _SUMS or (before.size, before.dtype) != (after.size, after.dtype):
            return path, index
        path, index = (*path[:-1], of_it[0]), 0
