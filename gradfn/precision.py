"""Where a few digits are not enough: sums, squares and exponentials in float32 at least, norms without overflow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def wide(dtype: Any) -> Any:
    """Return float32 for the narrower floats (float16, bfloat16), and any other dtype as it is."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


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
    limits = jnp.finfo(square.dtype)
    # The squares below `tiny` are lost: together less than a rounding of a sum this large.
    return (square >= n * float(limits.tiny) / float(limits.eps)) & (square < jnp.inf)


@functools.partial(jax.jit, static_argnames="axis")
def norm(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Return the L2 norm over some axes (all by default), right as long as it is itself a number of its dtype.

    On a CPU it is the root of the plain sum of squares. Only where such a sum is not safe (gradients of 1e-25 or 1e20
    have squares of 0 and inf in float32) are all computed again, scaled: `scaled_norm`. Under `vmap` both are computed.
    On an accelerator, where such a decision waits for the device, one pass is made in any case: `one_pass_norm`.

    Args:
        x: floating or complex; NaN and infinities show in the result.
        axis: summed over.

    >>> import jax.numpy as jnp
    >>> from gradfn.precision import norm
    >>> print(f"{norm(jnp.array([3e-25, 4e-25])):.3g} {norm(jnp.array([3e25 + 4e25j])):.3g}")
    5e-25 5e+25
    """

    def checked(x: jax.Array) -> jax.Array:
        square = jnp.sum(magnitudes_squared(x), axis)
        n = x.size // max(square.size, 1)
        safe = jnp.all(is_safe(square, n))
        return lax.cond(safe, lambda x: root(square), lambda x: scaled_norm(x, axis), x)

    return lax.platform_dependent(x, cpu=checked, default=lambda x: one_pass_norm(x, axis))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def one_pass_norm(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Return the L2 norm from one pass over the values, without a decision that depends on them.

    Small, middle and large magnitudes are summed apart, the small ones scaled up and the large ones down: Blue, *A
    Portable Fortran Program to Find the Euclidean Norm of a Vector*, 1978.
    """
    parts = real_parts(x)
    exponent = int(jnp.finfo(parts[0].dtype).maxexp) // 3
    small_below, large_from = 2.0**-exponent, 2.0**exponent
    up, down = 2.0 ** (2 * exponent), 2.0 ** (-2 * exponent)

    def total(chosen: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return functools.reduce(jnp.add, [jnp.sum(jnp.square(chosen(part)), axis) for part in parts])

    def is_small(part: jax.Array) -> jax.Array:
        return jnp.abs(part) < small_below

    def is_large(part: jax.Array) -> jax.Array:
        return jnp.abs(part) >= large_from

    small = total(lambda part: jnp.where(is_small(part), part, 0) * up)
    large = total(lambda part: jnp.where(is_large(part), part, 0) * down)

    def twice_down(sum_: jax.Array) -> jax.Array:
        # The barrier keeps XLA from multiplying the factors first, whose product is 0.
        return lax.optimization_barrier(sum_ * down) * down

    # What is neither, NaN included.
    middle = total(lambda part: jnp.where(is_small(part) | is_large(part), 0, part)) + twice_down(small)
    units = jnp.full_like(middle, up), jnp.ones_like(middle), jnp.full_like(middle, down)
    unit = jnp.where(large > 0, units[0], jnp.where(middle != 0, units[1], units[2]))
    square = jnp.where(large > 0, large + twice_down(middle), jnp.where(middle != 0, middle, small))
    return unit * root(square)


@one_pass_norm.defjvp
def _one_pass_norm_jvp(
    axis: int | tuple[int, ...] | None, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Follow the unit vector: differentiated term by term, the squares of the scales would overflow."""
    (x,), (dx,) = primals, tangents
    length = one_pass_norm(x, axis)
    kept = length if axis is None else jnp.expand_dims(length, axis)
    divisor = jnp.where(kept == 0, 1, kept)
    pairs = zip(real_parts(x), real_parts(dx), strict=True)
    return length, functools.reduce(jnp.add, [jnp.sum(a / divisor * b, axis) for a, b in pairs])


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


def root(square: jax.Array) -> jax.Array:
    """Return the root of a sum of squares, whose derivative at 0 is 0, the smallest subgradient of a norm."""
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))
