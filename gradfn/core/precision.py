"""Numerical precision: sums, squares and exponentials in float32 or wider, norms without overflow."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from gradfn.core.devices import on_several_devices


def is_narrow(dtype: DTypeLike) -> bool:
    """Return whether a dtype is a float of fewer than 32 bits."""
    return bool(jnp.issubdtype(dtype, jnp.inexact)) and jnp.finfo(dtype).bits < 32


def wide(dtype: DTypeLike) -> PyTree:
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
    """Return whether a sum of `n` squares is finite and accurate despite underflow."""
    return (square >= least_safe(square.dtype, n)) & (square < jnp.inf)


def least_safe(dtype: DTypeLike, n: int) -> float:
    """Return the smallest sum of `n` squares that is accurate in a dtype despite underflow."""
    limits = jnp.finfo(dtype)
    # Squares below `tiny` are lost: together they are less than a rounding error of a sum this large.
    return n * float(limits.tiny) / float(limits.eps)


@functools.partial(jax.jit, static_argnames="axis")
def norm(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Return the L2 norm over some axes (all by default), accurate whenever its dtype can represent it.

    The result is the root of the plain sum of squares. If that sum overflows or underflows (values of 1e20 or
    1e-25 have squares of inf and 0 in float32), all norms are recomputed by `scaled_norm`. Under `vmap` both are
    computed; on several devices it is `squares_in_units`.

    Args:
        x: floating or complex; NaN and infinities propagate.
        axis: the axes to sum over.

    >>> import jax.numpy as jnp
    >>> from gradfn.core.precision import norm
    >>> print(f"{norm(jnp.array([3e-25, 4e-25])):.3g} {norm(jnp.array([3e25 + 4e25j])):.3g}")
    5e-25 5e+25
    """
    if on_several_devices(x):
        square, unit = squares_in_units(x, axis)
        return unit * root(square)
    square = jnp.sum(magnitudes_squared(x), axis)
    n = x.size // max(square.size, 1)
    return lax.cond(jnp.all(is_safe(square, n)), lambda x: root(square), lambda x: scaled_norm(x, axis), x)


def scaled_norm(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Return the L2 norm, computed as the largest magnitude times the norm of the array divided by it."""
    parts = real_parts(x)
    largest = [jnp.max(jnp.abs(part), axis, initial=0, keepdims=True) for part in parts]
    unit = unit_of(functools.reduce(jnp.maximum, largest))
    squares = [jnp.sum(jnp.square(in_units(part, unit)), axis, keepdims=True) for part in parts]
    square = functools.reduce(jnp.add, squares)
    return jnp.squeeze(unit * root(square), axis if axis is not None else tuple(range(x.ndim)))


def squares_in_units(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> tuple[jax.Array, jax.Array]:
    """Return sums of |x|^2 in multiples of unit^2, and the units: 1, or a power of two that keeps the sum in range.

    Three sums do not depend on each other, so that devices exchange them together with others: a branch, or a unit
    that is found first, would make them wait once more for each value.
    """
    parts = real_parts(x)
    unit = far_from_one(parts[0].dtype)
    plain, large, small = (
        functools.reduce(jnp.add, [jnp.sum(jnp.square(part), axis) for part in scaled])
        for scaled in (
            parts,
            [part / unit for part in parts],
            # Clipped for derivatives, where infinity times 0 would be NaN; small values are far below 1.
            [jnp.clip(part, -1, 1) * unit for part in parts],
        )
    )
    overflows = plain == jnp.inf
    underflows = plain < least_safe(plain.dtype, x.size // max(plain.size, 1))
    ones = jnp.ones_like(plain)
    return (
        jnp.where(overflows, large, jnp.where(underflows, small, plain)),
        jnp.where(overflows, unit * ones, jnp.where(underflows, ones / unit, ones)),
    )


def far_from_one(dtype: DTypeLike) -> jax.Array:
    """Return a power of two by which values are divided, or multiplied, whose squares leave a dtype's range.

    It is not a constant to XLA, which would square it: see `in_units`.
    """
    return lax.optimization_barrier(jnp.full((), 2.0 ** (jnp.finfo(dtype).maxexp * 5 // 8), dtype))


def unit_of(largest: jax.Array) -> jax.Array:
    """Return the divisor that brings the largest magnitude close to 1; 1 if that is 0 or not finite."""
    largest = lax.stop_gradient(largest)  # the result does not depend on the scale
    # Devices may flush subnormal numbers to 0: neither the divisor nor its reciprocal may be subnormal.
    limits = jnp.finfo(largest.dtype)
    unit = jnp.clip(largest, float(limits.tiny), float(limits.max) / 16)
    return jnp.where((largest > 0) & (largest < jnp.inf), unit, jnp.ones_like(largest))


def in_units(x: jax.Array, unit: jax.Array) -> jax.Array:
    """Return `x / unit`, to be squared: XLA would fold constants to `x^2 (1 / unit)^2`, which is 0 times infinity."""
    return lax.optimization_barrier(x / unit)


def divided(x: jax.Array, unit: jax.Array) -> jax.Array:
    """Divide a real or complex array by a real one, part by part: unit^2 in a complex quotient may overflow."""
    return lax.complex(x.real / unit, x.imag / unit) if jnp.iscomplexobj(x) else x / unit


def root(square: jax.Array) -> jax.Array:
    """Return the root of a sum of squares, with derivative 0 at 0: the smallest subgradient of a norm."""
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def norm_of_norms(norms: Sequence[jax.Array]) -> jax.Array:
    """Return the norm of vectors, given the norms of their parts, `[B]` or `[B, parts]` each, in the widest dtype."""
    dtype = max((x.dtype for x in norms), key=lambda dtype: dtype.itemsize)
    parts = [x.astype(dtype).reshape(x.shape[0], math.prod(x.shape[1:])) for x in norms]
    together = jnp.concatenate(parts, 1)  # [B, parts]
    return together[:, 0] if together.shape[1] == 1 else scaled_norm(together, 1)


def sum_of(values: Iterable[jax.Array]) -> jax.Array:
    """Return the sum of arrays, in the widest of their dtypes."""
    values = list(values)
    widest = max((x.dtype for x in values), key=lambda dtype: dtype.itemsize)
    return functools.reduce(jnp.add, [x.astype(widest) for x in values])
