"""Figures of circuits: what patches of single parts of a model change."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gradfn.circuits import PatchSweep
from gradfn.pages.figures import new_figure
from gradfn.pages.sequences import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sweep_picture(sweep: PatchSweep, tokens: Sequence[str] | None = None, title: str = "") -> Figure:
    """Draw how far each patch takes the metric from one run to the other, as heat maps.

    Args:
        sweep: of one pair of inputs, or averaged over several.
        tokens: the text at each position, for the axis `position`; by default its number.
        title: above the picture; by default which patch has the largest effect.

    Returns:
        A figure with one heat map of the first two axes of the sweep, for each entry of the third axis if there is
        one. Red is toward the clean run, blue away from it, 1 the whole difference between both runs.

    Raises:
        ValueError: the sweep has more than three axes or those of a batch, or there is not one token per position.

    >>> import jax.numpy as jnp
    >>> metrics, labels = jnp.array([[0.0, 3.0], [0.0, 2.0]]), (("blocks/0/x", "blocks/1/x"), ("0", "1"))
    >>> sweep = PatchSweep(metrics, jnp.array(4.0), jnp.array(0.0), ("layer", "head"), labels, "corrupt", "Patching")
    >>> sweep_picture(sweep).get_suptitle()
    'Patching\\nthe largest effect: 75 % of the difference, at blocks/0/x, head 1'
    """
    shares, unit = _shares(sweep, "sweep_picture")
    if len(sweep.words) > 3:
        raise ValueError(f"sweep_picture: expected at most three axes, got {', '.join(sweep.words)}")
    words, labels = [*sweep.words], [*sweep.labels]
    if len(words) == 1:
        words, labels, shares = ["", *words], [("",), *labels], shares[None]
    if "position" in words and tokens is not None:
        at = words.index("position")
        if len(tokens) != len(labels[at]):
            raise ValueError(f"sweep_picture: expected {len(labels[at])} tokens, got {len(tokens)}")
        labels[at] = tuple(map(visible, tokens))
    names = [f"{words[2]} {label}" for label in labels[2]] if len(words) == 3 else [""]
    panels = np.moveaxis(shares, 2, 0) if len(words) == 3 else shares[None]
    figure = _heat_maps(names, list(panels), words, labels, unit)
    best = np.unravel_index(np.nanargmax(np.abs(np.nan_to_num(shares))), shares.shape)
    where = ", ".join(
        label if word == "layer" else f"{word} {label}"
        for word, label in zip(words, (group[i] for group, i in zip(labels, best, strict=True)), strict=True)
        if word
    )
    share = float(shares[best])
    of = f"{100 * share:.0f} % of the difference" if unit == SHARE else f"{share:+.3g}"
    figure.suptitle(title or f"{sweep.title}\nthe largest effect: {of}, at {where}", fontsize=11)
    return figure


def path_picture(paths: Mapping[str, PatchSweep], title: str = "") -> Figure:
    """Draw the effects of the paths from the same senders to several receivers, side by side on one scale.

    Args:
        paths: results of `gf.circuits.path_patch` over the same two axes, by the name of the receivers, such as
            `{"queries": ..., "keys": ..., "values": ...}`.
        title: above the picture; by default which path has the largest effect.

    Returns:
        A figure with one heat map per receiver. Red is toward the clean run, blue away from it, 1 the whole
        difference between both runs.

    Raises:
        ValueError: there are no paths, or they have other axes than the first ones, not two, or those of a batch.

    >>> import jax.numpy as jnp
    >>> labels = (("0/mixed", "1/mixed"), ("0", "1"))
    >>> metrics, words = jnp.array([[0.0, 3.0], [0.0, 0.0]]), ("layer", "head")
    >>> keys = PatchSweep(metrics, jnp.array(4.0), jnp.array(0.0), words, labels, "corrupt", "")
    >>> path_picture({"keys of head 1": keys}).get_suptitle()
    'The strongest path: from 0/mixed, head 1 to keys of head 1, 75 % of the difference'
    """
    first = next(iter(paths.values()), None)
    if first is None or len(first.words) != 2:
        raise ValueError("path_picture: expected at least one result over two axes, such as 'layer x head'")
    for name, each in paths.items():
        if (each.words, each.labels) != (first.words, first.labels):
            raise ValueError(f"path_picture: the senders of {name!r} are not those of the first result")
    found = [_shares(each, "path_picture") for each in paths.values()]
    panels, unit = [shares for shares, _ in found], found[0][1]
    figure = _heat_maps([f"to {name}" for name in paths], panels, first.words, first.labels, unit)
    sizes = np.abs(np.nan_to_num(np.stack(panels)))
    k, i, j = np.unravel_index(sizes.argmax(), sizes.shape)
    sender = ", ".join(
        group[at] if word == "layer" else f"{word} {group[at]}"
        for word, group, at in zip(first.words, first.labels, (i, j), strict=True)
    )
    share = float(panels[k][i, j])
    of = f"{100 * share:.0f} % of the difference" if unit == SHARE else f"{share:+.3g}"
    figure.suptitle(title or f"The strongest path: from {sender} to {list(paths)[k]}, {of}", fontsize=11)
    return figure


SHARE = "share of the difference\n(red: toward clean)"


def _shares(sweep: PatchSweep, what: str) -> tuple[np.ndarray, str]:
    """Return the effects relative to the difference of both runs, and their unit; effects where there is none."""
    if np.ndim(sweep.metric) != len(sweep.words):
        raise ValueError(
            f"{what}: the result has the axes of a batch in front; average it first: "
            "jax.tree.map(lambda x: x.mean(0), sweep)"
        )
    effect, gap = np.asarray(sweep.effect, np.float64), float(sweep.clean) - float(sweep.corrupt)
    return (effect / gap, SHARE) if gap else (effect, "change of the metric")


def _heat_maps(
    names: Sequence[str],
    panels: Sequence[np.ndarray],
    words: Sequence[str],
    labels: Sequence[Sequence[str]],
    unit: str,
) -> Figure:
    """Draw matrices with the same axes on one diverging scale, which is centered at zero."""
    (rows, row_name), (columns, column_name) = map(_ticks, words[:2], labels[:2])
    limit = max(float(np.abs(panel[np.isfinite(panel)]).max(initial=0.0)) for panel in panels) or 1.0
    n_columns = min(len(panels), 4)
    n_rows = math.ceil(len(panels) / n_columns)
    cell = 0.34 if len(panels) == 1 else 0.22  # inches
    width = max(cell * len(columns), 1.8 if len(panels) > 1 else 4.0)
    height = max(cell * len(rows), 0.7)
    figure = new_figure(n_columns * (width + 0.5) + 2.2, n_rows * (height + 0.4) + 1.2)
    axes = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, panel, name in zip(axes, panels, names, strict=False):
        image = axis.imshow(
            panel, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        axis.set_title(name, fontsize=9)
        crowded = max(map(len, columns)) * len(columns) * 0.09 > width
        axis.set_xticks(*_thinned(columns, width), fontsize=8, rotation=90 if crowded else 0)
        axis.set_yticks(*_thinned(rows, height), fontsize=8)
        axis.tick_params(length=0)
    figure.supxlabel(column_name, fontsize=8)
    figure.supylabel(row_name, fontsize=8)
    bar = figure.colorbar(image, ax=list(axes), pad=0.02)
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _ticks(word: str, labels: Sequence[str]) -> tuple[list[str], str]:
    """Return short labels of an axis and its name: numbers for sites that differ in one number alone."""
    if word != "layer":
        return list(labels), word
    forms = [re.sub(r"\d+", "*", label) for label in labels]
    form = max(forms, key=forms.count)
    if form.count("*") != 1:
        return list(labels), word
    short = [
        re.sub(r"\D", "", label) if each == form else label for label, each in zip(labels, forms, strict=True)
    ]
    return short, f"{word}, {form}"


def _thinned(labels: Sequence[str], room: float) -> tuple[list[int], list[str]]:
    """Return the labels of an axis that is `room` inches long, and their indices: every second one if need be."""
    step = math.ceil(len(labels) * 0.15 / room)
    indices = list(range(0, len(labels), step))
    return indices, [labels[i] for i in indices]
