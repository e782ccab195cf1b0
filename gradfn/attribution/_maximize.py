"""`gf.attribution.maximize`: the input that a class, or any unit inside, wants to see."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradfn.attribution._score import Target, as_image, floating, score


class Maximized(NamedTuple):
    """What `gf.attribution.maximize` returns.

    Attributes:
        x: the input that was found, in the shape of the first.
        score: its score, without the penalties.
        scores: `[steps]`, the score before each step, of the input as it was shifted then.
    """

    x: jax.Array
    score: jax.Array
    scores: jax.Array


def maximize(
    f: Callable,
    target: Target = None,
    *,
    shape: Sequence[int] | None = None,
    steps: int = 256,
    rate: float = 0.05,
    l2: float = 0.05,
    variation: float = 0.02,
    jitter: int = 2,
    box: tuple[float, float] | None = (0.0, 1.0),
) -> Callable[..., Maximized]:
    """Make an input by climbing a score: what a class or a unit wants to see.

    Erhan et al., *Visualizing Higher-Layer Features of a Deep Network*, 2009. Without regularisation the
    outcome is a pattern of dots that no eye could read. Penalties on ink (l2; Simonyan et al., 2014) and on
    total variation (Mahendran and Vedaldi, *Understanding Deep Image Representations by Inverting Them*,
    2015), small random shifts (Mordvintsev et al., *Inceptionism*, 2015) and the box make it legible. Adam
    climbs, in one compiled scan.

    Args:
        f: as `gf.attribution.saliency` has it. Climb logits, not probabilities: these are flat where the class is sure.
        target: as `gf.attribution.saliency` has it: a class, `3`, or a unit of a site, `("a1", 3)`.
        shape: height and width (and channels) of the image, where x is flat: `(28, 28)`. Of an input that is
            no image (flat, and no shape), `variation` and `jitter` have no meaning and are left out.
        steps: how many.
        rate: Adam's learning rate, in units of the input.
        l2: score that a sum of squares of 1 costs.
        variation: score that a total variation of 1 costs: a step from 0 to 1 along one pixel's side.
        jitter: the most pixels by which the image is shifted each way, anew at each step; it is rolled round.
        box: the least and largest value of an input; None for no bounds.

    Returns:
        `(params, x, key, *rest) -> Maximized`. `x` is where to begin: grey, or an image to change. (At zeros,
        all units of a relu network may be off, and no slope shows the way.)

    Raises:
        ValueError, TypeError: as `gf.attribution.saliency` does; a shape that does not fit x, `steps` below 1.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> climb = gf.attribution.maximize(lambda w, x: w @ x)
        >>> found = climb(jnp.array([2.0, -3.0, 1.0]), jnp.full(3, 0.5), jax.random.key(0))
        >>> found.x.round(3)
        Array([1., 0., 1.], dtype=float32)
    """
    if steps < 1:
        raise ValueError(f"maximize: steps is 1 or more, came {steps}")
    scored = score(f, target, "maximize")

    @functools.wraps(f)
    def climb(params: Any, x: Any, key: jax.Array, *rest: Any) -> Maximized:
        start = floating(x, "maximize")
        image = None if start.ndim < 2 and shape is None else as_image(start, shape, "maximize")

        def objective(x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            cost = l2 * jnp.square(x).sum()
            if image is not None:
                cost += variation * total_variation(x.reshape(image))
                x = _shifted(x.reshape(image), key, jitter).reshape(x.shape)
            value = scored(params, x, *rest)
            return cost - value, value

        optimizer = optax.adam(rate)

        def step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            x, memory = state
            slope, value = jax.grad(objective, has_aux=True)(x, key)
            with jax.numpy_dtype_promotion("standard"):  # optax relies on it
                update, memory = optimizer.update(slope, memory)
            x = optax.apply_updates(x, update)
            return (x if box is None else jnp.clip(x, *box), memory), value

        (found, _), scores = jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(key, steps))
        return Maximized(found, scored(params, found, *rest), scores)

    return climb


def total_variation(image: jax.Array) -> jax.Array:
    """Return the sum over pixels of the length of the gradient (Rudin, Osher and Fatemi, 1992).

    Args:
        image: `[height, width, ...]`.

    >>> import jax.numpy as jnp
    >>> total_variation(jnp.zeros([4, 4]).at[:, 2:].set(1.0)).round(2)  # an edge, four pixels long
    Array(4., dtype=float32)
    """
    down = jnp.diff(image, axis=0, append=image[-1:])
    right = jnp.diff(image, axis=1, append=image[:, -1:])
    tiny = 1e-8  # the root has no slope at 0
    return jnp.sqrt(down**2 + right**2 + tiny).sum()


def _shifted(image: jax.Array, key: jax.Array, pixels: int) -> jax.Array:
    moves = jax.random.randint(key, (2,), -pixels, pixels + 1)
    return jnp.roll(image, moves, (0, 1))
