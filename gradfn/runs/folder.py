"""Run folders: where an experiment stores its options, its results and its pictures.

A run is a folder that contains a `config.json`, which is written last and atomically: a run that is interrupted while
it starts exists as a whole or not at all. One process owns the folder from `start` until `finish`, or until it ends.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, TypeVar

from msgspec import Meta

from gradfn import layout
from gradfn.display import to_json
from gradfn.files import FileError, inside, owned, parse_json, read_json, replace_file
from gradfn.layout import CHECKPOINT, CONFIG, ENDED, METRICS, RESULT, VERSIONS
from gradfn.runs.config import RunConfig, options
from gradfn.versions import versions

T = TypeVar("T")
RUNS = Path(layout.RUNS)
# Bytes of the first two files.
CONFIG_LIMIT = 1 << 20
# The key of the starting time in versions.json.
STARTED = "started"
# The folders that this process owns, by their real paths.
_OWNED: dict[str, contextlib.ExitStack] = {}
# By the same paths: when this process started or resumed the run, as `time.monotonic` has it, and the seconds before.
_SINCE: dict[str, tuple[float, float | None]] = {}


# What these files may contain. Numbers are bounded so that arithmetic with them stays finite.
Number = Annotated[float, Meta(ge=-1e300, le=1e300)]
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Option = bool | Integer | Number | str | None


class ConfigFile(TypedDict):
    """`config.json`: the experiment, by a name that a file can have, and its options."""

    experiment: Annotated[str, Meta(pattern=r"\A[^/\\\x00-\x1f\x7f]{1,255}\Z")]
    options: dict[str, Option | list[Option]]


# versions.json: versions of the packages, the platform, the seed, and STARTED.
VersionsFile = dict[str, bool | Integer | Number | str | None]


class EndedFile(TypedDict):
    """`ended.json`: how a run ended; a process that is killed does not write it.

    Attributes:
        state: whether the run has a result, was stopped by a signal, or failed.
        seconds: from start to end, of all processes that continued the run; None where one of them was killed.
        error: what failed, in one line; "" where nothing did.
    """

    state: Literal["finished", "interrupted", "failed"]
    seconds: Annotated[float, Meta(ge=0, le=1e300)] | None
    error: str


class RunError(FileError):
    """A run that cannot be started or resumed as requested."""


def refuse_a_run(folder: Path) -> None:
    """Raise a RunError where a folder contains a run."""
    if os.path.lexists(folder / CONFIG):
        raise RunError(f"{folder} already contains a run: resume it (--resume), or name another folder")


def several() -> bool:
    """Return whether this is one of several processes; before jax is imported it is not."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def from_first(make: Callable[[], T]) -> T:
    """Return what the first of several processes makes, which must be JSON: see `gradfn.train.processes`."""
    if not several():
        return make()
    from gradfn.train import processes

    return processes.from_first(make)


def start(experiment: str, config: RunConfig) -> Path:
    """Make the folder of a settled run, write its options and versions, and print where it is.

    The process owns the folder until `finish`, or until it ends; of several processes the first one does.

    Args:
        experiment: its name.
        config: from `settle`.

    Returns:
        The folder.

    Raises:
        RunError: the folder cannot be made, or contains files that do not belong to a run.
        FileError: another process owns it.
    """
    return Path(from_first(lambda: str(_start(experiment, config))))


def _start(experiment: str, config: RunConfig) -> Path:
    folder = Path(config.folder or "")
    if config.resume:
        _own(folder)
        ended = read_ended(folder)  # `gf.fit` removes the file once it has accepted the checkpoint
        _SINCE[os.path.realpath(folder)] = time.monotonic(), ended["seconds"] if ended else None
        finished = (folder / RESULT).exists()
        print(f"{folder} has finished: computing its result again" if finished else f"resuming in {folder}")
        return folder
    content = to_json({"experiment": experiment, "options": options(config)}, indent=2) + "\n"
    parse_json(content, ConfigFile, f"{folder / CONFIG}")  # what cannot be read back is not written
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_files(folder)
        _own(folder)
        try:
            _refuse_files(folder)  # another process may have written some since
            now = datetime.now(UTC).isoformat()
            write_json(folder / VERSIONS, versions() | {"seed": getattr(config, "seed", None), STARTED: now})
            replace_file(folder / CONFIG, content.encode())
        except BaseException:
            disown(folder)
            raise
    except OSError as error:
        raise RunError(f"{folder}: cannot become a run's folder ({error.strerror})") from error
    _SINCE[os.path.realpath(folder)] = time.monotonic(), 0.0
    print(f"running in {folder}")
    return folder


