"""`gradfn report RUN`: one self-contained HTML file that shows a run, or two side by side.

The file has at most `LIMIT` bytes, whatever the run holds: texts and tables are cut at a length of their own, and the
charts, the network, the heat maps and the pictures, in this order, share the rest. The page lists what it leaves out.
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gradfn.display import is_weight
from gradfn.files import open_regular, replace_file
from gradfn.pages.charts import MAX_COLUMNS, Line, heat_map, line_chart, log_bounds, short
from gradfn.pages.live import live_parts
from gradfn.pages.live.examples import with_examples
from gradfn.pages.pictures import Picture, PictureError, fitting, read_picture
from gradfn.runs.about import About
from gradfn.runs.curve import Curve
from gradfn.runs.folder import STARTED, RunError, started
from gradfn.runs.kept import Kept, Part, read_run
from gradfn.runs.outcome import Outcome, listed

T = TypeVar("T")

ASSETS = Path(__file__).parent / "assets"
ALL_KINDS = frozenset(file.parent.name for file in ASSETS.glob("*/page.js"))  # of networks that run in pages
LIMIT = 5_000_000  # bytes, of the whole page
DRAWN_LIVE = ("curves",)  # pictures that the page replaces by charts of its own, where the run has metrics
GENERATOR = b'<meta name="generator" content="gradfn">'  # in every page: only such files are overwritten
# Bytes that parts of the page may take, at most.
CHARTS_ROOM, OPTIONS_ROOM, SHAPES_ROOM, VERSIONS_ROOM, NOTES_ROOM = (
    1_000_000,
    200_000,
    300_000,
    50_000,
    20_000,
)
OTHERS_ROOM = 400_000  # bytes for the heat maps and the pictures, at least
LINES = 48  # of a chart
MIN_COLUMNS = 15  # of a heat map
NO_MAPS = {
    "params": "",
    "values": "",
    "left_out": 0,
    "values_left_out": 0,
    "flags": [],
    "meanings": {},
    "looks": 0,
}
# By the functions of gradfn that make losses, and by the names in the files of digit networks.
LOSS_UNITS = {"classification_loss": "nats", "next_token_loss": "nats per token", "cross-entropy": "nats"}
NOISE_SCALE = (
    "The batch size at which the noise of a batch's gradient is as large as the gradient itself. Much smaller batches "
    "give mostly noise; much larger ones hardly help."
)
# What the flags of inspections mean; see `gradfn.inspection.flow`.
FLAGS = {
    "vanishing": "the gradient there was below a thousandth of that at the last value before the loss",
    "exploding": "the gradient there was over a thousand times that at the last value before the loss",
    "saturated": "more than half of the values were where sigmoid or tanh is almost flat, so little gradient passes",
    "dead": "more than half of the relu nodes were zero for all examples of the batch, so no gradient passes",
    "non-finite": "there was a NaN or an infinity",
}
VALUE, TEXT, COMMAND = 300, 1000, 2000  # letters of a value in a table, of a text, of a command


class Verdict(NamedTuple):
    """What a run measured and what was expected, as text.

    Attributes:
        reached: the measured numbers.
        expected: the expectations; "" where there are none.
        state: "reached", "missed", "open" (no expectations) or "unfinished".
    """

    reached: str
    expected: str
    state: str


def write_report(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    about: Mapping[str, About] = {},
    examples: tuple[np.ndarray, np.ndarray] | None = None,
) -> Path:
    """Write the page of a run, or of two side by side.

    It has at most 5 MB, however many rows the run has. Pictures that cannot be shown are named in it.

    Args:
        runs: one or two of them: folders, or experiments' names for their latest runs.
        out: the file; by default `report.html` in the run's folder, or `against-<B>.html` in the first one's.
        about: descriptions of the experiments, by name.
        examples: inputs and targets for the networks in the page, see `gf.report`.

    Returns:
        The file.

    Raises:
        RunError: there is no such run; or `out` cannot be written, or is an existing file that is not a page of
            gradfn.
        FileError: a file of the run cannot be read; it names the file.
        ValueError: examples that do not fit the network of any run.
    """
    kept = [read_run(run) for run in runs]
    if examples is not None:
        kept = with_examples(kept, *examples)
    if out is not None and os.path.lexists(out) and GENERATOR not in _head(Path(out)):
        raise RunError(f"{out}: already exists and is not a page that gradfn wrote. Name another file")
    if out is None:
        name = "report.html" if len(kept) == 1 else f"against-{_name(kept[1])}.html"
        out = kept[0].folder / name
    file = Path(out)
    html = page(kept, about).encode(errors="replace")  # names of files may not be UTF-8
    try:
        replace_file(file, html)
    except OSError as error:
        raise RunError(f"{file}: cannot be written ({error.strerror})") from error
    return file


def page(kept: Sequence[Kept], about: Mapping[str, About] = {}) -> str:
    """Return the page of one run, or of two that are compared, as HTML.

    Raises:
        ImportError: jinja2 is not installed.
    """
    template = _environment().get_template("template.html")
    options, options_left_out = _differences([run.options for run in kept], OPTIONS_ROOM)
    versions, versions_left_out = _differences(
        [{k: v for k, v in run.versions.items() if k != STARTED} for run in kept], VERSIONS_ROOM
    )
    shapes, shapes_left_out = _shared_shapes(kept)
    content: dict[str, Any] = {
        "runs": [_described(run, about.get(run.experiment, About())) for run in kept],
        "title": short(" and ".join(dict.fromkeys(run.experiment or _name(run) for run in kept)), VALUE),
        "options": options,
        "options_left_out": options_left_out,
        "meanings": {name: meaning for run in kept for name, (meaning, _) in _options_of(about, run).items()},
        "versions": versions,
        "versions_left_out": versions_left_out,
        "shapes": shapes,
        "shapes_left_out": shapes_left_out,
        "style": style(set()),
        "import_map": import_map(set()),
        "spikes": [
            [
                {
                    "name": short(name),
                    "texts": [short(text, VALUE) for text in part.spikes.texts],
                    "more": part.spikes.n - len(part.spikes.texts),
                }
                for name, part in run.parts.items()
                if part.spikes.n
            ]
            for run in kept
        ],
    }
    content["hints"] = _hints(kept)
    # These parts share the remaining bytes.
    content |= {"charts": [], "charts_left_out": 0, "live": [], "live_left_out": [], "flows": []}
    content |= {"pictures": [], "pictures_left_out": []}

    def room() -> int:
        return LIMIT - _size(template.render(**content))

    all_charts = charts(kept)
    content["charts"] = _that_fit(all_charts, _size, min(CHARTS_ROOM, room()))
    content["charts_left_out"] = len(all_charts) - len(content["charts"])
    # Leave room for the heat maps and the pictures, and for the code of any network.
    content["style"], content["import_map"] = style(ALL_KINDS), import_map(ALL_KINDS)
    found = [live_parts(run, (room() - OTHERS_ROOM) // len(kept)) for run in kept]
    content["live"] = [(i, part) for i, (parts, _) in enumerate(found) for part in parts]
    content["live_left_out"] = [(i, why) for i, (_, reasons) in enumerate(found) for why in reasons]
    kinds = {part.kind for _, part in content["live"]}
    content["style"], content["import_map"] = style(kinds), import_map(kinds)
    content["flows"] = flows(kept, room() // 2)
    content["pictures"], content["pictures_left_out"] = _pictures(kept, room() - NOTES_ROOM)
    return template.render(**content)


def _hints(kept: Sequence[Kept]) -> list[tuple[int, str]]:
    """Return for each run of `gf.fit`, by its place, what it did not record, and how it would."""
    found = []
    inspected = any(part.inspections.n for run in kept for part in run.parts.values())
    for i, run in enumerate(kept):
        parts = run.parts.values()
        if run.experiment:
            continue
        if not any(part.history.n for part in parts):
            found.append((i, "No evaluation has been recorded yet, so there are no curves."))
        if not inspected:
            found.append(
                (i, "To see how the gradient flows through the layers, train with inspect_every=10.")
            )
        if not any(part.noise.ends for part in parts):
            found.append((i, "To see the noise scale of the gradient, train with noise_every=10."))
    return found


def _head(file: Path) -> bytes:
    """Return the first bytes of a file; b"" where it is not a regular file."""
    if not file.is_file():
        return b""
    with open_regular(file) as content:
        return content.read(4096)


def _size(text: str) -> int:
    return len(text.encode(errors="replace"))


def _that_fit(things: Iterable[T], size: Callable[[T], int], room: int) -> list[T]:
    """Return the first things, as many as fit in `room` bytes."""
    found = []
    for thing in things:
        room -= size(thing)
        if room < 0:
            break
        found.append(thing)
    return found


@functools.cache
def _environment() -> Any:
    """Return jinja's environment, in which `part.values` of a dict is its item and never its method."""
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("reports need jinja2: pip install 'gradfn[run]'") from error

    class Environment(jinja2.Environment):
        def getattr(self, obj: Any, attribute: str) -> Any:
            if isinstance(obj, Mapping):
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
            return super().getattr(obj, attribute)

    return Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def import_map(kinds: Set[str]) -> str:
    """Return an import map with modules as data URLs: native modules in a file that works offline.

    Args:
        kinds: of the networks in the page; modules that only others need are left out.
    """
    needed = {f"gradfn/{file.relative_to(ASSETS).as_posix()}" for file in ASSETS.glob("core/*.js")}
    found, waiting = set[str](), {"gradfn/main.js", *needed, *(f"gradfn/{kind}/page.js" for kind in kinds)}
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= _imported(name) - found
    modules = {
        name: f"data:text/javascript;base64,{base64.b64encode(_module(name)).decode()}"
        for name in sorted(found)
    }
    return json.dumps({"imports": modules}, indent=0)


