"""Plant three bad batches in a training run: each spike is found, and shows what was wrong with its batch."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import optax

import gradfn as gf
from gradfn import runs
from gradfn.pages.figures import LINE_COLORS, new_figure
from gradfn.timings import phase

from ._common import DigitOptions, conclude, defaults, start_on_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPECTED = (
    runs.Expectation("planted batches that are found", at_least=1, unit="%"),
    runs.Expectation("other steps that are found", at_most=0),
    runs.Expectation("share of the gradient from the broken record", at_least=0.9, unit="%"),
)
# What is planted: at which share of the steps, and what is wrong with the batch.
PLANTED = (
    (0.375, "one broken record"),
    (0.575, "labels in the wrong order"),
    (0.775, "noise instead of images"),
)
BROKEN = 7  # the position of the broken record in its batch
SHOWN = 8  # examples of each spike


@dataclass(frozen=True)
class Config(DigitOptions):
    """Options of a run."""

    hidden: int = runs.option(32, "nodes in the hidden layer", at_least=1)
    steps: int = runs.option(400, "training steps", at_least=200)
    batch: int = runs.option(32, "digits per step", at_least=8)
    rate: float = runs.option(1e-3, "Adam's learning rate", above=0)


class Result(NamedTuple):
    """The result of a run."""

    spikes: Sequence[dict[str, Any]]  # rows of `gf.fit`
    planted: dict[int, str]  # what is wrong with the batch of a step
    history: Sequence[dict[str, Any]]
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Train on batches three of which are bad, and see what is found; it writes into the folder of the result."""
    config, data, folder = start_on_digits("spike", config)
    net = gf.mlp([int(np.prod(data.shape)), config.hidden, 10], activation="relu")
    batches = Batches(config, data.train)
    print("planted: " + ", ".join(f"{what} at step {step}" for step, what in batches.planted.items()))
    fitted = gf.fit(
        gf.batch_mean(gf.classification_loss(net)),
        net.init(jax.random.key(config.seed)),
        gf.train.from_host(batches),
        optax.adam(config.rate),
        config.steps,
        seed=config.seed,
        eval_every=2,
        inspect_when="spike",
        folder=folder,
        resume=config.resume,
        progress=False,
    )
    for row in fitted.spikes:
        print(row["text"])
    with phase("pictures"):
        figures = {
            "spikes": of_loss(fitted.history, fitted.spikes, batches.planted),
            "examples": of_examples(fitted.spikes, batches, data.shape),
        }
    outcome = judge(config, fitted.spikes, batches.planted)
    conclude(folder, outcome, figures, data.name, found=[row["step"] for row in fitted.spikes])
    return Result(fitted.spikes, batches.planted, fitted.history, folder, outcome)


