"""The rows of a training, read one at a time and reduced to what a page shows.

The result has a bounded size, however many rows there are: curves of the first `MAX_METRICS` metrics and, for the heat
maps, of the first `HEAT_ROWS` parameters and values.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

import numpy as np
from msgspec import Meta

from gradfn.files import FileError
from gradfn.layout import NOT_FINITE, NOT_METRICS
from gradfn.runs.curve import Curve
from gradfn.runs.folder import Number

Shapes = dict[str, tuple[int, ...]]

LAST_STEP = 2**53  # float64 represents all integers up to here
# The most bytes of a row; larger than a block of rows, so that a block is decoded at once.
METRICS_ROW, INSPECTIONS_ROW = 2 << 20, 16 << 20
WAITING = 1 << 15  # numbers that are added to curves at a time
MAX_METRICS = 48  # of a training
HEAT_ROWS = 100  # of a heat map: more would be too many to read
MAX_SPIKES = 20  # of a training
MAX_FLAGS = 200  # different ones of a training
NO_CURVES = {*NOT_METRICS, NOT_FINITE} - {"step"}
MAX_PAIRS = 2_000_000  # pairs of a parameter and a value whose names are compared

# The rows of a training's files; null is a number that was not finite.
Step = Annotated[int, Meta(ge=0, le=LAST_STEP)]
# Numbers by name, among them "step"; only NOT_FINITE is a list.
MetricsRow = dict[str, Number | list[Any] | None]


class Stats(TypedDict):
    """Statistics of a value or a gradient, of which the page shows one; in a loop, one for each iteration."""

    rms: NotRequired[Number | list[Any] | None]


class InspectionRow(TypedDict):
    """What the page shows of `Inspection.to_dict()`."""

    step: Step
    sites: dict[str, Stats]
    site_grads: dict[str, Stats]
    grads: dict[str, Stats]
    param_order: NotRequired[list[str]]
    flags: NotRequired[dict[str, list[str]]]


class NoiseRow(TypedDict):
    """What the page shows of a measurement of the gradient's noise."""

    step: Step
    running_scale: Number | None


class SpikeRow(TypedDict):
    """What the page shows of a loss spike."""

    step: Step
    text: str


class Spikes(NamedTuple):
    """The loss spikes of a training: how many there are, and the first `MAX_SPIKES` of them in words."""

    n: int = 0
    texts: tuple[str, ...] = ()


class Metrics(NamedTuple):
    """The evaluations of a training.

    Attributes:
        n: how many rows there are.
        last: the last row, with NaN for null.
        curves: of each metric over the steps, the first `MAX_METRICS` of them.
    """

    n: int = 0
    last: Mapping[str, Any] = {}
    curves: Mapping[str, Curve] = {}


class Inspections(NamedTuple):
    """The inspections of a training.

    Attributes:
        n: how many rows there are.
        grads: the rms of each parameter's gradient over the steps, from the inputs to the loss; the first `HEAT_ROWS`.
        site_grads: the same of the values inside the network.
        left_out: how many more parameters there are.
        sites_left_out: how many more values there are.
        flags: site, flag, and at how many inspections it was raised; the first `MAX_FLAGS` of them.
    """

    n: int = 0
    grads: Mapping[str, Curve] = {}
    site_grads: Mapping[str, Curve] = {}
    left_out: int = 0
    sites_left_out: int = 0
    flags: Sequence[tuple[str, str, int]] = ()


