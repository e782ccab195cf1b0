"""What a checkpoint holds beside the state: the run's settings, its counters, and its identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from gradfn.train.bands import Bands
from gradfn.train.checkpoint import CheckpointError, Number
from gradfn.train.identity import Identity, difference
from gradfn.train.loading import Position
from gradfn.train.rows import Extent, Row

if TYPE_CHECKING:
    from gradfn.per_example import NoiseScale

DECAY = 0.98  # of the noise scale's running sums, from one measurement to the next


class Settings(TypedDict):
    """The arguments of `fit` that decide what a run computes."""

    steps: int
    batch_size: int
    seed: int
    eval_every: int | None


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The counters of a run, since its last row of metrics and in total.

    Attributes:
        sums: of each metric since the last row.
        n_steps: steps since the last row.
        examples: examples since the last row.
        row_seconds: time spent in steps since the last row.
        seconds: time spent in steps since the run started.
        noise_sums: decayed sums of the gradient's signal and of its noise.
    """

    sums: Mapping[str, Number] = field(default_factory=dict)
    n_steps: int = 0
    examples: int = 0
    row_seconds: float = 0.0
    seconds: float = 0.0
    noise_sums: tuple[Number, Number] = (0.0, 0.0)

    @property
    def examples_per_second(self) -> float:
        """Examples per second since the last row."""
        return self.examples / max(self.row_seconds, 1e-9)

    def after_steps(self, metrics: Mapping[str, np.ndarray], batch_size: int, seconds: float) -> Totals:
        """Return the totals after a chunk of steps, whose metrics are `[steps]` each."""
        # One by one in float64: the sum must not depend on how steps were grouped into chunks.
        terms = {
            name: np.append(float(self.sums.get(name, 0.0)), column.astype(np.float64))
            for name, column in metrics.items()
        }
        n = len(metrics["loss"])
        return replace(
            self,
            sums={name: float(np.cumsum(each)[-1]) for name, each in terms.items()},
            n_steps=self.n_steps + n,
            examples=self.examples + n * batch_size,
            row_seconds=self.row_seconds + seconds,
            seconds=self.seconds + seconds,
        )

    def row(
        self,
        step: int,
        epoch: float | None,
        tokens: int | None,
        evaluated: Mapping[str, float],
        measures: Mapping[str, float],
    ) -> Row:
        """Return a row of metrics: means since the last row, what an evaluation returned, and rates.

        Args:
            step: steps taken.
            epoch: epochs passed; None where there are none.
            tokens: per example, where examples are sequences of tokens.
            evaluated: what the evaluation returned.
            measures: of the last step.
        """
        means = {name: float(total) / self.n_steps for name, total in self.sums.items()}
        row = (
            {"step": step}
            | ({} if epoch is None else {"epoch": epoch})
            | means
            | dict(evaluated)
            | dict(measures)
        )
        row |= {"examples_per_second": self.examples_per_second, "seconds": self.seconds}
        return row | ({"tokens_per_second": tokens * self.examples_per_second} if tokens else {})

    def after_row(self) -> Totals:
        """Return the totals after a row: its sums start again at zero."""
        return Totals(seconds=self.seconds, noise_sums=self.noise_sums)

    def after_noise(self, noise: NoiseScale) -> tuple[Totals, Row]:
        """Return the totals after a measurement of the noise scale, and its row."""
        row = noise.to_dict()
        # The ratio of sums: that of a single batch is very noisy, and may not exist.
        signal, variance = (
            DECAY * float(total) + row[name]
            for total, name in zip(self.noise_sums, ("gradient_square", "variance"), strict=True)
        )
        row["running_scale"] = variance / signal if signal > 0 else None
        return replace(self, noise_sums=(signal, variance)), row


@dataclass(frozen=True, kw_only=True)
class Notes(Totals):
    """What `fit` writes into a checkpoint beside the state.

    Attributes:
        settings: of the run.
        finished: whether it ended.
        logs: how far each file of rows reaches, by its name; None in checkpoints of earlier versions.
        identity: the identity of the run; None in checkpoints of earlier versions.
        versions: of the software that wrote it.
        bands: what is known of the numbers that are watched for spikes; None where none are.
        loader: the last known position of the loader that the batches come from; None where there is none.
    """

    settings: Settings
    finished: bool
    logs: dict[str, Extent] | None = None
    identity: Identity | None = None
    versions: dict[str, Any] = field(default_factory=dict)
    bands: Bands | None = None
    loader: Position | None = None

    @property
    def totals(self) -> Totals:
        """The counters of the run."""
        counted = {each.name: getattr(self, each.name) for each in fields(Totals)}
        # JSON has no NaN: a number may have been stored as text.
        sums = {name: float(total) for name, total in self.sums.items()}
        signal, noise = map(float, self.noise_sums)
        return Totals(**counted | {"sums": sums, "noise_sums": (signal, noise)})


def check_same_run(notes: Notes, settings: Settings, identity: Identity, folder: Path) -> dict[str, Extent]:
    """Check that a checkpoint is of the run that is to be resumed; return how far its files of rows reach.

    Args:
        notes: from the checkpoint.
        settings: of the run that resumes: more steps are fine, and None fits any.
        identity: of the run that resumes.
        folder: of the run.

    Raises:
        CheckpointError: it is of a run with other settings, other data or another loss.
    """
    for name, value in settings.items():
        before = notes.settings[name]  # type: ignore[literal-required]
        longer = name == "steps" and settings["steps"] > notes.settings["steps"]
        if value is not None and value != before and not longer:
            raise of_another_run(folder, f"is of a run with {name} {before}, got {value}")
    if notes.identity is None:
        raise of_another_run(folder, "does not describe its data; an earlier version of gradfn wrote it")
    if notes.logs is None:
        raise of_another_run(folder, "does not count its rows; an earlier version of gradfn wrote it")
    if differs := difference(notes.identity, identity):
        raise of_another_run(folder, f"is of another run: {differs}")
    return notes.logs


def of_another_run(folder: Path, why: str) -> CheckpointError:
    """Return the error for a checkpoint that does not fit the run that is to be resumed."""
    remedy = "Resume with the arguments that the run started with, or use another folder"
    return CheckpointError(f"{folder}: its checkpoint {why}. {remedy}")
