"""What a run reports while it trains: rows in memory and in files, events for TensorBoard, a progress bar or lines."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import jax

from gradfn.console import Output, is_terminal
from gradfn.display import to_json
from gradfn.files import FileError, inner_folder, read_json, replace_file
from gradfn.layout import (
    EVENTS,
    INSPECTIONS,
    LOGGED,
    LOGS,
    MEASURES,
    METRICS,
    NOISE,
    NOT_METRICS,
    SPIKES,
)
from gradfn.train.checkpoint import CheckpointError
from gradfn.train.events import Events
from gradfn.train.figures import png
from gradfn.train.lazy_rows import LazyRows
from gradfn.train.logged import LogFunction, row_histograms, row_scalars
from gradfn.train.notebook_bar import NotebookBar, in_notebook
from gradfn.train.notes import Totals
from gradfn.train.rows import Extent, Row, Rows

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from gradfn.inspection import Inspection

# Columns of a progress line beside its text and its bar: the time elapsed and the time left.
TIMES_WIDTH = 23
# What the rows of each file are called.
KIND = {METRICS: "metrics", INSPECTIONS: "inspection", NOISE: "noise", SPIKES: "spike"}


class Log:
    """The rows of a run, and where they are shown.

    Args:
        folder: where to write the files; None for rows in memory alone, as on all processes but the first.
        steps: the total number of steps of the run.
        tokens: per example, where examples are sequences of tokens.
        progress: whether to show a progress bar, or lines where there is no terminal.
        watches: whether there may be spikes.
        functions: called with the kind of each row and the row, before it is in a file. A row that an interrupted run
            left in a file is not logged again.

    Attributes:
        history: one row per evaluation.
        inspections: one row per inspection.
        noise: one row per measurement of the noise scale.
        spikes: one row per spike, see `gradfn.train.spikes.row_of`.
    """

    def __init__(
        self,
        folder: Path | None,
        steps: int,
        tokens: int | None,
        progress: bool,
        watches: bool = False,
        functions: Sequence[LogFunction] = (),
    ) -> None:
        self.folder, self.tokens = folder, tokens
        self.history, self.noise = _rows(folder, METRICS), _rows(folder, NOISE)
        self.spikes = _rows(folder if watches else None, SPIKES)
        self.inspections = LazyRows() if folder is None else Rows(folder / INSPECTIONS)
        self._steps, self._progress, self._functions = steps, progress, functions
        # The steps of the rows that a run before this one logged after the checkpoint, by kind.
        self._logged: dict[str, set[int]] = {}
        self._events: Events | None = None
        self._bar: tuple[Progress | NotebookBar, TaskID] | None = None
        # When this process started training, and at which step.
        self._started: tuple[float, int] | None = None

    @property
    def _all(self) -> tuple[Rows | LazyRows | list[Row], ...]:
        return self.history, self.inspections, self.noise, self.spikes

    @property
    def files(self) -> list[Rows]:
        """The files of rows; none where there is no folder."""
        return [rows for rows in self._all if isinstance(rows, Rows)]

    @property
    def extents(self) -> dict[str, Extent]:
        """How far each file of rows reaches, by its name."""
        return {rows.file.name: rows.extent for rows in self.files}

    def restore(self, extents: Mapping[str, Extent], step: int, folder: Path) -> None:
        """Read back the rows of a folder up to a checkpoint at a step; nothing is written.

        Raises:
            CheckpointError: the rows in the folder do not fit the checkpoint.
        """
        for name, rows in zip(LOGS, self._all, strict=True):
            extent = extents.get(name, {"rows": 0, "bytes": 0, "crc": 0})
            found = rows if isinstance(rows, Rows) else Rows(folder / name)
            try:
                found.restore(extent, _Checked(name, step))
                if isinstance(rows, list):  # another process writes the files
                    rows.extend(found)
                elif isinstance(rows, LazyRows):
                    rows.extend(len(found), functools.partial(_between, list(found)))
                if self._functions and isinstance(rows, Rows):
                    self._logged[KIND[name]] = set(rows.later_steps())
            except FileError as error:
                raise CheckpointError(str(error)) from error
        if self._functions and (folder / LOGGED).exists():
            for kind, steps in read_json(folder / LOGGED, dict[str, list[int]]).items():
                self._logged[kind] = self._logged.get(kind, set()).union(steps)

    def start(self, step: int) -> None:
        """Start the clock that estimates the time left: everything is compiled, and training starts at `step`."""
        self._started = time.monotonic(), step

    def left(self, step: int) -> float:
        """Return how many seconds are left at a step, evaluations, inspections and checkpoints included."""
        if self._started is None or step == self._started[1]:
            return math.nan
        started, first = self._started
        return (time.monotonic() - started) / (step - first) * (self._steps - step)

    def row(self, row: Row) -> None:
        """Append a row of metrics, and print it where there is no progress bar."""
        self._call("metrics", row)
        self.history.append(row)
        self._row_events(row)
        if self._bar is None and self._progress:
            line = _line(row, self._steps, self.left(row["step"]))
            print(line, file=Output(sys.stdout), flush=True)
        elif self._bar and isinstance(self._bar[0], NotebookBar):
            self._bar[0].last = _line(row, self._steps, math.nan)

    def _call(self, kind: str, row: Row, of: str = "") -> None:
        """Call the functions with a row, unless they were called with it before, or with the row `of` its step."""
        if row["step"] not in self._logged.get(of or kind, ()):
            for function in self._functions:
                function(kind, dict(row))

    def _row_events(self, row: Row) -> None:
        if self._events:
            self._events.add(row["step"], row_scalars("metrics", row))

    def figures(self, step: int, figures: Mapping[str, Any]) -> None:
        """Show the figures of an evaluation; they precede its row."""
        for name, figure in figures.items():
            self._call("figure", {"step": step, "name": name, "figure": figure}, of="metrics")
        if self._events and figures:
            self._events.add(step, {}, images={name: png(figure) for name, figure in figures.items()})

    def inspect(self, steps: Sequence[int], inspections: Inspection) -> None:
        """Append the stacked inspections of the steps that follow each of `steps`."""
        if isinstance(self.inspections, LazyRows):
            self.inspections.extend(len(steps), functools.partial(_rows_of, steps, inspections))
            if not self._functions:
                return
        for row in _rows_of(steps, inspections, 0, len(steps)):
            self.inspection(row)

    def inspection(self, row: Row) -> None:
        """Append the row of an inspection, where rows are in a file."""
        self._call("inspection", row)
        if isinstance(self.inspections, Rows):
            self.inspections.append(row)
        if self._events:
            self._events.add(row["step"], row_scalars("inspection", row), row_histograms(row))

    def noise_scale(self, step: int, noise: Row) -> None:
        """Append the noise scale of the step that follows `step`, with the running one."""
        row = {"step": step} | noise
        self._call("noise", row)
        self.noise.append(row)
        if self._events:
            self._events.add(step, row_scalars("noise", row))

    def spike(self, row: Row) -> None:
        """Append the row of a spike, and print it in short."""
        self._call("spike", row)
        self.spikes.append(row)
        if self._progress:
            if self._bar is None:
                print(row["text"], file=Output(sys.stdout), flush=True)
            else:
                self._bar[0].console.print(row["text"], markup=False, highlight=False)

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        for rows in self.files:
            rows.sync()

    @contextlib.contextmanager
    def open(self, step: int) -> Iterator[None]:
        """Keep the files open, and the bar shown, while a run continues from a step."""
        with contextlib.ExitStack() as stack:
            if self.folder:
                self._open_files(stack, self.folder, step)
            if self._progress and (bar := _progress_bar()):
                stack.enter_context(bar)
                task = bar.add_task("compiling", total=self._steps, completed=step, left=_clock(math.nan))
                self._bar = bar, task
            try:
                yield
            finally:
                self._bar = None

    def _open_files(self, stack: contextlib.ExitStack, folder: Path, step: int) -> None:
        if any(self._logged.values()):  # this run may be interrupted before it has written these rows again
            logged = {kind: sorted(steps) for kind, steps in self._logged.items()}
            replace_file(folder / LOGGED, to_json(logged).encode())
        # Rows that an interrupted run wrote after its last checkpoint are written again.
        for rows in self.files:
            rows.open()
            stack.callback(rows.close)
        # TensorBoard purges its events of this step and of later ones.
        self._events = Events(inner_folder(folder, EVENTS), step)
        stack.callback(self._events.close)
        # Inspections precede their step, and are repeated; the row after the last step is not.
        for row in self.history[-1:]:
            if row["step"] == step:
                self._row_events(row)

    def advance(self, step: int, loss: float, totals: Totals) -> None:
        """Move the progress bar, if there is one, to a step, and show its loss."""
        if self._bar is None:
            return
        bar, task = self._bar
        last = self.history[-1] if self.history else {}
        skip = ("loss", *NOT_METRICS)
        rate = totals.examples_per_second
        parts = [
            f"step {step:,} loss {loss:.4f}",
            *(f" {name} {value:.4g}" for name, value in last.items() if name not in skip),
            f" {self.tokens * rate:,.0f} tokens/s" if self.tokens else f" {rate:,.0f} examples/s",
            _measures(last),
        ]
        width = bar.console.width
        text = _fitting(parts, width - _bar_width(width) - TIMES_WIDTH)
        bar.update(task, completed=step, description=text, left=_clock(self.left(step)))


def _progress_bar() -> Progress | NotebookBar | None:
    """Return a progress bar; None where the output is neither a notebook nor a terminal that can redraw a line."""
    if in_notebook():
        return NotebookBar()
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    console = Console(file=cast(IO[str], Output(sys.stdout)))
    # FORCE_COLOR makes rich take a pipe for a terminal.
    redraws = is_terminal(sys.stdout) or os.environ.get("TTY_COMPATIBLE") == "1"
    if not redraws or not console.is_terminal or console.is_dumb_terminal:
        return None
    text = TextColumn("{task.description}", table_column=Column(no_wrap=True))
    bar = BarColumn(_bar_width(console.width))
    left = TextColumn("{task.fields[left]} left", style="progress.remaining")
    return Progress(text, bar, TimeElapsedColumn(), left, console=console)


def _bar_width(columns: int) -> int:
    """Return the width of the bar itself in a terminal: 10 of 80 columns."""
    return max(columns // 8, 4)


def _fitting(parts: Sequence[str], room: int) -> str:
    """Return the first part of a text, and each other part that there is room for.

    >>> _fitting(["step 3", " accuracy 0.96", " 8/s"], 12)
    'step 3 8/s'
    """
    text = parts[0]
    for part in parts[1:]:
        if len(text) + len(part) <= room:
            text += part
    return text


def _between(rows: list[Row], start: int, stop: int) -> list[Row]:
    return rows[start:stop]


def _rows_of(steps: Sequence[int], inspections: Inspection, start: int, stop: int) -> list[Row]:
    """Return the rows from `start` to `stop` of stacked inspections."""
    from gradfn.inspection.flow import to_dicts

    found = to_dicts(jax.tree.map(lambda array: array[start:stop], inspections))
    return [{"step": step} | row for step, row in zip(steps[start:stop], found, strict=True)]


def _rows(folder: Path | None, name: str) -> Rows | list[Row]:
    return [] if folder is None else Rows(folder / name)


class _Checked:
    """Raises a ValueError for an invalid row of a log; it is called with each row, in order."""

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
    """Raise a ValueError for a name that a row of metrics already has."""
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
    text = f"step {row['step']:,}/{steps:,} {named}{_measures(row)} {rate}"
    return f"{text}, {row['seconds']:.1f} s" + ("" if math.isnan(left) else f", {left:.1f} s left")


def _measures(row: Row) -> str:
    """Return what a row says about its last step, in short.

    >>> _measures({"loss": 2.3, "grad_norm": 0.51234, "update_norm": 2e-3, "learning_rate": 3e-4, "mfu": 0.412})
    ' gradient 0.512 update 0.002 rate 0.0003 MFU 41%'
    """
    forms = ("gradient {:.3g}", "update {:.3g}", "rate {:.3g}", "MFU {:.0%}")
    named = zip(MEASURES, forms, strict=True)
    return "".join(f" {form.format(row[name])}" for name, form in named if row.get(name) is not None)
