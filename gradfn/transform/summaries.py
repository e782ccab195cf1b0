"""Statistics of an array, cheap enough to take of every activation and every cotangent of a training step.

What XLA's processor backend likes decided the forms: plain ``jnp`` reductions (one variadic reduce took five
times as long), non-zeros as ``sum(sign(x)**2)`` (counting booleans does not vectorise), and a count of
non-finite values only where the sum of squares says that there are any. Sums are taken in float32 (float64
for float64), also for bfloat16.
"""

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

STATS = ("mean", "rms", "max", "zeros", "saturated", "dead", "nonfinite", "histogram")
DEFAULT_STATS = STATS[:-1]

# A sigmoid or tanh is called saturated where its slope is below a tenth of its largest: tanh' = 1 - tanh^2 <
# 0.1.
SATURATED = math.sqrt(0.9)
# Units are judged dead over at least this many rows: on one example, half of the units of a healthy relu are
# zero.
DEAD_ROWS = 8
# Bin k of a histogram counts 2^(k + FIRST_EXPONENT) <= |x| < twice that; the ends take what lies beyond, bin
# 0 zeros too.
FIRST_EXPONENT, N_BINS, SAMPLE = -32, 48, 1024


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["count", *STATS],
    meta_fields=[],
)
@dataclass(frozen=True)
class Stats:
    """Statistics of one value; None for those that were not asked for or do not apply.

    Each is a float scalar, with leading axes where the value sits in a scan (iterations) or a shard_map
    (devices).

    Attributes:
        count: number of elements (0 where the value was never computed, or no gradient reached it).
        mean: their mean.
        rms: root of their mean square.
        max: largest magnitude.
        zeros: share that is exactly zero, in [0, 1].
        saturated: of a sigmoid or tanh: share whose slope is below a tenth of the largest slope.
        dead: of a relu: share of units (last axis) that are zero for every row, given at least 8 rows.
        nonfinite: number of NaN and infinite elements.
        histogram: `[48]` counts of magnitudes by powers of two from 2^-32 up, on at most 1024 sampled
            elements.
    """

    count: Any
    mean: Any = None
    rms: Any = None
    max: Any = None
    zeros: Any = None
    saturated: Any = None
    dead: Any = None
    nonfinite: Any = None
    histogram: Any = None

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics that there are as Python numbers and lists."""
        pairs = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return {name: jax.device_get(value).tolist() for name, value in pairs if value is not None}


@partial(jax.jit, static_argnames=("stats", "kind"))
def sums(x: jax.Array, stats: tuple[str, ...], kind: str = "") -> dict[str, jax.Array]:
    """Return what the statistics are made of, in scalars that are zero for a value never computed."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.float32)
    accumulate = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    wide = x.astype(accumulate)
    rows = x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
    out = {"count": jnp.full((), x.size, accumulate)}
    if "mean" in stats:
        out["mean"] = jnp.sum(wide)
    if "rms" in stats or "nonfinite" in stats:
        out["rms"] = jnp.sum(wide * wide)
    if "dead" in stats and kind in ("relu", "relu6") and rows.shape[0] >= DEAD_ROWS:
        of_units = jnp.max(jnp.abs(rows), axis=0, initial=0)
        out["dead"] = jnp.mean((of_units == 0).astype(accumulate))
        if "max" in stats:
            out["max"] = jnp.max(of_units, initial=0).astype(accumulate)
    elif "max" in stats:
        out["max"] = jnp.max(jnp.abs(x), initial=0).astype(accumulate)
    if "zeros" in stats:
        out["zeros"] = jnp.sum(jnp.square(jnp.sign(wide)))  # of non-zeros
    if "saturated" in stats and kind in ("sigmoid", "tanh"):
        slope_at = jnp.abs(2 * wide - 1 if kind == "sigmoid" else wide)
        out["saturated"] = jnp.sum(jnp.sign(jnp.maximum(slope_at - SATURATED, 0)))
    if "nonfinite" in stats:
        out["nonfinite"] = _count_nonfinite(wide, out["rms"])
    if "histogram" in stats:
        out["histogram"] = _histogram(wide)
    return out


def _count_nonfinite(x: jax.Array, sum_of_squares: jax.Array) -> jax.Array:
    def count() -> jax.Array:
        return jnp.sum((~jnp.isfinite(x)).astype(x.dtype))

    return lax.cond(sum_of_squares < jnp.inf, lambda: jnp.zeros_like(sum_of_squares), count)


def _histogram(x: jax.Array) -> jax.Array:
    flat = x.reshape(-1)
    sample = flat[:: max(1, -(-flat.size // SAMPLE))]
    _, exponent = jnp.frexp(sample)  # |x| = m 2^exponent, 0.5 <= m < 1
    bins = jnp.where(sample == 0, 0, jnp.clip(exponent - 1 - FIRST_EXPONENT, 0, N_BINS - 1))
    return jnp.sum((bins[:, None] == jnp.arange(N_BINS)[None]).astype(x.dtype), axis=0)


def finalise(sums: dict[str, jax.Array], stats: tuple[str, ...]) -> Stats:
    """Turn sums, with any leading axes, into statistics."""
    count = sums["count"]
    safe = jnp.maximum(count, 1)
    values = {name: sums[name] for name in stats if name in sums}
    for name in ("mean", "saturated"):
        if name in values:
            values[name] = values[name] / safe
    if "rms" in values:
        values["rms"] = jnp.sqrt(values["rms"] / safe)
    if "zeros" in values:
        values["zeros"] = (count - values["zeros"]) / safe
    return Stats(count=count, **values)
