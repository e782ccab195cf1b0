"""Directional derivatives: by forward mode, or by reverse mode twice if a function has only a backward rule.

A function with `jax.custom_vjp` (such as `jax.experimental.ode.odeint`) has no forward mode. Reverse mode alone gives
`J v` too: `u -> J^T u` is linear, and the transpose of its Jacobian is J. Christianson, *Automatic Hessians by reverse
accumulation*, 1992, for Hessians.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradfn.core.attention_form import differentiable_attention
from gradfn.core.precision import sum_of, widen
from gradfn.inspection.where import around, line_of, operation_of
from gradfn.jaxpr import Program, trace, trace_as_written

Linear = Callable[[PyTree], PyTree]


class Linearized(NamedTuple):
    """A function linearized at one point: its value, and products with its Jacobian J.

    Attributes:
        value: an array or a tree.
        push: `v -> J v`, a tree like the value.
        pull: `u -> J^T u`, a tree like the argument.
    """

    value: PyTree
    push: Linear
    pull: Linear


@differentiable_attention()
def linearized(f: Callable, x: PyTree, what: str, push: Linear | None = None) -> Linearized:
    """Return `f` linearized at `x`; everything that does not depend on the vectors is computed once.

    Args:
        f: any function of one tree of floating arrays.
        x: that tree.
        what: names the caller in errors.
        push: `v -> J v`, used if there is no forward mode; reverse mode twice if None.

    Raises:
        TypeError: a function inside has only a backward rule, which itself cannot be differentiated.
    """
    value, forward = jax.linearize(f, x)
    if _runs(trace(forward, x)):
        transposed = jax.linear_transpose(forward, x)
        return Linearized(value, forward, lambda u: transposed(u)[0])
    value, back = jax.vjp(f, x)
    return Linearized(value, push or (lambda v: _twice(f, x, v, what)), lambda u: back(u)[0])


@differentiable_attention()
def slope(f: Callable, x: PyTree, v: PyTree, what: str, of: Callable | None = None) -> PyTree:
    """Return `J v`, the derivative of `f` at `x` in the direction `v`: a tree like the value.

    Args:
        f: any function of one tree of floating arrays.
        x: that tree.
        v: a tree like it.
        what: names the caller in errors.
        of: the function whose gradient `f` is, if any: errors name the functions in it.

    Raises:
        TypeError: a function inside has only a backward rule, which itself cannot be differentiated.
    """
    found = _forward(f, x, v)
    return _twice(f, x, v, what, of) if found is None else found


@differentiable_attention()
def slope_of_scalar(f: Callable, x: list[PyTree], v: list[PyTree]) -> jax.Array:
    """Return the slope of a function `list -> scalar`: from its gradient if there is no forward mode."""
    found = _forward(f, x, v)
    return slope_by_gradient(f, x, v) if found is None else found


@differentiable_attention()
def slope_by_gradient(f: Callable, x: list[PyTree], v: list[PyTree]) -> jax.Array:
    """Return the slope of a function `list -> scalar`, from its gradient."""
    value, gradient = jax.value_and_grad(f)(x)
    products = [jnp.sum(widen(g) * widen(part)) for g, part in zip(gradient, v, strict=True)]
    return sum_of(products).astype(value.dtype)


@differentiable_attention()
def linear_matrix(
    times: Callable[[jax.Array], jax.Array], zeros: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    """Return a linear function of vectors with everything that does not depend on the vector computed once.

    It is returned as it is if it has no forward mode.
    """
    # A linear function is its own derivative: linearizing splits off the part that does not depend on the vector.
    _, matrix = jax.linearize(times, zeros)
    return matrix if _runs(trace(matrix, zeros)) else times


def _forward(f: Callable, x: PyTree, v: PyTree) -> PyTree:
    """Return `J v` by forward mode; None if there is none."""
    program = trace(lambda x, v: jax.jvp(f, (x,), (v,))[1], x, v)
    if not _runs(program):
        return None
    closed = program.jaxpr
    return program.rebuild(jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *program.inputs))


def _runs(program: Program) -> bool:
    """Return whether a forward-mode derivative runs; jax traces that of a `custom_vjp`, and fails to run it."""
    equations = program.equations(enter_custom=True).values()
    return all(equation.eqn.primitive.name != "custom_lin" for equation in equations)


@differentiable_attention()
def _twice(f: Callable, x: PyTree, v: PyTree, what: str, of: Callable | None = None) -> PyTree:
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


def _backward_only(f: Callable, x: PyTree) -> list[str]:
    """Return the functions with `jax.custom_vjp` that a function calls, each with its line."""
    equations = trace_as_written(f, x).equations()
    found = [equation for equation in equations.values() if equation.eqn.primitive.name == "custom_vjp_call"]
    lines = (
        f"{operation_of(equation).split()[-1]} ({line_of(around(equation, equations))})" for equation in found
    )
    return list(dict.fromkeys(lines)) or ["a function with jax.custom_vjp"]
