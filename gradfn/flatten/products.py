"""Matrix products in two dimensions, whatever the number of axes that the code was written with.

For a product of `[batch, time, in]` with `[out, in]`, and its gradient, which contracts batch and time, XLA's CPU
backend transposes and copies; for `[batch * time, in]` it does not. Norms, activations and sums between products also
run on more threads in this form. A network written for one example and batched by `jax.vmap` has the slow form, so
the traced program is rewritten.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import source_info_util
from jaxtyping import PyTree

from gradfn.flatten.rows import Value, in_rows, row_equations, spec_of, values_of
from gradfn.jaxpr.interpreter import Equation, Evaluate, Path, interpret
from gradfn.jaxpr.program import as_written, trace


def flat_products(f: Callable) -> Callable:
    """Return the same function with matrix products of two-dimensional arrays.

    Products (`dot_general`) without batch axes whose operands have more than two axes become reshape, product,
    reshape. So do rowwise operations on their operands and results; XLA removes reshapes that cancel, which leaves
    long sequences in two dimensions. Nothing else changes: neither values (up to rounding) nor names, scopes, source
    lines and the shapes of named values. On two CPU cores a step of a small GPT takes 12 to 16 % less time, the same
    as raw JAX written by hand for a whole batch (`benchmarks/gpt_step.py`).

    Args:
        f: any JAX function. With concrete arguments (nothing is compiled or differentiated), and when it is traced to
            be inspected, it runs unchanged.

    >>> import jax, jax.numpy as jnp
    >>> from gradfn.flatten import flat_products
    >>> def f(W, x):
    ...     return jnp.einsum("oi,bti->bto", W, jnp.tanh(x))
    >>> shapes = jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((7, 5, 3), jnp.float32)
    >>> eqns = jax.make_jaxpr(flat_products(f))(*shapes).eqns
    >>> [(e.primitive.name, e.outvars[0].aval.shape) for e in eqns if e.primitive.name != "reshape"]
    [('tanh', (35, 3)), ('dot_general', (35, 2))]
    """

    if getattr(f, "flat", None) is f:
        return f

    @functools.wraps(f)
    def flat(*args: PyTree, **kwargs: PyTree) -> PyTree:
        concrete = not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs)))
        if concrete or as_written.value:
            return f(*args, **kwargs)
        program = trace(f, *args, **kwargs)
        equations = program.equations(enter_choices=True)
        eqns = {path: equation.eqn for path, equation in equations.items()}
        products = {path for path, eqn in eqns.items() if _flattens(eqn)}
        rows = row_equations(eqns, (start for path in products for start in _starts(path, eqns[path])))

        def visit(
            equation: Equation, evaluate: Evaluate, inputs: Sequence[PyTree], token: PyTree
        ) -> tuple[PyTree, None]:
            eqn: Any = equation.eqn
            source = eqn.source_info
            with source_info_util.user_context(source.traceback, name_stack=source.name_stack):
                n = rows.get(equation.path)
                y = _product(eqn, inputs) if n is None else in_rows(eqn, inputs, n)
                return [y.reshape(eqn.outvars[0].aval.shape)], None

        chosen = {path: equations[path] for path in (*products, *rows)}
        outs, _ = interpret(program.jaxpr, visit, chosen, program.inputs)
        return program.rebuild(outs)

    # Itself: `functools.wraps` hands attributes on to functions around this one, which are not it.
    flat.flat = flat  # type: ignore[attr-defined]
    return flat


def _flattens(eqn: Any) -> bool:
    """Tell a product that becomes one of two matrices by reshapes alone."""
    if eqn.primitive.name != "dot_general" or eqn.params.get("out_sharding") is not None:
        return False
    contracted, batched = eqn.params["dimension_numbers"]
    ranks = [atom.aval.ndim for atom in eqn.invars]
    if any(batched) or max(ranks) < 3 or any(any(spec_of(atom)[1:]) for atom in (*eqn.invars, *eqn.outvars)):
        return False
    return all(_at_an_end(axes, rank) for axes, rank in zip(contracted, ranks, strict=True))


def _at_an_end(axes: Sequence[int], rank: int) -> bool:
    """Tell whether axes are, in order, the first ones or the last ones, and not all."""
    n = len(axes)
    return 0 < n < rank and tuple(axes) in (tuple(range(n)), tuple(range(rank - n, rank)))


def _starts(path: Path, eqn: Any) -> Iterator[tuple[Value, int]]:
    """Yield a product's operands and result whose rows run over several axes, and over how many."""
    contracted, _ = eqn.params["dimension_numbers"]
    free = [atom.aval.ndim - len(axes) for atom, axes in zip(eqn.invars, contracted, strict=True)]
    # Free axes in front are rows; the result's first axes are the left operand's free ones.
    in_front = [axes[0] > 0 for axes in contracted]
    for atom, n, rows in zip((*eqn.invars, *eqn.outvars), (*free, free[0]), (*in_front, True), strict=True):
        if n > 1 and rows:
            yield from ((value, n) for value in values_of(path, [atom]))


def _product(eqn: Any, inputs: Sequence[PyTree]) -> jax.Array:
    contracted, _ = eqn.params["dimension_numbers"]
    (lhs, i), (rhs, j) = map(_matrix, inputs, contracted)
    params = {key: eqn.params[key] for key in ("precision", "preferred_element_type")}
    return jax.lax.dot_general(lhs, rhs, (((i,), (j,)), ((), ())), **params)


def _matrix(x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, int]:
    """Return an operand as a matrix, and which of its two axes is contracted."""
    size = math.prod(x.shape[axis] for axis in axes)
    if axes[0] == 0:
        return x.reshape(size, -1), 0  # [contracted ..., free ...] -> [contracted, free]
    return x.reshape(-1, size), 1  # [free ..., contracted ...] -> [free, contracted]
