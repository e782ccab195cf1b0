"""A value with a gradient of one's own: how a backward rule is attached to an equation."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

Losses = Mapping[str, jax.Array]


def attach(
    y: jax.Array, x: jax.Array, slope: jax.Array, lost: Losses | None = None, tokens: PyTree = None
) -> jax.Array:
    """Return `y`; differentiated, its cotangent g arrives at `x` as `slope * g`, and at nothing else.

    Args:
        y: the value.
        x: of the shape of `y`.
        slope: of the shape of `y`, or a scalar.
        lost: by cause, what of `y` does not arrive at `x`: the gradient of `tokens[cause]` is `sum(lost * g)`.
        tokens: scalars by cause.

    >>> import jax, jax.numpy as jnp
    >>> jax.grad(lambda x: attach(jnp.sin(x), x, jnp.array(5.0)))(1.0)
    Array(5., dtype=float32)
    """
    lost = lost or {}
    return _attach(y, x, slope, dict(lost), {cause: tokens[cause] for cause in lost})


@jax.custom_vjp
def _attach(y: jax.Array, x: jax.Array, slope: jax.Array, lost: PyTree, tokens: PyTree) -> jax.Array:
    return y


def _forward(
    y: jax.Array, x: jax.Array, slope: jax.Array, lost: PyTree, tokens: PyTree
) -> tuple[jax.Array, PyTree]:
    return y, (slope, lost, tokens)


def _backward(residuals: PyTree, g: jax.Array) -> tuple[PyTree, ...]:
    slope, lost, tokens = residuals

    def total(share: jax.Array, token: jax.Array) -> jax.Array:
        # A masked score is infinite, but nothing arrives at it.
        products = jnp.where(g == 0, 0, share.astype(g.dtype) * g)
        return products.sum(dtype=token.dtype)

    return None, slope.astype(g.dtype) * g, None, None, jax.tree.map(total, lost, tokens)


_attach.defvjp(_forward, _backward)
