"""Search widths and depths of the hidden layers, and see where the base case of one layer of mean width stands.

Some twenty shapes are few enough to try them all; a search library would have nothing to choose.
"""

from __future__ import annotations

# Before what takes long to import, so that Ctrl-C is answered from the first moment.
if __name__ == "__main__":
    from gradfn.cli import script

    script(__file__)

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf
from gradfn import runs
from gradfn.report.figures import save_all
from gradfn.report.width import search_map, trade

EXPECTED = (
    "the base case (784-397-10) within 1 percentage point of the best of 22 networks on test digits, and one with a "
    "tenth of its parameters within 1.5; in two minutes"
)
PROMISED_BASE, PROMISED_SMALL = 0.010, 0.015  # of test accuracy, below the best


@dataclass(frozen=True)
class Config:
    """Options of a run; every width is tried with every depth, but for what has too many parameters."""

    widths: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 397, 794)
    """nodes in each hidden layer; the base case is added if it is not there"""
    depths: tuple[int, ...] = (1, 2, 3)
    """hidden layers"""
    most: int = 700_000
    """leave out networks with more parameters"""
    seeds: int = 3
    """networks of each shape, trained at once, each with its own first weights and order of digits"""
    epochs: int = 12
    """how often to go through the training digits"""
    batch: int = 32
    """digits a step"""
    rate: float = 0.003
    """AdamW's learning rate at the start; it falls to zero on half a cosine"""
    data: Literal["digits", "mnist"] = "digits"
    """digits: 1,797 real ones that come with scikit-learn, 8x8 resized to 28x28 (not MNIST); mnist: the 70,000"""
    data_path: str | None = None
    """folder with MNIST's four files (else $GRADFN_MNIST, else a download into the cache)"""
    seed: int = 0
    """the first of the seeds"""
    resume: bool = False
    """go on with an interrupted run: the latest, or that in --folder"""
    folder: str | None = None
    """where to keep the run (else runs/width/<time>)"""

    def __post_init__(self) -> None:
        for width in self.widths:
            runs.within(1, None, widths=width)
        for depth in self.depths:
            runs.within(1, None, depths=depth)
        runs.within(1, None, seeds=self.seeds, epochs=self.epochs, batch=self.batch)
        runs.within(0, 2**32 - 1 - self.seeds, seed=self.seed)
        runs.positive(rate=self.rate)


class Tried(NamedTuple):
    """What came of the networks of one shape."""

    width: int
    depth: int
    parameters: int
    seconds: float  # to train one of them, compiling left out
    validation: np.ndarray  # accuracy in [0, 1], one a seed
    test: np.ndarray


class Result(NamedTuple):
    """What came of a run."""

    tried: list[Tried]
    base: Tried  # one hidden layer, as wide as the mean of inputs and outputs
    best: Tried  # by validation accuracy
    folder: Path
    verdict: str


def run(config: Config) -> Result:
    """Train every shape with every seed, compare, and draw; what it writes is in the result's folder."""
    config = runs.settle("width", config)
    data = gf.data.mnist(config.data_path) if config.data == "mnist" else gf.data.digits()
    print(data if config.data == "mnist" else f"{data}\n(8x8 pixels, resized: this is not MNIST)")
    if config.batch > len(data.train[1]):
        raise runs.RunError(f"batch: there are {len(data.train[1]):,} training digits, got {config.batch}")
    folder = runs.begin("width", config)
    base_width = gf.hidden_width(784, 10)
    tried = []
    for width, depth in shapes(config, base_width):
        tried.append(one := trained(config, data, width, depth))
        print(
            f"{depth} x {width:3}: {one.parameters:7,} parameters, {one.seconds:6.2f} s, "
            f"test accuracy {100 * one.test.mean():.1f} %"
        )
    base = next(one for one in tried if (one.width, one.depth) == (base_width, 1))
    # By validation, so that the test digits have no part in the choice.
    best = max(tried, key=lambda one: one.validation.mean())

    small = smallest(tried, best, PROMISED_SMALL)
    marked = {"base": base, "best": best, "small": small}
    rows = [one._asdict() | {name: one is its for name, its in marked.items()} for one in tried]
    figures = {"trade": trade(rows), "map": search_map(rows)}
    save_all(figures, folder, data.name)
    verdict = judge(config, tried, base, best)
    told = [
        one._replace(validation=one.validation.tolist(), test=one.test.tolist())._asdict() for one in tried
    ]
    runs.finish(folder, {"tried": told, "verdict": verdict})
    print(f"{verdict}\npictures: {folder}/trade.png, map.png")
    return Result(tried, base, best, folder, verdict)


