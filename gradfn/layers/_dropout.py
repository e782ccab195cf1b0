"""Dropout, with an explicit key."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradfn.core.net import Net
from gradfn.core.params import Params


def dropout(rate: float) -> Net:
    """Return a layer that sets a random fraction of its inputs to zero and scales the others to keep the mean.

    Srivastava et al., *Dropout: A Simple Way to Prevent Neural Networks from Overfitting*, 2014.

    Args:
        rate: the fraction to drop, in [0, 1).

    Returns:
        A net without parameters, `apply({}, x, key=key)`; without a key it returns its input unchanged, as
        evaluation needs it.

    Raises:
        ValueError: a rate outside [0, 1).

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> drop = gf.layers.dropout(0.5)
    >>> drop.apply({}, jnp.ones(3))
    Array([1., 1., 1.], dtype=float32)
    >>> sorted(set(drop.apply({}, jnp.ones(100), key=jax.random.key(0)).tolist()))
    [0.0, 2.0]
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: rate must be in [0, 1), got {rate}")

    def apply(params: Params, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        if key is None or rate == 0:
            return x
        kept = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))

    return Net({}, apply)
