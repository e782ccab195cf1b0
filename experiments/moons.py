"""Watch the boundary of a small network form between two moons."""

from __future__ import annotations

# Before what takes long to import, so that Ctrl-C is answered from the first moment.
if __name__ == "__main__":
    from gradfn.cli import script

    script(__file__)

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf
from gradfn import runs
from gradfn.report.figures import curves, save_all
from gradfn.report.moons import animation, strip

EXPECTED = "at least 96 % of new points on the right side, where a straight line leaves 88 % there; in some ten seconds"
PROMISED = 0.96
N_TEST = 1000
GRID = 100  # points along each axis of a picture


@dataclass(frozen=True)
class Config:
    """Options of a run."""

    hidden: tuple[int, ...] = (16,)
    """nodes in each hidden layer; () for none, which is a straight line"""
    activation: str = "tanh"
    """of the hidden nodes: a name from gf.layers.activations"""
    points: int = 300
    """points to train on"""
    noise: float = 0.15
    """standard deviation of what is added to each coordinate"""
    steps: int = 1000
    """training steps, each on all points"""
    rate: float = 0.03
    """Adam's learning rate"""
    seed: int = 0
    """decides the points and the first weights"""
    resume: bool = False
    """go on with an interrupted run: the latest, or that in --folder"""
    folder: str | None = None
    """where to keep the run (else runs/moons/<time>)"""

    def __post_init__(self) -> None:
        runs.within(1, None, steps=self.steps)
        for nodes in self.hidden:
            runs.within(1, None, hidden=nodes)
        runs.within(2, None, points=self.points)
        runs.within(0, 2**32 - 1, seed=self.seed)
        gf.layers.activation(self.activation)
        if not (0 < self.rate < float("inf") and 0 <= self.noise < float("inf")):
            raise ValueError(f"rate, noise: numbers above 0, came {self.rate}, {self.noise}")


class Result(NamedTuple):
    """What came of a run."""

    params: dict[str, jax.Array]
    steps: np.ndarray  # [frames]
    frames: np.ndarray  # [frames, GRID, GRID], probability of the second moon at each point of the plane
    test_accuracy: float  # in [0, 1]
    folder: Path
    verdict: str


def run(config: Config) -> Result:
    """Train, keep the parameters of some moments, and draw; what it writes is in the result's folder."""
    config = runs.settle("moons", config)
    folder = runs.begin("moons", config)
    train, test = moons(config)
    net = gf.mlp([2, *config.hidden, 2], activation=config.activation)
    print(gf.table(net.spec))
    start = net.init(jax.random.key(config.seed))
    kept, losses = trained(net, start, train, config)

    steps = moments(config.steps)
    axes = [np.linspace(low, high, GRID, dtype=np.float32) for low, high in ((-1.7, 2.7), (-1.2, 1.7))]
    plane = np.stack(np.meshgrid(*axes), -1).reshape(-1, 2)  # [GRID, GRID, 2] -> [GRID^2, 2]
    of_points = jax.vmap(net.apply, (None, 0))
    of_moments = jax.jit(jax.vmap(of_points, (0, None)))
    frames = np.asarray(jax.nn.softmax(of_moments(kept, plane))[..., 1]).reshape(-1, GRID, GRID)
    answers = np.asarray(of_moments(kept, test[0])).argmax(-1)  # [frames, N_TEST]
    accuracies = (answers == test[1]).mean(1)

    params = jax.tree.map(lambda leaf: leaf[-1], kept)
    accuracy = float(accuracies[-1])
    history = [
        {"step": int(step), "loss": float(loss), "test_accuracy": float(share)}
        for step, loss, share in zip(steps, losses, accuracies, strict=True)
    ]
    runs.keep_training(folder, history, params)
    save_all({"strip": strip(steps, frames, accuracies, axes, train), "curves": curves(history)}, folder)
    animation(steps, frames, accuracies, axes, train, folder / "boundary.gif")
    verdict = judge(config, accuracy)
    runs.finish(folder, {"test_accuracy": accuracy, "verdict": verdict})
    print(f"{verdict}\npictures: {folder}/strip.png, curves.png, boundary.gif")
    return Result(params, steps, frames, accuracy, folder, verdict)


def moons(config: Config) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return points of two half circles that reach into each other, to train on and to test on.

    Each is `[n, 2]` float32, and `[n]` which half circle they are of.
    """
    from sklearn.datasets import make_moons

    x, y = make_moons(config.points + N_TEST, noise=config.noise, random_state=config.seed)
    x, y = x.astype(np.float32), y.astype(np.int32)
    return (x[N_TEST:], y[N_TEST:]), (x[:N_TEST], y[:N_TEST])


def moments(steps: int) -> np.ndarray:
    """Return the steps at which to look: dense in the beginning, where most happens; the last one is `steps`."""
    return np.unique(np.round(np.geomspace(1, steps + 1, 48)).astype(int)) - 1


def trained(net: gf.Net, params: Any, points: Any, config: Config) -> tuple[Any, np.ndarray]:
    """Return the parameters at each moment, `[frames, ...]`, and the loss there, `[frames]`."""
    optimizer = optax.adam(config.rate)
    step = gf.train_step(gf.batch_mean(gf.classification_loss(net)), optimizer)
    batch = jax.tree.map(jnp.asarray, points)
    look = jnp.zeros(config.steps + 1, bool).at[moments(config.steps)].set(True)
    n_frames = int(look.sum())

    @jax.jit
    def train(params: Any) -> Any:
        def one(carry: Any, looking: jax.Array) -> tuple[Any, None]:
            state, kept, losses, i = carry
            after, metrics = step(state, batch)
            # What is kept at a moment that is not looked at is written over at the next.
            kept = jax.tree.map(lambda frames, leaf: frames.at[i].set(leaf), kept, state.params)
            return (after, kept, losses.at[i].set(metrics["loss"]), i + looking), None

        kept = jax.tree.map(lambda leaf: jnp.zeros([n_frames, *leaf.shape]), params)
        state = gf.train_state(params, optimizer, jax.random.key(config.seed))
        return jax.lax.scan(one, (state, kept, jnp.zeros(n_frames), 0), look.astype(int))[0][1:3]

    kept, losses = train(params)
    return kept, np.asarray(losses)


def judge(config: Config, accuracy: float) -> str:
    """Say what was reached against what was expected."""
    reached = f"{100 * accuracy:.1f} % of {N_TEST:,} new points on the right side"
    if runs.options(config) != runs.options(Config(seed=config.seed)):
        return f"{reached} (nothing was promised for these options)"
    enough = "reached" if accuracy >= PROMISED else "NOT reached"
    return f"{reached}; expected at least {100 * PROMISED:.0f} %: {enough}"
