"""Train one network with learning rates from 0.001 to 100, all at once: stuck, learning, broken."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gradfn as gf
from gradfn import runs
from gradfn.pages.figures import LINE_COLORS, new_figure
from gradfn.timings import phase

from ._common import DigitOptions, conclude, defaults, start_on_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EXPECTED = (
    runs.Expectation("smallest rates with stuck networks", at_least=1),
    runs.Expectation("largest rates with broken networks", at_least=1),
    runs.Expectation("best median test accuracy", at_least=0.9, unit="%"),
)

GUESS = math.log(10)  # the loss, in nats, of a uniform prediction
# Shares of that loss: below the first a network learns, above the second it is certainly broken.
LEARNS, WORSE = 0.8, 1.5


@dataclass(frozen=True)
class Config(DigitOptions):
    """Options of a run; rates are spread evenly on a logarithmic scale."""

    low: float = runs.option(0.001, "smallest learning rate", above=0)
    high: float = runs.option(100.0, "largest learning rate", above=0)
    rates: int = runs.option(16, "how many rates", at_least=2)
    seeds: int = runs.option(4, "networks per rate, each with its own initial weights", at_least=1)
    hidden: int = runs.option(16, "nodes in the hidden layer", at_least=1)
    steps: int = runs.option(600, "training steps of plain gradient descent", at_least=1)
    batch: int = runs.option(32, "digits per step", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low >= self.high:
            raise ValueError(f"low, high: low must be < high, got {self.low} and {self.high}")


class Result(NamedTuple):
    """The result of a run."""

    rates: np.ndarray  # [rates]
    losses: np.ndarray  # [rates, seeds, steps], of each step's batch, in nats
    accuracies: np.ndarray  # [rates, seeds], on the test digits
    states: list[str]  # of each rate: stuck, learning or broken
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Train all networks in one compiled program, measure and draw; it writes into the folder of the result."""
    config, data, folder = start_on_digits("rates", config)

    net = gf.mlp([784, config.hidden, 10], activation="sigmoid")
    rates = np.geomspace(config.low, config.high, config.rates).astype(np.float32)
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    print(
        f"{config.rates * config.seeds} networks of {gf.count(net.spec):,} parameters, {config.steps} steps each"
    )
    train = trainer(net, data, config)
    everything = jax.jit(jax.vmap(jax.vmap(train, (None, 0)), (0, None)))  # [rates, seeds]
    with phase("training"):
        losses, accuracies = map(np.asarray, everything(jnp.asarray(rates), keys))

    states = states_of(losses)
    for rate, its, of_rate in zip(rates, states, accuracies, strict=True):
        print(
            f"rate {rate:8.3g}: {its:8}  test accuracy {100 * np.median(of_rate):5.1f} % (median of the seeds)"
        )
    with phase("pictures"):
        figures = {
            "fan": fan(rates, losses, states, GUESS),
            "valley": valley(rates, final(losses), accuracies, states, GUESS),
        }
    outcome = judge(config, rates, accuracies, states)
    conclude(
        folder,
        outcome,
        figures,
        data.name,
        rates=rates.tolist(),
        states=states,
        accuracies=accuracies.tolist(),
    )
    return Result(rates, losses, accuracies, states, folder, outcome)


