"""Derivatives in a direction: by forward mode, or by reverse mode twice where a function has a backward rule only.

Reverse mode alone gives `J v`, too: `u -> J^T u` is linear, and the transpose of its Jacobian is J. Christianson,
*Automatic Hessians by reverse accumulation*, 1992, for Hessians. A function with `jax.custom_vjp`
(`jax.experimental.ode.odeint` is one) has no forward mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradfn.core.precision import widen
from gradfn.inspection.where import around, line_of, operation_of
from gradfn.jaxpr import Program, trace, trace_as_written
from gradfn.per_example.plan import sum_of


class Linearized(NamedTuple):
    """A function at one point: its value, and the products with its Jacobian J.

    Attributes:
        value: an array or a tree.
        push: `v -> J v`, a tree like the value.
        pull: `u -> J^T u`, a tree like the argument.
    """

    value: Any
    push: Callable[[Any], Any]
    pull: Callable[[Any], Any]


def linearized(f: Callable, x: Any, what: str, push: Callable[[Any], Any] | None = None) -> Linearized:
    """Return `f` at `x`; what does not depend on the vectors is computed once.

    Args:
        f: any function of one tree of floating arrays.
        x: that tree.
        what: names the caller in errors.
        push: `v -> J v`, for where there is no forward mode; by reverse mode twice if None.

    Raises:
        TypeError: a function inside has only a backward rule, which itself cannot be differentiated.
    """
    value, forward = jax.linearize(f, x)
    if _runs(trace(forward, x)):
        transposed = jax.linear_transpose(forward, x)
        return Linearized(value, forward, lambda u: transposed(u)[0])
    value, back = jax.vjp(f, x)
    return Linearized(value, push or (lambda v: _twice(f, x, v, what)), lambda u: back(u)[0])


def slope(f: Callable, x: Any, v: Any, what: str, of: Callable | None = None) -> Any:
    """Return `J v`, the slope of `f` at `x` in the direction `v`: a tree like the value.

    Args:
        f: any function of one tree of floating arrays.
        x: that tree.
        v: a tree like it.
        what: names the caller in errors.
        of: the function that `f` is the gradient of, if it is one: errors name what is in it.

    Raises:
        TypeError: a function inside has only a backward rule, which itself cannot be differentiated.
    """
    found = _forward(f, x, v)
    return _twice(f, x, v, what, of) if found is None else found


def slope_of_scalar(f: Callable, x: list[Any], v: list[Any]) -> jax.Array:
    """Return the slope of a function `list -> scalar`: from its gradient, where there is no forward mode."""
    found = _forward(f, x, v)
    return slope_by_gradient(f, x, v) if found is None else found


def slope_by_gradient(f: Callable, x: list[Any], v: list[Any]) -> jax.Array:
    """Return the slope of a function `list -> scalar`, from its gradient."""
    value, gradient = jax.value_and_grad(f)(x)
    products = [jnp.sum(widen(g) * widen(part)) for g, part in zip(gradient, v, strict=True)]
    return sum_of(products).astype(value.dtype)


def linear_matrix(
    times: Callable[[jax.Array], jax.Array], zeros: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    """Return a linear function of vectors with all that does not depend on the vector computed once.

    As it is where that takes a forward mode that is not there.
    """
    # A linear function is its own derivative: this splits it into what is known already and what is not.
    _, matrix = jax.linearize(times, zeros)
    return matrix if _runs(trace(matrix, zeros)) else times


def _forward(f: Callable, x: Any, v: Any) -> Any:
    """Return `J v` by forward mode; None where there is none."""
    program = trace(lambda x, v: jax.jvp(f, (x,), (v,))[1], x, v)
    if not _runs(program):
        return None
    closed = program.jaxpr
    return program.rebuild(jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *program.inputs))


def _runs(program: Program) -> bool:
    """Tell whether a derivative in forward mode runs; jax traces that of a `custom_vjp`, and fails at running it."""
    equations = program.equations(enter_custom=True).values()
    return all(equation.eqn.primitive.name != "custom_lin" for equation in equations)


def _twice(f: Callable, x: Any, v: Any, what: str, of: Callable | None = None) -> Any:
    try:
        value, pull = jax.vjp(f, x)
        zeros = jax.tree.map(jnp.zeros_like, value)
        return jax.vjp(lambda u: pull(u)[0], zeros)[1](v)[0]
    except (TypeError, ValueError, NotImplementedError) as error:
        names = ", ".join(_backward_only(of or f, x))
        raise TypeError(
            f"{what}: no forward-mode derivative of {names}, and its backward rule cannot be differentiated: "
            f"{str(error).splitlines()[0]} Write that rule with differentiable operations, or define the function "
            "with jax.custom_jvp"
        ) from error


def _backward_only(f: Callable, x: Any) -> list[str]:
    """Return the functions with `jax.custom_vjp` that a function calls, each with its line."""
    equations = trace_as_written(f, x).equations()
    found = [equation for equation in equations.values() if equation.eqn.primitive.name == "custom_vjp_call"]
    lines = (
        f"{operation_of(equation).split()[-1]} ({line_of(around(equation, equations))})" for equation in found
    )
    return list(dict.fromkeys(lines)) or ["a function with jax.custom_vjp"]
