"""Charts of any numbers: none fails or runs forever, all coordinates are finite, and a few points are all drawn."""

import json
import math
import re
from html import unescape

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gradfn.pages.charts import (
    HEIGHT,
    LEFT,
    MAX_COLUMNS,
    MAX_POINTS,
    RIGHT,
    WIDTH,
    Line,
    heat_map,
    line_chart,
    log_bounds,
    number,
    short,
    ticks,
)
from gradfn.runs.curve import Curve

HOSTILE = [
    0.0,
    -0.0,
    5e-324,
    -5e-324,
    1e-300,
    1e300,
    1e308,
    -1e308,
    1.7976931348623157e308,
    1e16,
    1e16 + 2,
    0.1,
]
Y = st.one_of(st.sampled_from(HOSTILE), st.floats(), st.none(), st.integers(-(10**400), 10**400))
FINITE = st.one_of(st.sampled_from(HOSTILE), st.floats(allow_nan=False, allow_infinity=False))
X = st.one_of(st.integers(-5, 50), st.sampled_from(HOSTILE), st.integers(-(10**400), 10**400))
QUICK = settings(max_examples=80, deadline=None)

# The drawing from before curves were thinned: a chart of few points is still the same.
CHART = (
    '<figure class="chart" data-unit="" data-left="44" data-right="350" data-last="30"><figcaption>Loss <small>'
    '</small></figcaption><ul class="legend"><li data-points="[[10, 2.0], [20, 1.5], [30, 1.0]]"><i class="key c0">'
    '</i>a &lt;b&gt; <b>1</b></li></ul><svg viewBox="0 0 360 216" role="img" aria-label="Loss: a &lt;b&gt; ends at 1">'
)
PATH = '<path class="line c0" d="M146.0 10.0L248.0 53.0L350.0 96.0"/>'


def finite_numbers(html, attributes):
    found = re.findall(rf' (?:{attributes})="([^"]*)"', html)
    numbers = [float(text) for each in found for text in re.findall(r"[^\sMLZ]+", each)]
    assert all(map(math.isfinite, numbers)), numbers
    return numbers


def in_the_picture(chart):
    numbers = finite_numbers(chart, "d|x1|x2|y1|y2|x|y|cx|cy|data-last")
    assert all(0 <= abs(n) <= WIDTH for n in numbers if n != last_of(chart))
    for path in re.findall(r' d="([^"]*)"', chart):
        for x, y in re.findall(r"([-\d.e]+) ([-\d.e]+)", path):
            assert LEFT <= float(x) <= WIDTH - RIGHT
            assert 0 <= float(y) <= HEIGHT


def last_of(chart):
    return float(re.search('data-last="([^"]*)"', chart)[1])


@QUICK
@given(FINITE, FINITE, st.integers(1, 20))
@example(-1e308, 1e308, 5)
@example(1e16, 1e16 + 2, 5)
@example(5e-324, 1e-323, 5)
def test_ticks_are_few_finite_and_in_order(low, high, about):
    low, high = min(low, high), max(low, high)
    found = ticks(low, high, about)
    assert 1 <= len(found) <= 4 * about + 2
    assert all(map(math.isfinite, found))
    assert found == sorted(set(found))


def test_ticks_of_small_numbers_are_not_all_zero():
    assert ticks(0, 4e-13, 4) == [0.0, 1e-13, 2e-13, 3e-13, 4e-13]