def trainer(net: gf.Net, data: gf.data.Dataset, config: Config) -> Any:
    """Return `(rate, key) -> (losses [steps], test accuracy)`, for gradient descent from random initial weights."""
    train, test = jax.tree.map(jnp.asarray, (data.train, data.test))
    n_epochs = -(-config.steps // (len(data.train[1]) // config.batch))
    orders = [gf.data.epoch_order(len(data.train[1]), config.batch, config.seed, e) for e in range(n_epochs)]
    order = jnp.asarray(np.concatenate(orders)[: config.steps])  # [steps, batch]
    value_and_grad = jax.value_and_grad(gf.batch_mean(gf.classification_loss(net)))

    def trained(rate: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(params: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            loss, grads = value_and_grad(params, jax.tree.map(lambda part: part[rows], train))
            return jax.tree.map(lambda param, grad: param - rate * grad, params, grads), loss

        params, losses = jax.lax.scan(step, net.init(key), order)
        return losses, gf.accuracy(net)(params, test)

    return trained


def final(losses: np.ndarray) -> np.ndarray:
    """Return the mean loss of the last tenth of the steps: `[..., steps] -> [...]`."""
    return losses[..., -max(losses.shape[-1] // 10, 1) :].mean(-1)


def states_of(losses: np.ndarray) -> list[str]:
    """Return the state of each rate, from losses `[rates, seeds, steps]`: by the median of its networks' final losses.

    What has not come clearly below a guess is stuck where the rate is smaller than the best one, and broken
    where it is larger.
    """
    ends = np.median(final(losses), axis=1)  # nan where most of the networks are
    best = int(np.nanargmin(np.where(np.isfinite(ends), ends, np.inf)))

    def state(i: int) -> str:
        if ends[i] <= LEARNS * GUESS:
            return "learning"
        return "stuck" if i <= best and ends[i] < WORSE * GUESS else "broken"

    return [state(i) for i in range(len(ends))]


def judge(config: Config, rates: np.ndarray, accuracies: np.ndarray, states: list[str]) -> runs.Outcome:
    """Compare the states of the smallest and largest rates, and the best test accuracy, with what is expected."""
    medians = np.median(accuracies, axis=1)
    measured = {
        "smallest rates with stuck networks": _n_leading(states, "stuck"),
        "largest rates with broken networks": _n_leading(states[::-1], "broken"),
        "best rate": rates[medians.argmax()],
        "best median test accuracy": medians.max(),
    }
    return runs.judge(EXPECTED, measured, defaults(config))


def _n_leading(states: Sequence[str], state: str) -> int:
    return sum(1 for _ in takewhile(lambda each: each == state, states))


POINTS = 120  # of a curve; more would only show noise


def fan(rates: Any, losses: Any, states: Sequence[str], guess: float) -> Figure:
    """Draw the loss of each learning rate over training, its color the rate.

    Args:
        rates: `[rates]`.
        losses: `[rates, seeds, steps]` in nats; where they are not finite, nothing is drawn.
        states: of each rate.
        guess: the loss of a guess.

    Returns:
        A figure with one line per rate (the median of the seeds) in a band from the smallest to the largest.

    >>> fan([0.1, 1.0], np.ones([2, 3, 50]), ["stuck", "learning"], 2.3).get_suptitle()
    'One network, 2 learning rates: 1 stuck, 1 learning'
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    rates = np.asarray(rates, np.float64)
    values, steps = _smooth(np.asarray(losses, np.float64))
    values = np.maximum(values, 1e-6)  # a logarithm has no place for zeros
    figure = new_figure(9.4, 5.6)
    panel = figure.subplots()
    scale = ScalarMappable(LogNorm(rates.min(), rates.max()), cmap="viridis")
    ends: dict[str, list[float]] = {}
    for rate, of_rate, name in zip(rates, values, states, strict=True):
        color, middle = scale.to_rgba(rate), np.median(of_rate, 0)
        panel.fill_between(steps, of_rate.min(0), of_rate.max(0), color=color, alpha=0.15, linewidth=0)
        panel.plot(steps, middle, color=color, linewidth=1.8)
        ends.setdefault(name, []).append(middle[-1])
    panel.plot([0, steps[-1]], [guess, guess], ":", color="black", linewidth=1.2, zorder=5)
    for name, of_state in ends.items():
        height = np.exp(np.mean(np.log(of_state)))
        if np.isfinite(height):
            panel.annotate(
                name, (steps[-1], height), (8, 0), textcoords="offset points", va="center", fontsize=12
            )
    panel.set_yscale("log")
    panel.set_xlabel("training step")
    panel.set_ylabel("training loss (nats; dotted: a guess)")
    panel.set_xlim(0, steps[-1] * 1.14)
    panel.grid(color="0.92")
    panel.spines[["top", "right"]].set_visible(False)
    figure.colorbar(scale, ax=panel, label="learning rate", pad=0.01)
    texts = [f"{len(of_state)} {name}" for name, of_state in ends.items()]
    figure.suptitle(f"One network, {len(rates)} learning rates: {', '.join(texts)}")
    return figure


def valley(rates: Any, losses: Any, accuracies: Any, states: Sequence[str], guess: float) -> Figure:
    """Draw where each learning rate ended, a dot a network.

    Args:
        rates: `[rates]`.
        losses: `[rates, seeds]`, in the end, in nats.
        accuracies: `[rates, seeds]`, shares in [0, 1].
        states: of each rate.
        guess: the loss of a guess.

    Returns:
        A figure with a panel for the losses and one for the accuracies.

    >>> figure = valley([0.1, 1.0], np.ones([2, 3]), [[0.1], [1.0]], ["stuck", "learning"], 2.3)
    >>> figure.get_suptitle()
    'Rates from 1 to 1 learn; the best is 1 (100.0 % of the test examples right)'
    """
    rates, losses, accuracies = (np.asarray(x, np.float64) for x in (rates, losses, accuracies))
    figure = new_figure(8.6, 6.0)
    panels = figure.subplots(2, 1, sharex=True)
    edges = np.sqrt(rates[1:] * rates[:-1])
    edges = np.concatenate([[rates[0] ** 2 / edges[0]], edges, [rates[-1] ** 2 / edges[-1]]])
    for panel, values, label in zip(
        panels,
        (losses, 100 * accuracies),
        ("training loss in the end (nats)", "test accuracy (%)"),
        strict=True,
    ):
        for name, group in groupby(range(len(rates)), key=lambda i: states[i]):
            members = list(group)
            low, high = edges[members[0]], edges[members[-1] + 1]
            panel.axvspan(low, high, color="0.93" if name == "learning" else "white", zorder=0)
            if panel is panels[0]:
                center = math.sqrt(low * high)
                panel.text(
                    center,
                    1.02,
                    name,
                    transform=panel.get_xaxis_transform(),
                    ha="center",
                    va="bottom",
                    fontsize=11,
                )
        for of_seed in values.T:
            panel.plot(rates, of_seed, "o", color=LINE_COLORS[0], markersize=4, alpha=0.6)
        panel.plot(rates, np.median(values, 1), color=LINE_COLORS[0])
        panel.set_ylabel(label)
        panel.set_xscale("log")
        panel.set_xlim(edges[0], edges[-1])
        panel.grid(color="0.88")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    panels[0].axhline(guess, color="0.3", linewidth=1, linestyle=":")
    panels[0].text(edges[-1], guess, "a guess ", color="0.3", fontsize=9, ha="right", va="bottom")
    panels[1].set_xlabel("learning rate (a dot is a network, the line their median)")
    medians = np.median(accuracies, 1)
    best = int(medians.argmax())
    learning = [rate for rate, name in zip(rates, states, strict=True) if name == "learning"]
    text = (
        f"Rates from {_told(min(learning))} to {_told(max(learning))} learn" if learning else "No rate learns"
    )
    figure.suptitle(
        f"{text}; the best is {_told(rates[best])} ({100 * medians[best]:.1f} % of the test examples right)"
    )
    return figure


def _told(rate: float) -> str:
    """Return a rate with two digits, and no exponent where there is a shorter way: 100, not 1e+02."""
    return f"{float(f'{rate:.2g}'):g}"


def _smooth(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return means over stretches of steps, `[..., points]`, and the last step of each stretch."""
    n_steps = losses.shape[-1]
    stretch = max(1, n_steps // POINTS)
    n = n_steps // stretch
    means = losses[..., : n * stretch].reshape(*losses.shape[:-1], n, stretch).mean(-1)
    return means, stretch * np.arange(1, n + 1)
