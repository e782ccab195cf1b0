"""Charts of a page, as SVG and HTML: pure functions from numbers to markup, colored by the page's style sheet.

Their size does not grow with the numbers: what a screen cannot show is gathered in buckets (see `gradfn.runs.curve`),
and the chart says so. Whatever the numbers are, all coordinates are finite.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from gradfn.runs.curve import LARGEST, Bucket, Curve

WIDTH, HEIGHT = 360, 216  # units; about one pixel each on the page
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 34  # margins, for the labels
MAX_POINTS = 300  # of a line
MAX_COLUMNS = 120  # of a heat map
DECADES = 6  # of a heat map's scale at most; smaller values look like the smallest
NAME = 80  # letters of a name
DECIMALS = 300  # the largest exponent of ten on a scale, of either sign


class Line(NamedTuple):
    """One line of a chart.

    Attributes:
        name: in the legend.
        color: a number, the same for what belongs together.
        dashed: for what is less important of the same color.
        curve: its points, at least one of them finite.
    """

    name: str
    color: int
    dashed: bool
    curve: Curve


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_name: str = "training step",
    percent: bool = False,
    note: str = "",
    unit: str = "",
) -> str:
    """Return a chart of lines with a legend that says where each ends.

    A line of more than `MAX_POINTS` points is the mean of points that follow each other, in front of a band that goes
    from the smallest to the largest of them. It has a gap where a number is not finite.

    Args:
        title: what is drawn.
        lines: at least one.
        x_name: what x is.
        percent: whether the values are shares in [0, 1], to be shown in %.
        note: a text below the chart.
        unit: of the values, which the title states.

    Returns:
        A `<figure>`.

    >>> chart = line_chart("loss", [Line("training", 0, False, Curve([(0, 2.0), (100, 0.5)]))])
    >>> chart.count("<path"), "training" in chart
    (1, True)
    """
    scale = 100.0 if percent else 1.0
    buckets_of = [[_scaled(bucket, scale) for bucket in line.curve.buckets(MAX_POINTS)] for line in lines]
    finite = [bucket for buckets in buckets_of for bucket in buckets if bucket.n_finite]
    last = max(0, *(bucket.last for bucket in finite))
    x_ticks = ticks(0.0, last, 5 if last < 1_000_000 else 3)  # fewer where their labels are long
    low, high = min(bucket.low for bucket in finite), max(bucket.high for bucket in finite)
    if percent:
        high = max(high, 100.0)
    elif 0 <= low < 0.6 * high:
        low = 0.0  # unless the lines would lie close together
    y_ticks = ticks(low, high, 5)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * min(max(x / (last or 1.0), 0.0), 1.0)
        down = TOP + (HEIGHT - TOP - BOTTOM) * min(max(1 - (y - low) / ((high - low) or 1.0), 0.0), 1.0)
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
    suffix = " %" if percent else ""
    if percent:
        unit = "%"
    legend, texts = [], {}
    for line, buckets in zip(lines, buckets_of, strict=True):
        pieces = _pieces(buckets)
        if len(buckets) < line.curve.n:
            # Means do not reach the points where the line starts and ends.
            first, end = ((x, _drawable(scale * y)) for x, y in line.curve.ends)
            pieces = [[first, *pieces[0]], *pieces[1:]]
            pieces[-1] = [*pieces[-1], end]
            parts.append(_band(buckets, line, at))
        parts.append(_path(pieces, line, at))
        name, end_y = short(line.name), f"{number(scale * line.curve.ends[-1][1])}{suffix}"
        texts[name] = end_y
        legend.append(_entry(line, name, [point for piece in pieces for point in piece], end_y))
    ends = "; ".join(f"{name} ends at {end}" for name, end in texts.items())
    of_unit = f'<span class="unit">({escape(unit)})</span> ' if unit else ""
    return (
        f'<figure class="chart" data-unit="{suffix}" data-left="{LEFT}" data-right="{WIDTH - RIGHT}" '
        f'data-last="{last}"><figcaption>{escape(title)} {of_unit}<small></small></figcaption>'
        f'<ul class="legend">{"".join(legend)}</ul>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}: {escape(ends)}">'
        f'{"".join(parts)}<line class="here" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        f"{_notes(buckets_of, note)}</figure>"
    )


At = Callable[[float, float], tuple[float, float]]  # from values to coordinates
Point = tuple[float, float]


def _scaled(bucket: Bucket, scale: float) -> Bucket:
    if not bucket.n_finite:
        return bucket
    low, high, mean = (_drawable(scale * y) for y in (bucket.low, bucket.high, bucket.mean))
    return bucket._replace(low=low, high=high, mean=mean)


def _drawable(y: float) -> float:
    """Return a number whose differences and products with others are finite."""
    return min(max(y, -LARGEST), LARGEST)


def _pieces(buckets: Sequence[Bucket]) -> list[list[Point]]:
    """Return the points of a line in pieces; what has a number that is not finite in it is not joined to the others."""
    pieces: list[list[Point]] = [[]]
    for bucket in buckets:
        point = [(bucket.x, bucket.mean)] if bucket.n_finite else []
        if bucket.n_other:
            pieces += [point, []]
        else:
            pieces[-1] += point
    return [piece for piece in pieces if piece]


def _path(pieces: Sequence[Sequence[Point]], line: Line, at: At) -> str:
    kind = f"line c{line.color % 8}{' dashed' if line.dashed else ''}"
    joined = "".join(_joined(piece, at) for piece in pieces if len(piece) > 1)
    path = f'<path class="{kind}" d="{joined}"/>' if joined else ""
    dots = [at(*piece[0]) for piece in pieces if len(piece) == 1]  # one point makes no line
    size = 3.5 if len(pieces) == 1 else 1.5
    return path + "".join(f'<circle class="{kind} dot" cx="{x}" cy="{y}" r="{size}"/>' for x, y in dots)


def _band(buckets: Sequence[Bucket], line: Line, at: At) -> str:
    """Return the area from the smallest to the largest number of each bucket."""
    edges: list[list[Bucket]] = [[]]
    for bucket in buckets:
        if bucket.n_finite:
            edges[-1].append(bucket)
        else:
            edges.append([])
    areas = [
        _joined([(b.x, b.high) for b in edge] + [(b.x, b.low) for b in reversed(edge)], at) + "Z"
        for edge in edges
        if edge
    ]
    return f'<path class="band c{line.color % 8}" d="{"".join(areas)}"/>'


def _joined(points: Sequence[Point], at: At) -> str:
    return "M" + "L".join("{} {}".format(*at(*point)) for point in points)


def _notes(lines: Sequence[Sequence[Bucket]], note: str) -> str:
    """Return a note with how many rows one point of a line stands for, if it is more than one."""
    most = max(bucket.n_finite + bucket.n_other for buckets in lines for bucket in buckets)
    thinned = f"The line is the mean of up to {most:,} rows, the band their range." if most > 1 else ""
    texts = " ".join(filter(None, [thinned, note]))
    return f'<p class="note">{escape(texts)}</p>' if texts else ""


def _entry(line: Line, name: str, points: Sequence[Point], end: str) -> str:
    """Return a line's entry in the legend, with its points, so that the page can tell its value at any step."""
    texts = json.dumps([[x, float(f"{y:.4g}")] for x, y in points])
    key = f"key c{line.color % 8}{' dashed' if line.dashed else ''}"
    return f'<li data-points="{texts}"><i class="{key}"></i>{escape(name)} <b>{end}</b></li>'