@functools.cache
def _module(name: str) -> bytes:
    return (ASSETS / name.removeprefix("gradfn/")).read_bytes()


@functools.cache
def _imported(name: str) -> Set[str]:
    """Return the modules that a module imports by their names."""
    return {found.decode() for found in re.findall(rb'"(gradfn/[\w/]+\.js)"', _module(name))}


def style(kinds: Set[str]) -> str:
    """Return the page's style sheet, with those of the kinds of networks in it."""
    files = [ASSETS / "style.css", *(ASSETS / kind / "style.css" for kind in sorted(kinds))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def verdict(result: Mapping[str, Any] | None) -> Verdict:
    """Return the texts for the result of a run.

    >>> from gradfn.runs import Expectation, judge
    >>> accuracy = Expectation("test accuracy", at_least=0.93, unit="%")
    >>> verdict({"outcome": judge([accuracy], {"test accuracy": 0.964})})
    Verdict(reached='Test accuracy 96.4 %', expected='test accuracy at least 93 %', state='reached')
    >>> verdict(None).state
    'unfinished'
    """
    if result is None:
        return Verdict("Not finished", "", "unfinished")
    outcome = result.get("outcome")
    if not isinstance(outcome, Outcome):
        return Verdict(_capital(short(result.get("verdict", "Finished"), TEXT)), "", "open")
    expected = listed(outcome.expected) if outcome.promised else "no expectation for these options"
    return Verdict(_capital(short(outcome.reached, TEXT)), short(expected, TEXT), outcome.state)


def charts(kept: Sequence[Kept]) -> list[str]:
    """Return a chart of the losses, one of the accuracies, one for each other metric, and one of the noise scale.

    For a single training, each line has its own color. For several trainings, each training has its own color, and
    all metrics but the last are dashed.
    """
    trainings = [
        (f"{chr(65 + i)} {name}".strip() if len(kept) > 1 else name, part, run.result or {})
        for i, run in enumerate(kept)
        for name, part in run.parts.items()
        if part.history.n
    ]
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for _, part, _ in trainings for name in part.history.curves):
        group = next((kind for kind in ("loss", "accuracy") if name.endswith(kind)), words(name))
        groups.setdefault(group, []).append(name)
    unit = _loss_unit(kept)
    why = _why_losses_differ(kept)
    all_charts = [
        _chart(
            _capital(group),
            lines,
            percent=group == "accuracy",
            unit=unit if group == "loss" else "",
            note=why if group == "loss" and len(metrics) > 1 else "",
        )
        for group, metrics in groups.items()
        if (lines := _lines(trainings, metrics))
    ]
    scales = [
        Line(f"{name}, noise scale" if len(trainings) > 1 else "running estimate", i, False, part.noise)
        for i, (name, part, _) in enumerate(trainings)
        if part.noise.ends
    ]
    return all_charts + (
        [_chart("Noise scale of the gradient", scales, unit="examples", note=NOISE_SCALE)] if scales else []
    )


