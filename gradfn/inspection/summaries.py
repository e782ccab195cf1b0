"""Statistics of an array, cheap enough for every activation and every cotangent of a training step.

What XLA's CPU backend compiles well decided the forms: plain `jnp` reductions (one variadic reduce took five
times as long), and non-zeros as `sum(sign(x)**2)` (counting booleans does not vectorize). Sums are computed
in float32 (float64 for float64), also for bfloat16. Where the sum of squares over- or underflows, mean and rms are
computed again, scaled, or non-finite values are counted: one test decides both.

On several devices that test would be a sum over all of them per value, with another one in its branch: there all sums
are computed at once, and XLA exchanges those of many values together.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import PyTree

from gradfn.core.devices import elements_of, explicit_spec, on_several_devices
from gradfn.core.precision import (
    far_from_one,
    is_safe,
    magnitudes_squared,
    real_parts,
    root,
    squares_in_units,
    widen,
)

STATS = ("mean", "rms", "max", "zeros", "saturated", "dead", "nonfinite", "histogram")
DEFAULT_STATS = STATS[:-1]

# A sigmoid or tanh is saturated where its slope is below a tenth of the largest: tanh' = 1 - tanh^2 < 0.1.
SATURATED = math.sqrt(0.9)
# The most elements of an array that is reduced in two steps, see `_total`.
SMALL = 2048
# The fewest rows over which units count as dead: on one example, half of the units of a healthy relu are zero.
DEAD_ROWS = 8
# Bin k of a histogram counts 2^(k + FIRST_EXPONENT) <= |x| < twice that; the first and last bins include what
# lies beyond, the first also zeros.
FIRST_EXPONENT, N_BINS, SAMPLE = -32, 48, 1024


@partial(jax.tree_util.register_dataclass, data_fields=["values", "histogram"], meta_fields=["names"])
@dataclass(frozen=True)
class Stats:
    """Statistics of one value; None for those that were not requested or do not apply.

    Of complex values, all are statistics of the modulus, but for the mean. Each is a real scalar, with leading
    axes where the value sits in a scan (iterations) or a shard_map (devices). They are kept in one array: a
    compiled step that returned hundreds of scalars would spend its time on that.

    Attributes:
        count: number of elements (0 where the value was never computed, or no gradient reached it).
        mean: their mean; of complex values, the modulus of their mean.
        rms: root of their mean square.
        max: largest magnitude.
        zeros: share that is exactly zero, in [0, 1].
        saturated: of a sigmoid or tanh: share whose slope is below a tenth of the largest slope.
        dead: of a relu: share of units that are zero for every row, given at least 8 rows. Units are the axes that the
            weights give a product (the channels of a convolution), else the last one. None where they are not known.
        nonfinite: number of NaN and infinite elements.
        histogram: `[48]` counts of magnitudes by powers of two from 2^-32 up, on at most 1024 sampled
            elements.
        values: `[..., len(names)]`, all but the histogram.
        names: which those are (static).
    """

    values: PyTree
    histogram: Any
    names: tuple[str, ...]

    def __getattr__(self, name: str) -> PyTree:
        if name not in ("count", *STATS):
            raise AttributeError(name)
        return self.values[..., self.names.index(name)] if name in self.names else None

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics that there are as Python numbers and lists."""
        values = np.asarray(self.values)
        out = {name: values[..., i].tolist() for i, name in enumerate(self.names)}
        return out if self.histogram is None else out | {"histogram": np.asarray(self.histogram).tolist()}


