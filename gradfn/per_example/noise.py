"""How noisy a batch's gradient is: the noise scale, the signal-to-noise ratio of each parameter, the norm test.

The gradient of a batch is the true gradient G plus the mean of its examples' deviations, whose covariance is
Sigma for one example. From one batch of B, with S1 the mean of the examples' squared gradient norms and SB the
squared norm of their mean,

    |G|^2    = (B SB - S1) / (B - 1)
    tr Sigma = (S1 - SB) B / (B - 1)

are unbiased estimates of both. Their ratio is not: average each over many steps, then divide. The estimate of
|G|^2 may be below zero, where noise hides the gradient; it is reported as it is.
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
from jaxtyping import Array, Bool, Float, PyTree

from gradfn.core.params import path_name
from gradfn.core.precision import divided, magnitudes_squared, sum_of, unit_of, widen
from gradfn.core.signature import transform_of
from gradfn.display import ROWS, ShowsTable, TextTable, array_table
from gradfn.per_example._norms import ExampleNorms
from gradfn.per_example._norms import norms as example_norms


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["signals", "noises", "weight"], meta_fields=[]
)
@dataclass(frozen=True, repr=False)
class NoiseScale(ShowsTable):
    """The signal that the gradients of examples share, and the noise in which they differ.

    It contains sums over the measured batches. `a + b` pools two; `a.decayed(0.9) + b` is an exponential moving
    average.

    Attributes:
        signals: in the tree of the parameters, one scalar per leaf: sums of estimates of |G|^2.
        noises: likewise of tr Sigma, the variance of one example's gradient.
        weight: the number of batches that the sums are over.
    """

    signals: PyTree[Float[Array, ""]]
    noises: PyTree[Float[Array, ""]]
    weight: Float[Array, ""]

    @property
    def gradient_square(self) -> jax.Array:
        """The mean estimate of |G|^2, a scalar; it may be below zero."""
        return sum_of(jax.tree.leaves(self.signals)) / self.weight

    @property
    def variance(self) -> jax.Array:
        """The mean estimate of tr Sigma, a scalar: the variance of one example's gradient, summed over elements.

        It is zero if the examples' gradients are equal up to rounding.
        """
        return sum_of(jax.tree.leaves(self.noises)) / self.weight

    @property
    def scale(self) -> jax.Array:
        """The noise scale tr Sigma / |G|^2 in examples; NaN if the estimate of |G|^2 is not above zero.

        A batch of that many examples has as much noise as signal. Much smaller batches waste steps, much larger
        ones waste examples.
        """
        return jnp.where(self.gradient_square > 0, self.variance / self.gradient_square, jnp.nan)

    @property
    def snr(self) -> PyTree:
        """Signal-to-noise ratio of one example's gradient, |G|^2 / tr Sigma, one scalar per leaf.

        That of a batch of B is B times as large. It is below zero where the estimate of the signal is, and infinite
        without noise.
        """
        return jax.tree.map(lambda signal, noise: signal / noise, self.signals, self.noises)

    def decayed(self, factor: float) -> NoiseScale:
        """Return the same with less weight, as the past of a moving average."""
        return jax.tree.map(lambda leaf: leaf * factor, self)

    def __add__(self, other: NoiseScale) -> NoiseScale:
        return jax.tree.map(jnp.add, self, other)

    def to_dict(self) -> dict[str, Any]:
        """Return the estimates as Python numbers, for logs; those that are not finite as None."""

        def number(x: PyTree) -> float | None:
            return float(x) if math.isfinite(x) else None

        return {
            "gradient_square": number(self.gradient_square),
            "variance": number(self.variance),
            "scale": number(self.scale),
            "snr": {name: number(leaf) for name, leaf in _named(self.snr)},
        }

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per leaf: its signal, its noise and their ratio."""
        if jnp.ndim(self.weight):
            return array_table("NoiseScale, batched by vmap", self)
        out = TextTable(caption=self._summary())
        out.add_column("path", shorten=True)
        for header in ("|G|²", "tr Σ", "signal / noise"):
            out.add_column(header)
        for (name, signal), (_, noise) in zip(_named(self.signals), _named(self.noises), strict=True):
            cells = (signal / self.weight, noise / self.weight, signal / noise)
            out.add_row(name, *map(float, cells), weight=float(noise))
        return out.folded(rows, "noise.table(rows=None)")

    def _summary(self) -> str:
        signal, noise = float(self.gradient_square), float(self.variance)
        if signal <= 0:
            return (
                f"the estimate of |G|² is {signal:.3g}, not above zero: noise hides the gradient (tr Σ {noise:.3g}). "
                "Add more batches"
            )
        if noise == 0:
            return (
                f"no noise: the gradients of all examples are equal up to rounding (|G|² {signal:.3g}). "
                "Unless they are, the loss is not of one example: it mixes the batch"
            )
        return f"noise scale {noise / signal:.3g} examples: tr Σ {noise:.3g} over |G|² {signal:.3g}"


