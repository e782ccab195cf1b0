"""Figures of deep networks: how the gradient goes through the layers, where nodes are shut, and who learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from gradfn.report.figures import LINE_COLOURS, LINE_STYLES, _figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kinds = Mapping[tuple[str, str], Any]  # by the name of a column of panels (an activation) and that of a row


def gradient_flow(norms: Kinds, lines: Sequence[str], title: str) -> Figure:
    """Draw how large the gradient is at each layer, as a share of that at the last.

    Args:
        norms: by the panel's column and row, `[lines, layers]`.
        lines: what each line is.
        title: the figure's.

    Returns:
        A figure with a grid of panels that share their axes.

    >>> gradient_flow({("relu", "plain"): [[0.1, 1.0]]}, ["He"], "A tenth").axes[0].get_title()
    'relu'
    """
    columns, rows = (list(dict.fromkeys(kind[i] for kind in norms)) for i in range(2))
    figure = _figure(2.7 * len(columns) + 1.6, 2.1 * len(rows) + 1.2)
    panels = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    for (column, row), values in norms.items():
        panel = panels[rows.index(row), columns.index(column)]
        values = np.asarray(values, np.float64)
        layers = np.arange(1, values.shape[1] + 1)
        for name, line, colour, style in zip(
            lines, values, cycle(LINE_COLOURS), cycle(LINE_STYLES), strict=False
        ):
            last = line[-1] if line[-1] > 0 else np.nan
            shares = np.where(line > 0, line / last, np.nan)  # a logarithm has no place for zeros
            panel.plot(layers, shares, style, color=colour, label=name, linewidth=1.8)
        panel.axhline(1e-3, color="0.6", linewidth=0.8)
        panel.set_yscale("log")
        panel.set_xticks(layers)
        panel.tick_params(labelsize=8)
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
        if row == rows[0]:
            panel.set_title(column, fontsize=11)
        if column == columns[0]:
            panel.set_ylabel(row, fontsize=11)
    panels[-1, 0].text(layers[-1], 1.2e-3, "1/1,000: vanished", color="0.4", fontsize=8, ha="right")
    low, high = panels[0, 0].get_ylim()
    panels[0, 0].set_ylim(max(low, 1e-9), min(high, 1e6))
    figure.supxlabel("layer (the loss is on the right, the gradient goes to the left)", fontsize=10)
    figure.supylabel("gradient of the weighted sums (norm), as a share of the last layer's", fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", title="first weights", frameon=False)
    figure.suptitle(title)
    return figure


def saturation(shares: Mapping[str, Any], rows: Sequence[str], what: Mapping[str, str], title: str) -> Figure:
    """Draw which share of each layer is shut: values on the flat of a sigmoid or tanh, relus that never open.

    Args:
        shares: by activation, `[rows, layers]` in [0, 1].
        rows: what each row is.
        what: by activation, what the shares are of.
        title: the figure's.

    Returns:
        A figure with a panel an activation.

    >>> saturation({"relu": [[0.0, 0.5]]}, ["He"], {"relu": "dead nodes"}, "Half").axes[0].get_title()
    'relu: dead nodes'
    """
    figure = _figure(4.2 * len(shares) + 1.6, 0.5 * len(rows) + 1.9)
    panels = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    for panel, (name, values) in zip(panels, shares.items(), strict=True):
        drawn = _shares(panel, np.asarray(values, np.float64))
        panel.set_title(f"{name}: {what[name]}", fontsize=11)
        panel.set_xticks(range(np.shape(values)[1]), range(1, np.shape(values)[1] + 1))
        panel.set_yticks(range(len(rows)), rows)
        panel.set_xlabel("layer")
    panels[0].set_ylabel("first weights")
    figure.colorbar(drawn, ax=list(panels), label="share of the layer (%)", pad=0.01)
    figure.suptitle(title)
    return figure


def learned(accuracies: Kinds, rows: Sequence[str], depths: Sequence[int], title: str) -> Figure:
    """Draw which networks have learned: a panel a wiring, a group of rows an activation, a column a depth.

    Args:
        accuracies: by activation and wiring, `[rows, depths]` in [0, 1].
        rows: what each row of a group is.
        depths: numbers of hidden layers.
        title: the figure's.

    Returns:
        A figure with a panel a wiring.

    >>> learned({("relu", "plain"): [[0.5, 0.9]]}, ["He"], [1, 2], "Two").axes[0].get_title()
    'plain'
    """
    activations, wirings = (list(dict.fromkeys(kind[i] for kind in accuracies)) for i in range(2))
    n = len(rows)
    figure = _figure(3.1 * len(wirings) + 2.8, 0.27 * n * len(activations) + 1.8)
    panels = figure.subplots(1, len(wirings), squeeze=False, sharey=True)[0]
    for panel, wiring in zip(panels, wirings, strict=True):
        drawn = _shares(panel, np.concatenate([np.asarray(accuracies[name, wiring]) for name in activations]))
        for group in range(1, len(activations)):
            panel.axhline(n * group - 0.5, color="white", linewidth=4)
        panel.set_title(wiring, fontsize=11)
        panel.set_xticks(range(len(depths)), depths)
        panel.set_xlabel("hidden layers")
        panel.set_yticks(range(n * len(activations)), list(rows) * len(activations), fontsize=9)
    for group, name in enumerate(activations):
        panels[0].text(
            -0.36, n * (group + 0.5) - 0.5, name, rotation=90, va="center", ha="center", fontsize=11,
            transform=panels[0].get_yaxis_transform(),
        )  # fmt: skip
    figure.colorbar(drawn, ax=list(panels), label="test digits right (%)", pad=0.01)
    figure.supxlabel("10 %: it guesses; 0 %: its numbers are no longer finite", fontsize=10)
    figure.suptitle(title)
    return figure


def _shares(panel: Any, values: np.ndarray) -> Any:
    """Draw shares as coloured cells with their percentages in them."""
    drawn = panel.imshow(
        100 * values, cmap="cividis", vmin=0, vmax=100, aspect="auto", interpolation="nearest"
    )
    for row, column in np.ndindex(*values.shape):
        colour = "black" if values[row, column] > 0.5 else "white"
        text = f"{100 * values[row, column]:.0f}"
        panel.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    panel.tick_params(length=0)
    return drawn
