"""Gradient maps: how much each part of an input, or of a value inside, counts for an answer.

All of them explain one number, the score: the function's own where it returns one, else what `target` picks.
A map is of the input, or of any site by name (`at`). Each is written for one example: `jax.vmap` makes it one
of a batch. They say what the function does, not what is true of the world, and some of them are known to
mislead: run `gf.attribution.randomize_weights` on a method before believing it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradfn.attribution._score import PART, Target, entry, floating, score
from gradfn.core.precision import wide, widen


class IntegratedGradients(NamedTuple):
    """What `gf.attribution.integrated_gradients` returns.

    Attributes:
        attributions: in the shape of the input, or of the site, in units of the score.
        score: f(x), a scalar.
        baseline_score: the score with the baseline's value in the place of x (or of the site's value).
        gap: the sum of the attributions less (score - baseline_score), which is 0 for an exact integral.
        relative_gap: |gap| as a share of |score - baseline_score|.
    """

    attributions: jax.Array
    score: jax.Array
    baseline_score: jax.Array
    gap: jax.Array
    relative_gap: jax.Array


def saliency(f: Callable, target: Target = None, at: str | None = None) -> Callable[..., jax.Array]:
    """Make the gradient of a score with respect to the input, or to a value inside.

    Simonyan, Vedaldi and Zisserman, *Deep Inside Convolutional Networks*, 2014. It is signed: where it is
    positive, more of the input makes the score larger; they show its absolute value.

    Args:
        f: `(params, x, *rest) -> scalar`, or `-> array`, of one example.
        target: which number of the array to explain: an index, from 0; a tuple, for several axes; or a site
            and an index, `("a1", 3)`. The mean, where it picks several: `("a1", (..., 3))` is a channel. It
            may be a traced integer, so that `vmap` can go over classes.
        at: the site (a name out of `gf.sites(f)`) that the map is of; None is the input.

    Returns:
        `(params, x, *rest) -> map` in the shape and dtype of the input or site (a site in a loop has the
        iterations in front), in units of the score for one unit of the input.

    Raises:
        ValueError: an unknown site (near names are listed), a target outside, none where there are several
            numbers; TypeError: an input or answer that is not floating.

    Example:
        >>> import jax.numpy as jnp, gradfn as gf
        >>> net = gf.mlp([2, 3])
        >>> params = {"W1": jnp.arange(6.0).reshape(3, 2), "b1": jnp.zeros(3)}
        >>> gf.attribution.saliency(net.apply, target=1)(params, jnp.ones(2))  # of a linear function: its weights
        Array([2., 3.], dtype=float32)
        >>> gf.attribution.saliency(net.apply, target=1, at="z1")(params, jnp.ones(2))
        Array([0., 1., 0.], dtype=float32)
    """
    scored = score(f, target, "saliency")

    @functools.wraps(f)
    def gradient(params: Any, x: Any, *rest: Any) -> jax.Array:
        zero, shifted, _ = entry(scored, at, params, x, rest, "saliency")
        return jax.grad(shifted, has_aux=True)(zero)[0]

    return gradient


def grad_times_input(f: Callable, target: Target = None, at: str | None = None) -> Callable[..., jax.Array]:
    """Make the gradient of a score times the input, or times the value at a site.

    To first order, how much of the score is there because of each part (Shrikumar et al., *Not Just a Black
    Box*, 2016); exact for linear functions without bias. The input shows through it whatever the network
    does, so that it looks right even where it is not (Adebayo et al., 2018).

    Args:
        f: as `gf.attribution.saliency` has it.
        target: as `gf.attribution.saliency` has it.
        at: as `gf.attribution.saliency` has it.

    Returns:
        `(params, x, *rest) -> map` in the shape and dtype of the input or site, in units of the score.

    Raises:
        ValueError, TypeError: as `gf.attribution.saliency` does.

    Example:
        >>> import jax.numpy as jnp, gradfn as gf
        >>> gf.attribution.grad_times_input(lambda w, x: w @ x)(jnp.array([2.0, -3.0]), jnp.array([1.0, 2.0]))
        Array([ 2., -6.], dtype=float32)
    """
    scored = score(f, target, "grad_times_input")

    @functools.wraps(f)
    def product(params: Any, x: Any, *rest: Any) -> jax.Array:
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
    baseline: Any = None,
) -> Callable[..., IntegratedGradients]:
    """Make the gradients along the straight way from a baseline to the input, times that way.

    Sundararajan, Taly and Yan, *Axiomatic Attribution for Deep Networks*, 2017. The attributions add up to
    the score less that of the baseline; how far they are from it is returned. The integral is taken by
    Gauss-Legendre quadrature, which is exact where the score is a polynomial of degree below 2 `steps` on
    the way.

    At a site, the way goes from the site's value for the baseline to that for `x`, with all else as it is for
    `x` (other ways past the site stay open, so the baseline's score may be another than f(baseline)).

    Args:
        f: as `gf.attribution.saliency` has it.
        target: as `gf.attribution.saliency` has it.
        at: as `gf.attribution.saliency` has it.
        steps: how many gradients to take on the way.
        baseline: an input that says nothing, of the shape of x or one that broadcasts to it; zeros where None.

    Returns:
        `(params, x, *rest) -> IntegratedGradients`.

    Raises:
        ValueError, TypeError: as `gf.attribution.saliency` does; `steps` below 1; a baseline that does not fit.

    Example:
        >>> import jax.numpy as jnp, gradfn as gf
        >>> w, x = jnp.array([2.0, -3.0]), jnp.array([1.0, 2.0])
        >>> seen = gf.attribution.integrated_gradients(lambda w, x: w @ x**2)(w, x)
        >>> seen.attributions.round(4), bool(seen.relative_gap < 1e-5)
        (Array([  2., -12.], dtype=float32), True)
    """
    what = "integrated_gradients"
    if steps < 1:
        raise ValueError(f"{what}: steps is 1 or more, came {steps}")
    scored = score(f, target, what)
    nodes, weights = (np.asarray(part) / 2 for part in np.polynomial.legendre.leggauss(steps))

    @functools.wraps(f)
    def integrated(params: Any, x: Any, *rest: Any) -> IntegratedGradients:
        zero, shifted, replaced = entry(scored, at, params, x, rest, what)
        end_score, end = shifted(zero)
        start = _baseline(baseline, x, what)
        if at is not None:
            _, start = entry(scored, at, params, start, rest, what)[1](zero)
        way = end - start

        def gradient(share: jax.Array) -> jax.Array:
            return jax.grad(replaced)(start + share * way)

        shares = jnp.asarray(nodes + 0.5, way.dtype)
        gradients = jax.lax.map(gradient, shares, batch_size=min(steps, PART))  # [steps, ...]
        attributions = way * jnp.tensordot(jnp.asarray(weights, way.dtype), gradients, 1)
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
) -> Callable[..., jax.Array]:
    """Make the mean of the gradients at noisy copies of the input, or of the value at a site.

    Smilkov et al., *SmoothGrad: removing noise by adding noise*, 2017, who use 10 to 20 % of noise.

    Args:
        f: as `gf.attribution.saliency` has it.
        target: as `gf.attribution.saliency` has it.
        at: as `gf.attribution.saliency` has it; the noise is added there, too.
        samples: how many copies.
        noise: standard deviation of the Gaussian noise, as a share of the value's range (max - min).

    Returns:
        `(params, x, key, *rest) -> map` in the shape and dtype of the input or site.

    Raises:
        ValueError, TypeError: as `gf.attribution.saliency` does; `samples` below 1, or negative noise.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> smooth = gf.attribution.smooth_grad(lambda w, x: w @ x, samples=4)
        >>> smooth(jnp.array([2.0, -3.0]), jnp.array([1.0, 2.0]), jax.random.key(0))
        Array([ 2., -3.], dtype=float32)
    """
    if samples < 1 or not noise >= 0:
        raise ValueError(f"smooth_grad: samples is 1 or more and noise 0 or more, came {samples} and {noise}")
    scored = score(f, target, "smooth_grad")

    @functools.wraps(f)
    def smoothed(params: Any, x: Any, key: jax.Array, *rest: Any) -> jax.Array:
        zero, shifted, _ = entry(scored, at, params, x, rest, "smooth_grad")
        _, value = shifted(zero)
        spread = jnp.asarray(noise, value.dtype) * (value.max() - value.min())

        def gradient(key: jax.Array) -> jax.Array:
            # Normal numbers of narrow dtypes have few values and are off centre.
            moved = spread * jax.random.normal(key, value.shape, wide(value.dtype)).astype(value.dtype)
            return jax.grad(shifted, has_aux=True)(moved)[0]

        keys = jax.random.split(key, samples)
        return jax.lax.map(gradient, keys, batch_size=min(samples, PART)).mean(0)

    return smoothed


def _baseline(baseline: Any, x: Any, what: str) -> jax.Array:
    """Return the baseline in the shape of the input."""
    x = floating(x, what) if baseline is None else jnp.asarray(x)
    if baseline is None:
        return jnp.zeros_like(x)
    baseline = jnp.asarray(baseline)
    try:
        return jnp.broadcast_to(baseline.astype(x.dtype), x.shape)
    except ValueError:
        came = f"{list(baseline.shape)} for an input of {list(x.shape)}"
        raise ValueError(f"{what}: the baseline must have the input's shape, came {came}") from None
