"""What a run says while it trains: rows of metrics in memory, in files and on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradfn.files import replace_file
from gradfn.text import to_json
from gradfn.train.checkpoint import CheckpointError
from gradfn.train.identity import Identity, difference
from gradfn.versions import versions

if TYPE_CHECKING:
    from gradfn.inspection import Inspection, NoiseScale

METRICS, INSPECTIONS, NOISE, EVENTS = "metrics.jsonl", "inspections.jsonl", "noise.jsonl", "events"
REMEMBERED = 0.98  # of the noise scale's running sums, from one measure to the next
NOT_METRICS = ("step", "epoch", "examples_per_second", "tokens_per_second", "seconds")


class Log:
    """The history of a run, and where it is shown.

    Between two rows it keeps the sums that the next row is made of, so that a checkpoint can hold them too.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: dict[str, Any],
        identity: Identity | None,
        progress: bool,
        tokens: int | None,
    ) -> None:
        self.folder, self.settings, self.identity, self.progress = folder, settings, identity, progress
        self.tokens = tokens  # of an example, where examples are sequences of them
        self.history: list[dict[str, Any]] = []
        self.inspections: list[dict[str, Any]] = []
        self.noise: list[dict[str, Any]] = []
        self.noise_sums = [0.0, 0.0]  # of signal and noise, what is older counting less
        self.finished = False
        self.sums: dict[str, float] = {}
        self.n_steps = 0
        self.examples = 0
        self.row_seconds = 0.0  # spent in steps since the last row
        self.seconds = 0.0  # in all
        self._bar: Any = None

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
        if self.folder:
            self._append(METRICS, row)
            self._row_events(row)
        if self._bar is None and self.progress:
            print(_line(row, self.settings["steps"]), flush=True)

    def _row_events(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(name, value, row["step"])

    def inspection(self, step: int, seen: Inspection) -> None:
        """Keep what an inspection saw before a step."""
        row = {"step": step} | seen.to_dict()
        self.inspections.append(row)
        if self.folder:
            self._append(INSPECTIONS, row)
            for name, stats in row["grads"].items():
                self._events.add_scalar(f"gradient rms/{name}", stats["rms"], step)

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
        if self.folder:
            self._append(NOISE, row)
            if row["running_scale"] is not None:
                self._events.add_scalar("noise scale", row["running_scale"], step)

    def notes(self) -> dict[str, Any]:
        """Return what a checkpoint must hold for the log to go on."""
        rows = ("history", "inspections", "noise")
        sums = ("sums", "noise_sums", "n_steps", "examples", "row_seconds", "seconds")
        kept = {name: getattr(self, name) for name in ("settings", "identity", "finished", *rows, *sums)}
        return kept | {"versions": versions()}

    def restore(self, notes: dict[str, Any]) -> None:
        """Resume from a checkpoint's notes.

        Raises:
            CheckpointError: they are of a run with other settings (more steps are fine, and None is any), other
                data or another loss.
        """
        notes.pop("versions", None)
        was = notes.pop("settings")
        for name, value in self.settings.items():
            longer = name == "steps" and value > was[name]
            if value is not None and value != was[name] and not longer:
                self._refuse(f"is of a run with {name} {was[name]}, got {value}")
        self.settings = was | {name: value for name, value in self.settings.items() if value is not None}
        if "identity" not in notes:
            self._refuse("does not say of which data it is; an earlier version of gradfn wrote it")
        assert self.identity
        if differs := difference(notes.pop("identity"), self.identity):
            self._refuse(f"is of another run: {differs}")
        for name, value in notes.items():
            setattr(self, name, value)
        # A run that took all its steps may take more; one that `stop` ended has ended.
        if self.finished and self.history[-1]["step"] == was["steps"] < self.settings["steps"]:
            self.finished = False

    def _refuse(self, why: str) -> None:
        remedy = "Resume with what that run began with, or use another folder"
        raise CheckpointError(f"{self.folder}: its checkpoint {why}. {remedy}")

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
        from tensorboardX import SummaryWriter

        assert self.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        # Rows that an interrupted run wrote after its last checkpoint are about to be made again.
        for name, rows in ((METRICS, self.history), (INSPECTIONS, self.inspections), (NOISE, self.noise)):
            replace_file(self.folder / name, "".join(to_json(row) + "\n" for row in rows).encode())
        # TensorBoard forgets what it has of this step and of later ones. Two files of one second must not share a name.
        events, suffix = str(self.folder / EVENTS), f".{step}"
        self._events = stack.enter_context(SummaryWriter(events, purge_step=step, filename_suffix=suffix))
        # Inspections come before their step, and are made again; the row after the last step is not.
        for row in self.history[-1:]:
            if row["step"] == step:
                self._row_events(row)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        assert self.folder
        file = self.folder / name
        try:
            with file.open("a") as out:
                out.write(to_json(row) + "\n")
        except OSError as error:  # the disk is full: an error of writing does not name the file
            raise OSError(error.errno, error.strerror, str(file)) from error

    def _open_bar(self, stack: contextlib.ExitStack) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console()
        if (
            not console.is_terminal or console.is_dumb_terminal
        ):  # one that cannot redraw a line would show no bar
            return
        text = TextColumn("{task.description}")
        bar = Progress(
            text, BarColumn(), TimeElapsedColumn(), TextColumn("of which left"), TimeRemainingColumn()
        )
        self._bar = stack.enter_context(bar)
        self._task = bar.add_task("compiling", total=self.settings["steps"], completed=self._steps_taken())
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
        self._bar.update(self._task, advance=n, description=f"{text} {per_second}")


def refuse_names(names: Iterable[str], what: str, others: Iterable[str] = ()) -> None:
    """Raise a ValueError for a name that a row of metrics has already."""
    taken = sorted({*NOT_METRICS, "loss", *others}.intersection(names))
    if taken:
        raise ValueError(
            f"fit: {what} returned {', '.join(taken)}, which a row of metrics has already. Rename it"
        )


def _line(row: dict[str, Any], steps: int) -> str:
    left = row["seconds"] / row["step"] * (steps - row["step"])
    named = " ".join(f"{name} {value:.4f}" for name, value in row.items() if name not in NOT_METRICS)
    rates = {"tokens/s": row.get("tokens_per_second"), "examples/s": row["examples_per_second"]}
    rate = next(f"{rate:,.0f} {unit}" for unit, rate in rates.items() if rate)
    return f"step {row['step']:,}/{steps:,} {named} {rate}, {row['seconds']:.1f} s, {left:.1f} s left"
