"""What a run says while it trains: rows of metrics in memory, in files and on the terminal."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

import numpy as np
from jaxtyping import PyTree

from gradfn.console import Output
from gradfn.files import FileError, inner_folder
from gradfn.layout import EVENTS, LOGS, METRICS, NOT_METRICS
from gradfn.train.checkpoint import CheckpointError, Number
from gradfn.train.events import Events
from gradfn.train.identity import Identity, difference
from gradfn.train.rows import Extent, Row, Rows
from gradfn.versions import versions

if TYPE_CHECKING:
    from gradfn.inspection import Inspection
    from gradfn.per_example import NoiseScale

REMEMBERED = 0.98  # of the noise scale's running sums, from one measure to the next


class Settings(TypedDict):
    """What a run was asked for, as far as it makes the run what it is."""

    steps: int
    batch_size: int
    seed: int
    eval_every: int | None


@dataclass(frozen=True)
class Notes:
    """What `fit` writes into a checkpoint beside the state.

    Attributes:
        settings: of the run.
        finished: whether it ended.
        sums: of each metric since the last row.
        n_steps, examples, row_seconds: how many steps and examples these are of, and how long they took.
        seconds: spent in steps, in all.
        noise_sums: of signal and noise, what is older counting less.
        logs: how far each file of rows reaches, by its name; None of an earlier version, which had the rows here.
        identity: what makes the run the run it is; None of an earlier version.
        versions: of what it ran on.
    """

    settings: Settings
    finished: bool
    sums: dict[str, Number]
    n_steps: int
    examples: int
    row_seconds: float
    seconds: float
    noise_sums: tuple[Number, Number]
    logs: dict[str, Extent] | None = None
    identity: Identity | None = None
    versions: dict[str, Any] = field(default_factory=dict)


class Log:
    """The history of a run, and where it is shown.

    Between two rows it keeps the sums that the next row is made of, so that a checkpoint can hold them too.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: Settings,
        identity: Identity | None,
        progress: bool,
        tokens: int | None,
    ) -> None:
        self.folder, self.settings, self.identity, self.progress = folder, settings, identity, progress
        self.tokens = tokens  # of an example, where examples are sequences of them
        self.history, self.inspections, self.noise = (_rows(folder, name) for name in LOGS)
        self.noise_sums = [0.0, 0.0]  # of signal and noise, what is older counting less
        self.finished = False
        self.sums: dict[str, float] = {}
        self.n_steps = 0
        self.examples = 0
        self.row_seconds = 0.0  # spent in steps since the last row
        self.seconds = 0.0  # in all
        self._events: Events | None = None
        self._bar: Any = None
        self._began: tuple[float, int] | None = None  # when this process began to train, and at which step

    @property
    def files(self) -> list[Rows]:
        """The files of rows; none where there is no folder."""
        return [rows for rows in (self.history, self.inspections, self.noise) if isinstance(rows, Rows)]

    def begin(self, step: int) -> None:
        """Say that all is compiled, and training begins at a step: what is left is told by the time from here on."""
        self._began = time.monotonic(), step

    def left(self) -> float:
        """Return how many seconds are left, evaluations, inspections and checkpoints included."""
        if self._began is None or self._steps_taken() == self._began[1]:
            return math.nan
        began, step = self._began
        taken = self._steps_taken()
        return (time.monotonic() - began) / (taken - step) * (self.settings["steps"] - taken)

    def steps(self, values: dict[str, np.ndarray], batch_size: int, seconds: float) -> None:
        """Take in the metrics of a chunk of steps, `[steps]` each."""
        n = len(values["loss"])
        for name, column in values.items():
            # One by one in float64: the sum must not depend on how steps were grouped into chunks.
            terms = np.concatenate([[self.sums.get(name, 0.0)], column])
            self.sums[name] = float(np.cumsum(terms, dtype=np.float64)[-1])
        self.n_steps += n
        self.examples += n * batch_size
        self.row_seconds += seconds
        self.seconds += seconds
        if self._bar is not None:
            self._advance(n, float(values["loss"][-1]))

    def row(self, step: int, epoch: float | None, answers: dict[str, float]) -> None:
        """Close a row: the means since the last one, and what the evaluation returned.

        Raises:
            ValueError: the evaluation returned a name that the row has already.
        """
        refuse_names(answers, "evaluate", self.sums)
        means = {name: total / self.n_steps for name, total in self.sums.items()}
        row = {"step": step} | ({} if epoch is None else {"epoch": epoch}) | means | answers
        rate = self.examples / max(self.row_seconds, 1e-9)
        row |= {"examples_per_second": rate, "seconds": self.seconds}
        if self.tokens:
            row["tokens_per_second"] = self.tokens * rate
        self.history.append(row)
        self.sums, self.n_steps, self.examples, self.row_seconds = {}, 0, 0, 0.0
        self._row_events(row)
        if self._bar is None and self.progress:
            line = _line(row, self.settings["steps"], self.left())
            print(line, file=Output(sys.stdout), flush=True)

    def _row_events(self, row: Row) -> None:
        if self._events:
            self._events.add(row["step"], {name: value for name, value in row.items() if name != "step"})

    def inspection(self, step: int, seen: Inspection) -> None:
        """Keep what an inspection saw before a step."""
        row = {"step": step} | seen.to_dict()
        self.inspections.append(row)
        if self._events:
            self._events.add(
                step, {f"gradient rms/{name}": stats["rms"] for name, stats in row["grads"].items()}
            )

    def noise_scale(self, step: int, seen: NoiseScale) -> None:
        """Keep the noise scale that was measured before a step, and the running one."""
        row = {"step": step} | seen.to_dict()
        # Sums first, then their ratio: each batch's own ratio is far off, and may not exist.
        signal, noise = self.noise_sums = [
            REMEMBERED * total + row[name]
            for total, name in zip(self.noise_sums, ("gradient_square", "variance"), strict=True)
        ]
        row["running_scale"] = noise / signal if signal > 0 else None
        self.noise.append(row)
        if self._events and row["running_scale"] is not None:
            self._events.add(step, {"noise scale": row["running_scale"]})

    def notes(self) -> dict[str, Any]:
        """Return what a checkpoint must hold for the log to go on: `Notes`."""
        return {
            "settings": self.settings,
            "finished": self.finished,
            "sums": self.sums,
            "n_steps": self.n_steps,
            "examples": self.examples,
            "row_seconds": self.row_seconds,
            "seconds": self.seconds,
            "noise_sums": self.noise_sums,
            "logs": {rows.file.name: rows.extent for rows in self.files},
            "identity": self.identity,
            "versions": versions(),
        }

    def restore(self, notes: Notes, step: int) -> None:
        """Resume from a checkpoint's notes; nothing is written.

        Args:
            notes: from there.
            step: of the state beside them.

        Raises:
            CheckpointError: they are of a run with other settings (more steps are fine, and None is any), other
                data or another loss; or they do not fit the state, or the rows in the folder.
        """
        was = notes.settings
        for name, value in self.settings.items():
            before = was[name]  # type: ignore[literal-required]
            longer = name == "steps" and self.settings["steps"] > was["steps"]
            if value is not None and value != before and not longer:
                self._refuse(f"is of a run with {name} {before}, got {value}")
        if notes.identity is None:
            self._refuse("does not say of which data it is; an earlier version of gradfn wrote it")
        if notes.logs is None:
            self._refuse("does not say how many rows there are; an earlier version of gradfn wrote it")
        assert self.identity
        if differs := difference(notes.identity, self.identity):
            self._refuse(f"is of another run: {differs}")
        for rows in self.files:
            extent = notes.logs.get(rows.file.name, {"rows": 0, "bytes": 0, "crc": 0})
            try:
                rows.restore(extent, _Checked(rows.file.name, step))
            except FileError as error:
                raise CheckpointError(str(error)) from error
        last = self.history[-1]["step"] if self.history else 0
        if last + notes.n_steps != step or notes.n_steps < 0:
            found = f"{last:,} in the last row and {notes.n_steps:,} since"
            self._refuse(f"is of step {step:,}, but counts {found}; it is damaged")
        self.settings["eval_every"] = self.settings["eval_every"] or was["eval_every"]
        self.sums = {name: float(total) for name, total in notes.sums.items()}
        self.noise_sums = [float(total) for total in notes.noise_sums]
        self.n_steps, self.examples = notes.n_steps, notes.examples
        self.row_seconds, self.seconds = notes.row_seconds, notes.seconds
        # A run that took all its steps may take more; one that `stop` ended has ended.
        longer = last == was["steps"] < self.settings["steps"]
        self.finished = notes.finished and not longer

    def _refuse(self, why: str) -> NoReturn:
        remedy = "Resume with what that run began with, or use another folder"
        raise CheckpointError(f"{self.folder}: its checkpoint {why}. {remedy}")

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        for rows in self.files:
            rows.sync()

    @contextlib.contextmanager
    def open(self, step: int) -> Iterator[None]:
        """Keep the files open, and the bar shown, while a run continues from a step."""
        with contextlib.ExitStack() as stack:
            if self.folder:
                self._open_files(stack, step)
            if self.progress:
                self._open_bar(stack)
            yield

    def _open_files(self, stack: contextlib.ExitStack, step: int) -> None:
        assert self.folder
        # Rows that an interrupted run wrote after its last checkpoint are about to be made again.
        for rows in self.files:
            rows.open()
            stack.callback(rows.close)
        # TensorBoard forgets what it has of this step and of later ones.
        self._events = Events(inner_folder(self.folder, EVENTS), step)
        stack.callback(self._events.close)
        # Inspections come before their step, and are made again; the row after the last step is not.
        for row in self.history[-1:]:
            if row["step"] == step:
                self._row_events(row)

    def _open_bar(self, stack: contextlib.ExitStack) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        output: PyTree = Output(sys.stdout)
        console = Console(file=output)
        if (
            not console.is_terminal or console.is_dumb_terminal
        ):  # one that cannot redraw a line would show no bar
            return
        text = TextColumn("{task.description}")
        remaining = TextColumn("{task.fields[left]}", style="progress.remaining")
        left = (TimeElapsedColumn(), TextColumn("of which left"), remaining)
        bar = Progress(text, BarColumn(), *left, console=console)
        self._bar = stack.enter_context(bar)
        total, done = self.settings["steps"], self._steps_taken()
        self._task = bar.add_task("compiling", total=total, completed=done, left=_clock(math.nan))
        stack.callback(setattr, self, "_bar", None)

    def _steps_taken(self) -> int:
        return (self.history[-1]["step"] if self.history else 0) + self.n_steps

    def _advance(self, n: int, loss: float) -> None:
        rate = self.examples / max(self.row_seconds, 1e-9)
        text = f"step {self._steps_taken():,} loss {loss:.4f}"
        if self.history:
            skip = ("loss", *NOT_METRICS)
            text += "".join(
                f" {name} {value:.4g}" for name, value in self.history[-1].items() if name not in skip
            )
        per_second = f"{self.tokens * rate:,.0f} tokens/s" if self.tokens else f"{rate:,.0f} examples/s"
        self._bar.update(self._task, advance=n, description=f"{text} {per_second}", left=_clock(self.left()))


