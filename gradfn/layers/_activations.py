"""Activation functions by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]


def gelu_exact(x: jax.Array) -> jax.Array:
    """Return `x` times the standard normal distribution function at `x` (`gelu` approximates it by tanh)."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))  # faster on CPUs than erfc


activations: dict[str, Activation] = {
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "gelu": jax.nn.gelu,
    "gelu_exact": gelu_exact,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "softmax": jax.nn.softmax,
    "identity": lambda x: x,
}
"""The activation functions by name, as layers and networks take them: `activations["relu"]`."""


def activation(name: str | Activation) -> Activation:
    """Return an activation by its name; a function is returned as it is.

    Args:
        name: one of `gf.layers.activations`, or a function of one array.

    Raises:
        ValueError: an unknown name; the message suggests the closest one.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> gf.layers.activation("sigmoid")(jnp.zeros(2))
    Array([0.5, 0.5], dtype=float32)
    """
    if callable(name):
        return name
    if name not in activations:
        near = difflib.get_close_matches(str(name), activations, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"activation: expected one of {', '.join(activations)}; got {name!r}.{hint}")
    return activations[name]


def name_of(squash: str | Activation) -> str | None:
    """Return the name of an activation in `gf.layers.activations`; None for a function without one.

    >>> import jax, jax.numpy as jnp
    >>> name_of(jax.nn.relu), name_of("tanh"), name_of(jnp.sin)
    ('relu', 'tanh', None)
    """
    if isinstance(squash, str):
        return squash
    return next((name for name, function in activations.items() if function is squash), None)
