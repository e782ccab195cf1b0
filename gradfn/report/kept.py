"""What a run has kept in its folder, read back for the page."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

from msgspec import Meta

from gradfn.files import FileError, inside, parse_json, read_bytes, read_rows
from gradfn.params import _reading_order
from gradfn.report.digit_net import DIGIT_NET, DigitNet, load_digit_net
from gradfn.run import (
    CONFIG,
    RUNS,
    Number,
    Option,
    RunError,
    VersionsFile,
    latest,
    read_config,
    read_result,
    read_versions,
)
from gradfn.tensors import open_tensors
from gradfn.train.fit import CHECKPOINT
from gradfn.train.log import INSPECTIONS, METRICS, NOISE
from gradfn.train.rows import NOT_FINITE

Row = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
PICTURES_LIMIT = 256 << 20  # bytes of all pictures of a run
LAST_STEP = 2**53  # that a float64 tells from the one before

# The rows of a training's files; null is a number that was not finite.
Step = Annotated[int, Meta(ge=0, le=LAST_STEP)]
# Of a row by name, among them "step"; the only list is that of NOT_FINITE.
MetricsRow = dict[str, Number | list[Any] | None]


class Stats(TypedDict):
    """Statistics of a value or a gradient, of which the page shows one; of a value in a loop, one for each turn."""

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
    """What the page shows of a measure of the gradient's noise."""

    step: Step
    running_scale: Number | None


class Notes(TypedDict, total=False):
    """What the page shows of the notes in a checkpoint of `gf.fit`."""

    settings: dict[str, Option]
    versions: VersionsFile
    finished: bool


class Part(NamedTuple):
    """One training of a run: of a seed, of a cell, or the only one.

    Attributes:
        history: a row for each evaluation.
        inspections: a row for each look at all gradients; empty where nobody looked.
        shapes: of the parameters, by path, in reading order.
        noise: a row for each measure of the gradient's noise.
    """

    history: list[Row]
    inspections: list[Row]
    shapes: Shapes
    noise: Sequence[Row] = ()


class Kept(NamedTuple):
    """A run, as far as it got.

    Attributes:
        folder: where it is.
        experiment: whose run it is; "" for one of `gf.fit(..., folder=...)` alone.
        options: what was asked.
        versions: what it ran on, and its seed.
        result: what came of it, with its verdict; None where it has not finished.
        parts: its trainings, by the folders that they are in; "" for the run's own.
        pictures: PNG and GIF files, by their names without the ending.
        net: the digit network that it trained; None where it is of another kind.
    """

    folder: Path
    experiment: str
    options: dict[str, Any]
    versions: dict[str, Any]
    result: dict[str, Any] | None
    parts: dict[str, Part]
    pictures: dict[str, bytes]
    net: DigitNet | None


def read_run(run: str | Path) -> Kept:
    """Read what a run has kept, however far it got.

    Args:
        run: its folder, also that of `gf.fit(..., folder=...)`; or an experiment's name for its latest run.

    Raises:
        RunError: there is no such run.
        FileError: a file of it cannot be read, or leads out of the run's folder; it names the file.
    """
    folder = find_run(run)
    if not os.path.lexists(folder / CONFIG):
        return _of_fit(folder)
    config = read_config(folder)
    net = inside(folder, DIGIT_NET)
    return Kept(
        folder=folder,
        experiment=config["experiment"],
        options=dict(config["options"]),
        versions=dict(read_versions(folder)),
        result=read_result(folder),
        parts={
            "" if part == folder else str(part.relative_to(folder)): _part(part) for part in _parts(folder)
        },
        pictures=_pictures(folder),
        net=load_digit_net(net) if os.path.lexists(net) else None,
    )


def find_run(run: str | Path) -> Path:
    """Return a run's folder: the folder itself, or for an experiment's name its latest run.

    Raises:
        RunError: there is no such run; it says what to type.
    """
    folder = Path(run)
    if os.path.lexists(folder / CONFIG):
        return folder
    if os.path.lexists(folder / METRICS) and not os.path.lexists(folder.parent / CONFIG):
        return folder
    if found := latest(folder):
        return found
    if os.path.lexists(folder.parent / CONFIG):
        raise RunError(f"{run}: only a part of a run; name the run's folder, {folder.parent}")
    if folder.is_dir():
        raise RunError(
            f"{run}: no run's folder (it has no {CONFIG}), and none of gf.fit (it has no {METRICS})"
        )
    raise RunError(
        f"{run}: neither a run's folder nor an experiment with a run in {RUNS / folder}; "
        "gradfn run NAME makes one, and says in which folder"
    )


