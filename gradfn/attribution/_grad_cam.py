"""Grad-CAM: where in the image a convolution's channels speak for a score."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from gradfn.attribution._score import Target, entry, score
from gradfn.core.signature import transform_of
from gradfn.jaxpr.call import jit_arrays


def grad_cam(
    f: Callable,
    site: str,
    target: Target = None,
    *,
    channel_axis: int = -1,
    grid: Sequence[int] | None = None,
    shape: Sequence[int] | None = None,
) -> Callable[..., Float[Array, "height width"]]:
    """Return a function that computes Grad-CAM: channels of a site weighted by their mean gradients, where positive.

    Selvaraju et al., *Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization*, 2017. The
    weighted sum of the channels is resized to the image (bilinear). Its product with
    `gf.attribution.guided_backprop` is their Guided Grad-CAM.

    Args:
        f: as for `gf.attribution.saliency`, of one image.
        site: the value with spatial axes (a name from `gf.sites(f)`), usually the last convolution's; axes of size
            1 before its last three are dropped.
        target: as for `gf.attribution.saliency`.
        channel_axis: of the site's value: -1 for `[height, width, channels]` as in gradfn and Flax, 0 for
            `[channels, height, width]` as in Equinox.
        grid: `[rows, columns]` of patches, for a site of tokens `[tokens, channels]`, as in a vision transformer;
            tokens in front of the patches (a class token) are left out.
        shape: `[height, width]` of the map; by default that of the input, which has its channel axis where the site
            has it, or none.

    Returns:
        `(params, x, *rest) -> map [height, width]`, >= 0; compiled.

    Raises:
        ValueError: a site without two spatial axes, a grid that does not fit, an input that is not an image; and as
            for `gf.attribution.saliency`.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.cnn((8, 8, 1), channels=(4,), hidden=(), classes=3)
    >>> cam = gf.attribution.grad_cam(net.apply, "a1", target=2)
    >>> cam(net.init(jax.random.key(0)), jnp.ones([8, 8])).shape
    (8, 8)
    """
    scored = score(f, target, "grad_cam")

    @jit_arrays
    def compiled(params: PyTree, x: ArrayLike, rest: tuple[PyTree, ...]) -> jax.Array:
        zero, shifted, _ = entry(scored, site, params, x, rest, "grad_cam")
        gradient, value = jax.grad(shifted, has_aux=True)(zero)
        gradient, value = (_channels_last(a, site, channel_axis, grid) for a in (gradient, value))
        weighted = value @ gradient.mean((0, 1))  # [rows, columns, channels] -> [rows, columns]
        return jax.image.resize(jnp.maximum(weighted, 0), _size(x, shape, channel_axis), "bilinear")

    @transform_of(f, "grad_cam", own=2)
    def localize(params: PyTree, x: ArrayLike, /, *rest: PyTree) -> jax.Array:
        """Return where in the image the site's channels speak for the score."""
        return compiled(params, x, rest)

    return localize


def _channels_last(a: jax.Array, site: str, channel_axis: int, grid: Sequence[int] | None) -> jax.Array:
    """Return a value as `[rows, columns, channels]`."""
    got = f"got {site!r} of shape {list(a.shape)}"
    ndim = 3 if grid is None else 2
    if a.ndim < ndim or any(n != 1 for n in a.shape[: a.ndim - ndim]):
        expected = "two spatial axes and one of channels" if grid is None else "[tokens, channels] for a grid"
        raise ValueError(f"grad_cam: expected a site of one image with {expected}, {got}")
    a = a.reshape(a.shape[a.ndim - ndim :])  # [1, rows, columns, channels] -> [rows, columns, channels]
    if not -ndim <= channel_axis < ndim:
        raise ValueError(f"grad_cam: channel_axis must be in [{-ndim}, {ndim}), got {channel_axis}")
    a = jnp.moveaxis(a, channel_axis, -1)
    if grid is None:
        return a
    rows, columns = grid
    if not 0 <= len(a) - rows * columns <= 8:
        raise ValueError(
            f"grad_cam: expected a site of {rows} x {columns} tokens for grid={list(grid)}, {got}"
        )
    # [tokens, channels] -> [rows, columns, channels]
    return a[len(a) - rows * columns :].reshape(rows, columns, -1)


def _size(x: ArrayLike, shape: Sequence[int] | None, channel_axis: int) -> tuple[int, ...]:
    """Return the height and width of the map."""
    size = list(jnp.shape(x) if shape is None else shape)
    while shape is None and len(size) > 3 and size[0] == 1:
        del size[0]
    if shape is None and len(size) == 3:
        del size[channel_axis]
    if len(size) != 2:
        expected = (
            "an image (for a flat one pass shape=(28, 28))" if shape is None else "shape=(height, width)"
        )
        raise ValueError(
            f"grad_cam: expected {expected}, got shape {list(jnp.shape(x) if shape is None else shape)}"
        )
    return tuple(size)
