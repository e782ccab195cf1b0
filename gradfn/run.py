"""Run folders: where an experiment keeps what it was told and what came of it.

A run is a folder with a `config.json` in it, which is written last and in one go. So whatever interrupts the
beginning of a run, it is there as a whole or not at all. From `begin` to `finish`, or to the end of the process, one
process owns the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypedDict, TypeVar

import msgspec
from msgspec import Meta

from gradfn.display import to_json
from gradfn.files import FileError, inside, owned, parse_json, read_json, replace_file
from gradfn.layout import CHECKPOINT, METRICS
from gradfn.versions import versions

RUNS = Path("runs")
CONFIG, VERSIONS, RESULT = "config.json", "versions.json", "result.json"
CONFIG_LIMIT = 1 << 20  # bytes of the first two
BEGUN = "begun"  # when, among the versions
_OWNED: dict[str, contextlib.ExitStack] = {}  # the folders of this process's runs, by their real paths


# What may stand in these files. Numbers are bounded so that arithmetic with them stays finite.
Number = Annotated[float, Meta(ge=-1e300, le=1e300)]
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Option = bool | Integer | Number | str | None


class ConfigFile(TypedDict):
    """`config.json`: whose run it is, a name that can be a file's, and its options."""

    experiment: Annotated[str, Meta(pattern=r"\A[^/\\\x00-\x1f\x7f]{1,255}\Z")]
    options: dict[str, Option | list[Option]]


# versions.json: what it ran on, its seed, and BEGUN.
VersionsFile = dict[str, bool | Integer | Number | str | None]
# result.json: its verdict, a text, and whatever an experiment measured.
ResultFile = dict[str, Any]


class RunError(FileError):
    """A run that cannot be begun, or gone on with, as asked."""


class RunConfig(Protocol):
    """A dataclass of options, among them where to run and whether to go on."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def folder(self) -> str | None:
        """The run's folder; None for a new one, or, with `resume`, for the latest."""

    @property
    def resume(self) -> bool:
        """Whether to go on with a run."""


C = TypeVar("C", bound=RunConfig)


def settle(experiment: str, config: C) -> C:
    """Settle where a run takes place, and with `resume` what its options are.

    Args:
        experiment: its name.
        config: with `folder` and `resume`. With `resume`, options left at their defaults stand for the stored ones.

    Returns:
        The config with its folder, and with the stored options; `resume` is False where there is no run to go
        on with, which it says.

    Raises:
        RunError: the folder holds a run already; or, with `resume`, a run of something else or with other options.
    """
    if config.resume:
        was = stored(experiment, config)
        if was is not None:
            return merge(config, was, type(config)())
        print(f"no run to go on with in {config.folder or RUNS / experiment}: starting a new one")
        return settle(experiment, dataclasses.replace(config, resume=False))
    if config.folder is None:
        # To the microsecond, so that runs that are started together do not meet in one folder.
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        return dataclasses.replace(config, folder=str(RUNS / experiment / stamp))
    _refuse_a_run(Path(config.folder))
    return config


def _refuse_a_run(folder: Path) -> None:
    if os.path.lexists(folder / CONFIG):
        raise RunError(f"{folder} holds a run: go on with it (--resume), or name another folder")


def begin(experiment: str, config: RunConfig) -> Path:
    """Make the folder of a settled run and write its options and the versions it runs on; say where it is.

    The process owns the folder until `finish`, or to its end.

    Args:
        experiment: its name.
        config: from `settle`.

    Returns:
        The folder.

    Raises:
        RunError: the folder cannot be made, or contains files that are not of a run.
        FileError: another process runs in it.
    """
    folder = Path(config.folder or "")
    if config.resume:
        _own(folder)
        finished = (folder / RESULT).exists()
        print(
            f"{folder}: finished before, so here is its result again" if finished else f"going on in {folder}"
        )
        return folder
    content = to_json({"experiment": experiment, "options": options(config)}, indent=2) + "\n"
    parse_json(content, ConfigFile, f"{folder / CONFIG}")  # what could not be read back is not begun
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_files(folder)
        _own(folder)
        try:
            _refuse_files(folder)  # which another process may have left since
            now = datetime.now(UTC).isoformat()
            write_json(folder / VERSIONS, versions() | {"seed": getattr(config, "seed", None), BEGUN: now})
            replace_file(folder / CONFIG, content.encode())
        except BaseException:
            disown(folder)
            raise
    except OSError as error:
        raise RunError(f"{folder}: cannot be made a run's folder ({error.strerror})") from error
    print(f"running in {folder}")
    return folder


