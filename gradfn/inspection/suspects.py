"""Why a gradient differs from the slope: a `stop_gradient`, a custom rule, an operation with zero derivative."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from gradfn.inspection._backprop import active_equations
from gradfn.inspection.where import around, line_of, operation_of
from gradfn.jaxpr import Equation, Program, interpret, trace_as_written
from gradfn.jaxpr.call import Scalar
from gradfn.jaxpr.interpreter import Evaluate, Path, bodies

_LIFTED = ("stop_gradient", "custom_jvp_call", "custom_vjp_call")
# Their gradient is zero.
_FLAT = {"ceil", "floor", "round", "sign"}
# The number of suspects that are tried one by one.
MOST = 16


def suspects(of: Scalar, i: int, is_right: Callable[[np.ndarray], bool]) -> str:
    """Return the cause of an incorrect gradient of leaf i; empty if it is not known.

    Each `stop_gradient` is removed, and each function with a custom rule is differentiated as it is written. If the
    gradient is then correct, the ones that change it are named.

    Args:
        of: the function.
        i: the index of the leaf.
        is_right: tells whether a gradient of that leaf is correct.
    """
    values = of.leaves.values
    program = trace_as_written(lambda leaf: of.value([*values[:i], leaf, *values[i + 1 :]]), values[i])
    equations = program.equations()
    lifted = {
        path: equation for path, equation in equations.items() if equation.eqn.primitive.name in _LIFTED
    }
    plain = _gradient(program, {})
    stops = {
        path: equation for path, equation in lifted.items() if equation.eqn.primitive.name == "stop_gradient"
    }
    for some in (stops, lifted):
        if some and is_right(_gradient(program, some)):
            alone = list(some.items())[:MOST]
            causes = [
                equation for path, equation in alone if _differs(_gradient(program, {path: equation}), plain)
            ]
            return "; ".join(
                dict.fromkeys(_named(equation, equations) for equation in causes or some.values())
            )
    if not plain.any():
        flat = [e for e in active_equations(program, [of.names[i]]) if e.operation in _FLAT]
        return "; ".join(dict.fromkeys(f"the gradient of {e.operation} is zero, at {e.line}" for e in flat))
    return ""


def _gradient(program: Program, lifted: Mapping[Path, Equation]) -> np.ndarray:
    """Return the gradient with some equations lifted; NaN where the body of a function has no derivative."""

    def visit(
        equation: Equation, evaluate: Evaluate, inputs: Sequence[PyTree], token: PyTree
    ) -> tuple[Sequence[PyTree], None]:
        _, inner = bodies(equation.eqn, enter_custom=True)
        if not inner:
            return inputs, None
        body, consts = inner[0]
        return jax.core.eval_jaxpr(body, consts, *inputs), None

    def value(leaf: PyTree) -> PyTree:
        outs, _ = interpret(program.jaxpr, visit, lifted, [leaf])
        return outs[0]

    try:
        return np.asarray(jax.jit(jax.grad(value))(*program.inputs))
    # Such as a while loop, which is why the function has a rule.
    except (TypeError, ValueError, NotImplementedError):
        return np.full(np.shape(program.inputs[0]), np.nan)


def _differs(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.isfinite(a).all()) and not np.allclose(
        a, b, rtol=1e-6, atol=1e-12 * float(np.abs(b).max(initial=0))
    )


def _named(equation: Equation, equations: Mapping[Path, Equation]) -> str:
    line = line_of(around(equation, equations))
    if equation.eqn.primitive.name == "stop_gradient":
        return f"stop_gradient, at {line}"
    return f"the rule of {operation_of(equation)} is not its derivative, at {line}"
