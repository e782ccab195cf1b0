"""Gradient maps: how much each part of an input, or of an intermediate value, contributes to an output.

All of them explain a scalar, the score: the output of the function if it is a scalar, else the element that `target`
selects. A map is of the input, or of a site by name (`at`). Each is written for one example; use `jax.vmap` for a
batch. They describe the function, not the world, and some are known to mislead: apply
`gf.attribution.randomize_weights` to a method before trusting it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from gradfn.attribution._score import PART, Target, entry, floating, score
from gradfn.core.precision import wide, widen
from gradfn.core.signature import transform_of
from gradfn.display import ROWS, ShowsTable, TextTable, array_table, extremes


class _IntegratedGradients(NamedTuple):
    attributions: Float[Array, " ..."]
    score: Float[Array, ""]
    baseline_score: Float[Array, ""]
    gap: Float[Array, ""]
    relative_gap: Float[Array, ""]


class IntegratedGradients(ShowsTable, _IntegratedGradients):
    """The result of `gf.attribution.integrated_gradients`. `print` shows a table.

    Attributes:
        attributions: of the shape of the input or site, in units of the score.
        score: scalar, f(x).
        baseline_score: scalar, the score with the baseline instead of x (or of the value at the site).
        gap: scalar, the sum of the attributions minus (score - baseline_score); 0 for an exact integral.
        relative_gap: scalar, |gap| / |score - baseline_score|.
    """

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table of the scores, and of the shape and range of the attributions."""
        if jnp.ndim(self.score):
            return array_table("IntegratedGradients, batched by vmap", self)
        change = float(widen(self.score) - widen(self.baseline_score))
        caption = f"gap to the change of the score: {float(self.gap):.3g} ({float(self.relative_gap):.2%})"
        out = TextTable("IntegratedGradients", caption)
        for header in ("score", "of the baseline", "change"):
            out.add_column(header, ".4g")
        for header in ("attributions", "smallest", "largest"):
            out.add_column(header)
        scores = float(self.score), float(self.baseline_score), change
        out.add_row(*scores, self.attributions.shape, *extremes(self.attributions))
        return out


def saliency(
    f: Callable, target: Target = None, at: str | None = None
) -> Callable[..., Float[Array, " ..."]]:
    """Return a function that computes the gradient of a score with respect to the input, or to a site.

    Simonyan, Vedaldi and Zisserman, *Deep Inside Convolutional Networks*, 2014; they show the absolute value. Here
    it is signed: where it is positive, a larger input gives a larger score.

    Args:
        f: `(params, x, *rest) -> scalar`, or `-> array`, of one example.
        target: the element of the output to explain: an index; a tuple of indices for several axes; or a site and
            an index, `("a1", 3)`. If it selects several elements, their mean: `("a1", (..., 3))` is a channel.
            An index may be a traced integer, so that `vmap` can run over classes.
        at: the site (a name from `gf.sites(f)`) that the map is of; the input if None.

    Returns:
        `(params, x, *rest) -> map` of the shape and dtype of the input or site (a site in a loop has the
        iterations as leading axes), in units of the score per unit of the input.

    Raises:
        ValueError: an unknown site (similar names are listed), a target out of range, no target for an output of
            several elements.
        TypeError: an input or output that is not floating.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> net = gf.mlp([2, 3])
    >>> params = {"W1": jnp.arange(6.0).reshape(3, 2), "b1": jnp.zeros(3)}
    >>> gf.attribution.saliency(net.apply, target=1)(params, jnp.ones(2))  # of a linear function: its weights
    Array([2., 3.], dtype=float32)
    >>> gf.attribution.saliency(net.apply, target=1, at="z1")(params, jnp.ones(2))
    Array([0., 1., 0.], dtype=float32)
    """
    scored = score(f, target, "saliency")

    @transform_of(f, "saliency", own=2)
    def gradient(params: PyTree, x: ArrayLike, /, *rest: PyTree) -> jax.Array:
        """Return the gradient of the score with respect to `x`, or to the site."""
        zero, shifted, _ = entry(scored, at, params, x, rest, "saliency")
        return jax.grad(shifted, has_aux=True)(zero)[0]

    return gradient


