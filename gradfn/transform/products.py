"""Matrix products in two dimensions, whatever the number of axes that the code was written with.

A product of `[batch, time, in]` with `[out, in]` and its gradient, which contracts batch and time at once, make
XLA's processor backend transpose and copy; on `[batch * time, in]` it multiplies at once. A network that is
written for one example and batched by `jax.vmap` arrives in the slow form, so this rewrites what was traced.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import source_info_util

from gradfn.transform.interpreter import Evaluate, Place, interpret, walk
from gradfn.transform.program import trace


def flat_products(f: Callable) -> Callable:
    """Return the same function, its matrix products taken on two-dimensional arrays.

    Products (`dot_general`) without batch axes of operands with more than two axes are rewritten: reshape,
    product, reshape. Nothing else changes, neither numbers (up to rounding) nor names, scopes and source lines.
    On two processor cores a step of a small GPT takes about a fifth less work for it (`benchmarks/`).

    Args:
        f: any JAX function; where its arguments are concrete (nothing is being compiled or differentiated) it
            runs as it is.

    >>> import jax, jax.numpy as jnp
    >>> from gradfn.transform import flat_products
    >>> def f(W, x):
    ...     return jnp.einsum("oi,bti->bto", W, x)
    >>> shapes = jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((7, 5, 3), jnp.float32)
    >>> [e.outvars[0].aval.shape for e in jax.make_jaxpr(flat_products(f))(*shapes).eqns]
    [(35, 3), (35, 2), (7, 5, 2)]
    """

    if getattr(f, "has_flat_products", False):
        return f

    @functools.wraps(f)
    def flat(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            return f(*args, **kwargs)
        program = trace(f, *args, **kwargs)
        chosen = {place.path: place for place in walk(program.jaxpr) if _flattens(place.eqn)}
        outs, _ = interpret(program.jaxpr, _flattened, chosen, program.inputs)
        return program.rebuild(outs)

    flat.has_flat_products = True  # type: ignore[attr-defined]
    return flat


def _flattens(eqn: Any) -> bool:
    """Tell a product that becomes one of two matrices by reshapes alone."""
    if eqn.primitive.name != "dot_general" or eqn.params.get("out_sharding") is not None:
        return False
    contracted, batched = eqn.params["dimension_numbers"]
    ranks = [atom.aval.ndim for atom in eqn.invars]
    if any(batched) or max(ranks) < 3:
        return False
    return all(_at_an_end(axes, rank) for axes, rank in zip(contracted, ranks, strict=True))


def _at_an_end(axes: Sequence[int], rank: int) -> bool:
    """Tell whether axes are, in order, the first ones or the last ones, and not all."""
    n = len(axes)
    return 0 < n < rank and tuple(axes) in (tuple(range(n)), tuple(range(rank - n, rank)))


def _flattened(
    place: Place, evaluate: Evaluate, inputs: Sequence[Any], token: Any
) -> tuple[Sequence[Any], None]:
    eqn: Any = place.eqn
    contracted, _ = eqn.params["dimension_numbers"]
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=eqn.source_info.name_stack):
        (lhs, i), (rhs, j) = map(_matrix, inputs, contracted)
        params = {key: eqn.params[key] for key in ("precision", "preferred_element_type")}
        product = jax.lax.dot_general(lhs, rhs, (((i,), (j,)), ((), ())), **params)
        return [product.reshape(eqn.outvars[0].aval.shape)], None


def _matrix(x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, int]:
    """Return an operand as a matrix, and which of its two axes is contracted."""
    size = math.prod(x.shape[axis] for axis in axes)
    if axes[0] == 0:
        return x.reshape(size, -1), 0  # [contracted ..., free ...] -> [contracted, free]
    return x.reshape(-1, size), 1  # [free ..., contracted ...] -> [free, contracted]
