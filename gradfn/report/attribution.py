"""Figures of what counts: maps over digits, what a class wants to see, regions, and which examples taught it.

Red speaks for an answer, blue against it; grey is ink.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradfn.report.figures import _figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOR, AGAINST = "#b2182b", "#2166ac"  # the ends of RdBu_r


def signed_maps(
    images: Any,
    maps: Mapping[str, Any],
    title: str,
    names: Sequence[str] = (),
    label: str = "share of the map's largest value (red speaks for the answer, blue against it)",
) -> Figure:
    """Draw images and, beside each, signed maps of it over the outline of its ink.

    Args:
        images: `[n, height, width]`, from 0 (paper) to 1 (ink).
        maps: by what each column is called, `[n, height', width']` of any sign and resolution.
        title: the figure's.
        names: what to call each row; nothing where empty.
        label: of the colour bar.

    Returns:
        A figure with a row an image; each map has a scale of its own, as their units differ.

    Raises:
        ValueError: not one map, or one name, an image.

    >>> figure = signed_maps(np.ones([2, 8, 8]), {"saliency": np.ones([2, 8, 8])}, "Two", ["a", "b"])
    >>> [panel.get_title() for panel in figure.axes][:2]
    ['image', 'saliency']
    """
    images = np.asarray(images)
    for name, values in {**maps, **({"names": names} if len(names) else {})}.items():
        if len(values) != len(images):
            raise ValueError(f"signed_maps: {name}: one an image, {len(images)}, came {len(values)}")
    n_columns = 1 + len(maps)
    figure = _figure(1.45 * n_columns + 0.9, 1.45 * len(images) + 0.9, "compressed")
    panels = figure.subplots(len(images), n_columns, squeeze=False)
    drawn = None
    for i, row in enumerate(panels):
        for panel in row:
            _bare(panel)
        row[0].imshow(images[i], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        if len(names):
            row[0].set_ylabel(names[i], fontsize=9)
        for panel, values in zip(row[1:], maps.values(), strict=True):
            drawn = _signed(panel, np.asarray(values[i]) / _limit(values[i]), images[i])
    for panel, name in zip(panels[0], ("image", *maps), strict=True):
        panel.set_title(name, fontsize=9)
    if drawn is not None:
        figure.colorbar(drawn, ax=panels.ravel().tolist(), label=label, pad=0.02, extend="both", aspect=30)
    figure.suptitle(title)
    return figure


def randomised_maps(
    image: Any,
    maps: Mapping[str, Any],
    columns: Sequence[str],
    notes: Mapping[str, Sequence[str]],
    title: str,
) -> Figure:
    """Draw what becomes of each method's map of one image as what the network learned is taken away.

    Args:
        image: `[height, width]`, from 0 (paper) to 1 (ink).
        maps: by the name of the method, `[columns, height, width]`; each map has a scale of its own.
        columns: what is random in each.
        notes: by the name of the method, what to write under each map.
        title: the figure's.

    Returns:
        A figure with a row a method.

    >>> image = np.ones([8, 8])
    >>> figure = randomised_maps(image, {"saliency": image[None]}, ["trained"], {"saliency": ["1.00"]}, "One")
    >>> figure.axes[0].get_xlabel()
    '1.00'
    """
    figure = _figure(1.45 * len(columns) + 0.6, 1.65 * len(maps) + 0.9, "compressed")
    panels = figure.subplots(len(maps), len(columns), squeeze=False)
    for line, (name, values) in zip(panels, maps.items(), strict=True):
        for panel, one, note in zip(line, np.asarray(values), notes[name], strict=True):
            _bare(panel)
            drawn = _signed(panel, one / _limit(one), np.asarray(image))
            panel.set_xlabel(note, fontsize=9, labelpad=2)
        line[0].set_ylabel(name, fontsize=9)
    for panel, column in zip(panels[0], columns, strict=True):
        panel.set_title(column, fontsize=9)
    label = "share of the map's largest value"
    figure.colorbar(drawn, ax=panels.ravel().tolist(), label=label, pad=0.02, extend="both", aspect=30)
    figure.suptitle(title)
    return figure


def image_rows(
    rows: Mapping[str, Any], columns: Sequence[str], title: str, notes: Mapping[str, Sequence[str]] = {}
) -> Figure:
    """Draw rows of images of the same things side by side, from 0 (paper) to 1 (ink).

    Args:
        rows: by what each row is called, `[n, height, width]`.
        columns: what each column is called.
        title: the figure's.
        notes: by the name of a row, what to write under each of its images.

    Returns:
        A figure with `n` columns.

    Raises:
        ValueError: a row without one image a column.

    >>> figure = image_rows({"mean": np.zeros([2, 8, 8])}, "01", "Two means", {"mean": ["a", "b"]})
    >>> figure.axes[0].get_title(), figure.axes[1].get_xlabel()
    ('0', 'b')
    """
    figure = _figure(1.05 * len(columns) + 1.0, 1.22 * len(rows) + 0.7, "compressed")
    panels = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (name, images) in zip(panels, rows.items(), strict=True):
        if len(images) != len(columns):
            raise ValueError(f"image_rows: {name}: one image a column, {len(columns)}, came {len(images)}")
        for i, (panel, image) in enumerate(zip(line, np.asarray(images), strict=True)):
            _bare(panel)
            panel.imshow(image, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            if name in notes:
                panel.set_xlabel(notes[name][i], fontsize=8, labelpad=2)
        line[0].set_ylabel(name, fontsize=9)
    for panel, column in zip(panels[0], columns, strict=True):
        panel.set_title(column, fontsize=10)
    figure.suptitle(title)
    return figure


def heat_over_images(
    images: Any, heat: Any, names: Sequence[str], title: str, label: str, columns: int = 5
) -> Figure:
    """Draw signed heat maps over the outlines of images, all on one scale.

    Args:
        images: `[n, height, width]`, from 0 (paper) to 1 (ink).
        heat: `[n, rows, columns]`, of a grid of regions that covers the image.
        names: what to call each.
        title: the figure's.
        label: what the heat is, with its unit.
        columns: images side by side.

    Returns:
        A figure with a panel an image, and a colour bar.

    Raises:
        ValueError: not one map and one name an image.

    >>> figure = heat_over_images(np.ones([2, 8, 8]), np.ones([2, 4, 4]), "ab", "Two", "fall (%)")
    >>> [panel.get_title() for panel in figure.axes][:2]
    ['a', 'b']
    """
    images, heat = np.asarray(images), np.asarray(heat)
    if not len(images) == len(heat) == len(names):
        came = f"{len(images)} images, {len(heat)} maps, {len(names)} names"
        raise ValueError(f"heat_over_images: one map and one name an image, came {came}")
    n_rows = -(-len(images) // columns)
    figure = _figure(1.75 * columns + 1.0, 1.95 * n_rows + 0.7, "compressed")
    panels = figure.subplots(n_rows, columns, squeeze=False).ravel()
    limit = float(np.abs(heat).max()) or 1.0
    for panel in panels[len(images) :]:
        panel.set_axis_off()
    for panel, image, values, name in zip(panels, images, heat, names, strict=False):
        _bare(panel)
        drawn = _signed(panel, values, image, limit)
        panel.set_title(name, fontsize=9)
    figure.colorbar(drawn, ax=panels.tolist(), label=label, pad=0.02, aspect=30)
    figure.suptitle(title)
    return figure


def remains(
    images: Any,
    masks: Mapping[str, Any],
    said: Any,
    sure: Any,
    labels: Any,
    shares: Sequence[float],
    title: str,
) -> Figure:
    """Draw what a network answers from one region of each image alone.

    Args:
        images: `[n, height, width]`, from 0 (paper) to 1 (ink).
        masks: by what each region is called, bool `[height, width]`.
        said: `[n, regions]`, the class it answered.
        sure: `[n, regions]`, how sure it was, in [0, 1].
        labels: `[n]`, the true classes.
        shares: `[regions]`, of all test images, how many are answered right from the region, in [0, 1].
        title: the figure's.

    Returns:
        A figure with a row an image and a column a region; frames are blue where the answer is right and orange
        where it is not.

    >>> masks = {"all": np.ones([8, 8], bool)}
    >>> figure = remains(np.ones([1, 8, 8]), masks, [[3]], [[0.9]], [3], [0.97], "One")
    >>> figure.axes[0].get_title(), figure.axes[0].get_xlabel()
    ('all\\n97 % right', '3 (90 %)')
    """
    images, said, sure = np.asarray(images), np.asarray(said), np.asarray(sure)
    figure = _figure(1.2 * len(masks) + 0.5, 1.35 * len(images) + 0.9, "compressed")
    panels = figure.subplots(len(images), len(masks), squeeze=False)
    for i, line in enumerate(panels):
        for j, (panel, mask) in enumerate(zip(line, masks.values(), strict=True)):
            _bare(panel)
            # What is covered is light grey, so that paper and cover are told apart.
            shown = np.where(mask, images[i], 0.18)
            panel.imshow(shown, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            right = said[i, j] == labels[i]
            panel.set_xlabel(f"{said[i, j]} ({100 * sure[i, j]:.0f} %)", fontsize=8, labelpad=2)
            for spine in panel.spines.values():
                spine.set(color="#0072b2" if right else "#d55e00", linewidth=2.5, visible=True)
    for panel, (name, share) in zip(panels[0], zip(masks, shares, strict=True), strict=True):
        panel.set_title(f"{name}\n{100 * share:.0f} % right", fontsize=9)
    figure.suptitle(title)
    return figure


def influences(
    tests: Any,
    test_names: Sequence[str],
    train: Any,
    train_labels: Any,
    scores: Any,
    title: str,
    n_best: int = 5,
) -> Figure:
    """Draw test images and, beside each, the training images that helped and harmed its answer most.

    Args:
        tests: `[n, height, width]`.
        test_names: what to write under each test image.
        train: `[m, height, width]`.
        train_labels: `[m]`, what the training images are said to be.
        scores: `[n, m]`, from `gf.attribution.tracin`.
        title: the figure's.
        n_best: how many training images a side.

    Returns:
        A figure with a row a test image: it, then the helpful ones, the most helpful first, then the harmful
        ones, the most harmful first; under each stand its label and score.

    >>> images = np.zeros([4, 8, 8])
    >>> figure = influences(images[:1], ["a"], images, [0, 1, 2, 3], [[1.0, -1.0, 0.5, -0.5]], "One", n_best=1)
    >>> [panel.get_xlabel() for panel in figure.axes]
    ['a', '0 (+1)', '1 (-1)']
    """
    tests, train, scores = np.asarray(tests), np.asarray(train), np.asarray(scores)
    n_columns = 1 + 2 * n_best
    figure = _figure(1.02 * n_columns + 0.6, 1.3 * len(tests) + 0.9, "compressed")
    panels = figure.subplots(len(tests), n_columns, squeeze=False)
    for i, line in enumerate(panels):
        order = np.argsort(-scores[i], kind="stable")
        chosen = [*order[:n_best], *order[::-1][:n_best]]
        for panel in line:
            _bare(panel)
        line[0].imshow(tests[i], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        line[0].set_xlabel(test_names[i], fontsize=8, labelpad=2)
        for panel, j, colour in zip(line[1:], chosen, [FOR] * n_best + [AGAINST] * n_best, strict=True):
            panel.imshow(train[j], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            panel.set_xlabel(f"{train_labels[j]} ({scores[i, j]:+.2g})", fontsize=8, labelpad=2)
            for spine in panel.spines.values():
                spine.set(color=colour, linewidth=1.5)
    panels[0, 0].set_title("test digit", fontsize=9)
    panels[0, 1 + n_best // 2].set_title("helped most", fontsize=10, color=FOR)
    panels[0, 1 + n_best + n_best // 2].set_title("harmed most", fontsize=10, color=AGAINST)
    figure.suptitle(title)
    return figure


def _bare(panel: Any) -> None:
    panel.set_xticks([])
    panel.set_yticks([])
    for spine in panel.spines.values():
        spine.set(color="0.8", linewidth=0.6)


def _limit(values: Any) -> float:
    """Return the magnitude that few values are beyond, so that one spike does not make the others pale."""
    sizes = np.abs(np.asarray(values))
    return float(np.percentile(sizes, 99.5)) or float(sizes.max()) or 1.0


def _signed(panel: Any, values: np.ndarray, image: np.ndarray, limit: float = 1.0) -> Any:
    """Draw a map stretched over an image, and the outline of the image's ink."""
    height, width = image.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    drawn = panel.imshow(
        values, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest", extent=extent
    )
    if image.max() > image.min():
        level = (float(image.max()) + float(image.min())) / 2
        panel.contour(image, levels=[level], colors="0.15", linewidths=0.8)
    return drawn
