"""Charts of a page, as SVG and HTML: pure functions from numbers to markup, coloured by the page's style sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 360, 216  # units; a chart is shown in about as many pixels, so that its letters are as large
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 34  # of which these are for the labels
MAX_POINTS = 300
DECADES = 6  # of a heat map's scale at most: what is smaller still looks like the smallest


class Line(NamedTuple):
    """One line of a chart.

    Attributes:
        name: in the legend.
        colour: a number, the same for what belongs together.
        dashed: for what is less important of the same colour.
        points: `(x, y)`, in the order of x.
    """

    name: str
    colour: int
    dashed: bool
    points: list[tuple[float, float]]


def line_chart(
    title: str, lines: Sequence[Line], x_name: str = "training step", percent: bool = False
) -> str:
    """Return a chart of lines with a legend that says where each ends.

    Args:
        title: what is drawn, with its unit.
        lines: at least one, with a finite point.
        x_name: what x is.
        percent: whether the values are shares in [0, 1], to be shown in %.

    Returns:
        A `<figure>`.

    >>> chart = line_chart("loss", [Line("training", 0, False, [(0, 2.0), (100, 0.5)])])
    >>> chart.count("<path"), "training" in chart
    (1, True)
    """
    scale = 100.0 if percent else 1.0
    drawn = [line._replace(points=_thinned(line.points, scale)) for line in lines]
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    x_ticks = ticks(0.0, max(xs), 5)
    low, high = min(ys), max(ys)
    if percent:
        high = 100.0
    elif 0 <= low < 0.6 * high:
        low = 0.0  # far from zero the lines would lie close together
    y_ticks = ticks(low, high, 5)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / (max(xs) or 1.0)
        down = TOP + (HEIGHT - TOP - BOTTOM) * (1 - (y - low) / ((high - low) or 1.0))
        return round(across, 1), round(down, 1)

    parts = []
    for tick in y_ticks:
        y = at(0, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 3.5}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        x = at(tick, low)[0]
        anchor = "end" if x > WIDTH - 24 else "middle"
        parts.append(f'<text x="{x}" y="{HEIGHT - 18}" text-anchor="{anchor}">{number(tick)}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{x_name}</text>'
    )
    for line in drawn:
        kind = f"line c{line.colour % 8}{' dashed' if line.dashed else ''}"
        if len(line.points) == 1:  # one point makes no line
            x, y = at(*line.points[0])
            parts.append(f'<circle class="{kind} dot" cx="{x}" cy="{y}" r="3.5"/>')
            continue
        path = "M" + "L".join("{} {}".format(*at(*point)) for point in line.points)
        parts.append(f'<path class="{kind}" d="{path}"/>')
    unit = " %" if percent else ""
    ends = {line.name: f"{number(line.points[-1][1])}{unit}" for line in drawn}
    told = "; ".join(f"{name} ends at {end}" for name, end in ends.items())
    legend = "".join(_entry(line, ends[line.name]) for line in drawn)
    return (
        f'<figure class="chart" data-unit="{unit}" data-left="{LEFT}" data-right="{WIDTH - RIGHT}" '
        f'data-last="{max(xs)}"><figcaption>{escape(title)} <small></small></figcaption>'
        f'<ul class="legend">{legend}</ul>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}: {escape(told)}">'
        f'{"".join(parts)}<line class="here" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg></figure>'
    )


def _entry(line: Line, end: str) -> str:
    """Return a line's entry in the legend, with its points, so that the page can tell its value at any step."""
    points = json.dumps([[x, float(f"{y:.4g}")] for x, y in line.points])
    key = f"key c{line.colour % 8}{' dashed' if line.dashed else ''}"
    return f'<li data-points="{points}"><i class="{key}"></i>{escape(line.name)} <b>{end}</b></li>'


def heat_map(
    title: str,
    rows: dict[str, list[float]],
    steps: Sequence[int],
    bounds: tuple[float, float],
) -> str:
    """Return a map of positive numbers, a row a name and a column a step, on a logarithmic scale.

    Args:
        title: what the numbers are.
        rows: for each name a number a step: zero has a place below the scale, what is not finite is marked.
        steps: of the columns.
        bounds: the numbers at the ends of the scale, from `log_bounds`.

    Returns:
        A `<figure>`.

    >>> heat_map("gradient rms", {"W1": [0.1, 0.01]}, [0, 100], (0.01, 0.1)).count("<i ")
    2
    """
    low, high = bounds
    span = math.log10(high / low) or 1.0
    told = []
    for name, values in rows.items():
        cells = []
        for step, value in zip(steps, values, strict=True):
            said = f"{name}, step {step:,}: {value:.2e}"
            if not math.isfinite(value):
                cells.append(f'<i class="bad" title="{escape(said)}"></i>')
            elif value <= 0:
                cells.append(f'<i class="none" title="{escape(said)}"></i>')
            else:
                share = min(max(math.log10(value / low) / span, 0.0), 1.0)
                cells.append(f'<i style="--p:{100 * share:.0f}%" title="{escape(said)}"></i>')
        told.append(f'<span>{escape(name)}</span><div class="cells">{"".join(cells)}</div>')
    return (
        f'<figure class="heat"><figcaption>{escape(title)}</figcaption>'
        f'<div class="rows" role="img" aria-label="{escape(title)}, {len(rows)} rows, '
        f'{len(steps)} steps">{"".join(told)}'
        f'<span></span><div class="axis"><small>step {steps[0]:,}</small><small>{steps[-1]:,}</small></div></div>'
        f'<div class="scale"><small>{low:.0e}</small><i></i><small>{high:.0e}</small></div></figure>'
    )


def log_bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a scale for positive numbers: powers of ten, six apart at most.

    A twentieth of the numbers may lie below it, so that a few tiny ones do not make the others look alike.

    >>> log_bounds([0.0, 0.02, 3.0])
    (0.01, 10.0)
    """
    logs = sorted(math.log10(value) for value in values if value > 0 and math.isfinite(value))
    if not logs:
        return 0.1, 1.0
    high = math.ceil(logs[-1])
    low = min(max(math.floor(logs[len(logs) // 20]), high - DECADES), high - 1)
    return 10.0**low, 10.0**high


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers from `low` to `high`, about so many.

    >>> ticks(0, 1560, 5)
    [0.0, 500.0, 1000.0, 1500.0]
    """
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(span / step - about))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)] or [low]


def number(value: float) -> str:
    """Return a number as a reader wants it: three digits, and commas.

    >>> number(1560.0), number(0.20421), number(96.39)
    ('1,560', '0.204', '96.4')
    """
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _thinned(points: list[tuple[float, float]], scale: float) -> list[tuple[float, float]]:
    finite = [(x, scale * y) for x, y in points if math.isfinite(y)]
    every = math.ceil(len(finite) / MAX_POINTS)
    return [point for i, point in enumerate(finite) if i % every == 0 or i == len(finite) - 1]
