"""The operands of one equation, in numbers: what explains the NaN or the infinity that it returned."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradfn.core.devices import elements_of, replicated
from gradfn.inspection.causes import ELEMENTWISE, Operand
from gradfn.inspection.search import Spot, is_inexact
from gradfn.jaxpr import Equation, Program, interpret
from gradfn.jaxpr.interpreter import Evaluate


class Details(NamedTuple):
    """The first bad element of an equation's result, and the equation's operands.

    Attributes:
        element: its index, or None.
        operands: empty if they are not known.
    """

    element: tuple[int, ...] | None = None
    operands: tuple[Operand, ...] = ()


def details_of(
    program: Program, kind: str, spot: Spot, iteration: tuple[int, ...], compiled: bool
) -> Details:
    """Run the program once more, to record the operands of one equation in one iteration.

    Args:
        program: the program.
        kind: of the equation's result, `nan` or `inf`.
        spot: the equation.
        iteration: of the loops around it.
        compiled: whether the program is compiled as a whole, or runs equation by equation.
    """
    equation = program.equations([spot.path], enter_custom=True)[spot.path]
    outs: list[PyTree] = [v for v in equation.eqn.outvars if is_inexact(v)]
    operands: list[PyTree] = [v for v in equation.eqn.invars if is_inexact(v)]
    shape: tuple[int, ...] = tuple(outs[0].aval.shape)
    pointwise = len(equation.eqn.outvars) == 1 and spot.operation in ELEMENTWISE
    is_bad = jnp.isnan if kind == "nan" else jnp.isinf

    @jax.jit
    def numbers_of(results: Sequence[PyTree], inputs: Sequence[PyTree]) -> jax.Array:
        known = [x for v, x in zip(equation.eqn.outvars, results, strict=True) if is_inexact(v)]
        bad = replicated(is_bad(known[0])).reshape(-1)
        element = jnp.unravel_index(jnp.argmax(bad), shape) if bad.size else [jnp.zeros((), int)] * len(shape)
        found = jnp.any(jnp.stack([jnp.any(is_bad(x)) for x in known]))
        numbers = [found, *element]
        for v, x in zip(equation.eqn.invars, inputs, strict=True):
            if is_inexact(v):
                numbers += _numbers(jnp.asarray(x), element if pointwise else None)
        wide = jnp.float64 if any(x.dtype == jnp.float64 for x in known) else jnp.float32
        return jnp.stack([jnp.asarray(n).astype(wide) for n in numbers])

    def visit(
        equation: Equation, evaluate: Evaluate, inputs: Sequence[PyTree], token: None
    ) -> tuple[list[PyTree], jax.Array]:
        results = evaluate(inputs)
        return results, numbers_of(results, inputs)

    def keep_first(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(old[..., :1] > 0, old, new)

    def run(inputs: Sequence[PyTree]) -> jax.Array:
        _, captures = interpret(program.jaxpr, visit, {spot.path: equation}, inputs, merge=keep_first)
        return captures[spot.path]

    index = tuple(i for loop, i in zip(spot.loops, iteration, strict=True) if loop.length is not None)
    numbers = np.asarray((jax.jit(run) if compiled else run)(program.inputs))[index].tolist()
    if not numbers[0]:
        # Compiled differently, the program gave other numbers.
        return Details()
    element = tuple(int(i) for i in numbers[1 : 1 + len(shape)])
    rest = numbers[1 + len(shape) :]
    found = []
    for i, v in enumerate(operands):
        low, high, zeros, nans, infs, minus_infs, at = rest[7 * i : 7 * i + 7]
        counts = (int(zeros), int(nans), int(infs), int(minus_infs))
        known = pointwise and tuple(v.aval.shape) in (shape, ())
        found.append(
            Operand(str(v.aval.dtype), tuple(v.aval.shape), low, high, *counts, at if known else None)
        )
    return Details(element if len(outs) == 1 else None, tuple(found))


def _numbers(x: jax.Array, element: Sequence[PyTree] | None) -> list[jax.Array]:
    """Return lowest and highest finite value, counts of zeros, NaN, inf, -inf, and the value at an element."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.abs(x)
    x = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    finite = jnp.isfinite(x)
    none = ~jnp.any(finite)
    low = jnp.min(jnp.where(finite, x, jnp.inf), initial=jnp.inf)
    high = jnp.max(jnp.where(finite, x, -jnp.inf), initial=-jnp.inf)
    nan = jnp.full((), jnp.nan, x.dtype)
    at = nan
    if element is not None:
        at = elements_of(x, [i[None] for i in element])[0] if x.ndim else x
    counts = [jnp.sum(c) for c in (x == 0, jnp.isnan(x), x == jnp.inf, x == -jnp.inf)]
    return [jnp.where(none, nan, low), jnp.where(none, nan, high), *counts, at]
