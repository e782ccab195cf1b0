"""The gradient of a score whose equations have backward rules of their own."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import PyTree

from gradfn.attribution._roles import Step, live_steps
from gradfn.attribution._score import explained_site, floating
from gradfn.inspection.observe import trace_sites
from gradfn.jaxpr import Equation, Program, Site, interpret
from gradfn.jaxpr.interpreter import Evaluate, Path

Visit = Callable[[Equation, Evaluate, Sequence[PyTree]], list[PyTree]]


class Explained(NamedTuple):
    """A traced score, the value to explain it by, and the equations between the two.

    Attributes:
        program: of the score.
        source: the index of the input to explain it by, or a site.
        steps: the equations by path through which the score depends on it.
        value: zeros of the shape and dtype of the value.
    """

    program: Program
    source: int | Site
    steps: dict[Path, Step]
    zero: jax.Array

    def run(self, delta: jax.Array, visit: Visit, visited: Container[Path]) -> tuple[jax.Array, jax.Array]:
        """Return the score and the value, with `delta` added to it, and `visit` instead of the chosen equations."""
        program, source = self.program, self.source
        inputs, chosen, tokens = list(program.inputs), dict[Path, Equation](), dict[Path, jax.Array]()
        if isinstance(source, Site):
            tokens[source.path] = delta
            chosen |= program.equations([source.path], enter_custom=True)
        else:
            value = jnp.asarray(inputs[source])
            inputs[source] = value + delta

        def visit_one(
            equation: Equation, evaluate: Evaluate, inputs: Sequence[PyTree], token: PyTree
        ) -> tuple[list[PyTree], PyTree]:
            outs = visit(equation, evaluate, inputs) if equation.path in visited else evaluate(inputs)
            if token is None or not isinstance(source, Site):
                return outs, None
            old = outs[source.index]
            outs[source.index] = old + token
            return outs, old

        chosen |= program.equations(visited, enter_custom=True)
        outs, captures = interpret(program.jaxpr, visit_one, chosen, inputs, tokens)
        return program.rebuild(outs), captures[source.path] if isinstance(source, Site) else value


def explained(
    scored: Callable, at: str | None, params: PyTree, x: ArrayLike, rest: Sequence[PyTree], what: str
) -> Explained:
    """Trace a score and find the equations between it and the value to explain it by: `x`, or the site `at`."""
    if at is None:
        x = floating(x, what)
    program, offered, _ = trace_sites(scored, (params, x, *rest), {}, at or (), what)
    if at is None:
        source: int | Site = program.owners.index(1)
        zero = jnp.zeros_like(x)
    else:
        source = explained_site(offered, at, what)
        zero = jnp.zeros(source.axes + source.shape, source.dtype)
    return Explained(program, source, live_steps(program, source, what), zero)