def noise_scale(loss: Callable) -> Callable[..., NoiseScale]:
    """Return a function that estimates the noise scale of a loss from one batch.

    McCandlish et al., *An Empirical Model of Large-Batch Training*, 2018, the simple noise scale. The examples'
    norms come from the backward pass that computes the gradient (`gf.per_example.norms`).

    Args:
        loss: `(params, *example) -> scalar` or `(scalar, aux)`, of one example.

    Returns:
        `(params, *batch, key=None) -> NoiseScale`, where the batch's arrays have a leading axis of at least two
        examples; `key` is as in `gf.per_example.grads`. Add the estimates of several batches: `a + b`.

    Raises:
        ValueError: a batch of one example; and as `gf.per_example.norms`.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> def loss(params, x):  # its gradient is x - w: signal 4 at w = 3, noise 1
    ...     return -jnp.square(params["w"] - x) / 2
    >>> x = 5 + jax.random.normal(jax.random.key(0), [10_000])
    >>> noise = gf.per_example.noise_scale(loss)({"w": jnp.array(3.0)}, x)
    >>> print(f"{noise.gradient_square:.1f} {noise.variance:.1f} {noise.scale:.1f}")
    4.0 1.0 0.3
    """

    @transform_of(loss, "noise_scale")
    def measure(params: PyTree, /, *batch: PyTree, key: PyTree = None) -> NoiseScale:
        """Return the estimated noise scale from one batch of at least two examples."""
        return noise_of(example_norms(loss)(params, *batch, key=key))

    return measure


def noise_of(norms: ExampleNorms) -> NoiseScale:
    """Return the noise scale, given the result of `gf.per_example.norms`."""
    n = norms.total.shape[0]
    if n < 2:
        raise ValueError("noise_scale: expected a batch of at least 2 examples, got 1")

    def estimates(norm: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
        one = jnp.square(norm).mean()  # S1
        all_ = magnitudes_squared(grad).sum().astype(one.dtype)  # SB
        # S1 is below SB only by rounding: a difference within rounding counts as zero.
        rounding = float(max(2 * jnp.finfo(grad.dtype).eps, 32 * jnp.finfo(one.dtype).eps))
        noise = jnp.where(one - all_ <= rounding * one, 0, one - all_)
        return (n * all_ - one) / (n - 1), noise * n / (n - 1)

    pairs = jax.tree.map(estimates, norms.norms, norms.grads)
    signals, noises = jax.tree.transpose(jax.tree.structure(norms.norms), jax.tree.structure((0, 0)), pairs)
    return NoiseScale(signals, noises, jnp.ones([], norms.total.dtype))


class _NormTest(NamedTuple):
    passed: Bool[Array, ""]
    ratio: Float[Array, ""]
    examples: Float[Array, ""]


class NormTest(ShowsTable, _NormTest):
    """Whether a batch is large enough for its gradient to be reliable. `print` shows a table.

    Attributes:
        passed: a bool scalar.
        ratio: the noise of the batch's gradient over its norm; the test passes up to `theta`.
        examples: the estimated size of the smallest batch that passes.
    """

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table of one row: the verdict, the ratio of noise to gradient, and the batch that would pass."""
        if jnp.ndim(self.passed):
            return array_table("NormTest, batched by vmap", self)
        out = TextTable("Norm test")
        for header in ("passed", "noise / gradient", "examples to pass"):
            out.add_column(header)
        out.add_row("yes" if self.passed else "NO", float(self.ratio), float(self.examples))
        return out


def norm_test(loss: Callable, theta: float = 0.9) -> Callable[..., NormTest]:
    """Return the norm test: is the batch large enough that its gradient is likely to be a descent direction?

    It passes where `sqrt(tr Sigma / B) <= theta |g|`, with the batch's own variance and gradient. Byrd et al.,
    *Sample size selection in optimization methods for machine learning*, 2012.

    Args:
        loss: of one example, as for `gf.per_example.noise_scale`.
        theta: above 0; a smaller one requires more examples.

    Returns:
        `(params, *batch, key=None) -> NormTest`; `key` is as in `gf.per_example.grads`.

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
        raise ValueError(f"norm_test: theta must be > 0, got {theta}")

    @transform_of(loss, "norm_test")
    def test(params: PyTree, /, *batch: PyTree, key: PyTree = None) -> NormTest:
        """Return whether the batch passes the norm test."""
        measured = example_norms(loss)(params, *batch, key=key)
        # The test does not depend on the gradients' unit, but their squares may overflow or underflow in any other.
        unit = unit_of(measured.total.max())
        norms, grads = jax.tree.map(lambda x: divided(widen(x), unit), (measured.norms, measured.grads))
        variance = noise_of(dataclasses.replace(measured, norms=norms, grads=grads)).variance
        n = measured.total.shape[0]
        square = sum_of(magnitudes_squared(grad).sum() for grad in jax.tree.leaves(grads))
        ratio = jnp.sqrt(variance / n / square)
        return NormTest(ratio <= theta, ratio, jnp.ceil(variance / (theta**2 * square)))

    return test


def _named(tree: PyTree) -> list[tuple[str, PyTree]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