def _chart(title: str, lines: Sequence[Line], percent: bool = False, unit: str = "", note: str = "") -> str:
    """Return a chart of the first `LINES` lines."""
    more = f"The first {LINES} of {len(lines):,} lines." if len(lines) > LINES else ""
    notes = " ".join(filter(None, [more, note]))
    return line_chart(short(title), lines[:LINES], percent=percent, note=notes, unit=unit)


def _loss_unit(kept: Sequence[Kept]) -> str:
    """Return the unit of the losses; "" where it is not known or not the same."""
    losses = {part.loss or _loss(run) for run in kept for part in run.parts.values()}
    units = {LOSS_UNITS.get(loss, "") for loss in losses}
    return units.pop() if len(units) == 1 else ""


def _loss(run: Kept) -> str:
    """Return the name of the loss that the networks of a run's page have; "" where there are none."""
    if run.training_set or run.cnn:
        return "classification_loss"
    return run.net.about["loss"] if run.net else ""


def _why_losses_differ(kept: Sequence[Kept]) -> str:
    """Return why the loss of training and that of a validation are not comparable point by point."""
    dropped = any(run.options.get("dropout") for run in kept)
    noisy = ", and with dropout" if dropped else ""
    return (
        f"The training loss of a point is the mean over the steps since the one before, while the network was still "
        f"changing{noisy}. The other losses are measured at the point itself{', without dropout' if dropped else ''}. "
        "So the training loss can be higher than these."
    )


