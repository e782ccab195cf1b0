"""`gf.attribution.occlusion`: cover the input piece by piece, and see what becomes of the score."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gradfn.attribution._score import PART, Target, as_image, floating, score


def occlusion(
    f: Callable,
    size: int,
    stride: int | None = None,
    value: float = 0.0,
    target: Target = None,
    *,
    shape: Sequence[int] | None = None,
) -> Callable[..., jax.Array]:
    """Make the fall of a score when a square of the image is covered, square by square.

    Zeiler and Fergus, *Visualizing and Understanding Convolutional Networks*, 2014. No gradient is taken, so
    it also sees what a saturated function hides from its gradient; but covering makes images that the network
    has never met.

    Args:
        f: as `gf.attribution.saliency` has it.
        size: height and width of the square, in pixels.
        stride: from one square to the next, in pixels; `size` where None, so that they do not overlap.
        value: what to put there: 0 is paper.
        target: as `gf.attribution.saliency` has it.
        shape: height and width (and channels) of the image, where x is flat: `(28, 28)`.

    Returns:
        `(params, x, *rest) -> [rows, columns]`, f(x) less f(x covered there), in units of the score: positive
        where the square speaks for it. The last squares reach over the edge where the stride does not fit.

    Raises:
        ValueError, TypeError: as `gf.attribution.saliency` does; a size, stride or shape that does not fit the image.

    Example:
        >>> import jax.numpy as jnp, gradfn as gf
        >>> covered = gf.attribution.occlusion(lambda w, x: jnp.sum(w * x), size=2)
        >>> covered(jnp.arange(16.0).reshape(4, 4), jnp.ones([4, 4]))
        Array([[10., 18.],
               [42., 50.]], dtype=float32)
    """
    scored = score(f, target, "occlusion")
    stride = size if stride is None else stride

    @functools.wraps(f)
    def fall(params: Any, x: Any, *rest: Any) -> jax.Array:
        x = floating(x, "occlusion")
        height, width, *others = as_image(x, shape, "occlusion")
        if not (1 <= size <= min(height, width) and stride >= 1):
            raise ValueError(
                f"occlusion: size is from 1 to {min(height, width)} and stride 1 or more, came {size} and {stride}"
            )
        n_rows, n_columns = (math.ceil((n - size) / stride) + 1 for n in (height, width))

        def covered(number: jax.Array) -> jax.Array:
            top, left = stride * (number // n_columns), stride * (number % n_columns)
            rows, columns = jnp.arange(height) - top, jnp.arange(width) - left
            inside = ((rows >= 0) & (rows < size))[:, None] & ((columns >= 0) & (columns < size))[None]
            inside = inside.reshape(height, width, *[1] * len(others))  # [height, width, 1...]
            inside = jnp.broadcast_to(inside, (height, width, *others)).reshape(x.shape)
            return scored(params, jnp.where(inside, jnp.asarray(value, x.dtype), x), *rest)

        numbers = jnp.arange(n_rows * n_columns)
        scores = jax.lax.map(covered, numbers, batch_size=min(len(numbers), PART))
        return (scored(params, x, *rest) - scores).reshape(n_rows, n_columns)

    return fall