def heat_map(
    title: str, rows: Mapping[str, Curve], bounds: tuple[float, float], max_columns: int = MAX_COLUMNS
) -> str:
    """Return a map of positive numbers, one row per name and one column per step, on a logarithmic scale.

    Of more steps than `max_columns` a column shows the largest number of steps that follow each other.

    Args:
        title: what the numbers are.
        rows: for each name its numbers, at the same steps: zero has a color below the scale, what is not finite is
            marked.
        bounds: the numbers at the ends of the scale, from `log_bounds`.
        max_columns: how many columns there may be.

    Returns:
        A `<figure>`.

    >>> heat_map("gradient rms", {"W1": Curve([(0, 0.1), (100, 0.01)])}, (0.01, 0.1)).count("<i ")
    2
    """
    cells = {name: curve.buckets(max_columns) for name, curve in rows.items()}
    columns = next(iter(cells.values()), [])
    n = max((bucket.n_finite + bucket.n_other for bucket in columns), default=1)
    thinned = f" <small>each column is the largest of up to {n:,} inspections</small>" if n > 1 else ""
    texts = [
        f'<span>{name}</span><div class="cells">{"".join(_cell(name, bucket, bounds) for bucket in buckets)}</div>'
        for name, buckets in ((escape(short(name)), buckets) for name, buckets in cells.items())
    ]
    marked = any(bucket.n_other for buckets in cells.values() for bucket in buckets)
    hatched = '<small class="hatched">hatched: NaN or infinite</small>' if marked else ""
    first, last = (columns[0].first, columns[-1].last) if columns else (0, 0)
    low, high = bounds
    return (
        f'<figure class="heat"><figcaption>{escape(title)}{thinned}</figcaption>'
        f'<div class="rows" role="img" aria-label="{escape(title)}, {len(rows)} rows, '
        f'{len(columns)} steps">{"".join(texts)}'
        f'<span></span><div class="axis"><small>step {first:,}</small><small>{last:,}</small></div></div>'
        f'<div class="scale">{hatched}<small>{low:.0e}</small><i></i><small>{high:.0e}</small></div></figure>'
    )