@partial(jax.jit, static_argnames=("stats", "kind", "units"))
def summarize(x: jax.Array, stats: tuple[str, ...], kind: str = "", units: tuple[int, ...] = (-1,)) -> Stats:
    """Return statistics of an array.

    Args:
        x: the array.
        stats: names of statistics.
        kind: the activation function that computed it, if any.
        units: its axes that are units; empty where they are not known, and none are counted as dead.
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(jnp.float32)
    is_real = not jnp.iscomplexobj(x)
    values = widen(x)
    # Of real values, only squares and signs are used.
    magnitudes = values if is_real else jnp.abs(values)
    accumulate = magnitudes.dtype
    others = tuple(axis for axis in range(x.ndim) if axis not in units and axis - x.ndim not in units)
    n_rows = math.prod(x.shape[axis] for axis in others)
    n = max(x.size, 1)
    out = {"count": jnp.full((), x.size, accumulate)}
    if "dead" in stats and kind in ("relu", "relu6") and units and n_rows >= DEAD_ROWS:
        # XLA reduces merged axes faster, but those that are split over devices in the type cannot be merged.
        merge = others == tuple(range(x.ndim - 1)) and not explicit_spec(x)
        rows = x.reshape(n_rows, x.shape[-1]) if merge else x
        of_units = jnp.max(jnp.abs(rows), axis=0 if merge else others)  # [units...]
        out["dead"] = jnp.mean((of_units == 0).astype(accumulate))
        if "max" in stats:
            out["max"] = jnp.max(of_units, initial=0).astype(accumulate)
    elif "max" in stats:
        out["max"] = _largest(x).astype(accumulate)
    sums = tuple(name for name in ("mean", "rms", "nonfinite") if name in stats)
    if sums and on_several_devices(x):
        out |= _at_once(sums, values)
    elif "rms" in sums or "nonfinite" in sums:
        out |= _one_by_one(sums, values, out.get("max") if is_real else None)
    elif "mean" in sums:
        out["mean"] = _mean(values)
    if "zeros" in stats:
        out["zeros"] = (x.size - _total(jnp.sum, jnp.square(jnp.sign(magnitudes)))) / n
    if "saturated" in stats and kind in ("sigmoid", "tanh") and is_real:
        slope_at = jnp.abs(2 * values - 1 if kind == "sigmoid" else values)
        out["saturated"] = jnp.sum(jnp.sign(jnp.maximum(slope_at - SATURATED, 0))) / n
    names = tuple(name for name in ("count", *stats) if name in out)
    histogram = _histogram(magnitudes) if "histogram" in stats else None
    return Stats(jnp.stack([out[name] for name in names]), histogram, names)


def _total(reduce: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """Reduce a whole array to a scalar, as `jnp.sum` does.

    XLA's CPU backend takes the elements of a small array one after the other, and each waits for the one before. So
    its columns are reduced first, side by side; the barrier keeps XLA from joining both steps again.
    """
    if x.ndim < 2 or not 0 < x.size <= SMALL or on_several_devices(x):
        return reduce(x)
    return reduce(lax.optimization_barrier(reduce(x, axis=tuple(range(x.ndim - 1)))))


def _mean(x: jax.Array, unit: jax.Array | float = 1.0) -> jax.Array:
    """Return the mean, of complex values its modulus; sums are computed in multiples of `unit`."""
    return _modulus([_total(jnp.sum, part / unit) / max(x.size, 1) for part in real_parts(x)], unit)


def _modulus(parts: Sequence[jax.Array], unit: jax.Array | float = 1.0) -> jax.Array:
    """Return a real number, or the modulus of a complex one, given its real parts in multiples of `unit`."""
    return unit * (parts[0] if len(parts) == 1 else jnp.abs(lax.complex(*parts)))


def _one_by_one(names: tuple[str, ...], x: jax.Array, largest: jax.Array | None) -> dict[str, jax.Array]:
    """Return mean, rms and the number of non-finite elements; `largest` is the largest magnitude, if it is known."""
    n = max(x.size, 1)
    square, plain = _total(jnp.sum, magnitudes_squared(x)), _mean(x)
    zero = jnp.zeros_like(square)
    nothing = zero, [zero for _ in real_parts(x)], zero
    careful = partial(_carefully, square, largest)
    largest, totals, scaled = lax.cond(is_safe(square, n), lambda _: nothing, careful, x)
    is_finite, unit = _all_finite(square, largest), 1 / _scale_for(largest)
    # 0 where the plain sums are right.
    as_is = (largest == 0) | ~is_finite
    found = {
        "mean": jnp.where(as_is, plain, _modulus([total / n for total in totals], unit)),
        # Not the norm over the root of n: the norm may overflow where this does not.
        "rms": jnp.where(as_is, root(square / n), unit * root(scaled / n)),
        "nonfinite": jnp.where(is_finite, 0, totals[0]),
    }
    return {name: found[name] for name in names}


def _carefully(
    square: jax.Array, largest: jax.Array | None, x: jax.Array
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """Return what corrects the plain sums where they over- or underflow, or where they are not finite.

    The time to compile a program follows its number of kernels, and these are compiled for each value. So one array
    serves two purposes: it is the values, scaled, or marks the elements that are not finite, if there are any.

    Returns:
        The largest magnitude, the sum of that array (for complex values, of each part's), and its sum of squares.
    """
    parts = real_parts(x)
    if largest is None:
        largest = functools.reduce(jnp.maximum, map(_largest, parts))
    scale = jnp.where(_all_finite(square, largest), _scale_for(largest), jnp.zeros_like(largest))
    # Squares of constants times values would be folded to the squares of both.
    arrays = [lax.optimization_barrier(jnp.where(jnp.isfinite(x), part * scale, 1)) for part in parts]
    return largest, list(map(jnp.sum, arrays)), functools.reduce(jnp.add, map(_sum_of_squares, arrays))


def _all_finite(square: jax.Array, largest: jax.Array) -> jax.Array:
    """Return whether all elements are finite, given their sum of squares and largest magnitude.

    Some kernels of XLA's ignore NaN in a maximum.
    """
    return (largest < jnp.inf) & ~jnp.isnan(square)


def _scale_for(largest: jax.Array) -> jax.Array:
    """Return the power of two by which values are multiplied whose squares leave the dtype's range."""
    scale = 2.0 ** (jnp.finfo(largest.dtype).maxexp * 5 // 8)
    one = jnp.ones_like(largest)
    return jnp.where(largest > 1, one / scale, one * scale)


def _largest(x: jax.Array) -> jax.Array:
    return _total(jnp.max, jnp.abs(x)) if x.size else jnp.zeros((), jnp.abs(x).dtype)


def _sum_of_squares(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x))


def _at_once(names: tuple[str, ...], x: jax.Array) -> dict[str, jax.Array]:
    """Return mean, rms and the number of non-finite elements from sums that do not depend on each other."""
    square, unit = squares_in_units(x)
    mean = _mean(x)
    found = {
        "mean": jnp.where(jnp.isfinite(mean), mean, _mean(x, far_from_one(square.dtype))),
        "rms": unit * root(square / max(x.size, 1)),
        "nonfinite": jnp.sum((~jnp.isfinite(x)).astype(square.dtype)),
    }
    return {name: found[name] for name in names}


def _histogram(x: jax.Array) -> jax.Array:
    every = max(1, -(-x.size // SAMPLE))
    if on_several_devices(x):
        sample = elements_of(x, np.unravel_index(np.arange(0, x.size, every), x.shape))
    else:
        sample = x.reshape(-1)[::every]
    # |x| = m 2^exponent, 0.5 <= m < 1
    _, exponent = jnp.frexp(sample)
    bins = jnp.where(sample == 0, 0, jnp.clip(exponent - 1 - FIRST_EXPONENT, 0, N_BINS - 1))
    return jnp.sum((bins[:, None] == jnp.arange(N_BINS)[None]).astype(x.dtype), axis=0)
