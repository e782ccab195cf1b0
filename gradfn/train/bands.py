"""Running bands: where a number lies as a rule, and when it leaves that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradfn.train.checkpoint import Number


@dataclass(frozen=True)
class Spike:
    """When a step of training counts as a spike: `gf.fit(inspect_when=gf.train.Spike(...))`.

    A watched number has a band, from its running mean and its running standard deviation. It spikes where it is above
    the mean by more than `deviations` of these. Norms, which are positive, are compared by their logarithm. While it
    is outside, the band learns only up to its edge from it.

    Attributes:
        watch: what is watched: `loss`, `grad_norm`, `update_norm`, and the norms of the optimizer's moments by their
            names in its state: `mu` and `nu` of Adam, `trace` of momentum. A spike of `nu` that lags behind the
            gradients precedes many of the loss (Molybog et al., *A Theory on Adam Instability in Large-Scale
            Machine Learning*, 2023).
        deviations: how many standard deviations above the mean a number has to be.
        half_life: in steps, of what the running mean and deviation have learned.
        after: the number of steps before the first spike, from which the band is learned.

    Raises:
        ValueError: a number that is not positive.

    >>> Spike(watch=("loss", "grad_norm", "nu")).deviations
    6.0
    """

    watch: Sequence[str] = ("loss", "grad_norm")
    deviations: float = 6.0
    half_life: float = 50.0
    after: int = 50

    def __post_init__(self) -> None:
        for name in ("deviations", "half_life", "after"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Spike: {name} must be positive, got {getattr(self, name)}")
        if isinstance(self.watch, str):
            object.__setattr__(self, "watch", (self.watch,))


# The deviation that a band has at least: of a logarithm, and of any other number relative to its mean.
LEAST_OF_LOG, LEAST_OF_MEAN = 0.05, 0.01


@dataclass
class Bands:
    """The bands of several numbers, learned step by step, in float64 on the host.

    The state of a run: it does not depend on how steps are grouped into chunks, and a checkpoint holds it.

    Attributes:
        means: running means.
        variances: running variances.
        steps: the number of steps learned from.
        since: the step since which each number is outside its band; -1 if it is inside.
    """

    means: Sequence[Number] = ()
    variances: Sequence[Number] = ()
    steps: int = 0
    since: Sequence[int] = field(default_factory=list)

    def learn(self, values: np.ndarray, of_log: np.ndarray, step: int, spike: Spike) -> np.ndarray:
        """Learn from the numbers of one step; return by how many deviations each lies above its mean.

        Args:
            values: `[n]`.
            of_log: `[n]` booleans, which of them are compared by their logarithm.
            step: its number.
            spike: what counts as one.
        """
        x = np.where(of_log, np.log(np.maximum(values, np.finfo(np.float64).tiny)), values)
        means, variances = (np.array([float(v) for v in old]) for old in (self.means, self.variances))
        since = np.array(self.since, np.int64)
        if not self.steps:
            means, variances, since = x, np.zeros_like(x), np.full(len(x), -1)
        least = np.where(of_log, LEAST_OF_LOG, LEAST_OF_MEAN * np.abs(means))
        deviation = np.maximum(np.sqrt(variances), np.maximum(least, np.finfo(np.float64).tiny))
        above = (x - means) / deviation
        outside = (above > spike.deviations) & (self.steps >= spike.after)
        since = np.where(outside, np.where(since < 0, step, since), -1)
        # A number outside moves its band as one at the edge would.
        delta = np.where(outside, spike.deviations * deviation, x - means)
        rate = max(1 / (self.steps + 1), 1 - 0.5 ** (1 / spike.half_life))
        self.means = list(means + rate * delta)
        self.variances = list((1 - rate) * (variances + rate * delta**2))
        self.since = [int(each) for each in since]
        self.steps += 1
        return above

    def edge(self, i: int, of_log: bool, spike: Spike) -> float:
        """Return the upper edge of a band."""
        mean, deviation = float(self.means[i]), float(self.variances[i]) ** 0.5
        least = LEAST_OF_LOG if of_log else LEAST_OF_MEAN * abs(mean)
        edge = mean + spike.deviations * max(deviation, least)
        return float(np.exp(edge)) if of_log else edge


def series(watched: dict[str, Any], losses: np.ndarray, spike: Spike) -> dict[str, np.ndarray]:
    """Return the watched numbers of each step of a chunk, `[steps]`, by name.

    Args:
        watched: what the chunk recorded: `grad_norms` `[steps, arrays]` and the norms by name, `[steps]`.
        losses: of the steps.
        spike: what is watched.
    """
    squares = np.square(watched["grad_norms"].astype(np.float64))
    known = {"loss": losses, "grad_norm": np.sqrt(squares.sum(-1)), **watched}
    return {name: known[name] for name in spike.watch}
