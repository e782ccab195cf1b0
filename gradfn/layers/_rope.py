"""RoPE: positions as rotations of queries and keys, and how longer sequences change the frequencies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from gradfn.core.precision import wide

Kind = Literal["linear", "dynamic", "yarn", "llama3"]


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies change for sequences longer than those of training.

    - `"linear"`: all are divided by `factor` (Chen et al., *Extending Context Window of Large Language Models via
      Positional Interpolation*, 2023).
    - `"dynamic"`: the base grows with the length of the sequence, from `original_context` on ("NTK-aware" scaling; Peng
      et al., *YaRN*, 2023, appendix B). All positions of a call are rotated with its length. In cached decoding
      each step rotates its own queries and keys with the length so far, and earlier keys stay as they are, as in
      `transformers`: the logits differ from those of one call with all tokens.
    - `"yarn"`: fast ones stay, slow ones are divided by `factor`, those between are interpolated, and queries and
      keys are multiplied by a factor (Peng et al., *YaRN*, 2023, section 3.4).
    - `"llama3"`: the same without that factor, and with other weights between (Grattafiori et al., *The Llama 3 Herd of
      Models*, 2024, and its code).

    Attributes:
        kind: one of the four.
        factor: how many times longer sequences become.
        original_context: the context of training; `"linear"` does not need it.
        low_freq_factor: `"llama3"` divides wavelengths longer than `original_context / low_freq_factor`,
        high_freq_factor: and keeps those shorter than `original_context / high_freq_factor`.
        beta_fast: `"yarn"` keeps what rotates more often than this over the original context,
        beta_slow: and divides what rotates less often than this.
        truncate: whether `"yarn"` rounds the two limits to whole indices of frequencies.
        attention_factor: what `"yarn"` multiplies queries and keys by; None for `0.1 ln(factor) + 1`.

    >>> import gradfn as gf
    >>> gf.RopeScaling("llama3", 8.0, 8192).original_context
    8192
    """

    kind: Kind
    factor: float
    original_context: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"RopeScaling: kind must be one of {', '.join(get_args(Kind))}; got {self.kind!r}"
            )
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"RopeScaling: factor must be a number >= 1, got {self.factor!r}")
        if self.kind != "linear" and (self.original_context is None or self.original_context < 1):
            raise ValueError(
                f"RopeScaling: {self.kind} needs original_context, an integer >= 1, got {self.original_context!r}"
            )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, low) < getattr(self, high) < math.inf:
                raise ValueError(
                    f"RopeScaling: {low} must be above 0 and below {high}, got {getattr(self, low)!r} and "
                    f"{getattr(self, high)!r}"
                )
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise ValueError(
                f"RopeScaling: attention_factor must be a number above 0 or None, got {self.attention_factor!r}"
            )


def rope(
    x: jax.Array,
    positions: jax.Array,
    base: float = 10_000.0,
    scaling: RopeScaling | None = None,
    length: Any = None,
) -> jax.Array:
    """Rotate pairs of features by an angle proportional to position (RoPE), so that products depend on distances.

    Su et al., *RoFormer*, 2021. Feature `i` is paired with feature `i + size / 2`, as in Llama's code. The paper
    pairs adjacent features; the two differ by a permutation of the rows of the query and key matrices.

    Args:
        x: `[T, heads, size]` queries or keys; `size` is even.
        positions: `[T]` integers.
        base: the longest wavelength is close to `2 pi base`.
        scaling: how the frequencies change for long sequences (`gf.RopeScaling`).
        length: of the sequence so far, which `"dynamic"` scaling needs; the last position + 1 by default.

    Returns:
        `[T, heads, size]`; the norm of each pair is unchanged, unless the scaling has an attention factor.

    Raises:
        ValueError: an odd size; dynamic scaling of a size below 4.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> gf.layers.rope(jnp.array([[[1.0, 0.0]]]), jnp.array([1]))  # one radian
    Array([[[0.5403023 , 0.84147096]]], dtype=float32)
    """
    size = x.shape[-1]
    if size % 2:
        raise ValueError(f"rope: the head size must be even, got {size}")
    dtype = wide(x.dtype)  # bfloat16 is too coarse for angles
    positions = positions.astype(dtype)
    if scaling is not None and scaling.kind == "dynamic":
        length = positions[-1] + 1 if length is None else jnp.asarray(length, dtype)
        frequencies = dynamic_frequencies(size, base, scaling, length)
    else:
        frequencies = jnp.asarray(scaled_frequencies(size, base, scaling), dtype)
    angles = positions[:, None, None] * frequencies[None, None]  # [T, 1, size / 2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if (factor := attention_factor(scaling)) != 1:
        cos, sin = factor * cos, factor * sin
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def frequencies_of(width: int, base: float) -> np.ndarray:
    """Return the angles per position of the pairs of features, `[width / 2]`."""
    return np.exp(np.arange(0, width, 2) * (-math.log(base) / width))


def scaled_frequencies(size: int, base: float, scaling: RopeScaling | None) -> np.ndarray:
    """Return the frequencies `[size / 2]` under a scaling that does not depend on the length of the sequence."""
    frequencies = frequencies_of(size, base)
    if scaling is None:
        return frequencies
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "llama3":
        rotations = _original(scaling) * frequencies / (2 * math.pi)  # over the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((rotations - low) / (high - low), 0, 1)
    else:
        kept = 1 - _yarn_ramp(size, base, scaling)
    return kept * frequencies + (1 - kept) * slow


def _yarn_ramp(size: int, base: float, scaling: RopeScaling) -> np.ndarray:
    """Return 0 for the frequencies that are kept, 1 for those that are divided, and what lies between."""

    def index(rotations: float) -> float:
        """Return the index of the frequency with N rotations over the original context, between two integers."""
        return size * math.log(_original(scaling) / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 if low == high else 0
    return np.clip((np.arange(size // 2) - low) / (high - low), 0, 1)


def dynamic_frequencies(size: int, base: float, scaling: RopeScaling, length: jax.Array) -> jax.Array:
    """Return the frequencies `[size / 2]` of a sequence of some length, under dynamic scaling."""
    if size < 4:
        raise ValueError(f"rope: dynamic scaling needs a head size of at least 4, got {size}")
    longer = jnp.maximum(length / _original(scaling), 1)
    growth = scaling.factor * longer - (scaling.factor - 1)
    log_base = math.log(base) + size / (size - 2) * jnp.log(growth)
    return jnp.exp(-log_base * jnp.asarray(np.arange(0, size, 2) / size, log_base.dtype))


def _original(scaling: RopeScaling) -> int:
    """Return the context of training, which all kinds but `"linear"` have."""
    assert scaling.original_context is not None
    return scaling.original_context


def attention_factor(scaling: RopeScaling | None) -> float:
    """Return what a scaling multiplies queries and keys by."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1