def _refuse_files(folder: Path) -> None:
    """Raise unless a run may begin here: it writes under many names, none of which may be somebody else's file."""
    _refuse_a_run(folder)
    found = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    if found and not (found == [VERSIONS] and "gradfn" in read_versions(folder)):
        raise RunError(
            f"{folder}: contains {found[0]}, which is not of a run: name a new folder or an empty one"
        )


def _own(folder: Path) -> None:
    """Own a folder until `disown`, or to the end of the process."""
    _OWNED.setdefault(os.path.realpath(folder), contextlib.ExitStack()).enter_context(owned(folder))


def disown(folder: str | Path) -> None:
    """Let other processes run in a folder that this one may own."""
    if stack := _OWNED.pop(os.path.realpath(folder), None):
        stack.close()


def finish(folder: Path, result: Mapping[str, Any]) -> None:
    """Write what came of a run, which marks it as finished: `result.json`; others may run in its folder then."""
    write_json(folder / RESULT, dict(result))
    disown(folder)


def keep_training(folder: Path, history: Sequence[Mapping[str, Any]], params: Any) -> None:
    """Write what a page shows of a training that `gf.fit` did not run: its rows of metrics and its parameters.

    Args:
        folder: of the run.
        history: a row per evaluation, with `step`.
        params: at the end.
    """
    from gradfn.train.checkpoint import save

    replace_file(folder / METRICS, "".join(to_json(row) + "\n" for row in history).encode())
    save(folder / CHECKPOINT, {"params": params}, {})


def read_config(folder: Path) -> ConfigFile:
    """Read whose run a folder has, and its options.

    Raises:
        FileError: the file is missing, leads out of the folder, or has another form.
    """
    return read_json(inside(folder, CONFIG), ConfigFile, CONFIG_LIMIT)


def read_versions(folder: Path) -> VersionsFile:
    """Read what a run ran on; {} where that is not kept. Errors are those of `read_config`."""
    file = inside(folder, VERSIONS)
    return read_json(file, VersionsFile, CONFIG_LIMIT) if os.path.lexists(file) else {}


def read_result(folder: Path) -> ResultFile | None:
    """Read what came of a run; None where it has not finished. Errors are those of `read_config`."""
    file = inside(folder, RESULT)
    if not os.path.lexists(file):
        return None
    result = read_json(file, ResultFile)
    if not isinstance(verdict := result.get("verdict", ""), str):
        raise FileError(f"{file}: expected a text as the verdict, got {type(verdict).__name__}")
    return result


def latest(experiment: str | Path, holding: str = CONFIG) -> Path | None:
    """Return the run of an experiment that began last, or None where there is no run.

    Args:
        experiment: its name.
        holding: a file that the run must have.
    """
    folders = [file.parent for file in (RUNS / experiment).glob(f"*/{holding}")]
    return max(folders, key=lambda folder: (begun(folder), folder.name), default=None)


def begun(folder: Path) -> datetime:
    """Return when a run began; for one of an earlier version, when its options were written."""
    try:
        return datetime.fromisoformat(str(read_versions(folder)[BEGUN])).astimezone(UTC)
    except (ValueError, KeyError, OSError, OverflowError):
        file = folder / CONFIG
        seconds = (file if os.path.lexists(file) else folder).lstat().st_mtime
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OSError, OverflowError):  # a year beyond 9999
        return datetime.min.replace(tzinfo=UTC)


