"""How noisy a batch's gradient is: the noise scale, the signal-to-noise ratio of each parameter, the norm test.

The gradient of a batch is the true gradient G plus the mean of its examples' deviations, whose covariance is
Sigma for one example. From one batch of B, with S1 the mean of the examples' squared gradient norms and SB the
squared norm of their mean,

    |G|^2    = (B SB - S1) / (B - 1)
    tr Sigma = (S1 - SB) B / (B - 1)

are unbiased estimates of both. Their ratio is not: take the mean of each over many steps, then divide. An estimate
of |G|^2 may be below zero, where noise hides the gradient; that is said, not hidden.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradfn.core.params import path_name
from gradfn.core.precision import divided, magnitudes_squared, sum_of, unit_of, widen
from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.per_example._norms import norms as example_norms


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["signals", "noises", "weight"], meta_fields=[]
)
@dataclass(frozen=True, repr=False)
class NoiseScale(ShowsTable):
    """What gradients are made of: the signal that examples share, and the noise in which they differ.

    It holds sums over the batches that were measured. `a + b` pools two; `a.decayed(0.9) + b` is a running
    average that forgets.

    Attributes:
        signals: like the parameters, a scalar a leaf: sums of estimates of |G|^2.
        noises: the same of tr Sigma, the variance of one example's gradient.
        weight: how many batches the sums are over.
    """

    signals: Any
    noises: Any
    weight: jax.Array

    @property
    def gradient_square(self) -> jax.Array:
        """The mean estimate of |G|^2, a scalar; it may come out below zero."""
        return sum_of(jax.tree.leaves(self.signals)) / self.weight

    @property
    def variance(self) -> jax.Array:
        """The mean estimate of tr Sigma, a scalar: the variance of one example's gradient, all elements summed.

        It is zero where the examples' gradients are equal up to rounding.
        """
        return sum_of(jax.tree.leaves(self.noises)) / self.weight

    @property
    def scale(self) -> jax.Array:
        """The noise scale tr Sigma / |G|^2 in examples; NaN where |G|^2 is not estimated above zero.

        A batch of that many examples has as much noise as signal. Batches far below it waste steps, batches far
        above it waste examples.
        """
        return jnp.where(self.gradient_square > 0, self.variance / self.gradient_square, jnp.nan)

    @property
    def snr(self) -> Any:
        """Signal-to-noise ratio of one example's gradient, |G|^2 / tr Sigma, a scalar for each leaf.

        Batches of B have B times as much. Below zero where the estimate of the signal is, infinite without noise.
        """
        return jax.tree.map(lambda signal, noise: signal / noise, self.signals, self.noises)

    def decayed(self, factor: float) -> NoiseScale:
        """Return the same with less weight: what came before, in a running average."""
        return jax.tree.map(lambda leaf: leaf * factor, self)

    def __add__(self, other: NoiseScale) -> NoiseScale:
        return jax.tree.map(jnp.add, self, other)

    def to_dict(self) -> dict[str, Any]:
        """Return the estimates as Python numbers, for logs; those that are not finite as None."""

        def number(x: Any) -> float | None:
            return float(x) if math.isfinite(x) else None

        return {
            "gradient_square": number(self.gradient_square),
            "variance": number(self.variance),
            "scale": number(self.scale),
            "snr": {name: number(leaf) for name, leaf in _named(self.snr)},
        }

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per leaf: its signal, its noise and their ratio."""
        out = TextTable(caption=self._said())
        out.add_column("path", shorten=True)
        for header in ("|G|²", "tr Σ", "signal / noise"):
            out.add_column(header)
        for (name, signal), (_, noise) in zip(_named(self.signals), _named(self.noises), strict=True):
            cells = (signal / self.weight, noise / self.weight, signal / noise)
            out.add_row(name, *map(float, cells), weight=float(noise))
        return out.folded(rows, "noise.table(rows=None)")

    def _said(self) -> str:
        signal, noise = float(self.gradient_square), float(self.variance)
        if signal <= 0:
            return (
                f"|G|² is estimated at {signal:.3g}, not above zero: noise hides the gradient (tr Σ {noise:.3g}). "
                "Add up more batches"
            )
        if noise == 0:
            return (
                f"no noise: the gradients of all examples are equal up to rounding (|G|² {signal:.3g}). "
                "Expected if they are; else the loss is not that of one example, but mixes the batch"
            )
        return f"noise scale {noise / signal:.3g} examples: tr Σ {noise:.3g} over |G|² {signal:.3g}"


