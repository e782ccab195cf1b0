"""Figures of networks that read images: filters, and which part of an image activates them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gradfn.pages.figures import new_figure, weight_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def filter_images(W: Any, name: str) -> Figure:
    """Draw the filters of a layer with one input channel, on one diverging color scale centered at zero.

    Args:
        W: `[out, 1, height, width]`, or `[out, height * width]` of square patches.
        name: what to call it.

    Returns:
        A figure with one image per filter.

    Raises:
        ValueError: the filters have several channels, or are not square.

    >>> filter_images(np.ones([8, 1, 5, 5]), "conv1").get_suptitle()
    'conv1: what each of the 8 filters looks for in windows of 5x5 pixels'
    """
    W = np.asarray(W)
    n_out, size = len(W), round(W[0].size ** 0.5)
    if size * size != W[0].size:
        raise ValueError(f"filter_images: expected square filters of one channel, got {list(W.shape)}")
    figure = weight_images(W.reshape(n_out, -1), (size, size), name, "filter")
    figure.suptitle(f"{name}: what each of the {n_out} filters looks for in windows of {size}x{size} pixels")
    return figure


def image_maps(images: Any, maps: Mapping[str, Any], title: str, label: str) -> Figure:
    """Draw images and, beside each, maps of it: the output of a filter, or the attention.

    Args:
        images: `[n, height, width]`.
        maps: by the name of each column, nonnegative values `[n, height', width']` at any resolution.
        title: the title of the figure.
        label: what the values are.

    Returns:
        A figure with one row per image; each column of maps has a scale of its own, from 0 to its largest value.

    Raises:
        ValueError: there is not one map per image.

    >>> figure = image_maps(np.zeros([2, 28, 28]), {"filter 0": np.ones([2, 14, 14])}, "Two", "activation")
    >>> [panel.get_title() for panel in figure.axes][:2]
    ['image', 'filter 0']
    """
    images = np.asarray(images)
    for name, values in maps.items():
        if len(values) != len(images):
            raise ValueError(f"image_maps: {name}: one map per image, {len(images)}, got {len(values)}")
    n_columns = 1 + len(maps)
    figure = new_figure(1.25 * n_columns + 0.8, 1.25 * len(images) + 0.8, "compressed")
    panels = figure.subplots(len(images), n_columns, squeeze=False)
    for i, row in enumerate(panels):
        for panel in row:
            panel.set_axis_off()
        row[0].imshow(images[i], cmap="gray_r", interpolation="nearest")
        for panel, values in zip(row[1:], maps.values(), strict=True):
            top = float(np.max(values)) or 1.0
            mapped = panel.imshow(
                np.asarray(values[i]) / top, cmap="Blues", vmin=0, vmax=1, interpolation="nearest"
            )
    for panel, name in zip(panels[0], ("image", *maps), strict=True):
        panel.set_title(name, fontsize=9)
    if maps:
        figure.colorbar(
            mapped, ax=panels.ravel().tolist(), label=f"{label}, of the column's largest", pad=0.02
        )
    figure.suptitle(title)
    return figure


def bare(panel: Any) -> None:
    """Remove the ticks of a panel and make its frame light."""
    panel.set_xticks([])
    panel.set_yticks([])
    for spine in panel.spines.values():
        spine.set(color="0.8", linewidth=0.6)


def robust_limit(values: Any) -> float:
    """Return a magnitude that few values exceed, so that one outlier does not make the others pale."""
    sizes = np.abs(np.asarray(values))
    return float(np.percentile(sizes, 99.5)) or float(sizes.max()) or 1.0


def signed_image(panel: Any, values: np.ndarray, image: np.ndarray, limit: float = 1.0) -> Any:
    """Draw a map stretched over an image, and the outline of the image's stroke."""
    height, width = image.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    mapped = panel.imshow(
        values, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest", extent=extent
    )
    if image.max() > image.min():
        level = (float(image.max()) + float(image.min())) / 2
        panel.contour(image, levels=[level], colors="0.15", linewidths=0.8)
    return mapped