def _lines(trainings: Sequence[tuple[str, Part, Mapping[str, Any]]], metrics: Sequence[str]) -> list[Line]:
    several = len(trainings) > 1
    lines = []
    for i, (name, part, result) in enumerate(trainings):
        for j, metric in enumerate(metrics):
            curve = part.history.curves.get(metric)
            if curve and curve.ends:
                label = f"{name}, {words(metric)}" if several else words(metric)
                if result.get(metric, curve.ends[-1][1]) != curve.ends[-1][1]:
                    label += " during training"  # the run measured it again at the end, on all examples
                dashed = several and j < len(metrics) - 1
                lines.append(Line(label, i if several else j, dashed, curve))
    return lines


def flows(kept: Sequence[Kept], room: int = LIMIT) -> list[list[dict[str, Any]]]:
    """Return for each run the maps of its gradients by layer over training; all are on one scale.

    Args:
        kept: the runs.
        room: bytes. The maps get as many columns as fit in it; maps that do not fit at all are empty.

    Returns:
        For each run a list with, for each of its trainings, `name`, `params` and `values` (heat maps of the
        gradient's rms at the parameters and at the values inside the network, both from the inputs to the loss),
        `left_out` and `values_left_out` (how many rows they lack) and `flags` (what was wrong, and where: see
        `grouped`).
    """
    parts = [part for run in kept for part in run.parts.values() if part.inspections.n]
    bounds = _bounds(curve for part in parts for curve in part.inspections.grads.values())
    value_bounds = _bounds(curve for part in parts for curve in part.inspections.site_grads.values())

    def described(name: str, part: Part, columns: int) -> dict[str, Any]:
        inspections = part.inspections
        return {
            "name": short(name),
            "params": heat_map("Gradient of each parameter (rms)", inspections.grads, bounds, columns),
            "values": heat_map(
                "Gradient at each value inside the network (rms)",
                inspections.site_grads,
                value_bounds,
                columns,
            )
            if inspections.site_grads
            else "",
            "left_out": inspections.left_out,
            "values_left_out": inspections.sites_left_out,
            "flags": grouped(inspections.flags),
            "meanings": {
                flag: FLAGS[flag]
                for flag in dict.fromkeys(flag for _, flag, _ in inspections.flags)
                if flag in FLAGS
            },
            "looks": inspections.n,
        }

    # The first training of each run, then the second ones, ...: so both runs have something to show.
    trainings = sorted(
        (
            (place, i, name, part)
            for i, run in enumerate(kept)
            for place, (name, part) in enumerate(run.parts.items())
            if part.inspections.n
        ),
        key=lambda training: training[:2],
    )
    columns = MAX_COLUMNS
    while True:
        maps = (described(name, part, columns) for _, _, name, part in trainings)
        found = _that_fit(maps, _size_of_maps, room)
        if len(found) == len(trainings) or columns // 2 < MIN_COLUMNS:
            break
        columns //= 2
    found += [NO_MAPS | {"name": short(name)} for _, _, name, _ in trainings[len(found) :]]
    of_runs: list[list[dict[str, Any]]] = [[] for _ in kept]
    for (_, i, _, _), each in zip(trainings, found, strict=True):
        of_runs[i].append(each)
    return of_runs


