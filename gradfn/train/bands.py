"""Running bands: where a number lies as a rule, and when it leaves that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
TINY = np.finfo(np.float64).tiny
LARGE = 1e300
FEW = 10  # from so few steps no deviation is known
BLOCK = 512  # steps that are learned from at once, at most


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

    def learn(self, values: np.ndarray, of_log: np.ndarray, step: int, spike: Spike) -> Learned:
        """Learn from the numbers of consecutive steps.

        Args:
            values: `[steps, n]`.
            of_log: `[n]` booleans, which of them are compared by their logarithm.
            step: the number of the first step.
            spike: what counts as one.
        """
        values = np.clip(values.astype(np.float64), -LARGE, LARGE)  # a square may have overflowed
        x = np.where(of_log, np.log(np.maximum(values, TINY)), values)
        if not self.steps and len(x):
            self.means, self.variances, self.since = list(x[0]), [0.0] * x.shape[1], [-1] * x.shape[1]
        parts, i = [], 0
        while i < len(x):
            settled = 1 / (self.steps + 1) <= _rate(spike) and self.steps >= spike.after
            within = settled and max(self.since) < 0
            part = self._within(x[i : i + BLOCK], of_log, spike) if within else None
            if part is None or not len(part.above):
                part = self._one(x[i], of_log, step + i, spike)
            parts.append(part)
            i += len(part.above)
        return Learned(*(np.concatenate(each) for each in zip(*parts, strict=True)))

    def _one(self, x: np.ndarray, of_log: np.ndarray, step: int, spike: Spike) -> Learned:
        """Learn from one step, `[n]`."""
        means, variances = (np.array([float(v) for v in old]) for old in (self.means, self.variances))
        deviation = _deviation(means, variances, of_log)
        above = (x - means) / deviation
        extreme = (above > spike.deviations) & (self.steps >= FEW)
        outside = extreme & (self.steps >= spike.after)
        since = np.where(outside, np.where(np.array(self.since) < 0, step, self.since), -1)
        edges = means + spike.deviations * deviation
        # A number outside moves its band as one at the edge would.
        delta = np.where(extreme, edges, x) - means
        rate = max(1 / (self.steps + 1), _rate(spike))
        self.means = list(means + rate * delta)
        self.variances = list((1 - rate) * (variances + rate * delta**2))
        self.since = [int(each) for each in since]
        self.steps += 1
        return Learned(above[None], _values(edges[None], of_log), since[None])

    def _within(self, x: np.ndarray, of_log: np.ndarray, spike: Spike) -> Learned:
        """Learn from the steps up to the first at which a number is outside, `[steps, n]`, all at once."""
        means, variances = (np.array([float(v) for v in old]) for old in (self.means, self.variances))
        rate = _rate(spike)
        after = _smoothed(rate * x, 1 - rate, means)
        before = np.concatenate([means[None], after[:-1]])
        of_delta = _smoothed((1 - rate) * rate * (x - before) ** 2, 1 - rate, variances)
        spread = np.concatenate([variances[None], of_delta[:-1]])
        deviation = _deviation(before, spread, of_log)
        above = (x - before) / deviation
        outside = (above > spike.deviations).any(1)
        n = int(outside.argmax()) if outside.any() else len(x)
        if n:
            self.means, self.variances = list(after[n - 1]), list(of_delta[n - 1])
            self.steps += n
        edges = before + spike.deviations * deviation
        return Learned(above[:n], _values(edges[:n], of_log), np.full(above.shape, -1)[:n])


class Learned(NamedTuple):
    """What bands say of the numbers of some steps, `[steps, n]` each.

    Attributes:
        above: by how many deviations each lies above its mean.
        edges: the upper edges of the bands, before the step.
        since: the step since which each is outside its band; -1 if it is inside.
    """

    above: np.ndarray
    edges: np.ndarray
    since: np.ndarray


def _values(edges: np.ndarray, of_log: np.ndarray) -> np.ndarray:
    return np.where(of_log, np.exp(np.where(of_log, np.minimum(edges, np.log(LARGE)), 0)), edges)


def _rate(spike: Spike) -> float:
    return 1 - 0.5 ** (1 / spike.half_life)


def _deviation(means: np.ndarray, variances: np.ndarray, of_log: np.ndarray) -> np.ndarray:
    least = np.where(of_log, LEAST_OF_LOG, LEAST_OF_MEAN * np.abs(means))
    return np.maximum(np.sqrt(variances), np.maximum(least, TINY))


def _smoothed(x: np.ndarray, keeps: float, start: np.ndarray) -> np.ndarray:
    """Return `y[i] = x[i] + keeps * y[i - 1]` along the first axis, where `y[-1]` is `start`."""
    from scipy.signal import lfilter

    return lfilter([1.0], [1.0, -keeps], x, axis=0, zi=(keeps * start)[None])[0]


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
