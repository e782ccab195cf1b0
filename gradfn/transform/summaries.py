"""Statistics of an array, cheap enough to take of every activation and every cotangent of a training step.

What XLA's processor backend likes decided the forms: plain ``jnp`` reductions (one variadic reduce took five
times as long), non-zeros as ``sum(sign(x)**2)`` (counting booleans does not vectorise), and a count of
non-finite values only where the sum of squares says that there are any. Sums are taken in float32 (float64
for float64), also for bfloat16.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


@partial(jax.tree_util.register_dataclass, data_fields=["values", "histogram"], meta_fields=["names"])
@dataclass(frozen=True)
class Stats:
    """Statistics of one value; None for those that were not asked for or do not apply.

    Each is a float scalar, with leading axes where the value sits in a scan (iterations) or a shard_map
    (devices). They are kept in one array: a compiled step that returns hundreds of scalars spends its time on
    returning them.

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
        values: `[..., len(names)]`, all but the histogram.
        names: which those are (static).
    """

    values: Any
    histogram: Any
    names: tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        if name not in ("count", *STATS):
            raise AttributeError(name)
        return self.values[..., self.names.index(name)] if name in self.names else None

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics that there are as Python numbers and lists."""
        values = np.asarray(self.values)
        out = {name: values[..., i].tolist() for i, name in enumerate(self.names)}
        return out if self.histogram is None else out | {"histogram": np.asarray(self.histogram).tolist()}


@partial(jax.jit, static_argnames=("stats", "kind"))
def summarise(x: jax.Array, stats: tuple[str, ...], kind: str = "") -> Stats:
    """Return statistics of an array; `kind` is the activation function that made it, if one did."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.float32)
    accumulate = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    wide = x.astype(accumulate)
    n_units = x.shape[-1] if x.ndim else 1
    n_rows = x.size // max(n_units, 1)
    n = max(x.size, 1)
    out = {"count": jnp.full((), x.size, accumulate)}
    if "mean" in stats:
        out["mean"] = jnp.sum(wide) / n
    if "rms" in stats or "nonfinite" in stats:
        sum_of_squares = jnp.sum(wide * wide)
        out["rms"] = jnp.sqrt(sum_of_squares / n)
    if "dead" in stats and kind in ("relu", "relu6") and n_rows >= DEAD_ROWS:
        of_units = jnp.max(jnp.abs(x.reshape(n_rows, n_units)), axis=0)  # [units]
        out["dead"] = jnp.mean((of_units == 0).astype(accumulate))
        if "max" in stats:
            out["max"] = jnp.max(of_units, initial=0).astype(accumulate)
    elif "max" in stats:
        out["max"] = jnp.max(jnp.abs(x), initial=0).astype(accumulate)
    if "zeros" in stats:
        out["zeros"] = (x.size - jnp.sum(jnp.square(jnp.sign(wide)))) / n
    if "saturated" in stats and kind in ("sigmoid", "tanh"):
        slope_at = jnp.abs(2 * wide - 1 if kind == "sigmoid" else wide)
        out["saturated"] = jnp.sum(jnp.sign(jnp.maximum(slope_at - SATURATED, 0))) / n
    if "nonfinite" in stats:
        out["nonfinite"] = _count_nonfinite(wide, sum_of_squares)
    names = tuple(name for name in ("count", *stats) if name in out)
    histogram = _histogram(wide) if "histogram" in stats else None
    return Stats(jnp.stack([out[name] for name in names]), histogram, names)


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
