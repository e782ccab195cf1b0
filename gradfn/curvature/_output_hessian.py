"""The Hessian H of a loss with respect to the outputs of a net, as a product S S^T."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import PyTree

from gradfn.core.precision import wide, widen
from gradfn.curvature.products import softmax_of


def root_of(loss: str | Callable, what: str) -> Callable[[jax.Array, PyTree], PyTree]:
    """Return a function `(outputs, y) -> S`, of one example, of which `times_root` computes products."""
    if loss == "softmax":
        return lambda z, y: softmax_of(z, y, what)
    if loss == "squared":
        return lambda z, y: jnp.full((), (2 / z.size) ** 0.5, wide(z.dtype))
    return lambda z, y: _by_eigenvalues(loss, z, y)  # type: ignore[arg-type]


def times_root(loss: str | Callable, root: PyTree, e: jax.Array) -> jax.Array:
    """Return S times an array like the outputs of one example."""
    if loss == "softmax":
        p, weights = root
        along, half = e.reshape(p.shape), jnp.sqrt(p)
        return (jnp.sqrt(weights) * (half * along - p * (half * along).sum(-1, keepdims=True))).reshape(
            e.shape
        )
    if loss == "squared":
        return root * e
    return (root @ e.ravel()).reshape(e.shape)


def _by_eigenvalues(loss: Callable, z: jax.Array, y: ArrayLike) -> jax.Array:
    """Return S `[outputs, outputs]`; eigenvalues below 0 count as 0."""
    z = widen(z)
    matrix = jax.hessian(lambda flat: loss(flat.reshape(z.shape), y))(z.ravel())
    values, vectors = jnp.linalg.eigh(matrix)
    return vectors * jnp.sqrt(jnp.maximum(values, 0))[None]
