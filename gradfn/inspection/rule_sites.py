"""Sites inside backward rules: values that `gf.tap` names in the rule of a `jax.custom_vjp`, for `gf.inspect`."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from gradfn.jaxpr import Program, Site
from gradfn.jaxpr.backward_rules import NamedValue, named_values
from gradfn.jaxpr.sites import last_axis


class RuleSite(NamedTuple):
    """A site inside a backward rule, and the equation that names it there."""

    site: Site
    value: NamedValue

    def zeros(self, shapes: PyTree) -> PyTree:
        """Return zeros like a tree of shapes: a token, with the axes of the loops around the call and in the rule."""
        call, inside = self.value.call, self.value.equation
        return call.zeros(jax.eval_shape(lambda: inside.zeros(shapes)))


def rule_sites(program: Program, others: Sequence[Site]) -> dict[str, RuleSite]:
    """Return the sites inside the backward rules of a program by name.

    A name that is not unique is prefixed by the scope of the call, or else numbered, as all sites are.
    """
    values = [value for call in program.equations().values() for value in named_values(call)]
    given = Counter(site.name for site in others)
    repeated = Counter(value.name for value in values) + given
    found: dict[str, RuleSite] = {}
    for value in values:
        scope = value.call.scope
        base = f"{scope}/{value.name}" if repeated[value.name] > 1 and scope else value.name
        name, number = base, 0
        while name in given or name in found:
            number += 1
            name = f"{base}.{number}"
        found[name] = RuleSite(_site(name, value), value)
    return found


def _site(name: str, value: NamedValue) -> Site:
    call, inside = value.call, value.equation
    aval = inside.eqn.outvars[0].aval
    loops = [len(frame.path) for frame in call.frames if frame.length is not None]
    # Loops in the rule are not on the path of the call.
    loops += [len(call.path) + len(frame.path) for frame in inside.frames if frame.length is not None]
    return Site(
        name=name,
        path=call.path,
        index=0,
        shape=tuple(aval.shape),
        dtype=str(aval.dtype),
        axes=call.axes + inside.axes,
        loops=tuple(loops),
        source="backward",
        line=inside.line,
        scope=call.scope,
        kind="",
        units=last_axis(aval.ndim),
        differentiable=False,
        reaches="result",
    )