def _refuse_files(folder: Path) -> None:
    """Raise a RunError where a run might overwrite another program's files: it writes under many names."""
    refuse_a_run(folder)
    found = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    if found and not (found == [VERSIONS] and "gradfn" in read_versions(folder)):
        raise RunError(
            f"{folder}: contains {found[0]}, which does not belong to a run: name a new or an empty folder"
        )


def _own(folder: Path) -> None:
    """Own a folder until `disown`, or until the process ends."""
    _OWNED.setdefault(os.path.realpath(folder), contextlib.ExitStack()).enter_context(owned(folder))


def disown(folder: str | Path) -> None:
    """Give up the ownership of a folder, if this process has it."""
    if stack := _OWNED.pop(os.path.realpath(folder), None):
        stack.close()


def end(folder: str | Path, state: Literal["finished", "interrupted", "failed"], error: str = "") -> None:
    """Write how a run ended and how long it took, where this process owns its folder and the disk has room."""
    path = os.path.realpath(folder)
    if path not in _OWNED or path not in _SINCE:
        return
    since, before = _SINCE.pop(path)
    seconds = None if before is None else before + time.monotonic() - since
    content: EndedFile = {"state": state, "seconds": seconds, "error": " ".join(error.split())[:1000]}
    with contextlib.suppress(OSError):
        write_json(Path(folder) / ENDED, content)


def keep_training(folder: Path, history: Sequence[Mapping[str, Any]], params: Any) -> None:
    """Write metrics and parameters of a training that `gf.fit` did not run, so that a page can show them.

    Args:
        folder: of the run.
        history: one row per evaluation, each with `step`.
        params: the final parameters.
    """
    from gradfn.train.checkpoint import save

    replace_file(folder / METRICS, "".join(to_json(row) + "\n" for row in history).encode())
    save(folder / CHECKPOINT, {"params": params}, {})


def read_config(folder: Path) -> ConfigFile:
    """Read the experiment and the options of a run.

    Raises:
        FileError: the file is missing, leads out of the folder, or has another form.
    """
    return read_json(inside(folder, CONFIG), ConfigFile, CONFIG_LIMIT)


def read_versions(folder: Path) -> VersionsFile:
    """Read the versions that a run used; {} where they are not stored. Errors are those of `read_config`."""
    file = inside(folder, VERSIONS)
    return read_json(file, VersionsFile, CONFIG_LIMIT) if os.path.lexists(file) else {}


def read_ended(folder: Path) -> EndedFile | None:
    """Read how a run ended; None where that is not known. Errors are those of `read_config`."""
    file = inside(folder, ENDED)
    return read_json(file, EndedFile, CONFIG_LIMIT) if os.path.lexists(file) else None


def latest(experiment: str | Path, holding: str = CONFIG) -> Path | None:
    """Return the run of an experiment that started last, or None where there is no run.

    Args:
        experiment: its name.
        holding: the name of a file that the run must have.
    """
    folders = [file.parent for file in (RUNS / experiment).glob(f"*/{holding}")]
    return max(folders, key=lambda folder: (started(folder), folder.name), default=None)


def started(folder: Path) -> datetime:
    """Return when a run started; for one without that entry, when its options were written."""
    try:
        return datetime.fromisoformat(str(read_versions(folder)[STARTED])).astimezone(UTC)
    except (ValueError, KeyError, OSError, OverflowError):
        file = folder / CONFIG
        seconds = (file if os.path.lexists(file) else folder).lstat().st_mtime
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OSError, OverflowError):  # a year beyond 9999
        return datetime.min.replace(tzinfo=UTC)


def write_json(file: Path, content: Any) -> None:
    """Write JSON atomically: a reader finds the old file or the new one. NaN and infinities become null."""
    replace_file(file, (to_json(content, indent=2) + "\n").encode())
