"""Where a few digits are not enough: sums, squares and exponentials in float32 at least, norms without overflow."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def is_narrow(dtype: Any) -> bool:
    """Tell a float of less than 32 bits."""
    return bool(jnp.issubdtype(dtype, jnp.inexact)) and jnp.finfo(dtype).bits < 32


def wide(dtype: Any) -> Any:
    """Return float32 for the narrower floats (float16, bfloat16), and any other dtype as it is."""
    return jnp.dtype(jnp.float32) if is_narrow(dtype) else jnp.dtype(dtype)


def widen(x: jax.Array) -> jax.Array:
    """Cast an array of narrow floats to float32."""
    return x.astype(wide(x.dtype))


def magnitudes_squared(x: jax.Array) -> jax.Array:
    """Return |x|^2 of each element, real, in float32 at least."""
    return functools.reduce(jnp.add, map(jnp.square, real_parts(x)))


def real_parts(x: jax.Array) -> list[jax.Array]:
    """Return the real and imaginary parts, in float32 at least."""
    return [widen(part) for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]


def is_safe(square: jax.Array, n: int) -> jax.Array:
    """Tell whether a sum of `n` squares is finite and lost nothing that counts to underflow."""
    return (square >= least_safe(square.dtype, n)) & (square < jnp.inf)


def least_safe(dtype: Any, n: int) -> float:
    """Return the least sum of `n` squares, of a dtype, that lost nothing that counts to underflow."""
    limits = jnp.finfo(dtype)
    # The squares below `tiny` are lost: together less than a rounding of a sum this large.
    return n * float(limits.tiny) / float(limits.eps)


@functools.partial(jax.jit, static_argnames="axis")
def norm(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Return the L2 norm over some axes (all by default), right as long as it is itself a number of its dtype.

    It is the root of the plain sum of squares. Only where such a sum is not safe (gradients of 1e-25 or 1e20 have
    squares of 0 and inf in float32) are all computed again, scaled: `scaled_norm`. Under `vmap` both are computed.

    Args:
        x: floating or complex; NaN and infinities show in the result.
        axis: summed over.

    >>> import jax.numpy as jnp
    >>> from gradfn.core.precision import norm
    >>> print(f"{norm(jnp.array([3e-25, 4e-25])):.3g} {norm(jnp.array([3e25 + 4e25j])):.3g}")
    5e-25 5e+25
    """
    square = jnp.sum(magnitudes_squared(x), axis)
    n = x.size // max(square.size, 1)
    return lax.cond(jnp.all(is_safe(square, n)), lambda x: root(square), lambda x: scaled_norm(x, axis), x)


def scaled_norm(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Return the L2 norm as the largest magnitude times the norm of what is divided by it."""
    parts = real_parts(x)
    largest = [jnp.max(jnp.abs(part), axis, initial=0, keepdims=True) for part in parts]
    unit = unit_of(functools.reduce(jnp.maximum, largest))
    squares = [jnp.sum(jnp.square(in_units(part, unit)), axis, keepdims=True) for part in parts]
    square = functools.reduce(jnp.add, squares)
    return jnp.squeeze(unit * root(square), axis if axis is not None else tuple(range(x.ndim)))


def unit_of(largest: jax.Array) -> jax.Array:
    """Return what to divide by so that the largest magnitude is near 1; 1 where it is 0 or not finite."""
    largest = lax.stop_gradient(largest)  # a result does not depend on what it was scaled by
    # Subnormal numbers may count as 0, so nothing is divided by one, or by what has one for a reciprocal.
    limits = jnp.finfo(largest.dtype)
    unit = jnp.clip(largest, float(limits.tiny), float(limits.max) / 16)
    return jnp.where((largest > 0) & (largest < jnp.inf), unit, jnp.ones_like(largest))


def in_units(x: jax.Array, unit: jax.Array) -> jax.Array:
    """Return `x / unit`, to be squared: of constants, XLA would make `x^2 (1 / unit)^2`, which is 0 times infinity."""
    return lax.optimization_barrier(x / unit)


def divided(x: jax.Array, unit: jax.Array) -> jax.Array:
    """Return a real or complex array over a real one, part by part: in a complex quotient unit^2 may overflow."""
    return lax.complex(x.real / unit, x.imag / unit) if jnp.iscomplexobj(x) else x / unit


def root(square: jax.Array) -> jax.Array:
    """Return the root of a sum of squares, whose derivative at 0 is 0, the smallest subgradient of a norm."""
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))