def grad_times_input(
    f: Callable, target: Target = None, at: str | None = None
) -> Callable[..., Float[Array, " ..."]]:
    """Return a function that computes the gradient of a score times the input, or times the value at a site.

    To first order, the contribution of each element to the score (Shrikumar et al., *Not Just a Black Box*, 2016);
    exact for linear functions without bias. The input is visible in the map whatever the network computes, so
    the map looks plausible even if it is wrong (Adebayo et al., 2018).

    Args:
        f: as for `gf.attribution.saliency`.
        target: as for `gf.attribution.saliency`.
        at: as for `gf.attribution.saliency`.

    Returns:
        `(params, x, *rest) -> map` of the shape and dtype of the input or site, in units of the score.

    Raises:
        ValueError, TypeError: as for `gf.attribution.saliency`.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> gf.attribution.grad_times_input(lambda w, x: w @ x)(jnp.array([2.0, -3.0]), jnp.array([1.0, 2.0]))
    Array([ 2., -6.], dtype=float32)
    """
    scored = score(f, target, "grad_times_input")

    @transform_of(f, "grad_times_input", own=2)
    def product(params: PyTree, x: ArrayLike, /, *rest: PyTree) -> jax.Array:
        """Return the gradient of the score times `x`, or times the value at the site."""
        zero, shifted, _ = entry(scored, at, params, x, rest, "grad_times_input")
        gradient, value = jax.grad(shifted, has_aux=True)(zero)
        return gradient * value

    return product


def integrated_gradients(
    f: Callable,
    target: Target = None,
    at: str | None = None,
    *,
    steps: int = 64,
    baseline: ArrayLike | None = None,
) -> Callable[..., IntegratedGradients]:
    """Return a function that integrates the gradients of a score along the straight path from a baseline to the input.

    Sundararajan, Taly and Yan, *Axiomatic Attribution for Deep Networks*, 2017. The attributions sum to the score
    minus that of the baseline; the difference that remains is returned. The integral is computed by
    Gauss-Legendre quadrature, which is exact if the score is a polynomial of degree below `2 * steps` along the
    path.

    At a site, the path goes from the value of the site for the baseline to that for `x`, and everything else stays
    as it is for `x`. What bypasses the site is unchanged, so the score of the baseline may differ from f(baseline).

    Args:
        f: as for `gf.attribution.saliency`.
        target: as for `gf.attribution.saliency`.
        at: as for `gf.attribution.saliency`.
        steps: the number of gradients along the path.
        baseline: an uninformative input, of the shape of x or broadcast to it; zeros if None.

    Returns:
        `(params, x, *rest) -> IntegratedGradients`.

    Raises:
        ValueError, TypeError: as for `gf.attribution.saliency`; `steps` below 1; a baseline of another shape.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> w, x = jnp.array([2.0, -3.0]), jnp.array([1.0, 2.0])
    >>> result = gf.attribution.integrated_gradients(lambda w, x: w @ x**2)(w, x)
    >>> result.attributions.round(4), bool(result.relative_gap < 1e-5)
    (Array([  2., -12.], dtype=float32), True)
    """
    what = "integrated_gradients"
    if steps < 1:
        raise ValueError(f"{what}: steps must be an integer >= 1, got {steps}")
    scored = score(f, target, what)
    nodes, weights = (np.asarray(part) / 2 for part in np.polynomial.legendre.leggauss(steps))

    @transform_of(f, what, own=2)
    def integrated(params: PyTree, x: ArrayLike, /, *rest: PyTree) -> IntegratedGradients:
        """Return the integrated gradients of the score with respect to `x`, or to the site."""
        zero, shifted, replaced = entry(scored, at, params, x, rest, what)
        end_score, end = shifted(zero)
        start = _baseline(baseline, x, what)
        if at is not None:
            _, start = entry(scored, at, params, start, rest, what)[1](zero)
        path = end - start

        def gradient(fraction: jax.Array) -> jax.Array:
            return jax.grad(replaced)(start + fraction * path)

        fractions = jnp.asarray(nodes + 0.5, path.dtype)
        gradients = jax.lax.map(gradient, fractions, batch_size=min(steps, PART))  # [steps, ...]
        attributions = path * jnp.tensordot(jnp.asarray(weights, path.dtype), gradients, 1)
        start_score = replaced(start)
        change = widen(end_score) - widen(start_score)
        gap = widen(attributions).sum() - change
        return IntegratedGradients(
            attributions, end_score, start_score, gap, jnp.where(gap == 0, 0, jnp.abs(gap / change))
        )

    return integrated