def metrics(blocks: Iterable[Sequence[Mapping[str, Any]]], name: str = "metrics") -> Metrics:
    """Reduce rows of metrics.

    Args:
        blocks: the rows, in lists of them.
        name: what to call them in an error.

    Raises:
        FileError: a row has no step, or one that is not an integer, or a list where a number is expected.

    >>> found = metrics([[{"step": 10, "loss": 2.0}, {"step": 20, "loss": None}]])
    >>> found.n, found.last, found.curves["loss"].ends
    (2, {'step': 20, 'loss': nan}, [(10, 2.0), (10, 2.0)])
    """
    n = 0
    last: Mapping[str, Any] = {}
    curves: dict[str, Curve] = {}
    for rows in blocks:
        try:
            columns = _columns(rows)
            _, steps = columns.pop("step", ([], np.zeros(0)))
            right = (steps >= 0) & (steps <= LAST_STEP) & (steps == np.floor(steps))
            if len(steps) < len(rows) or not right.all():
                raise ValueError("expected an integer as the step of each row")
            for metric, (indices, numbers) in columns.items():
                if metric not in curves and len(curves) < MAX_METRICS:
                    curves[metric] = Curve()
                if metric in curves:
                    curves[metric].extend(steps[indices], numbers)
        except ValueError as error:
            raise FileError(_fault(rows, n, name)) from error
        n, last = n + len(rows), rows[-1] if rows else last
    row = {key: math.nan if value is None else value for key, value in last.items() if key != NOT_FINITE}
    return Metrics(n, row | {"step": int(row["step"])} if row else {}, curves)


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[slice | list[int], np.ndarray]]:
    """Return, for the step and each metric, the rows that have it and their numbers."""
    names = [name for name in rows[0] if name not in NO_CURVES] if rows else []
    if names and sum(map(len, rows)) == len(rows) * len(rows[0]):
        with contextlib.suppress(KeyError):  # rows of one length may still have other names
            shape = (len(rows), len(names)) if len(names) > 1 else (len(rows),)
            numbers = _numbers(list(map(itemgetter(*names), rows)), shape)
            columns = numbers.reshape(len(rows), len(names)).T  # [rows] or [rows, metrics] -> [metrics, rows]
            return {name: (slice(None), column) for name, column in zip(names, columns, strict=True)}
    found: dict[str, tuple[slice | list[int], np.ndarray]] = {}
    for name in dict.fromkeys(chain.from_iterable(rows)):
        if name not in NO_CURVES:
            has = [i for i, row in enumerate(rows) if name in row]
            found[name] = has, _numbers([rows[i][name] for i in has], (len(has),))
    return found


