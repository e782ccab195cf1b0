"""The inside of backward rules written with `jax.custom_vjp`: the values that `gf.tap` names there.

A program contains the forward part of such a function only; the rule is called when the program is differentiated. To
record values in it, the call is replaced by one whose backward rule interprets the user's rule, and returns what was
recorded as the gradient of a token, as probes do.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from jaxtyping import PyTree

from gradfn.jaxpr.interpreter import Equation, Evaluate, Path, evaluate, interpret, operation, params_of, walk

HAS_LOGS = hasattr(jax.custom_vjp, "defvjp_with_logs")
"""Whether backward rules can log values: `jax.custom_vjp.defvjp_with_logs`, from jax 0.12 on."""


class NamedValue(NamedTuple):
    """A value that a backward rule names: the equation in the rule, and the call of the function with that rule."""

    call: Equation
    equation: Equation

    @property
    def name(self) -> str:
        """The name given to `gf.tap`."""
        return params_of(self.equation.eqn)["name"]


def named_values(call: Equation) -> list[NamedValue]:
    """Return the floating values that the backward rule of an equation names; none if it has no such rule."""
    # The shapes inside a shard_map are those of one device, which only code inside it may use.
    if call.eqn.primitive.name != "custom_vjp_call" or any(f.kind == "shard_map" for f in call.frames):
        return []
    try:
        pull, cotangents = _shapes(call)
        rule, _ = _rule(pull, cotangents)
    # A rule that fails says so where it is used, in the differentiation itself.
    except Exception:
        return []
    return [NamedValue(call, equation) for equation in _named(rule).values()]


def _shapes(call: Equation) -> tuple[PyTree, list[Any]]:
    def forward(*inputs: PyTree) -> tuple[PyTree, list[Any]]:
        outs, pull = jax.vjp(lambda *xs: evaluate(call.eqn, xs), *inputs)
        return pull, outs

    return jax.eval_shape(forward, *[v.aval for v in call.eqn.invars])


def _rule(pull: PyTree, cotangents: Sequence[Any]) -> tuple[ClosedJaxpr, Any]:
    """Return a backward rule as a program of `(pull, floating cotangents)`, and the tree of `(gradients, logs)`."""
    floating = [_is_floating(c) for c in cotangents]

    def run(pull: Any, moving: list[jax.Array]) -> tuple[PyTree, dict[str, PyTree]]:
        rest = iter(moving)
        full = [
            next(rest) if moves else _no_cotangent(c) for moves, c in zip(floating, cotangents, strict=True)
        ]
        return pull.with_logs(full) if HAS_LOGS else (pull(full), {})

    rule, shapes = jax.make_jaxpr(run, return_shape=True)(pull, _floating(cotangents))
    return rule, jax.tree.structure(shapes)


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _floating(arrays: Sequence[Any]) -> list[Any]:
    return [x for x in arrays if _is_floating(x)]


def _no_cotangent(x: Any) -> np.ndarray:
    """Return what jax passes as the cotangent of an integer."""
    return np.zeros(x.shape, jax.dtypes.float0)


def _named(rule: ClosedJaxpr) -> dict[Path, Equation]:
    return {
        equation.path: equation
        for equation in walk(rule)
        if operation(equation.eqn) == "name" and _is_floating(equation.eqn.outvars[0].aval)
    }


def with_rule(
    evaluate: Evaluate, inputs: Sequence[PyTree], record: Callable[[Path, jax.Array], PyTree], token: PyTree
) -> list[PyTree]:
    """Evaluate a call of a function with a backward rule; differentiated, record the values that the rule names.

    Args:
        evaluate: computes the call from its inputs.
        inputs: those inputs.
        record: `(path of the equation in the rule, value) -> tree` of floating arrays.
        token: zeros like `{path: tree}` of what is recorded, whose gradient it becomes.

    Returns:
        The outputs of the call, whose gradients are those of the user's rule.
    """

    @jax.custom_vjp
    def call(token: PyTree, *inputs: PyTree) -> list[PyTree]:
        return evaluate(inputs)

    def forward(token: PyTree, *inputs: PyTree) -> tuple[list[PyTree], PyTree]:
        return jax.vjp(lambda *xs: evaluate(xs), *inputs)

    def backward(pull: PyTree, cotangents: list[Any]) -> tuple[Any, ...]:
        rule, structure = _rule(pull, cotangents)

        def visit(
            equation: Equation, evaluate: Evaluate, operands: Sequence[PyTree], _: None
        ) -> tuple[list[PyTree], PyTree]:
            outs = evaluate(operands)
            return outs, record(equation.path, outs[0])

        equations = {path: equation for path, equation in _named(rule).items() if path in token_paths}
        flat = jax.tree.leaves((pull, _floating(cotangents)))
        outs, recorded = interpret(rule, visit, equations, flat)
        gradients, logs = jax.tree.unflatten(structure, outs)
        found = (recorded, *gradients)
        return (found, logs) if HAS_LOGS else found

    token_paths = set(token)
    # mypy knows the older versions of jax, which have no logs.
    define: Any = getattr(call, "defvjp_with_logs", call.defvjp)
    define(forward, backward)
    return call(token, *inputs)


def value_grads_and_logs(
    f: Callable, *args: PyTree
) -> tuple[tuple[Any, PyTree], tuple[PyTree, ...], dict[str, PyTree]]:
    """Return `((value, aux), gradients, logs)` of a function `(*args) -> (scalar, aux)`.

    Logs are what backward rules logged, by key; always empty in versions of jax without logs.
    """
    if not HAS_LOGS:
        return *jax.value_and_grad(f, argnums=tuple(range(len(args))), has_aux=True)(*args), {}
    pull: Any
    value, pull, aux = jax.vjp(f, *args, has_aux=True)
    return (value, aux), *pull.with_logs(jax.lax.full_like(value, 1))