def smooth_grad(
    f: Callable,
    target: Target = None,
    at: str | None = None,
    *,
    samples: int = 64,
    noise: float = 0.15,
) -> Callable[..., Float[Array, " ..."]]:
    """Return a function that averages the gradients of a score at noisy copies of the input, or of a site.

    Smilkov et al., *SmoothGrad: removing noise by adding noise*, 2017; they use 10 to 20 % of noise.

    Args:
        f: as for `gf.attribution.saliency`.
        target: as for `gf.attribution.saliency`.
        at: as for `gf.attribution.saliency`; the noise is added there too.
        samples: the number of noisy copies.
        noise: the standard deviation of the Gaussian noise, as a fraction of the range (max - min) of the value.

    Returns:
        `(params, x, *rest, key) -> map` of the shape and dtype of the input or site; `key` draws the noise.

    Raises:
        ValueError, TypeError: as for `gf.attribution.saliency`; `samples` below 1, or negative noise.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> smooth = gf.attribution.smooth_grad(lambda w, x: w @ x, samples=4)
    >>> smooth(jnp.array([2.0, -3.0]), jnp.array([1.0, 2.0]), key=jax.random.key(0))
    Array([ 2., -3.], dtype=float32)
    """
    if samples < 1 or not noise >= 0:
        raise ValueError(
            f"smooth_grad: expected samples >= 1 and noise >= 0, got samples={samples}, noise={noise}"
        )
    scored = score(f, target, "smooth_grad")

    @transform_of(f, "smooth_grad", own=2)
    def smoothed(params: PyTree, x: ArrayLike, /, *rest: PyTree, key: Key[Array, ""]) -> jax.Array:
        """Return the mean gradient of the score at noisy copies of `x`; `key` draws the noise."""
        zero, shifted, _ = entry(scored, at, params, x, rest, "smooth_grad")
        _, value = shifted(zero)
        spread = jnp.asarray(noise, value.dtype) * (value.max() - value.min())

        def gradient(key: jax.Array) -> jax.Array:
            # Normal samples of narrow dtypes take few values and are biased.
            moved = spread * jax.random.normal(key, value.shape, wide(value.dtype)).astype(value.dtype)
            return jax.grad(shifted, has_aux=True)(moved)[0]

        keys = jax.random.split(key, samples)
        return jax.lax.map(gradient, keys, batch_size=min(samples, PART)).mean(0)

    return smoothed


def _baseline(baseline: ArrayLike | None, x: ArrayLike, what: str) -> jax.Array:
    """Return the baseline broadcast to the shape of the input."""
    x = floating(x, what) if baseline is None else jnp.asarray(x)
    if baseline is None:
        return jnp.zeros_like(x)
    baseline = jnp.asarray(baseline)
    try:
        return jnp.broadcast_to(baseline.astype(x.dtype), x.shape)
    except ValueError:
        raise ValueError(
            f"{what}: expected a baseline of the input's shape {list(x.shape)}, got {list(baseline.shape)}"
        ) from None