def _bounds(curves: Iterable[Curve]) -> tuple[float, float]:
    return log_bounds([bucket.high for curve in curves for bucket in curve.buckets(MAX_COLUMNS)])


def _size_of_maps(described: Mapping[str, Any]) -> int:
    flags = sum(
        300 + _size(escape(each["flag"])) + sum(100 + 2 * _size(escape(site)) for site, _ in each["sites"])
        for each in described["flags"]
    )
    return _size(described["params"]) + _size(described["values"]) + flags + 1000


def grouped(flags: Iterable[tuple[str, str, int]]) -> list[dict[str, Any]]:
    """Return for each flag the sites that have it, in their order, with the number of inspections of each.

    >>> grouped([("a1", "dead", 3), ("a2", "dead", 5), ("a1", "vanishing", 1)])[0]
    {'flag': 'dead', 'sites': [('a1', 3), ('a2', 5)], 'least': 3, 'most': 5}
    """
    found: dict[str, list[tuple[str, int]]] = {}
    for site, flag, n in flags:
        found.setdefault(short(flag), []).append((short(site), n))
    return [
        {
            "flag": flag,
            "sites": sites,
            "least": min(n for _, n in sites),
            "most": max(n for _, n in sites),
        }
        for flag, sites in found.items()
    ]


def differences(tables: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], bool]]:
    """Return name, value in each table and whether they differ, of every name.

    >>> differences([{"hidden": 16, "seed": 0}, {"hidden": 30, "seed": 0}])
    [('hidden', ['16', '30'], True), ('seed', ['0', '0'], False)]
    """
    names = dict.fromkeys(name for table in tables for name in table)
    rows = [(name, [_value(table.get(name)) for table in tables]) for name in names]
    return [(name, values, len(set(values)) > 1) for name, values in rows]


def words(name: str) -> str:
    """Return a metric's name as words.

    >>> words("train_accuracy"), words("loss")
    ('training accuracy', 'training loss')
    """
    return "training loss" if name == "loss" else name.replace("train_", "training_").replace("_", " ")


def _described(run: Kept, about: About) -> dict[str, Any]:
    last = next((part.history.last for part in run.parts.values() if part.history.n), None)
    counts = {sum(map(math.prod, part.shapes.values())) for part in run.parts.values() if part.shapes}
    facts = {}
    if counts:
        facts["parameters"] = short(" / ".join(f"{count:,}" for count in sorted(counts)), VALUE)
    if last:
        facts["steps"] = f"{last['step']:,}"
    if len(run.parts) > 1:
        facts["trainings"] = f"{len(run.parts) + run.parts_left_out:,}"
    if run.versions.get("seed") is not None:
        facts["seed"] = short(str(run.versions["seed"]))
    if run.experiment:
        start = started(run.folder)
        facts["started"] = f"{start.day} {start:%B %Y, %H:%M} UTC"
    again = command(run, about)
    return {
        "experiment": short(run.experiment or _name(run), VALUE),
        "folder": short(str(run.folder), TEXT),
        "what": about.what,
        "verdict": verdict(run.result),
        "facts": facts,
        "command": again if len(again) <= COMMAND else "",
        "long_command": len(again) > COMMAND,
        "parts": len(run.parts),
        "parts_left_out": run.parts_left_out,
    }


def _name(run: Kept) -> str:
    return "-".join(filter(None, [run.experiment, run.folder.resolve().name]))