@QUICK
@given(
    st.lists(st.lists(st.tuples(X, Y), min_size=1, max_size=40), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([1, 30]),
)
def test_a_line_chart_of_any_numbers_has_finite_coordinates(series, percent, repeats):
    curves = [Curve(points * repeats) for points in series]
    lines = [Line(f"<{i}>", i, i > 1, curve) for i, curve in enumerate(curves) if curve.ends]
    if lines:
        chart = line_chart("a & b", lines, percent=percent)
        in_the_picture(chart)
        assert len(chart) < 20_000 + 40 * 3 * MAX_POINTS * len(lines)
        for points in re.findall('data-points="([^"]*)"', chart):
            assert all(math.isfinite(value) for point in json.loads(unescape(points)) for value in point)


@QUICK
@given(
    st.lists(st.lists(Y, min_size=7, max_size=7), min_size=1, max_size=4),
    st.lists(X, min_size=7, max_size=7),
    st.sampled_from([1, 60]),
)
def test_a_heat_map_of_any_numbers_has_finite_shares(rows, steps, repeats):
    curves = {f"row {i}": Curve(list(zip(steps, row)) * repeats) for i, row in enumerate(rows)}
    bounds = log_bounds([bucket.high for curve in curves.values() for bucket in curve.buckets(MAX_COLUMNS)])
    html = heat_map("size", curves, bounds)
    shares = [float(share) for share in re.findall("--p:([^%]*)%", html)]
    assert all(0 <= share <= 100 for share in shares)
    n_cells = html.count("<i ")
    assert n_cells == len(rows) * len(next(iter(curves.values())).buckets(MAX_COLUMNS))
    assert n_cells <= len(rows) * MAX_COLUMNS


@QUICK
@given(st.lists(st.one_of(st.floats(), st.sampled_from(HOSTILE))))
def test_bounds_are_powers_of_ten_in_order(values):
    low, high = log_bounds(values)
    assert 0 < low < high < math.inf
    assert 0.9 < math.log10(high / low) < 6.1


def test_a_chart_of_few_points_does_not_change():
    chart = line_chart("Loss", [Line("a <b>", 0, False, Curve([(10, 2.0), (20, 1.5), (30, 1.0)]))])
    assert chart.startswith(CHART)
    assert PATH in chart
    assert "band" not in chart
    assert "note" not in chart


def test_a_line_has_a_gap_where_it_is_not_finite():
    points = [(1, 1.0), (2, 1.0), (3, None), (4, 1.0), (5, math.inf), (6, 1.0), (7, 1.0)]
    chart = line_chart("Loss", [Line("a", 0, False, Curve(points))])
    [path] = re.findall('<path class="line c0" d="([^"]*)"', chart)
    assert path.count("M") == 2
    assert chart.count('r="1.5"') == 1  # the one between two gaps
    # The same where many rows are one point: a million rows, of which 30,000 consecutive ones are not finite.
    many = Curve()
    many.extend(range(100_000), [None if 50_000 <= i < 53_000 else 1.0 for i in range(100_000)])
    [path] = re.findall('<path class="line c0" d="([^"]*)"', line_chart("Loss", [Line("a", 0, False, many)]))
    one, other = path.split("M")[1:]
    end, begin = float(one.split("L")[-1].split()[0]), float(other.split()[0])
    assert 0.02 < (begin - end) / (WIDTH - LEFT - RIGHT) < 0.05


def test_a_spike_among_many_points_is_visible_and_the_ends_are_exact():
    values = [1.0] * 50_000
    values[20_000], values[0], values[-1] = 9.0, 3.0, 2.0
    curve = Curve()
    curve.extend(range(50_000), values)
    chart = line_chart("Loss", [Line("a", 0, False, curve)])
    [band] = re.findall('<path class="band c0" d="([^"]*)"', chart)
    top = min(float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", band))
    nine = float(re.search(r'y="([\d.]+)" text-anchor="end">8<', chart)[1]) - 3.5
    assert top < nine  # above the line of 8
    points = json.loads(re.search('data-points="([^"]*)"', chart)[1])
    assert points[0] == [0, 3.0]
    assert points[-1] == [49_999, 2.0]
    assert "a <b>2</b>" in chart
    assert "the mean of up to 256 rows, the band their range" in chart
    assert len(points) <= MAX_POINTS + 2


def test_columns_of_a_heat_map_hold_the_largest_of_many_steps():
    curve = Curve()
    curve.extend(range(0, 10_000, 10), [0.1] * 500 + [50.0] + [0.1] * 498 + [None])
    html = heat_map("size", {"W<1>": curve}, log_bounds([0.1, 50.0]))
    assert "each column is the largest of up to 10 inspections" in html
    assert html.count("<i ") <= MAX_COLUMNS
    assert "W&lt;1&gt;, steps 5,000 to 5,090: at most 5.00e+01" in html
    assert html.count('class="bad"') == 1
    assert "not finite in 1 of" in html


def test_long_texts_lose_their_middle():
    assert short("x" * 80) == "x" * 80
    assert short("a" * 50 + "b" * 50) == "a" * 40 + "…" + "b" * 39
    assert [number(value) for value in (999.0, 1e14, 1e15, -1e300)] == [
        "999",
        "100,000,000,000,000",
        "1e+15",
        "-1e+300",
    ]