def _numbers(values: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers as an array of a shape, with NaN for None; raise a ValueError if there is a list."""
    try:
        numbers = np.array(values, np.float64)
    except TypeError as error:
        raise ValueError("expected numbers") from error
    if numbers.shape != shape:
        raise ValueError(f"expected numbers of shape {shape}, got {numbers.shape}")
    return numbers


def _fault(rows: Sequence[Mapping[str, Any]], n: int, name: str) -> str:
    """Return a message about the first invalid row, where `n` rows precede `rows`."""
    for i, row in enumerate(rows, start=n + 1):
        for metric, value in row.items():
            if isinstance(value, list) and metric != NOT_FINITE:
                return f"{name}: line {i:,}: expected a number as {metric!r:.40}, got a list"
        step = row.get("step")
        if step is None or not (0 <= step <= LAST_STEP and float(step).is_integer()):
            return f"{name}: line {i:,}: expected an integer >= 0 as the step, got {step}"
    return f"{name}: expected numbers"


def inspections(rows: Iterable[Mapping[str, Any]], shapes: Shapes, name: str = "inspections") -> Inspections:
    """Reduce rows of `Inspection.to_dict()`; the first row determines which names are shown.

    Raises:
        FileError: a row has an rms that is not made of numbers.
    """
    n = 0
    shown: dict[str, list[str]] = {"grads": [], "site_grads": []}
    curves: dict[str, dict[str, Curve]] = {"grads": {}, "site_grads": {}}
    flags: dict[tuple[str, str], int] = {}
    waiting: list[list[float]] = []  # of each row the step, then an rms for each curve
    for row in rows:
        n += 1
        if n == 1:
            shown = {"grads": _by_depth(row, shapes), "site_grads": list(row["site_grads"])}
            curves = {kind: {one: Curve() for one in names[:HEAT_ROWS]} for kind, names in shown.items()}
        try:
            sizes = (_rms(row[kind].get(one)) for kind in curves for one in curves[kind])
            waiting.append([row["step"], *sizes])
        except (TypeError, ValueError) as error:
            raise FileError(f"{name}: line {n:,}: {error}") from error
        for site, found in row.get("flags", {}).items():
            for flag in found:
                if (site, flag) in flags or len(flags) < MAX_FLAGS:
                    flags[site, flag] = flags.get((site, flag), 0) + 1
        if len(waiting) * len(waiting[0]) >= WAITING:
            _extend(curves, waiting)
            waiting = []
    if waiting:
        _extend(curves, waiting)
    left_out, sites_left_out = (max(len(names) - HEAT_ROWS, 0) for names in shown.values())
    flagged = [(site, flag, count) for (site, flag), count in flags.items()]
    return Inspections(n, curves["grads"], curves["site_grads"], left_out, sites_left_out, flagged)


def noise(blocks: Iterable[Sequence[Mapping[str, Any]]]) -> Curve:
    """Reduce blocks of measurements of the gradient's noise to a curve of the running noise scale."""
    curve = Curve()
    for rows in blocks:
        points = [(row["step"], row["running_scale"]) for row in rows if (row["running_scale"] or 0) > 0]
        curve.extend([step for step, _ in points], [scale for _, scale in points])
    return curve


def spikes(rows: Iterable[SpikeRow]) -> Spikes:
    """Reduce loss spikes to the texts of the first ones."""
    found = Spikes()
    for row in rows:
        few = (*found.texts, row["text"]) if found.n < MAX_SPIKES else found.texts
        found = Spikes(found.n + 1, few)
    return found


def _extend(curves: Mapping[str, Mapping[str, Curve]], waiting: list[list[float]]) -> None:
    steps, *columns = np.array(waiting).T
    every = chain.from_iterable(of_kind.values() for of_kind in curves.values())
    for curve, column in zip(every, columns, strict=True):
        curve.extend(steps, column)


def _rms(stats: Stats | None) -> float:
    """Return the rms among statistics, for a loop over all iterations; 0 where there is none."""
    value = 0.0 if stats is None else stats.get("rms", 0.0)
    if isinstance(value, float):
        return abs(value)
    waiting, sizes = [value], []
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif value is None:
            sizes.append(math.nan)
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300:
            sizes.append(value)
        else:
            raise TypeError(f"expected numbers as an rms, got {value!r:.40}")
    if not sizes:
        raise ValueError("expected numbers as an rms, got none")
    return math.hypot(*sizes) / math.sqrt(len(sizes))


def _by_depth(row: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """Return the parameters in the order in which the loss uses them, starting at the inputs.

    Runs of earlier versions do not store that order, so it is guessed from the names.
    """
    order = row.get("param_order")
    if not order:
        comparable = len(row["grads"]) * len(row["sites"]) <= MAX_PAIRS
        sites = [site.split("/") for site in row["sites"]] if comparable else []
        reading = {param: i for i, param in enumerate(shapes)}
        order = sorted(
            row["grads"], key=lambda param: (_depth(param, sites), reading.get(param, len(shapes)))
        )
    # The loss does not use the others, or not together with data.
    used = dict.fromkeys(param for param in order if param in row["grads"])
    return [*used, *(param for param in row["grads"] if param not in used)]


def _depth(param: str, sites: Sequence[Sequence[str]]) -> int:
    """Return the index of the first value whose name shares the longest prefix with the parameter's path."""
    scopes = param.split("/")[:-1]
    shared = [_n_shared(scopes, site) for site in sites]
    return shared.index(max(shared)) if scopes and shared and max(shared) else 0


def _n_shared(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the common prefix of two paths."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
