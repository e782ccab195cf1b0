"""What a run has kept in its folder, read back for the page."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeVar

from gradfn.display import reading_order
from gradfn.files import FileError, inside, read_blocks_of_rows, read_bytes, read_rows
from gradfn.layout import INSPECTIONS, METRICS, MODEL, NOISE, SPIKES
from gradfn.runs.cnn_net import CNN_NET, CnnNet, load_cnn_net
from gradfn.runs.curve import Curve
from gradfn.runs.described_net import DescribedNet, load_described_net
from gradfn.runs.digit_net import DIGIT_NET, DigitNet, load_digit_net
from gradfn.runs.folder import (
    CONFIG,
    RUNS,
    Option,
    RunError,
    VersionsFile,
    latest,
    read_config,
    read_versions,
)
from gradfn.runs.language_net import LanguageNet, load_language_net
from gradfn.runs.outcome import judge, read_result
from gradfn.runs.rows import (
    INSPECTIONS_ROW,
    METRICS_ROW,
    InspectionRow,
    Inspections,
    Metrics,
    MetricsRow,
    NoiseRow,
    Shapes,
    SpikeRow,
    Spikes,
    inspections,
    metrics,
    noise,
    spikes,
)
from gradfn.runs.training_set import TRAINING_SET, TrainingSet, load_training_set
from gradfn.stored import model_file, newest, parameter_shapes
from gradfn.stored import notes as notes_of

N = TypeVar("N")
MAX_PARTS = 64  # trainings that a page shows
MAX_PICTURES = 100
PICTURE_LIMIT, PICTURES_LIMIT = 16 << 20, 64 << 20  # bytes of a picture, and of all those of a run
NOT_DESCRIBED = (
    "No network runs in this page, because the run does not say which one it trained. To have it run, train a network "
    "of gf.mlp, gf.cnn or gf.gpt, whose activations have names, with one of gradfn's losses, such as "
    "gf.batch_mean(gf.classification_loss(net))."
)
NET_LIMIT = 16 << 20  # bytes of a network for the page, which holds fewer


class Notes(TypedDict, total=False):
    """What the page shows of the notes in a checkpoint of `gf.fit`."""

    settings: dict[str, Option]
    versions: VersionsFile
    finished: bool


class Part(NamedTuple):
    """One training of a run: of a seed, of a cell, or the only one.

    Attributes:
        history: its evaluations.
        inspections: its inspections of all gradients.
        shapes: of the parameters, by path, in reading order.
        noise: the running noise scale of the gradient.
        spikes: its loss spikes.
        loss: the function of gradfn that made its loss; "" where it is not known.
    """

    history: Metrics
    inspections: Inspections
    shapes: Shapes
    noise: Curve
    spikes: Spikes
    loss: str = ""


class Kept(NamedTuple):
    """A run, as far as it got.

    Attributes:
        folder: where it is.
        experiment: whose run it is; "" for one of `gf.fit(..., folder=...)` alone.
        options: what was requested.
        versions: what it ran on, and its seed.
        result: what it measured, among it its `outcome`; None where it has not finished.
        parts: its trainings, by the folders that they are in; "" for the run's own.
        pictures: PNG and GIF files, by their names without the ending.
        net: the digit network that it trained; None where it is of another kind.
        parts_left_out: how many trainings there are beyond `MAX_PARTS`.
        pictures_left_out: files of pictures that are not shown, with the reason.
        net_left_out: whether there is a digit network that is too large to be read.
        drawings: SVG files, by their names without the ending, which the page prefers to a PNG of the same name.
        training_set: what the page trains with; None where the run has kept no such file.
        training_set_left_out: whether there is one that is too large to be read.
        cnn: the convolutional network that it trained; None where it is of another kind.
        cnn_left_out: whether there is a convolutional network that is too large to be read.
        language_net: the GPT that it trained, in the first of its parts that has one; a sentence where it has one that
            cannot run in a page; None where it has no GPT.
        described: the network in its folder that describes itself, where it is none of these; or why there is none.
    """

    folder: Path
    experiment: str
    options: dict[str, Any]
    versions: dict[str, Any]
    result: dict[str, Any] | None
    parts: dict[str, Part]
    pictures: dict[str, bytes]
    net: DigitNet | None
    parts_left_out: int = 0
    pictures_left_out: Mapping[str, str] = {}
    net_left_out: bool = False
    drawings: Mapping[str, bytes] = {}
    training_set: TrainingSet | None = None
    training_set_left_out: bool = False
    cnn: CnnNet | None = None
    cnn_left_out: bool = False
    language_net: LanguageNet | str | None = None
    described: DescribedNet | str | None = None


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
    parts = _parts(folder)
    pictures, drawings, pictures_left_out = _pictures(folder)
    net, net_left_out = _net(folder, DIGIT_NET, load_digit_net)
    cnn, cnn_left_out = _net(folder, CNN_NET, load_cnn_net)
    training_set, set_left_out = _net(folder, TRAINING_SET, load_training_set)
    return Kept(
        folder=folder,
        experiment=config["experiment"],
        options=dict(config["options"]),
        versions=dict(read_versions(folder)),
        result=read_result(folder),
        parts={
            "" if part == folder else str(part.relative_to(folder)): _part(part) for part in parts[:MAX_PARTS]
        },
        pictures=pictures,
        net=net,
        parts_left_out=max(len(parts) - MAX_PARTS, 0),
        pictures_left_out=pictures_left_out,
        net_left_out=net_left_out,
        drawings=drawings,
        training_set=training_set,
        training_set_left_out=set_left_out,
        cnn=cnn,
        cnn_left_out=cnn_left_out,
        language_net=_language_net([folder, *parts]),
        described=None if net or net_left_out or cnn or cnn_left_out else load_described_net(folder),
    )


def _net(folder: Path, name: str, load: Callable[[Path], N]) -> tuple[N | None, bool]:
    """Return what a run has kept for its page in a file, None without it; and whether it is too large to be read."""
    file = inside(folder, name)
    if not os.path.lexists(file):
        return None, False
    if file.is_file() and file.stat().st_size > NET_LIMIT:
        return None, True
    return load(file), False


def _language_net(folders: Iterable[Path]) -> LanguageNet | str | None:
    return next((net for net in map(load_language_net, folders) if net is not None), None)


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
        raise RunError(f"{run}: only a part of a run; name the folder of the run, {folder.parent}")
    if folder.is_dir():
        raise RunError(
            f"{run}: not the folder of a run (it has no {CONFIG}) or of gf.fit (it has no {METRICS})"
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
    files = [inside(folder, name) for name in (METRICS, INSPECTIONS, NOISE, SPIKES)]
    evaluated, inspected, measured, spiked = (file if os.path.lexists(file) else None for file in files)
    shapes = _shapes(folder)
    return Part(
        metrics(read_blocks_of_rows(evaluated, MetricsRow, limit=METRICS_ROW), str(evaluated))
        if evaluated
        else Metrics(),
        inspections(read_rows(inspected, InspectionRow, limit=INSPECTIONS_ROW), shapes, str(inspected))
        if inspected
        else Inspections(),
        shapes,
        noise(read_blocks_of_rows(measured, NoiseRow, limit=METRICS_ROW)) if measured else Curve(),
        spikes(read_rows(spiked, SpikeRow, limit=INSPECTIONS_ROW)) if spiked else Spikes(),
        _loss(folder),
    )


def _loss(folder: Path) -> str:
    """Return the name of the function that made a loss; "" where it is not known, as in a model.json of others."""
    try:
        model = model_file(folder)
    except FileError:
        return ""
    return model.get("loss", "next_token_loss") if model else ""


def _of_fit(folder: Path) -> Kept:
    """Read what `gf.fit` has kept in a folder of its own; its checkpoint tells its settings and versions."""
    part, notes = _part(folder), _notes(folder)
    settings = notes.get("settings", {})
    result = None
    if notes.get("finished") and part.history.n:
        last = part.history.last
        result = {"outcome": judge([], {"training loss": last.get("loss", math.nan)})}
    versions = notes.get("versions", {}) | ({"seed": settings["seed"]} if "seed" in settings else {})
    pictures, drawings, left_out = _pictures(folder)
    try:
        model = model_file(folder)
    except FileError:  # which `load_described_net` reports
        model = None
    network = {"network": f"gf.{model['net']}", **model["settings"]} if model else {}
    loss = {"loss": f"gf.{model['loss']}"} if model and "loss" in model else {}
    return Kept(
        folder,
        "",
        network | loss | settings,
        versions,
        result,
        {"": part},
        pictures,
        None,
        pictures_left_out=left_out,
        drawings=drawings,
        language_net=_language_net([folder]) if model else None,
        described=load_described_net(folder) if os.path.lexists(folder / MODEL) else NOT_DESCRIBED,
    )


def _pictures(folder: Path) -> tuple[dict[str, bytes], dict[str, bytes], dict[str, str]]:
    """Return the pictures in a folder, those that are SVG; and of those that are not read, why."""
    files = [file for ending in ("png", "gif", "svg") for file in sorted(folder.glob(f"*.{ending}"))]
    pictures: dict[str, bytes] = {}
    drawings: dict[str, bytes] = {}
    # A chart and its PNG count as one.
    names = list(dict.fromkeys(file.stem for file in files))
    many = set(names[MAX_PICTURES:])
    left_out = {
        file.name: f"there are more than {MAX_PICTURES} pictures" for file in files if file.stem in many
    }
    room = PICTURES_LIMIT
    for file in files:
        if file.name in left_out:
            continue
        try:
            data = read_bytes(inside(folder, file.name), min(PICTURE_LIMIT, room))
        except FileError as error:
            left_out[file.name] = str(error).removeprefix(f"{file}: ")
            continue
        (drawings if file.suffix == ".svg" else pictures)[file.stem] = data
        room -= len(data)
    return pictures, drawings, left_out


def _shapes(folder: Path) -> Shapes:
    """Return the shapes of the parameters in a folder's checkpoint, without reading them."""
    checkpoint = newest(folder)
    shapes = parameter_shapes(checkpoint) if checkpoint else {}
    try:
        return {name: shapes[name] for name in sorted(shapes, key=reading_order)}
    except ValueError as error:  # a number of thousands of digits
        raise FileError(
            f"{checkpoint and checkpoint.file}: names no arrays of a network ({error})"
        ) from error


def _notes(folder: Path) -> Notes:
    """Return the notes in a folder's checkpoint; none where there is no checkpoint yet."""
    checkpoint = newest(folder)
    return notes_of(checkpoint, Notes) if checkpoint else {}
