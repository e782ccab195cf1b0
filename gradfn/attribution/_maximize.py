"""`gf.attribution.maximize`: an input that maximizes the score of a class, or of any unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from gradfn.attribution._score import Target, as_image, floating, score
from gradfn.core.signature import transform_of
from gradfn.display import ROWS, ShowsTable, TextTable, array_table, extremes


class _Maximized(NamedTuple):
    x: Float[Array, " ..."]
    score: Float[Array, ""]
    scores: Float[Array, " steps"]


class Maximized(ShowsTable, _Maximized):
    """The result of `gf.attribution.maximize`. `print` shows a table.

    Attributes:
        x: the final input, of the shape of the initial one.
        score: scalar, its score, without the penalties.
        scores: `[steps]`, the score before each step, of the shifted input.
    """

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table of one row: the score at the start and at the end, and the range of the input."""
        if jnp.ndim(self.score):
            return array_table("Maximized, batched by vmap", self)
        out = TextTable(f"Maximized in {len(self.scores)} steps")
        for header in ("initial score", "final score"):
            out.add_column(header, ".4g")
        for header in ("shape of x", "smallest", "largest"):
            out.add_column(header)
        out.add_row(float(self.scores[0]), float(self.score), self.x.shape, *extremes(self.x))
        return out


def maximize(
    f: Callable,
    target: Target = None,
    *,
    shape: Sequence[int] | None = None,
    steps: int = 256,
    learning_rate: float = 0.05,
    l2: float = 0.05,
    variation: float = 0.02,
    jitter: int = 2,
    box: tuple[float, float] | None = (0.0, 1.0),
) -> Callable[..., Maximized]:
    """Return a function that maximizes a score over the input by gradient ascent (activation maximization).

    Erhan et al., *Visualizing Higher-Layer Features of a Deep Network*, 2009. Without regularization the result is
    a pattern of dots that nobody can read. A penalty on the norm (`l2`; Simonyan et al., 2014), one on the total
    variation (Mahendran and Vedaldi, *Understanding Deep Image Representations by Inverting Them*, 2015), small
    random shifts (Mordvintsev et al., *Inceptionism*, 2015) and bounds make it legible. Adam runs in one compiled
    scan.

    Args:
        f: as for `gf.attribution.saliency`. Maximize logits, not probabilities, whose gradient vanishes near 1.
        target: as for `gf.attribution.saliency`: a class, `3`, or a unit of a site, `("a1", 3)`.
        shape: height and width (and channels) of the image if x is flat: `(28, 28)`. `variation` and `jitter` do
            not apply to an input that is not an image (flat, and no shape).
        steps: the number of steps.
        learning_rate: of Adam, in units of the input.
        l2: the penalty per unit of the squared norm of x, in units of the score.
        variation: the penalty per unit of total variation; an edge from 0 to 1 along one pixel has 1.
        jitter: the largest random shift in pixels per axis, drawn at each step; the image wraps around.
        box: lower and upper bound of the elements of x; None for no bounds.

    Returns:
        `(params, x, *rest, key) -> Maximized`. `x` is the initial input: gray, or an image to change. (At zeros,
        all units of a ReLU network may be inactive, and the gradient is zero.) `key` draws the shifts.

    Raises:
        ValueError, TypeError: as for `gf.attribution.saliency`; a shape that does not fit x, `steps` below 1.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> ascend = gf.attribution.maximize(lambda w, x: w @ x)
    >>> result = ascend(jnp.array([2.0, -3.0, 1.0]), jnp.full(3, 0.5), key=jax.random.key(0))
    >>> result.x.round(3)
    Array([1., 0., 1.], dtype=float32)
    """
    if steps < 1:
        raise ValueError(f"maximize: steps must be an integer >= 1, got {steps}")
    scored = score(f, target, "maximize")

    @transform_of(f, "maximize", own=2)
    def ascend(params: PyTree, x: ArrayLike, /, *rest: PyTree, key: Key[Array, ""]) -> Maximized:
        """Return the input that gradient ascent on the score reaches from `x`; `key` draws the shifts."""
        start = floating(x, "maximize")
        image = None if start.ndim < 2 and shape is None else as_image(start, shape, "maximize")

        def objective(x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            cost = l2 * jnp.square(x).sum()
            if image is not None:
                cost += variation * total_variation(x.reshape(image))
                x = _shifted(x.reshape(image), key, jitter).reshape(x.shape)
            value = scored(params, x, *rest)
            return cost - value, value

        optimizer = optax.adam(learning_rate)

        def step(state: tuple[jax.Array, optax.OptState], key: jax.Array) -> tuple[PyTree, jax.Array]:
            x, memory = state
            slope, value = jax.grad(objective, has_aux=True)(x, key)
            # optax relies on it.
            with jax.numpy_dtype_promotion("standard"):
                update, memory = optimizer.update(slope, memory)
            x = optax.apply_updates(x, update)
            return (x if box is None else jnp.clip(x, *box), memory), value

        (found, _), scores = jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(key, steps))
        return Maximized(found, scored(params, found, *rest), scores)

    return ascend


def total_variation(image: jax.Array) -> jax.Array:
    """Return the sum over pixels of the norm of the gradient (Rudin, Osher and Fatemi, 1992).

    Args:
        image: `[height, width, ...]`.

    >>> import jax.numpy as jnp
    >>> total_variation(jnp.zeros([4, 4]).at[:, 2:].set(1.0)).round(2)  # an edge, four pixels long
    Array(4., dtype=float32)
    """
    down = jnp.diff(image, axis=0, append=image[-1:])
    right = jnp.diff(image, axis=1, append=image[:, -1:])
    # The square root has no derivative at 0.
    tiny = 1e-8
    return jnp.sqrt(down**2 + right**2 + tiny).sum()


def _shifted(image: jax.Array, key: jax.Array, pixels: int) -> jax.Array:
    moves = jax.random.randint(key, (2,), -pixels, pixels + 1)
    return jnp.roll(image, moves, (0, 1))
