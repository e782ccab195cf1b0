"""What a run has kept in its folder, read back for the page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradfn.params import _reading_order
from gradfn.report.digit_net import DIGIT_NET, DigitNet, load_digit_net
from gradfn.run import CONFIG, RESULT, RUNS, VERSIONS, RunError, latest
from gradfn.train.fit import CHECKPOINT
from gradfn.train.log import INSPECTIONS, METRICS, NOISE

Row = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


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
        RunError: there is no such run, or a file of it cannot be read; it names the file.
    """
    folder = find_run(run)
    if not (folder / CONFIG).exists():
        return _of_fit(folder)
    config = _json(folder / CONFIG)
    try:
        experiment, options = str(config["experiment"]), dict(config["options"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{folder / CONFIG}: not a readable config of a run ({error})") from error
    has = {name: (folder / name).exists() for name in (VERSIONS, RESULT, DIGIT_NET)}
    try:
        net = load_digit_net(folder / DIGIT_NET) if has[DIGIT_NET] else None
    except ValueError as error:
        raise RunError(str(error)) from error
    return Kept(
        folder=folder,
        experiment=experiment,
        options=options,
        versions=_json(folder / VERSIONS) if has[VERSIONS] else {},
        result=_json(folder / RESULT) if has[RESULT] else None,
        parts={
            "" if file.parent == folder else str(file.parent.relative_to(folder)): _part(file.parent)
            for file in sorted(folder.rglob(METRICS))
        },
        pictures=_pictures(folder),
        net=net,
    )


def find_run(run: str | Path) -> Path:
    """Return a run's folder: the folder itself, or for an experiment's name its latest run.

    Raises:
        RunError: there is no such run; it says what to type.
    """
    folder = Path(run)
    if (folder / CONFIG).exists():
        return folder
    if (folder / METRICS).exists() and not (folder.parent / CONFIG).exists():
        return folder
    if found := latest(folder):
        return found
    if (folder.parent / CONFIG).exists():
        raise RunError(f"{run}: only a part of a run; name the run's folder, {folder.parent}")
    if folder.is_dir():
        raise RunError(
            f"{run}: no run's folder (it has no {CONFIG}), and none of gf.fit (it has no {METRICS})"
        )
    raise RunError(
        f"{run}: neither a run's folder nor an experiment with a run in {RUNS / folder}; "
        "gradfn run NAME makes one, and says in which folder"
    )


def _part(folder: Path) -> Part:
    shapes = _shapes(folder / CHECKPOINT)
    return Part(_rows(folder / METRICS), _rows(folder / INSPECTIONS), shapes, _rows(folder / NOISE))


def _of_fit(folder: Path) -> Kept:
    """Read what `gf.fit` has kept in a folder of its own; its checkpoint tells its settings and versions."""
    part, notes = _part(folder), _notes(folder / CHECKPOINT)
    settings = notes.get("settings", {})
    result = None
    if notes.get("finished") and part.history:
        last = part.history[-1]
        result = {"verdict": f"training loss {last['loss']:.4g} after {last['step']:,} steps"}
    versions = notes.get("versions", {}) | ({"seed": settings["seed"]} if "seed" in settings else {})
    return Kept(folder, "", settings, versions, result, {"": part}, _pictures(folder), None)


def _pictures(folder: Path) -> dict[str, bytes]:
    files = [file for ending in ("png", "gif") for file in sorted(folder.glob(f"*.{ending}"))]
    return {file.stem: file.read_bytes() for file in files}


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: not readable ({error})") from error
    if not isinstance(content, dict):
        raise RunError(f"{file}: expected an object, came {type(content).__name__}")
    return content


def _rows(file: Path) -> list[Row]:
    """Read rows of JSON; of a run that is still going on the last may be half written, which is left out."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(dict(json.loads(line, object_hook=_numbers)))
        except (TypeError, ValueError) as error:
            if number < len(lines):
                raise RunError(f"{file}, line {number}: not readable ({error})") from error
    return rows


def _numbers(row: Row) -> Row:
    """Read null, which JSON has for it, as NaN."""
    return {name: math.nan if value is None else value for name, value in row.items()}


def _shapes(checkpoint: Path) -> Shapes:
    """Return the shapes of the parameters in a checkpoint, without reading them."""
    if not checkpoint.exists():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(checkpoint, "numpy") as content:
            names = [name for name in content.keys() if re.match("params(/|$)", name)]  # noqa: SIM118
            shapes = {name.removeprefix("params/"): content.get_slice(name).get_shape() for name in names}
    except (OSError, SafetensorError) as error:
        raise RunError(f"{checkpoint}: not a readable checkpoint ({error})") from error
    return {name: tuple(shapes[name]) for name in sorted(shapes, key=_reading_order)}


def _notes(checkpoint: Path) -> dict[str, Any]:
    """Return the notes in a checkpoint; none where there is no checkpoint yet."""
    if not checkpoint.exists():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(checkpoint, "numpy") as content:
            return dict(json.loads(content.metadata()["notes"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{checkpoint}: not a readable checkpoint ({error})") from error