class Batches:
    """The batch of each step: digits in a new order each epoch, but for the batches that are planted.

    Attributes:
        planted: what is wrong with the batch of a step.
    """

    def __init__(self, config: Config, train: Sequence[np.ndarray]) -> None:
        self.images, self.labels = (np.asarray(part) for part in train)
        n, self.seed = len(self.labels), config.seed
        epochs = -(-config.steps // (n // config.batch))
        orders = [gf.data.epoch_order(n, config.batch, config.seed, epoch) for epoch in range(epochs)]
        self.order = np.concatenate(orders)  # [steps, batch]
        self.planted = {int(share * config.steps): what for share, what in PLANTED}

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the images and labels of a step."""
        rows = self.order[step % len(self.order)]
        images, labels = self.images[rows], self.labels[rows]
        what = self.planted.get(step)
        if what == "one broken record":
            # Nobody divided its pixels by 255, and its label is that of another digit.
            images[BROKEN] *= np.float32(255)
            labels[BROKEN] = (labels[BROKEN] + 5) % 10
        elif what == "labels in the wrong order":
            labels = np.roll(labels, 1)
        elif what is not None:
            images = np.random.default_rng(self.seed).uniform(0, 1, images.shape).astype(images.dtype)
        return images, labels.astype(np.int32)


def judge(config: Config, spikes: Sequence[dict[str, Any]], planted: dict[int, str]) -> runs.Outcome:
    """Compare the steps that were found with those that were planted."""
    found = [row["step"] for row in spikes]
    broken = [row for row in spikes if planted.get(row["step"]) == "one broken record"]
    norms = np.square(broken[0]["examples"]["norms"]) if broken else np.zeros(config.batch)
    measured = {
        "planted batches that are found": len(set(found) & set(planted)) / len(planted),
        "other steps that are found": len(set(found) - set(planted)),
        "share of the gradient from the broken record": norms[BROKEN] / max(norms.sum(), 1e-30),
    }
    return runs.judge(EXPECTED, measured, defaults(config))


def of_loss(
    history: Sequence[dict[str, Any]], spikes: Sequence[dict[str, Any]], planted: dict[int, str]
) -> Figure:
    """Draw the loss over training, and the steps that were found.

    Args:
        history: rows of `gf.fit`.
        spikes: rows of `gf.fit`.
        planted: what is wrong with the batch of a step.

    >>> rows = [{"step": 2, "loss": 2.0}, {"step": 4, "loss": 1.0}]
    >>> spike = {"step": 3, "values": {"loss": 9.0}, "edges": {"loss": 2.0}}
    >>> of_loss(rows, [spike], {3: "noise", 4: "zeros"}).get_suptitle()
    '50 % of the planted batches found, and 0 other steps'
    """
    figure = new_figure(9.0, 4.6)
    panel = figure.subplots()
    panel.plot(
        [row["step"] for row in history],
        [row["loss"] for row in history],
        color=LINE_COLORS[0],
        linewidth=1.2,
    )
    for row in spikes:
        step, loss = row["step"], row["values"]["loss"]
        panel.plot([step, step], [row["edges"]["loss"], loss], color=LINE_COLORS[1], linewidth=1)
        panel.plot([step], [loss], "o", color=LINE_COLORS[1])
        text = f"step {step}: {planted.get(step, 'nothing was planted here')}"
        panel.annotate(text, (step, loss), (0, 8), textcoords="offset points", ha="center", fontsize=9)
    panel.set_yscale("log")
    panel.margins(y=0.15)
    panel.set_xlabel(
        "training step (a dot: a step that was found, its line starts at the upper edge of the band)"
    )
    panel.set_ylabel("training loss (nats, mean of two steps)")
    panel.grid(color="0.92")
    panel.spines[["top", "right"]].set_visible(False)
    found = {row["step"] for row in spikes}
    others = len(found - set(planted))
    share = len(found & set(planted)) / len(planted)
    figure.suptitle(f"{share:.0%} of the planted batches found, and {others} other steps".replace("%", " %"))
    return figure


def of_examples(spikes: Sequence[dict[str, Any]], batches: Batches, shape: Sequence[int]) -> Figure:
    """Draw the examples of each spike that have the largest gradients, with their shares of the squared norms.

    Args:
        spikes: rows of `gf.fit`.
        batches: of the run.
        shape: of an image.
    """
    figure = new_figure(9.6, 1.75 * max(len(spikes), 1) + 0.9)
    panels = figure.subplots(max(len(spikes), 1), SHOWN, squeeze=False)
    for panel in panels.ravel():
        panel.set_axis_off()
    for row, of_spike in zip(spikes, panels, strict=False):
        images, labels = batches(row["step"])
        of_spike[0].text(
            -0.15,
            0.5,
            f"step {row['step']}",
            transform=of_spike[0].transAxes,
            rotation=90,
            va="center",
            ha="right",
        )
        for one, panel in zip(row["examples"]["largest"], of_spike, strict=False):
            image = images[one["position"]]
            panel.imshow(image.reshape(shape) / max(image.max(), 1), cmap="gray_r", vmin=0, vmax=1)
            brightest = "" if image.max() <= 1 else f", up to {image.max():.0f}"
            panel.set_title(f"{one['share']:.0%}: a {labels[one['position']]}{brightest}", fontsize=8)
    figure.suptitle(
        "The largest gradients of each spike: share of the squared norms, the label, and pixels above 1"
    )
    return figure
