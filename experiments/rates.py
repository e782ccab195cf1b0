"""Train one network with learning rates from 0.001 to 100, all at once: stuck, learning, broken."""

from __future__ import annotations

# Before what takes long to import, so that Ctrl-C is answered from the first moment.
if __name__ == "__main__":
    from gradfn.cli import script

    script(__file__)

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gradfn as gf
from gradfn import runs
from gradfn.report.figures import save_all
from gradfn.report.rates import fan, valley

EXPECTED = (
    "a rate of 0.001 that is stuck at a guess's loss, rates between that read at least 90 % of the test digits, and a "
    "rate of 100 that ends worse than a guess; in some ten seconds"
)
GUESS = math.log(10)  # the loss, in nats, of giving each digit the same chance
LEARNS, WORSE = (
    0.8,
    1.5,
)  # of that loss: below the one a network learns, above the other it is broken for sure
PROMISED = 0.9


@dataclass(frozen=True)
class Config:
    """Options of a run; rates are spread evenly on a logarithmic scale."""

    low: float = 0.001
    """smallest learning rate"""
    high: float = 100.0
    """largest learning rate"""
    rates: int = 16
    """how many rates"""
    seeds: int = 4
    """how many networks with each rate, each with its own first weights"""
    hidden: int = 16
    """nodes in the hidden layer"""
    steps: int = 600
    """training steps of plain gradient descent"""
    batch: int = 32
    """digits a step"""
    data: Literal["digits", "mnist"] = "digits"
    """digits: 1,797 real ones that come with scikit-learn, 8x8 resized to 28x28 (not MNIST); mnist: the 70,000"""
    data_path: str | None = None
    """folder with MNIST's four files (else $GRADFN_MNIST, else a download into the cache)"""
    seed: int = 0
    """decides the first weights and the order of the digits"""
    resume: bool = False
    """go on with an interrupted run: the latest, or that in --folder"""
    folder: str | None = None
    """where to keep the run (else runs/rates/<time>)"""

    def __post_init__(self) -> None:
        runs.within(2, None, rates=self.rates)
        runs.within(1, None, seeds=self.seeds, hidden=self.hidden, steps=self.steps, batch=self.batch)
        runs.within(0, 2**32 - 1, seed=self.seed)
        if not 0 < self.low < self.high < float("inf"):
            raise ValueError(
                f"low, high: numbers above 0, the first the smaller, came {self.low}, {self.high}"
            )


class Result(NamedTuple):
    """What came of a run."""

    rates: np.ndarray  # [rates]
    losses: np.ndarray  # [rates, seeds, steps], of each step's batch, in nats
    accuracies: np.ndarray  # [rates, seeds], on the test digits
    states: list[str]  # of each rate: stuck, learning or broken
    folder: Path
    verdict: str


def run(config: Config) -> Result:
    """Train all networks in one compiled program, measure and draw; what it writes is in the result's folder."""
    config = runs.settle("rates", config)
    data = gf.data.mnist(config.data_path) if config.data == "mnist" else gf.data.digits()
    print(data if config.data == "mnist" else f"{data}\n(8x8 pixels, resized: this is not MNIST)")
    if config.batch > len(data.train[1]):
        raise runs.RunError(f"batch: there are {len(data.train[1]):,} training digits, got {config.batch}")
    folder = runs.begin("rates", config)

    net = gf.mlp([784, config.hidden, 10], activation="sigmoid")
    rates = np.geomspace(config.low, config.high, config.rates).astype(np.float32)
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    print(
        f"{config.rates * config.seeds} networks of {gf.count(net.spec):,} parameters, {config.steps} steps each"
    )
    train = trainer(net, data, config)
    everything = jax.jit(jax.vmap(jax.vmap(train, (None, 0)), (0, None)))  # [rates, seeds]
    losses, accuracies = map(np.asarray, everything(jnp.asarray(rates), keys))

    states = states_of(losses)
    for rate, its, of_rate in zip(rates, states, accuracies, strict=True):
        print(
            f"rate {rate:8.3g}: {its:8}  test accuracy {100 * np.median(of_rate):5.1f} % (median of the seeds)"
        )
    figures = {
        "fan": fan(rates, losses, states, GUESS),
        "valley": valley(rates, final(losses), accuracies, states, GUESS),
    }
    save_all(figures, folder, data.name)
    verdict = judge(config, rates, accuracies, states)
    runs.finish(
        folder,
        {"rates": rates.tolist(), "states": states, "accuracies": accuracies.tolist(), "verdict": verdict},
    )
    print(f"{verdict}\npictures: {folder}/fan.png, valley.png")
    return Result(rates, losses, accuracies, states, folder, verdict)


def trainer(net: gf.Net, data: gf.data.Dataset, config: Config) -> Any:
    """Return `(rate, key) -> (losses [steps], test accuracy)`: gradient descent from first weights of that key."""
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
    """Say how each rate fares, `[rates, seeds, steps]`, by the median of its networks' losses in the end.

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


def judge(config: Config, rates: np.ndarray, accuracies: np.ndarray, states: list[str]) -> str:
    """Say what was reached against what was expected."""
    medians = np.median(accuracies, axis=1)
    best = int(medians.argmax())
    reached = (
        f"rate {rates[0]:.3g} is {states[0]}, rate {rates[-1]:.3g} is {states[-1]}, and the best, {rates[best]:.2g}, "
        f"has a median test accuracy of {100 * medians[best]:.1f} %"
    )
    if runs.options(config) != runs.options(Config(seed=config.seed)):
        return f"{reached} (nothing was promised for these options)"
    enough = states[0] == "stuck" and states[-1] == "broken" and medians[best] >= PROMISED
    expected = f"stuck, broken, and at least {100 * PROMISED:.0f} %"
    return f"{reached}; expected {expected}: {'reached' if enough else 'NOT reached'}"
