"""The learning-rate range test: one short run whose rate rises until the loss diverges."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.flatten import Loss
from gradfn.losses import check_targets
from gradfn.train.held import held
from gradfn.train.placing import mesh_of
from gradfn.train.source import source_of
from gradfn.train.step import TrainState, one_step, step_key, train_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the running mean that says when to stop: over about ten steps.
DECAY = 0.9
# A fall of the loss counts from this multiple of the scatter around the smoothed loss on.
CLEAR = 3.0


@dataclass(frozen=True, repr=False, eq=False)
class RateRange(ShowsTable):
    """The result of `gf.train.lr_range`. `print` shows a table.

    Attributes:
        rates: `[n]`, of the steps that were taken.
        losses: `[n]`, of the batch of each step, before the step. The last may be NaN or infinite.
        smoothed: `[n]`, a mean of the losses around each step, in a window of about a third of a decade.
        suggested: the rate at which the smoothed loss falls fastest; None where it does not fall clearly.
        diverged: whether the loss diverged. If not, larger rates may do, too.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggested: float | None
    diverged: bool

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table of rates and losses, of at most that many steps, evenly spaced; None for all."""
        title = "RateRange: the loss does not fall clearly at any rate"
        if self.suggested is not None:
            title = f"RateRange: suggested learning rate {self.suggested:.2g}"
        note = (
            f"the loss diverged at a rate of {self.rates[-1]:.2g}"
            if self.diverged
            else f"the loss did not diverge up to a rate of {self.rates[-1]:.2g}: raise high to see where it does"
        )
        out = TextTable(title, note)
        for header in ("step", "rate", "loss", "smoothed"):
            out.add_column(header)
        n = len(self.rates)
        shown = range(n) if rows is None else np.unique(np.linspace(0, n - 1, min(rows, n)).astype(int))
        for i in shown:
            out.add_row(int(i), *(float(each[i]) for each in (self.rates, self.losses, self.smoothed)))
        return out

    def plot(self) -> Figure:
        """Return a figure of the loss over the rate.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("RateRange.plot needs matplotlib: pip install 'gradfn[run]'") from None
        figure = Figure(figsize=(7.4, 4.0), layout="constrained")
        panel = figure.subplots()
        panel.plot(self.rates, self.losses, color="0.8", linewidth=1, label="loss of a batch")
        panel.plot(self.rates, self.smoothed, color="#0072b2", label="smoothed")
        if self.suggested is not None:
            panel.axvline(
                self.suggested, color="#d55e00", linestyle="--", label=f"suggested: {self.suggested:.2g}"
            )
        known = self.smoothed[np.isfinite(self.smoothed)]
        if known.size:
            low, start = known.min(), known[0]
            room = max(start - low, abs(start) / 10, 1e-12)
            panel.set_ylim(low - room / 4, start + room)
        panel.set_xscale("log")
        panel.set_xlabel("learning rate")
        panel.set_ylabel("loss")
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
        return figure


class Progress(NamedTuple):
    """What the loop carries from step to step: the training state, and what is known of the loss.

    Attributes:
        state: of training.
        losses: `[steps]`, NaN for those that were not taken.
        mean: the running mean, not yet divided by the sum of its weights.
        first: the loss of step 0.
        best: the smallest running mean.
        going: whether the loss has not diverged.
    """

    state: TrainState
    losses: jax.Array
    mean: jax.Array
    first: jax.Array
    best: jax.Array
    going: jax.Array

    def after(self, state: TrainState, loss: jax.Array) -> Progress:
        """Return the progress after a step that started from a loss."""
        i = self.state.step
        loss = loss.astype(jnp.float32)
        mean = DECAY * self.mean + (1 - DECAY) * loss
        running = mean / (1 - DECAY ** (i + 1).astype(jnp.float32))
        first = jnp.where(i == 0, loss, self.first)
        best = jnp.minimum(self.best, running)
        # Beyond the start by as much as it had fallen, and by the loss of the start itself at least.
        limit = first + jnp.maximum(first - best, jnp.abs(first))
        losses = self.losses.at[i].set(loss)
        return Progress(state, losses, mean, first, best, jnp.isfinite(loss) & (running <= limit))