def _cell(name: str, bucket: Bucket, bounds: tuple[float, float]) -> str:
    """Return a cell of the row with this name, which has no markup in it."""
    low, high = bounds
    n = bucket.n_finite + bucket.n_other
    if n == 1:
        text = f"{name}, step {bucket.first:,}: {bucket.high if bucket.n_finite else math.nan:.2e}"
    else:
        at_most = (
            f"not finite in {bucket.n_other:,} of {n:,}" if bucket.n_other else f"at most {bucket.high:.2e}"
        )
        text = f"{name}, steps {bucket.first:,} to {bucket.last:,}: {at_most}"
    if bucket.n_other:
        look = 'class="bad"'
    elif bucket.high <= 0:
        look = 'class="none"'
    else:
        share = math.log10(max(bucket.high / low, 1 / LARGEST)) / (math.log10(high / low) or 1.0)
        look = f'style="--p:{100 * min(max(share, 0.0), 1.0):.0f}%"'
    return f'<i {look} title="{text}"></i>'


def log_bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a scale for positive numbers: powers of ten, six apart at most.

    A twentieth of the numbers may lie below it, so that a few tiny ones do not make the others look alike.

    >>> log_bounds([0.0, 0.02, 3.0])
    (0.01, 10.0)
    """
    logs = sorted(math.log10(value) for value in values if value > 0 and math.isfinite(value))
    if not logs:
        return 0.1, 1.0
    high = min(max(math.ceil(logs[-1]), -DECIMALS), DECIMALS)
    low = min(max(math.floor(logs[len(logs) // 20]), high - DECADES), high - 1)
    return 10.0**low, 10.0**high


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers from `low` to `high`, approximately `about` of them.

    >>> ticks(0, 1560, 5)
    [0.0, 500.0, 1000.0, 1500.0]
    """
    low, high = _drawable(low), _drawable(high)
    span = (high - low) or abs(high) or 1.0
    # Wide enough that no two ticks are the same number.
    span = max(span, 1e-9 * max(abs(low), abs(high)), 1 / LARGEST)
    power = 10.0 ** math.floor(math.log10(span / about))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(span / step - about))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)] or [low]


def number(value: float) -> str:
    """Format a number for a reader: three significant digits, or commas.

    >>> number(1560.0), number(0.20421), number(96.39)
    ('1,560', '0.204', '96.4')
    """
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def short(text: str, limit: int = NAME) -> str:
    """Return a text, with an ellipsis instead of its middle if it is long.

    >>> short("blocks/0/attention/query/W", 11)
    'block…ery/W'
    """
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-(limit - limit // 2 - 1) :]}"
