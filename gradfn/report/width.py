"""Figures of a search over the widths and depths of a network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from gradfn.report.figures import LINE_COLOURS, LINE_STYLES, _figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, Any]]  # width, depth, parameters, seconds, test [seeds], base, best, small


def trade(rows: Rows) -> Figure:
    """Draw what accuracy costs: in parameters, and in time to train.

    Args:
        rows: a dict a shape: `width`, `depth`, `parameters`, `seconds`, `test` (accuracies, one a seed), and
            whether it is the `base` case, the `best` by validation, the smallest that is nearly as good (`small`).

    Returns:
        A figure with two panels, a line a depth; base case, best and smallest are marked.

    >>> row = {"width": 8, "depth": 1, "parameters": 90, "seconds": 0.1, "test": [0.9], "base": True, "best": True}
    >>> small = {**row, "width": 4, "parameters": 45, "base": False, "small": True}
    >>> trade([{**row, "small": False}, small]).get_suptitle()
    'The base case (1 x 8) reads 90.0 %, the best of 2 (1 x 8) 90.0 %, 1 x 4 with 1/2 of the parameters 90.0 %'
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = _figure(11.5, 4.8)
    panels = figure.subplots(1, 2, sharey=True)
    depths = sorted({row["depth"] for row in rows})
    marks = {
        "base": "base case: mean(in, out)",
        "best": "best by validation",
        "small": "smallest nearly as good",
    }
    for panel, cost in zip(panels, ("parameters", "seconds"), strict=True):
        for depth, colour, style in zip(depths, cycle(LINE_COLOURS), cycle(LINE_STYLES), strict=False):
            members = sorted((row for row in rows if row["depth"] == depth), key=lambda row: row["width"])
            costs, wrong = [row[cost] for row in members], [_wrong(row) for row in members]
            label = f"{depth} hidden layer{'s' if depth > 1 else ''}"
            # Times of the smallest networks are noise, so that a line through them would be a tangle.
            line = style if cost == "parameters" else "none"
            panel.plot(costs, wrong, "o", linestyle=line, color=colour, markersize=5, label=label)
            if cost == "parameters" and depth == depths[0]:
                for row, x, y in zip(members, costs, wrong, strict=True):
                    where: dict[str, Any] = {
                        "xy": (x, y),
                        "xytext": (0, -16),
                        "textcoords": "offset points",
                        "ha": "center",
                    }
                    panel.annotate(str(row["width"]), **where, fontsize=8, color=colour)
        for which, marker in (("base", "*"), ("best", "o"), ("small", "s")):
            row = next(row for row in rows if row[which])
            look: dict[str, Any] = {
                "markersize": 15,
                "fillstyle": "none",
                "markeredgewidth": 1.5,
                "label": marks[which],
            }
            panel.plot(row[cost], _wrong(row), marker, color="black", linestyle="none", zorder=5, **look)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
        panel.yaxis.set_major_locator(FixedLocator([1, 2, 3, 5, 10, 20, 30, 50, 100]))
        panel.yaxis.set_major_formatter("{x:g} %")
        panel.yaxis.set_minor_locator(NullLocator())
    panels[0].set_ylim(bottom=0.85 * panels[0].get_ylim()[0])  # room for the numbers
    panels[0].set_xlabel("parameters (numbers: nodes in the one hidden layer)")
    panels[1].set_xlabel("time to train one network (s)")
    panels[0].set_ylabel("test examples wrong (mean over the seeds)")
    panels[1].legend(frameon=False, loc="upper right")
    base, best, small = (next(row for row in rows if row[which]) for which in marks)
    told = [f"{100 - _wrong(row):.1f} %" for row in (base, best, small)]
    figure.suptitle(
        f"The base case ({_name(base)}) reads {told[0]}, the best of {len(rows)} ({_name(best)}) {told[1]}, "
        f"{_name(small)} with 1/{base['parameters'] / small['parameters']:.0f} of the parameters {told[2]}"
    )
    return figure


def search_map(rows: Rows) -> Figure:
    """Draw the accuracy of every shape that was tried, as a table of depths and widths.

    Args:
        rows: as for `trade`.

    Returns:
        A figure with one panel; the base case and the best have frames.

    >>> row = {"width": 4, "depth": 1, "parameters": 90, "seconds": 0.1, "test": [0.9], "base": True, "best": True}
    >>> search_map([row]).get_suptitle()
    'All 1 shapes: from 90.0 % (1 x 4) to 90.0 % (1 x 4) of the test examples right'
    """
    from matplotlib.patches import Rectangle

    widths, depths = (sorted({row[name] for row in rows}) for name in ("width", "depth"))
    values = np.full([len(depths), len(widths)], np.nan)
    figure = _figure(0.95 * len(widths) + 2.6, 0.7 * len(depths) + 2.0)
    panel = figure.subplots()
    for row in rows:
        values[depths.index(row["depth"]), widths.index(row["width"])] = 100 * np.mean(row["test"])
    low, high = np.nanmin(values), np.nanmax(values)
    # Most shapes differ by little: the colours begin where the better half does.
    drawn = panel.imshow(
        values, cmap="cividis", vmin=2 * np.nanmedian(values) - high, vmax=high, aspect="auto"
    )
    middle = sum(drawn.get_clim()) / 2
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            panel.text(
                j, i, f"{value:.1f}", ha="center", va="center", color="black" if value > middle else "white"
            )
    for row in rows:
        corner = widths.index(row["width"]) - 0.47, depths.index(row["depth"]) - 0.46
        for which, colour in (("best", "black"), ("base", LINE_COLOURS[1])):
            if row[which]:
                panel.add_patch(Rectangle(corner, 0.94, 0.92, fill=False, edgecolor=colour, linewidth=3))
    panel.set_xticks(range(len(widths)), widths)
    panel.set_yticks(range(len(depths)), depths)
    panel.tick_params(length=0)
    panel.set_xlabel(
        "nodes in each hidden layer (orange: the base case; black: best by validation; blank: too many parameters)"
    )
    panel.set_ylabel("hidden layers")
    extend = "min" if low < drawn.get_clim()[0] else "neither"
    figure.colorbar(drawn, ax=panel, label="test examples right (%)", extend=extend, pad=0.02)
    worst, top = (pick(rows, key=lambda row: np.mean(row["test"])) for pick in (min, max))
    figure.suptitle(
        f"All {len(rows)} shapes: from {low:.1f} % ({_name(worst)}) to {high:.1f} % ({_name(top)}) "
        "of the test examples right"
    )
    return figure


def _wrong(row: dict[str, Any]) -> float:
    """Return the share of test examples that a shape has wrong, in percent; at least a hundredth, for a logarithm."""
    return max(100 * (1 - float(np.mean(row["test"]))), 0.01)


def _name(row: dict[str, Any]) -> str:
    return f"{row['depth']} x {row['width']}"
