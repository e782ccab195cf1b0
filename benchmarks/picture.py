"""One picture of all ratios: what has an aim on the left, everything else but parts of totals on the right.

    python -m benchmarks.picture benchmarks.json benchmarks.png

`benchmarks.all` draws it too.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.rows import Row, rows_of

# Okabe and Ito's, which color-blind readers distinguish; shapes differ too.
REACHED, MISSED, WITHOUT = ("#0072b2", "o"), ("#d55e00", "^"), ("#8c8c8c", "o")
LINE = 0.16  # inches per row
# The ends of the axes with and without aims; a time beyond them is drawn at the end, and its number tells it.
AIMED, COMPARED = (0.5, 2.0), (1 / 8, 32.0)


class Entry(NamedTuple):
    """A heading (of a benchmark, or of a table within it), or a row."""

    text: str
    row: Row | None = None
    level: int = 2  # 0 for a benchmark, 1 for a table, 2 for a row


def entries(content: dict[str, Any], with_aims: bool) -> list[Entry]:
    """Return the rows with or without an aim, under the headings of their benchmark and table.

    Args:
        content: what `benchmarks.all` wrote.
        with_aims: which of the rows.
    """
    out: list[Entry] = []
    for name, run in content["runs"].items():
        tables = []
        for table in run["tables"]:
            rows = [
                row
                for row in rows_of(table)
                if row.time is not None
                and not (row.is_baseline or row.is_part)
                and (row.aim is not None) == with_aims
            ]
            if rows:
                tables += [Entry(f"{table['title']} (1 is {table['baseline'] or 'the gradient'})", level=1)]
                tables += [Entry(row.name, row) for row in rows]
        if tables:
            out += [Entry(name, level=0), *tables]
    return out


def draw(content: dict[str, Any], file: Path) -> bool:
    """Draw the picture as PNG; return whether there was anything to draw and matplotlib is installed.

    Args:
        content: what `benchmarks.all` wrote.
        file: the picture's.
    """
    try:
        figure = figure_of(content)
    except ImportError:
        print("the picture needs matplotlib")
        return False
    if figure is not None:
        from PIL import Image

        figure.canvas.draw()
        # A few colors need a third of the space.
        pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba()))  # [height, width, 4]
        pixels.convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE).save(file, optimize=True)
    return figure is not None


def figure_of(content: dict[str, Any]) -> Any:
    """Return the picture as a matplotlib figure, or None if no table has a ratio."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    aimed, others = entries(content, True), entries(content, False)
    panels = [("with an aim", aimed, AIMED), ("for comparison, without an aim", others, COMPARED)]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    longest = max(len(found) for _, found, _ in panels) + 1
    height = 1.65 + LINE * longest
    figure = Figure(figsize=(7.5 * len(panels), height), dpi=110)
    FigureCanvasAgg(figure)
    rows = [entry.row for entry in aimed if entry.row]
    reached = (
        f"{sum(row.reached for row in rows)} of {len(rows)} aims reached" if rows else "Times without aims"
    )
    title = f"{reached}, on {content['cpus']}"
    figure.text(0.01, 1 - 0.12 / height, title, size=15, weight="bold", va="top")
    explanation = (
        "Time relative to the baseline of each table: left of 1 is faster. Logarithmic; bars are quartiles."
    )
    figure.text(0.01, 1 - 0.45 / height, explanation, size=9.5, va="top")
    bottom, top, width = 0.4 / height, 1 - 1.2 / height, 1 / len(panels)
    for i, (title, found, ends) in enumerate(panels):
        figure.text(width * i + 0.01, top + 0.12 / height, title, size=10.5, style="italic")
        own = (top - bottom) * (len(found) + 1) / longest
        # Names stand left of the axes, times right of them.
        axes = figure.add_axes((width * (i + 0.44), top - own, width * 0.46, own))
        _panel(axes, found, ends)
    _legend(figure, height)
    return figure


def _panel(axes: Any, found: list[Entry], ends: tuple[float, float]) -> None:
    """Draw rows on a logarithmic axis, the first on top."""
    low, high = ends[0] / 1.08, ends[1] * 1.08
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.set_ylim(len(found) + 0.5, -0.5)
    axes.axvline(1, color="#444444", lw=1, zorder=1)
    for y, entry in enumerate(found):
        if entry.row:
            _row(axes, y, entry.text, entry.row, ends)
        else:
            size, weight = (8.5, "bold") if entry.level == 0 else (7.5, "normal")
            across = axes.get_yaxis_transform()
            axes.text(-0.95, y, entry.text, transform=across, size=size, weight=weight, va="center")
    ticks = [0.5, 0.75, 1, 1.1, 1.25, 1.5, 2] if high < 4 else [2.0**k for k in range(-3, 6)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], size=7.5)
    axes.minorticks_off()
    axes.set_yticks([])
    axes.grid(axis="x", color="#e5e5e5", lw=0.6, zorder=0)
    axes.tick_params(axis="x", top=True, labeltop=True, length=2)
    for side in ("left", "right"):
        axes.spines[side].set_visible(False)


def _row(axes: Any, y: int, name: str, row: Row, ends: tuple[float, float]) -> None:
    """Draw the time of one row, its quartiles and its aim."""
    assert row.time is not None

    def within(time: float) -> float:
        return min(max(time, ends[0]), ends[1])

    across = axes.get_yaxis_transform()
    color, marker = WITHOUT if row.aim is None else REACHED if row.reached else MISSED
    axes.text(-0.02, y, name, transform=across, size=7, ha="right", va="center")
    number = {"size": 7, "va": "center", "color": color, "weight": "bold"}
    axes.text(1.02, y, f"{row.time:.2f}", transform=across, **number)
    axes.plot([1, within(row.time)], [y, y], color=color, lw=0.8, alpha=0.5, zorder=2)
    if row.low and row.high:
        axes.plot([within(row.low), within(row.high)], [y, y], color=color, lw=2.4, alpha=0.5, zorder=2)
    axes.plot([within(row.time)], [y], marker=marker, color=color, ms=3.5 if row.aim is None else 5, zorder=4)
    if row.aim is not None:
        axes.plot([within(row.aim)] * 2, [y - 0.42, y + 0.42], color="black", lw=1.6, zorder=3)


def _legend(figure: Any, height: float) -> None:
    from matplotlib.lines import Line2D

    marks = {"aim reached": REACHED, "aim missed": MISSED, "without an aim": WITHOUT}
    handles = [
        Line2D([], [], color=color, marker=marker, ls="", ms=6, label=label)
        for label, (color, marker) in marks.items()
    ]
    handles.append(Line2D([], [], color="black", marker="|", ls="", ms=9, mew=1.8, label="aim"))
    figure.legend(
        handles=handles,
        loc="upper left",
        ncols=4,
        frameon=False,
        fontsize=9,
        bbox_to_anchor=(0, 1 - 0.6 / height),
    )


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