def noise_scale(loss: Callable) -> Callable[..., NoiseScale]:
    """Return the function that estimates the noise scale of a loss from one batch.

    McCandlish et al., *An Empirical Model of Large-Batch Training*, 2018, the simple noise scale. The examples'
    norms come from the backward pass that computes the gradient (`gf.per_example.norms`).

    Args:
        loss: `(params, *example) -> scalar` or `(scalar, aux)`, of one example.

    Returns:
        `(params, *batch) -> NoiseScale`, where the batch's arrays have a leading axis of at least two examples.
        Estimates of several batches add up: `a + b`.

    Raises:
        ValueError: a batch of one example, which shows no noise; and what `gf.per_example.norms` raises.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> def loss(params, x):  # its gradient is x - w: signal 4 at w = 3, noise 1
    ...     return -jnp.square(params["w"] - x) / 2
    >>> x = 5 + jax.random.normal(jax.random.key(0), [10_000])
    >>> seen = gf.per_example.noise_scale(loss)({"w": jnp.array(3.0)}, x)
    >>> print(f"{seen.gradient_square:.1f} {seen.variance:.1f} {seen.scale:.1f}")
    4.0 1.0 0.3
    """

    def measure(params: Any, *batch: Any) -> NoiseScale:
        return noise_of(example_norms(loss)(params, *batch))

    return measure


def noise_of(seen: Any) -> NoiseScale:
    """Return what norms and gradient of a batch say of its noise: for those who have them already.

    Args:
        seen: from `gf.per_example.norms`.
    """
    n = seen.total.shape[0]
    if n < 2:
        raise ValueError("noise_scale: one example shows no noise, a batch has two or more")

    def estimates(norms: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
        one = jnp.square(norms).mean()  # S1
        all_ = magnitudes_squared(grad).sum().astype(one.dtype)  # SB
        # S1 is never below SB but for rounding: a difference within it is none.
        rounding = float(max(2 * jnp.finfo(grad.dtype).eps, 32 * jnp.finfo(one.dtype).eps))
        noise = jnp.where(one - all_ <= rounding * one, 0, one - all_)
        return (n * all_ - one) / (n - 1), noise * n / (n - 1)

    pairs = jax.tree.map(estimates, seen.norms, seen.grads)
    signals, noises = jax.tree.transpose(jax.tree.structure(seen.norms), jax.tree.structure((0, 0)), pairs)
    return NoiseScale(signals, noises, jnp.ones([], seen.total.dtype))


class NormTest(NamedTuple):
    """Whether a batch is large enough for its gradient to be trusted.

    Attributes:
        passed: a bool scalar.
        ratio: noise of the batch's gradient over its norm; at most `theta` passes.
        examples: the batch that would just pass, as far as this one can tell.
    """

    passed: jax.Array
    ratio: jax.Array
    examples: jax.Array


def norm_test(loss: Callable, theta: float = 0.9) -> Callable[..., NormTest]:
    """Return the norm test: is the batch so large that its gradient is likely to be a descent direction?

    It passes where `sqrt(tr Sigma / B) <= theta |g|`, with the batch's own variance and gradient. Byrd et al.,
    *Sample size selection in optimization methods for machine learning*, 2012.

    Args:
        loss: of one example, as for `gf.per_example.noise_scale`.
        theta: above 0; the smaller, the more examples it asks for.

    Returns:
        `(params, *batch) -> NormTest`.

    Raises:
        ValueError: theta not above zero, or a batch of one example.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> test = gf.per_example.norm_test(lambda params, x: params["w"] * x)
    >>> bool(test({"w": jnp.array(1.0)}, jnp.array([1.0, 2.0, 3.0])).passed)
    True
    >>> print(test({"w": jnp.array(1.0)}, jnp.array([-3.0, 1.0, 3.0, 0.0])).examples)
    124.0
    """
    if not theta > 0:
        raise ValueError(f"norm_test: theta is above 0, came {theta}")

    def test(params: Any, *batch: Any) -> NormTest:
        seen = example_norms(loss)(params, *batch)
        # The test does not depend on the gradients' unit, but their squares may be too small or large for any other.
        unit = unit_of(seen.total.max())
        norms, grads = jax.tree.map(lambda x: divided(widen(x), unit), (seen.norms, seen.grads))
        variance = noise_of(dataclasses.replace(seen, norms=norms, grads=grads)).variance
        n, square = (
            seen.total.shape[0],
            sum_of(magnitudes_squared(grad).sum() for grad in jax.tree.leaves(grads)),
        )
        ratio = jnp.sqrt(variance / n / square)
        return NormTest(ratio <= theta, ratio, jnp.ceil(variance / (theta**2 * square)))

    return test


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