def stored(experiment: str, config: C) -> C | None:
    """Return the config of the run that `config` would go on with, or None where there is no such run.

    It is the run in `config.folder`, or, where that is None, the latest in `runs/<experiment>`.

    Raises:
        RunError: the folder holds a run of another experiment, or one with options that it does not take.
        FileError: its config cannot be read.
    """
    folder = latest(experiment) if config.folder is None else Path(config.folder)
    if folder is None or not os.path.lexists(folder / CONFIG):
        return None
    content = read_config(folder)
    if content["experiment"] != experiment:
        raise RunError(f"{folder} holds a run of {content['experiment']}, not of {experiment}")
    kind = type(config)
    try:
        if unknown := sorted(content["options"].keys() - options(config).keys()):
            raise ValueError(f"no option {unknown[0]!r}")
        return msgspec.convert(content["options"] | {"folder": str(folder), "resume": True}, kind)
    except (TypeError, ValueError) as error:
        raise RunError(
            f"{folder / CONFIG}: not what {experiment} takes now ({error}); start a new run"
        ) from error


def merge(config: C, was: C, default: C) -> C:
    """Return the stored config `was`, if `config` asks for nothing else: each option is as stored or as in `default`.

    Raises:
        RunError: it names the option.
    """
    for name, value in options(config).items():
        before = options(was)[name]
        if value != before and value != options(default)[name]:
            raise RunError(
                f"{name} {value}: the run in {was.folder} has {name} {before}. "
                "Drop the option, or start a new run without --resume"
            )
    return was


def options(config: RunConfig) -> dict[str, Any]:
    """Return the options that make a run what it is: all but where it takes place."""
    found = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in found.items() if name not in ("folder", "resume")}


def within(low: int, high: int | None, **numbers: int | None) -> None:
    """Raise a ValueError that names the first option outside of `low` to `high`; None is no bound, and no number.

    >>> from gradfn.run import within
    >>> within(1, None, epochs=3, hidden=0)
    Traceback (most recent call last):
    ValueError: hidden: a whole number from 1 up, came 0
    """
    for name, number in numbers.items():
        if number is not None and (number < low or (high is not None and number > high)):
            bounds = f"from {low} up" if high is None else f"from {low} to {high}"
            raise ValueError(f"{name}: a whole number {bounds}, came {number}")


def some(**parts: Any) -> None:
    """Raise a RunError that names the first part of the data that has no example.

    >>> some(train=[1, 2], validation=[])
    Traceback (most recent call last):
    gradfn.run.RunError: data: too few examples, so that none are left for validation; use more
    """
    for name, part in parts.items():
        if not len(part):
            raise RunError(f"data: too few examples, so that none are left for {name}; use more")


def batch_for(config: Any, n: int, what: str) -> int:
    """Return how many of `n` examples a step takes: `config.batch`; a default of more than there are means all.

    Raises:
        RunError: more were requested than there are; `what` is what they are called.
    """
    if config.batch > n and config.batch != type(config)().batch:
        raise RunError(f"batch: there are {n:,} {what}, got {config.batch}")
    return min(config.batch, n)


def heads_for(config: Any) -> int:
    """Return how many attention heads a network has: as `config.heads` says, else at most 4 that divide its width.

    >>> from types import SimpleNamespace
    >>> [heads_for(SimpleNamespace(heads=None, width=width)) for width in (128, 30, 25)]
    [4, 3, 1]
    """
    return config.heads or next(n for n in (4, 3, 2, 1) if config.width % n == 0)


def positive(**numbers: float) -> None:
    """Raise a ValueError that names the first option that is not above 0, or not finite.

    >>> from gradfn.run import positive
    >>> positive(rate=0.1, clip=0.0)
    Traceback (most recent call last):
    ValueError: clip: a number above 0, came 0.0
    """
    for name, number in numbers.items():
        if not 0 < number < float("inf"):
            raise ValueError(f"{name}: a number above 0, came {number}")


def write_json(file: Path, content: Any) -> None:
    """Write JSON in one go: a reader finds the old file or the new, never a part. NaN and infinities become null."""
    replace_file(file, (to_json(content, indent=2) + "\n").encode())