def lr_range(
    loss: Loss,
    params: PyTree,
    data: PyTree,
    optimizer: Callable[[Any], optax.GradientTransformation] = optax.adam,
    *,
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 200,
    state: PyTree = None,
    batch_size: int = 32,
    seed: int = 0,
) -> RateRange:
    """Find a learning rate: train with one that rises exponentially, and see where the loss falls and diverges.

    Smith, *Cyclical Learning Rates for Training Neural Networks*, 2017, section 3.3. One run in compiled loops, which
    end when the running mean of the loss exceeds the initial loss by as much as it had fallen below it (at least by
    its size), or when the loss is not finite.

    Args:
        loss: of a batch, as for `gf.fit`, as are `params` (which are not modified), `data`, `state`, `batch_size` and
            `seed`.
        params: the parameters to start from: those that training will start from.
        data: arrays, a function of a key, `gf.train.from_host` or `gf.train.from_loader`.
        optimizer: from a learning rate schedule to an optimizer: `optax.adam`, or `lambda rate: optax.adamw(rate,
            weight_decay=0.1)`.
        low: the first rate.
        high: the last rate, unless the loss diverges before.
        steps: at most; more make the curve less noisy.
        state: that the loss carries from step to step.
        batch_size: examples per step.
        seed: decides the batches.

    Returns:
        A `RateRange`, with `.suggested`, `.table()` and `.plot()`. The suggestion is the rate at which
        the loss falls fastest per decade, to the left of its minimum. With warm-up a larger one may do.

    Raises:
        TypeError: an optimizer instead of a function that makes one; else as `gf.fit`.
        ValueError: rates that do not rise from above 0; fewer than 10 steps; parameters on a mesh.

    >>> import jax, jax.numpy as jnp, optax, gradfn as gf
    >>> x = jax.random.normal(jax.random.key(0), [256, 4])
    >>> loss = lambda params, x: jnp.square(x @ params - x.sum(1)).mean()
    >>> found = gf.train.lr_range(loss, jnp.zeros(4), x, optax.sgd, low=1e-4)
    >>> 0.005 < found.suggested < 0.5
    True
    """
    if callable(getattr(optimizer, "update", None)) or not callable(optimizer):
        raise TypeError(
            "lr_range: optimizer must be a function of the learning rate, got an optimizer. Pass optax.adam, or "
            "lambda rate: optax.adamw(rate, weight_decay=0.1)"
        )
    if not 0 < low < high < math.inf:
        raise ValueError(f"lr_range: the rates must be 0 < low < high, got low {low} and high {high}")
    if steps < 10:
        raise ValueError(f"lr_range: steps must be an integer >= 10, got {steps}")
    own, loss_of = held(loss)
    if mesh_of((params, own)) is not None:
        raise ValueError("lr_range: the parameters must be on one device, got some that are on a mesh")
    growth = math.log(high / low) / (steps - 1)
    chosen = optimizer(lambda count: low * jnp.exp(growth * jnp.asarray(count, jnp.float32)))
    source = source_of(data, batch_size, seed)
    if not callable(source.content):
        check_targets(loss, source.content)
    source = source.started(steps, None).placed(None)
    start = train_state(params, chosen, jax.random.key(seed), state)
    number = lambda value: jnp.asarray(value, jnp.float32)  # noqa: E731
    losses = jnp.full([steps], jnp.nan, jnp.float32)
    progress = Progress(start, losses, number(0), number(0), number(jnp.inf), jnp.array(True))

    @jax.jit
    def advance(arrays: PyTree, own: PyTree, progress: Progress, order: Any, row: Any, end: Any) -> Progress:
        begin = progress.state.step

        def step(progress: Progress) -> Progress:
            before = progress.state
            key = jax.random.fold_in(step_key(before), 1)  # as in gf.fit
            batch = source.batch(arrays, order, row + before.step - begin, key)
            after, metrics, _ = one_step(loss_of(own), chosen, None)(before, batch)
            return progress.after(after, metrics["loss"])

        return jax.lax.while_loop(lambda now: (now.state.step < end) & now.going, step, progress)

    own = jax.tree.map(jnp.asarray, own)
    at = 0
    while at < steps and progress.going:
        end = min(steps, (at // source.order_steps + 1) * source.order_steps) if source.order_steps else steps
        order, row = source.order(source.epoch(at)), source.row(at)
        if source.end is not None and source.end < end:
            raise ValueError(
                f"lr_range: the data ended after {source.end:,} batches, but steps is {steps:,}. Pass a loader that "
                "can be iterated over again, or fewer steps"
            )
        progress = advance(source.arrays, own, progress, order, row, end)
        at = end
    n = int(progress.state.step)
    rates = low * np.exp(growth * np.arange(n))
    return _result(rates, np.asarray(progress.losses[:n], np.float64), not bool(progress.going))


def _result(rates: np.ndarray, losses: np.ndarray, diverged: bool) -> RateRange:
    """Return the result for the losses of the steps that were taken."""
    known = np.isfinite(losses)
    smoothed = _smooth(rates, losses, known)
    suggested = None
    if known.sum() > 2:
        # What is left of one loss to the next around the curve: its scatter, whatever its trend.
        scatter = float(np.median(np.abs(np.diff(losses[known])))) / math.sqrt(2)
        best = int(np.nanargmin(np.where(known, smoothed, np.nan)))
        fall = smoothed[0] - smoothed[best]
        noise = CLEAR * scatter / math.sqrt(_window(rates))
        if fall > max(noise, 1e-3 * abs(float(smoothed[0]))):
            slopes = np.gradient(smoothed[: best + 1], np.log(rates[: best + 1]))
            suggested = float(rates[np.nanargmin(slopes)])
    return RateRange(rates, losses, smoothed, suggested, diverged)


def _window(rates: np.ndarray) -> float:
    """Return the standard deviation, in steps, of the window that losses are averaged in."""
    per_decade = math.log(10) / math.log(rates[1] / rates[0]) if len(rates) > 1 else 1.0
    return max(per_decade / 6, 1.0)


def _smooth(rates: np.ndarray, losses: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return means of finite losses in a Gaussian window; NaN where a loss is not finite."""
    i = np.arange(len(losses))
    weights = np.exp(-0.5 * np.square((i[:, None] - i) / _window(rates))) * known  # [n, n]
    means = weights @ np.where(known, losses, 0) / np.maximum(weights.sum(1), 1e-300)
    return np.where(known, means, np.nan)