def sizes(width: int, depth: int) -> list[int]:
    """Return the nodes of each layer."""
    return [784, *[width] * depth, 10]


def shapes(config: Config, base_width: int) -> list[tuple[int, int]]:
    """Return the widths and depths to try, the base case among them."""
    pairs = {(width, depth) for width in config.widths for depth in config.depths}
    pairs = {pair for pair in pairs if gf.count(gf.mlp(sizes(*pair)).spec) <= config.most}
    return sorted(pairs | {(base_width, 1)}, key=lambda pair: pair[::-1])


def trained(config: Config, data: gf.data.Dataset, width: int, depth: int) -> Tried:
    """Train the networks of one shape, all seeds at once in one compiled program."""
    net = gf.mlp(sizes(width, depth), activation="relu")
    train, validation, test = jax.tree.map(jnp.asarray, tuple(data[:3]))
    seeds = range(config.seed, config.seed + config.seeds)
    orders = np.stack(  # [seeds, steps, batch]
        [
            np.concatenate(
                [gf.data.epoch_order(len(train[1]), config.batch, seed, e) for e in range(config.epochs)]
            )
            for seed in seeds
        ]
    )
    optimizer = optax.adamw(optax.cosine_decay_schedule(config.rate, orders.shape[1]), weight_decay=0.03)
    step = gf.train_step(gf.batch_mean(gf.classification_loss(net)), optimizer)
    right = gf.accuracy(net)

    def of_seed(key: jax.Array, order: jax.Array, parts: Any) -> tuple[jax.Array, jax.Array]:
        train, validation, test = parts

        def one(state: Any, rows: jax.Array) -> tuple[Any, None]:
            return step(state, jax.tree.map(lambda part: part[rows], train))[0], None

        state, _ = jax.lax.scan(one, gf.train_state(net.init(key), optimizer, key), order)
        return right(state.params, validation), right(state.params, test)

    arguments = (
        jnp.stack([jax.random.key(seed) for seed in seeds]),
        jnp.asarray(orders),
        (train, validation, test),
    )
    compiled = jax.jit(jax.vmap(of_seed, (0, 0, None))).lower(*arguments).compile()
    began = time.perf_counter()
    shares = jax.block_until_ready(compiled(*arguments))
    seconds = (time.perf_counter() - began) / len(seeds)
    return Tried(width, depth, gf.count(net.spec), seconds, *map(np.asarray, shares))


def smallest(tried: list[Tried], best: Tried, within: float) -> Tried:
    """Return the network with the fewest parameters whose test accuracy is so little below the best's."""
    enough = [one for one in tried if one.test.mean() >= best.test.mean() - within]
    return min(enough, key=lambda one: one.parameters)


def judge(config: Config, tried: list[Tried], base: Tried, best: Tried) -> str:
    """Say what was reached against what was expected."""
    behind = float(best.test.mean() - base.test.mean())
    small = smallest(tried, best, PROMISED_SMALL)
    reached = (
        f"the base case (1 x {base.width}, {base.parameters:,} parameters) has {100 * base.test.mean():.1f} % right, "
        f"the best ({best.depth} x {best.width}, {best.parameters:,}) {100 * best.test.mean():.1f} %; "
        f"{small.depth} x {small.width} with {small.parameters:,} is within {100 * PROMISED_SMALL:.1f} points of it"
    )
    if runs.options(config) != runs.options(Config(seed=config.seed)):
        return f"{reached} (nothing was promised for these options)"
    enough = behind <= PROMISED_BASE and small.parameters <= base.parameters / 10
    expected = f"at most {100 * PROMISED_BASE:.0f} point behind, and a tenth of its parameters"
    return f"{reached}; expected {expected}: {'reached' if enough else 'NOT reached'}"
