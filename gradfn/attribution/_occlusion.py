"""`gf.attribution.occlusion`: the drop of a score when parts of the input are covered."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from gradfn.attribution._score import PART, Target, as_image, floating, score
from gradfn.core.signature import transform_of


def occlusion(
    f: Callable,
    size: int,
    stride: int | None = None,
    value: float = 0.0,
    target: Target = None,
    *,
    shape: Sequence[int] | None = None,
) -> Callable[..., Float[Array, "rows columns"]]:
    """Return a function that computes how far a score drops when a square of the image is covered.

    Zeiler and Fergus, *Visualizing and Understanding Convolutional Networks*, 2014. It uses no gradient, so
    saturation does not hide anything from it; but covered images are unlike those that the network was trained on.

    Args:
        f: as for `gf.attribution.saliency`.
        size: height and width of the square, in pixels.
        stride: between neighboring squares, in pixels; `size` if None, so that they do not overlap.
        value: the background value that covers the square.
        target: as for `gf.attribution.saliency`.
        shape: height and width (and channels) of the image if x is flat: `(28, 28)`.

    Returns:
        `(params, x, *rest) -> [rows, columns]`, f(x) minus f of the covered x, in units of the score: positive
        where the square supports the score. The last squares extend beyond the edge if the stride does not divide
        the image.

    Raises:
        ValueError, TypeError: as for `gf.attribution.saliency`; a size, stride or shape that does not fit the image.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> occlusion = gf.attribution.occlusion(lambda w, x: jnp.sum(w * x), size=2)
    >>> occlusion(jnp.arange(16.0).reshape(4, 4), jnp.ones([4, 4]))
    Array([[10., 18.],
           [42., 50.]], dtype=float32)
    """
    scored = score(f, target, "occlusion")
    stride = size if stride is None else stride

    @transform_of(f, "occlusion", own=2)
    def drop(params: PyTree, x: ArrayLike, /, *rest: PyTree) -> jax.Array:
        """Return the drop of the score for each covered square of `x`."""
        x = floating(x, "occlusion")
        height, width, *others = as_image(x, shape, "occlusion")
        if not (1 <= size <= min(height, width) and stride >= 1):
            raise ValueError(
                f"occlusion: expected size in 1..{min(height, width)} and stride >= 1, got {size} and {stride}"
            )
        n_rows, n_columns = (math.ceil((n - size) / stride) + 1 for n in (height, width))

        def covered(index: jax.Array) -> jax.Array:
            top, left = stride * (index // n_columns), stride * (index % n_columns)
            rows, columns = jnp.arange(height) - top, jnp.arange(width) - left
            inside = ((rows >= 0) & (rows < size))[:, None] & ((columns >= 0) & (columns < size))[None]
            inside = inside.reshape(height, width, *[1] * len(others))  # [height, width, 1...]
            inside = jnp.broadcast_to(inside, (height, width, *others)).reshape(x.shape)
            return scored(params, jnp.where(inside, jnp.asarray(value, x.dtype), x), *rest)

        indices = jnp.arange(n_rows * n_columns)
        scores = jax.lax.map(covered, indices, batch_size=min(len(indices), PART))
        return (scored(params, x, *rest) - scores).reshape(n_rows, n_columns)

    return drop
