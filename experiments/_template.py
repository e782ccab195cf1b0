"""Train a small network on two interleaved spirals, and draw where it draws the line."""

from __future__ import annotations

# Before the slow imports, so that --help is fast and Ctrl-C works from the start.
if __name__ == "__main__":
    from gradfn.cli import script

    script(__file__)

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf
from gradfn import runs

# The name of the experiment, which is that of this file: its runs are stored in runs/my_experiment/<time>.
NAME = Path(__file__).stem
# What a run is compared with. `runs.Expectation(name, at_least=..., at_most=..., unit=...)`.
EXPECTED = (runs.Expectation("test accuracy", at_least=0.95, unit="%"),)


@dataclass(frozen=True)
class Config:
    """Options of a run: each is an option of the command line, `hidden` is `--hidden`."""

    hidden: int = runs.option(32, "nodes in each of the two hidden layers", at_least=1)
    points: int = runs.option(600, "points to train on", at_least=32)
    steps: int = runs.option(3000, "training steps", at_least=1)
    rate: float = runs.option(0.003, "Adam's learning rate", above=0)
    seed: int = runs.option(0, "determines all random numbers", at_least=0)
    resume: bool = runs.option(False, "resume an interrupted run: the latest, or the one in --folder")
    folder: str | None = runs.option(None, "where to store the run (default: runs/my_experiment/<time>)")
    timings: bool = runs.option(False, "print how long it took to import, compile, train and draw")

    def __post_init__(self) -> None:
        """Check the bounds."""
        runs.check(self)


def run(config: Config) -> runs.Outcome:
    """Train, measure and draw; everything is written into the folder of the run."""
    config = runs.settle(NAME, config)
    folder = runs.start(NAME, config)

    # The data: inputs [n, 2] and labels [n].
    train, test = spirals(config.points, config.seed), spirals(1000, config.seed + 1)

    # The network is a spec and a pure function of one example: `net.apply(params, x)`, [2] -> [2].
    net = gf.mlp([2, config.hidden, config.hidden, 2], activation="tanh")
    print(gf.table(net.spec))
    params = net.init(jax.random.key(config.seed))
    accuracy = jax.jit(gf.accuracy(net))

    # The loss of a batch: any function `(params, batch) -> scalar` will do.
    loss = gf.batch_mean(gf.classification_loss(net))
    fitted = gf.fit(
        loss,
        params,
        train,
        optax.adam(config.rate),
        config.steps,
        batch_size=32,
        seed=config.seed,
        eval_every=max(config.steps // 10, 1),
        evaluate=lambda params: {"test_accuracy": accuracy(params, test)},
        # The page of the run shows the gradients of these steps.
        inspect_every=max(config.steps // 20, 1),
        folder=folder,
        resume=config.resume,
    )

    # Every value and gradient of one batch, by name.
    print(jax.jit(gf.inspect(loss))(fitted.params, jax.tree.map(lambda leaf: leaf[:32], train)))

    draw(net, fitted.params, test, folder / "boundary.png")
    outcome = runs.judge(EXPECTED, {"test accuracy": float(accuracy(fitted.params, test))})
    # This marks the run as finished.
    runs.finish(folder, outcome)
    print(outcome)
    return outcome


def spirals(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `n` points of two spirals, [n, 2] float32, and which spiral each is of, [n] int32."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n).astype(np.int32)
    radius = np.sqrt(rng.uniform(0.05, 1, n))
    angle = 2 * np.pi * radius + np.pi * labels
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return (points + rng.normal(0, 0.03, points.shape)).astype(np.float32), labels


def draw(
    net: gf.Net, params: dict[str, jax.Array], points: tuple[np.ndarray, np.ndarray], file: Path
) -> None:
    """Draw the probability of the second spiral in the plane, and the points on it."""
    from matplotlib.figure import Figure

    axis = np.linspace(-1.2, 1.2, 120, dtype=np.float32)
    plane = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)  # [120^2, 2]
    logits = jax.vmap(net.apply, (None, 0))(params, jnp.asarray(plane))
    second = np.asarray(jax.nn.softmax(logits)[:, 1]).reshape(120, 120)

    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(second, origin="lower", extent=(-1.2, 1.2, -1.2, 1.2), cmap="RdBu", vmin=0, vmax=1)
    axes.scatter(
        points[0][:, 0], points[0][:, 1], c=points[1], s=4, cmap="RdBu", edgecolors="black", linewidths=0.2
    )
    figure.colorbar(shown, label="probability of the second spiral")
    axes.set_title("Where the network draws the line between two spirals")
    figure.savefig(file, dpi=120)
