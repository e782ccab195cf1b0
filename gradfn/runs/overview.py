"""The runs in a folder of runs, each in a line: what `gradfn runs` prints. Nothing here imports jax."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

from gradfn.files import LOCK, FileError, owned
from gradfn.layout import CONFIG, RESULT
from gradfn.runs.folder import RUNS, read_config, read_ended, started
from gradfn.runs.outcome import Outcome, read_result

State = Literal["finished", "running", "interrupted", "failed", "damaged"]


class RunLine(NamedTuple):
    """What the list of runs says about one.

    Attributes:
        experiment: its name; "" where its files cannot be read.
        started: when it started, in UTC.
        state: finished has a result; running belongs to a process; interrupted was stopped or killed, and can be
            resumed; failed ended with an error; damaged has files that cannot be read.
        seconds: how long it took until its end, over all processes that continued it; None where that is not known.
        result: what it measured and whether that is what was expected; for a failed or a damaged run, the error.
        folder: where it is stored.
    """

    experiment: str
    started: datetime
    state: State
    seconds: float | None
    result: str
    folder: Path


def overview(experiments: Iterable[str] = (), root: Path = RUNS) -> list[RunLine]:
    """Return the runs in a folder of runs, the newest first.

    Args:
        experiments: only the runs of these; of all experiments by default.
        root: the folder, which has one folder per experiment, with one folder per run in it.
    """
    names = [*experiments] or ["*"]
    folders = {file.parent for name in names for file in root.glob(f"{name}/*/{CONFIG}")}
    return sorted(map(_line, folders), key=lambda line: (line.started, str(line.folder)), reverse=True)


def _line(folder: Path) -> RunLine:
    try:
        experiment = read_config(folder)["experiment"]
        result, ended = read_result(folder), read_ended(folder)
    except FileError as error:
        return RunLine("", started(folder), "damaged", None, _plain(str(error)), folder)
    seconds = ended["seconds"] if ended else None
    if ended and ended["state"] == "failed":
        return RunLine(experiment, started(folder), "failed", seconds, _plain(ended["error"]), folder)
    if result is not None:
        return RunLine(experiment, started(folder), "finished", seconds, _result(result), folder)
    state: State = "running" if _running(folder) else "interrupted"
    return RunLine(experiment, started(folder), state, seconds, "", folder)


def _result(result: dict[str, object]) -> str:
    outcome = result.get("outcome")
    if not isinstance(outcome, Outcome):
        return _plain(str(result.get("verdict", "")))
    # In front, because the end of a line is cut in a narrow terminal.
    return ("NOT as expected: " if outcome.state == "missed" else "") + _plain(outcome.reached)


def _plain(text: str) -> str:
    """Return a text in one line, without characters that could control the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def _running(folder: Path) -> bool:
    """Return whether a process owns a folder; it has no result yet."""
    if not os.path.lexists(folder / LOCK):
        return False
    try:
        with owned(folder):
            return os.path.lexists(folder / RESULT)
    except FileError:
        return True
    except OSError:
        return False


def duration(seconds: float | None) -> str:
    """Return a time in at most seven characters.

    >>> [duration(seconds) for seconds in (None, 4.3, 59.7, 3599, 7380, 200_000)]
    ['', '4 s', '1 min', '60 min', '2.0 h', '56 h']
    """
    if seconds is None:
        return ""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36_000 else f"{seconds / 3600:.0f} h"


def table(lines: Sequence[RunLine], width: int) -> list[str]:
    """Return the lines of a table of runs that is at most `width` columns wide; the last column is shortened.

    Where there is room, it says when each run started in local time; otherwise the folder does, in UTC.
    """
    rows = [["RUN", "STATE", "TIME", "RESULT"]]
    rows += [[str(line.folder), line.state, duration(line.seconds), line.result] for line in lines]
    if width >= 100:
        when = [f"{line.started.astimezone():%Y-%m-%d %H:%M}" for line in lines]
        rows = [[*row[:1], start, *row[1:]] for row, start in zip(rows, ["STARTED", *when], strict=True)]
    *sizes, _ = (max(map(len, cells)) for cells in zip(*rows, strict=True))
    return [_cut("  ".join([*map(str.ljust, row, sizes), row[-1]]).rstrip(), width) for row in rows]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