def _rows(folder: Path | None, name: str) -> Rows | list[Row]:
    return [] if folder is None else Rows(folder / name)


class _Checked:
    """Raises a ValueError for a row of a log that none can be: called with each, in order."""

    def __init__(self, name: str, step: int) -> None:
        self.metrics = name == METRICS
        # A row is of the steps before it, an inspection of the step after it.
        self.last, self.end = (0, step) if self.metrics else (-1, step - 1)

    def __call__(self, row: Row) -> None:
        step = row.get("step")
        if type(step) is not int or not self.last < step <= self.end:
            raise ValueError(f"expected a step from {self.last + 1:,} to {self.end:,}, got {step!r:.30}")
        self.last = step
        if self.metrics:
            numbers = all(value is None or type(value) in (int, float) for value in row.values())
            if not numbers or "loss" not in row:
                raise ValueError("expected numbers, among them a loss")


def refuse_names(names: Iterable[str], what: str, others: Iterable[str] = ()) -> None:
    """Raise a ValueError for a name that a row of metrics has already."""
    taken = sorted({*NOT_METRICS, "loss", *others}.intersection(names))
    if taken:
        raise ValueError(
            f"fit: {what} returned {', '.join(taken)}, which a row of metrics has already. Rename it"
        )


def _clock(seconds: float) -> str:
    """Return a time as hours, minutes and seconds, as the bar has them.

    >>> _clock(3723.4), _clock(math.nan)
    ('1:02:03', '-:--:--')
    """
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _line(row: Row, steps: int, left: float) -> str:
    named = " ".join(f"{name} {value:.4f}" for name, value in row.items() if name not in NOT_METRICS)
    rates = {"tokens/s": row.get("tokens_per_second"), "examples/s": row["examples_per_second"]}
    rate = next(f"{rate:,.0f} {unit}" for unit, rate in rates.items() if rate)
    return f"step {row['step']:,}/{steps:,} {named} {rate}, {row['seconds']:.1f} s, {left:.1f} s left"