def _parts(folder: Path) -> list[Path]:
    """Return the folders with rows of metrics, those of links left out; one at a time, however deep they lie."""
    found, waiting = [], [folder]
    while waiting:
        part = waiting.pop()
        try:
            with os.scandir(part) as entries:
                waiting += [part / entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError as error:
            raise FileError(f"{str(part)[:300]}: cannot be read ({error.strerror})") from error
        if os.path.lexists(part / METRICS):
            found.append(part)
    return sorted(found)


def _part(folder: Path) -> Part:
    files = [inside(folder, name) for name in (METRICS, INSPECTIONS, NOISE)]
    metrics, inspections, noise = (file if os.path.lexists(file) else None for file in files)
    return Part(
        history=list(_metrics(metrics)) if metrics else [],
        inspections=list(_inspections(inspections)) if inspections else [],
        shapes=_shapes(folder),
        noise=[_numbers(row) for row in read_rows(noise, NoiseRow)] if noise else [],
    )


def _of_fit(folder: Path) -> Kept:
    """Read what `gf.fit` has kept in a folder of its own; its checkpoint tells its settings and versions."""
    part, notes = _part(folder), _notes(folder)
    settings = notes.get("settings", {})
    result = None
    if notes.get("finished") and part.history:
        last = part.history[-1]
        result = {"verdict": f"training loss {last.get('loss', math.nan):.4g} after {last['step']:,} steps"}
    versions = notes.get("versions", {}) | ({"seed": settings["seed"]} if "seed" in settings else {})
    return Kept(folder, "", settings, versions, result, {"": part}, _pictures(folder), None)


def _pictures(folder: Path) -> dict[str, bytes]:
    files = [file for ending in ("png", "gif") for file in sorted(folder.glob(f"*.{ending}"))]
    found, room = {}, PICTURES_LIMIT
    for file in files:
        found[file.stem] = read_bytes(inside(folder, file.name), room)
        room -= len(found[file.stem])
    return found


def _metrics(file: Path) -> Iterator[Row]:
    for i, found in enumerate(read_rows(file, MetricsRow), start=1):
        row: dict[str, Any] = {name: value for name, value in found.items() if name != NOT_FINITE}
        if lists := [name for name, value in row.items() if isinstance(value, list)]:
            raise FileError(f"{file}: line {i:,}: expected a number as {lists[0]!r:.40}, got a list")
        step = row.get("step")
        if step is None or not (0 <= step <= LAST_STEP and step.is_integer()):
            raise FileError(f"{file}: line {i:,}: expected an integer >= 0 as the step, got {step}")
        yield _numbers(row) | {"step": int(step)}


def _inspections(file: Path) -> Iterator[Row]:
    for i, row in enumerate(read_rows(file, InspectionRow), start=1):
        try:
            yield row | {kind: _sizes(row[kind]) for kind in ("grads", "site_grads")}
        except (TypeError, ValueError) as error:
            raise FileError(f"{file}: line {i:,}: {error}") from error


def _sizes(stats: Mapping[str, Stats]) -> dict[str, Stats]:
    """Return the rms of each entry; of one that a loop repeats, over all its turns."""
    return {name: {"rms": _root_mean_square(each["rms"])} for name, each in stats.items() if "rms" in each}


def _root_mean_square(values: Any) -> float:
    waiting, sizes = [values], []
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


def _numbers(row: Mapping[str, Any]) -> Row:
    """Read null, which JSON has for it, as NaN."""
    return {name: math.nan if value is None else value for name, value in row.items()}


def _shapes(folder: Path) -> Shapes:
    """Return the shapes of the parameters in a folder's checkpoint, without reading them."""
    file = inside(folder, CHECKPOINT)
    if not os.path.lexists(file):
        return {}
    with open_tensors(file) as content:
        names = [name for name in content.keys() if re.match("params(/|$)", name)]  # noqa: SIM118
        shapes = {name.removeprefix("params/"): content.get_slice(name).get_shape() for name in names}
        return {name: tuple(shapes[name]) for name in sorted(shapes, key=_reading_order)}


def _notes(folder: Path) -> Notes:
    """Return the notes in a folder's checkpoint; none where there is no checkpoint yet."""
    file = inside(folder, CHECKPOINT)
    if not os.path.lexists(file):
        return {}
    with open_tensors(file) as content:
        return parse_json(content.metadata()["notes"], Notes, str(file))