def command(run: Kept, about: About) -> str:
    """Return the command that repeats a run, with the options that differ from the defaults; "" for `gf.fit`."""
    if not run.experiment:
        return ""
    described = ["gradfn", "run", run.experiment]
    for name, value in run.options.items():
        _, default = about.options.get(name, ("", ...))
        plain = tuple(value) if isinstance(value, list) else value
        if value is None or plain == default:
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            described += [option] if value else []
        else:
            described += [option, *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(described)


def _options_of(about: Mapping[str, About], run: Kept) -> Mapping[str, tuple[str, Any]]:
    return about.get(run.experiment, About()).options


def _differences(
    tables: Sequence[Mapping[str, Any]], room: int
) -> tuple[list[tuple[str, list[str], bool]], int]:
    """Return the rows of `differences` that fit in `room` bytes, with long texts cut, and how many do not fit."""
    rows = differences(tables)
    cut = [(short(name), list(map(_cut, values)), differ) for name, values, differ in rows]

    def size(row: tuple[str, list[str], bool]) -> int:
        name, values, _ = row
        return 150 + 2 * _size(escape(name)) + sum(20 + _size(escape(value)) for value in values)

    found = _that_fit(cut, size, room)
    return found, len(rows) - len(found)


def _cut(text: str) -> str:
    return text if len(text) <= VALUE else f"{short(text, VALUE)} ({len(text):,} characters)"


def _shared_shapes(kept: Sequence[Kept]) -> tuple[list[dict[str, Any]], int]:
    """Return the tables of parameters, each with the names of the trainings that have these parameters.

    Returns:
        The tables with as many rows as fit on the page; and how many tables do not.
    """
    tables: dict[tuple[Any, ...], list[str]] = {}
    for i, run in enumerate(kept):
        for name, part in run.parts.items():
            if part.shapes:
                label = " ".join(filter(None, [chr(65 + i) if len(kept) > 1 else "", name]))
                tables.setdefault(tuple(part.shapes.items()), []).append(label)
    found, room = [], SHAPES_ROOM
    for shapes, names in tables.items():
        sizes = [math.prod(shape) for _, shape in shapes]
        weights = sum(
            size for size, (name, shape) in zip(sizes, shapes, strict=True) if is_weight(name, shape)
        )
        cut = [
            (short(name), short(str(list(shape))), size)
            for (name, shape), size in zip(shapes, sizes, strict=True)
        ]
        rows = _that_fit(cut, lambda row: 300 + _size(escape(row[0])), room - 2000)
        if not rows:
            break
        room -= 2000 + sum(300 + _size(escape(name)) for name, _, _ in rows)
        found.append(
            {
                "of": short(", ".join(name for name in names if name), VALUE),
                "rows": rows,
                "n_rows": len(shapes),
                "weights": weights,
                "biases": sum(sizes) - weights,
                "total": sum(sizes),
            }
        )
    return found, len(tables) - len(found)


def _pictures(kept: Sequence[Kept], room: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the pictures that fit in `room` bytes, and a line for each that is left out.

    Returns:
        By name, the picture of each run (None where it does not have one); and the lines.
    """
    live = DRAWN_LIVE if any(part.history.n for run in kept for part in run.parts.values()) else ()
    # In the order of the PNG files, which all pictures of gradfn are, too.
    names = dict.fromkeys(name for run in kept for name in (*run.pictures, *run.drawings) if name not in live)
    pictures: dict[tuple[str, int], Picture] = {}
    left_out: dict[tuple[str, int], str] = {}
    for name, (i, run) in itertools.product(names, enumerate(kept)):
        for found, ending in ((run.pictures, ""), (run.drawings, ".svg")):
            still = pictures.get((name, i))
            if name not in found or (still and still.kind == "gif"):
                continue
            try:
                pictures[name, i] = read_picture(found[name])._replace(still=still)
            except PictureError as error:
                left_out[name + ending, i] = str(error)
    around = sum(
        600 + 3 * _size(escape(name)) + _size(escape(picture.title))
        for (name, _), picture in pictures.items()
    )
    pictures, no_room = fitting(pictures, room - around)
    found = []
    for name in dict.fromkeys(name for name, _ in pictures):
        of_runs = [pictures.get((name, i)) for i in range(len(kept))]
        wide = any(each and each.width > 2 * each.height for each in of_runs)
        found.append({"name": short(words(name)), "wide": wide, "of_runs": of_runs})
    unread = {(name, i): why for i, run in enumerate(kept) for name, why in run.pictures_left_out.items()}
    lines = [
        f"{f'{chr(65 + i)} ' if len(kept) > 1 else ''}{short(name)}: {short(why, VALUE)}"
        for (name, i), why in (unread | left_out | no_room).items()
    ]
    described = _that_fit(lines, lambda line: 50 + _size(escape(line)), NOTES_ROOM - 1000)
    more = len(lines) - len(described)
    return found, described + ([f"and {more:,} more"] if more else [])


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "–"
    return str(value)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
