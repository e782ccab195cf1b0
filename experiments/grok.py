"""Train on addition modulo 59 until the network memorizes and then generalizes; draw gradients, weights and waves."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf
from gradfn import runs
from gradfn.files import inner_folder
from gradfn.layers._embed import look_up
from gradfn.pages.figures import LINE_COLORS, History, new_figure
from gradfn.timings import phase

from ._common import SeededOptions, conclude, defaults

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EXPECTED = (
    runs.Expectation("step of memorization"),
    runs.Expectation("step of generalization"),
    runs.Expectation("generalization step / memorization step", at_least=10),
    runs.Expectation("test accuracy without decay", at_most=0.1, unit="%"),
)

MEMORIZED, GENERALIZED = 0.99, 0.95  # accuracies on the training and on the other sums
EVALUATIONS = 160


@dataclass(frozen=True)
class Config(SeededOptions):
    """Options of a run."""

    modulus: int = runs.option(
        59, "the numbers are 0 to this, without it; sums are taken modulo it", at_least=3
    )
    share: float = runs.option(0.4, "share of all pairs of numbers to train on")
    hidden: int = runs.option(128, "nodes in the hidden layer", at_least=1)
    steps: int = runs.option(8000, "training steps, each on all training pairs", at_least=1)
    rate: float = runs.option(0.003, "AdamW's learning rate", above=0)
    decay: float = runs.option(0.2, "weight decay of the first network; the second has 0", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise ValueError(f"share must be > 0 and < 1, got {self.share}")


class Result(NamedTuple):
    """The result of a run; dicts are by network, `decay` and `no decay`."""

    params: dict[str, dict[str, jax.Array]]
    histories: dict[str, Sequence[dict[str, Any]]]
    memorized: int | None  # the step at which the training pairs are known, with decay
    generalized: int | None  # that at which the others are
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Train with and without weight decay, measure and draw; it writes into the folder of the result."""
    config = runs.settle("grok", config)
    folder = runs.start("grok", config)
    train, test = sums(config.modulus, config.share, config.seed)
    print(f"{len(train[1]):,} sums modulo {config.modulus} to train on, {len(test[1]):,} others")
    net = adder(config.modulus, config.hidden)
    print(gf.table(net.spec))
    loss, start = gf.classification_loss(net), net.init(jax.random.key(config.seed))
    params, histories = {}, {}
    for name, decay in {"decay": config.decay, "no decay": 0.0}.items():
        fitted = gf.fit(
            gf.batch_mean(loss),
            start,
            lambda key: train,  # all of it, each step
            optax.adamw(config.rate, b2=0.98, weight_decay=decay),
            config.steps,
            seed=config.seed,
            evaluate=measures(net, loss, train, test),
            eval_every=max(config.steps // EVALUATIONS, 1),
            folder=inner_folder(folder, name.replace(" ", "-")),
            resume=config.resume,
            progress=False,
        )
        params[name], histories[name] = fitted.params, fitted.history
        last = fitted.history[-1]
        print(
            f"{name}: after {last['step']:,} steps {100 * last['train_accuracy']:.1f} % of the training sums right, "
            f"{100 * last['test_accuracy']:.1f} % of the others"
        )

    memorized = first(histories["decay"], "train_accuracy", MEMORIZED)
    generalized = first(histories["decay"], "test_accuracy", GENERALIZED)
    with phase("pictures"):
        figures = {
            "grok": grokking(histories, memorized, generalized),
            "waves": waves(
                {"before training": start["A"]} | {f"after, {name}": params[name]["A"] for name in params}
            ),
        }
    outcome = judge(config, memorized, generalized, histories["no decay"][-1]["test_accuracy"])
    conclude(
        folder,
        outcome,
        figures,
        f"sums modulo {config.modulus}",
        memorized=memorized,
        generalized=generalized,
    )
    return Result(params, histories, memorized, generalized, folder, outcome)


def adder(modulus: int, hidden: int) -> gf.Net:
    """Return a network of two numbers: a vector for each; their sum is squared elementwise and multiplied by a matrix.

    Gromov, *Grokking modular arithmetic*, 2023, whose squares make the waves that it finds easy to read.
    """
    normal = jax.nn.initializers.normal(0.3)  # large, which favors memorizing
    spec = {
        "A": gf.Param((modulus, hidden), normal),
        "B": gf.Param((modulus, hidden), normal),
        "W": gf.Param((modulus, hidden), normal),
    }

    def apply(params: Any, pair: jax.Array) -> jax.Array:
        z = gf.tap(look_up(params["A"], pair[0]) + look_up(params["B"], pair[1]), "z")  # [hidden]
        return gf.layers.affine(params["W"], None, gf.tap(jnp.square(z), "a"))  # [modulus]

    return gf.Net(spec, apply)


def sums(
    modulus: int, share: float, seed: int
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Return all pairs of numbers `[n, 2]` and their sums `[n]`: those to train on, and the others."""
    pairs = np.stack(np.divmod(np.arange(modulus**2), modulus), 1).astype(np.int32)
    pairs = pairs[np.random.default_rng(seed).permutation(len(pairs))]
    answers = pairs.sum(1, dtype=np.int32) % modulus
    n = min(max(round(share * len(pairs)), 1), len(pairs) - 1)
    x, y = jnp.asarray(pairs), jnp.asarray(answers)
    return (x[:n], y[:n]), (x[n:], y[n:])


def measures(net: gf.Net, loss: Any, train: Any, test: Any) -> Any:
    """Return what `gf.fit` evaluates: accuracies, norms of weights and gradient, purity of the waves."""
    right, mean_loss = gf.accuracy(net), gf.batch_mean(loss)

    @jax.jit
    def measure(params: Any) -> dict[str, jax.Array]:
        return {
            "train_accuracy": right(params, train),
            "test_accuracy": right(params, test),
            "test_loss": mean_loss(params, test),
            "weight_norm": optax.tree.norm(params),
            "gradient_norm": optax.tree.norm(jax.grad(mean_loss)(params, train)),
            "wave_share": wave_share(params["A"]),
        }

    return measure


def wave_share(A: jax.Array) -> jax.Array:
    """Return how much of the nodes' weights `[numbers, nodes]` is one wave each, in [0, 1].

    It is the share of the strongest frequency in a node's power (its mean left out), over all nodes. Nanda et al.,
    *Progress Measures for Grokking via Mechanistic Interpretability*, 2023, follow such a measure.
    """
    power = jnp.square(jnp.abs(jnp.fft.rfft(A, axis=0)[1:]))  # [frequencies, nodes]
    return power.max(0).sum() / power.sum()


def first(history: Sequence[dict[str, Any]], name: str, level: float) -> int | None:
    """Return the first step that was inspected with a metric at a level or above."""
    return next((row["step"] for row in history if row[name] >= level), None)


def judge(config: Config, memorized: int | None, generalized: int | None, without: float) -> runs.Outcome:
    """Compare when both happened, and the test accuracy without weight decay, with what is expected."""
    steps = [math.nan if step is None else step for step in (memorized, generalized)]
    measured = {
        "step of memorization": steps[0],
        "step of generalization": steps[1],
        "generalization step / memorization step": steps[1] / steps[0],
        "test accuracy without decay": without,
    }
    return runs.judge(EXPECTED, measured, defaults(config))


N_WAVES = 5


def grokking(histories: Mapping[str, History], memorized: int | None, generalized: int | None) -> Figure:
    """Draw accuracies, norms and the purity of waves over training, on a logarithmic scale of steps.

    Args:
        histories: by network, one dict per evaluation with `step`, `train_accuracy`, `test_accuracy`, `weight_norm`,
            `gradient_norm` and `wave_share`.
        memorized: the first network's step at which the training examples are known.
        generalized: that at which the others are.

    Returns:
        A figure with four panels.

    >>> names = ("step", "train_accuracy", "test_accuracy", "weight_norm", "gradient_norm", "wave_share")
    >>> grokking({"decay": [dict.fromkeys(names, 1)]}, 100, 5000).get_suptitle()
    'Memorized at step 100, generalized at step 5,000: 50 times as late'
    """
    figure = new_figure(11.0, 7.0)
    panels = figure.subplots(2, 2, sharex=True)
    for (name, history), color in zip(histories.items(), cycle(LINE_COLORS), strict=False):
        steps = [row["step"] for row in history]
        for metric, style, label in (("train", "--", "training sums"), ("test", "-", "other sums")):
            values = [100 * row[f"{metric}_accuracy"] for row in history]
            panels[0, 0].plot(steps, values, style, color=color, label=f"{label}, {name}")
        for panel, metric, scale in (
            (panels[0, 1], "weight_norm", 1), (panels[1, 0], "gradient_norm", 1), (panels[1, 1], "wave_share", 100),
        ):  # fmt: skip
            panel.plot(steps, [scale * row[metric] for row in history], color=color, label=name)
    labels = {
        (0, 0): "right (%)",
        (0, 1): "norm of all weights",
        (1, 0): "norm of the gradient (nats per weight)",
        (1, 1): "share of a node's weights\nthat is one wave (%)",
    }
    for where, label in labels.items():
        panel = panels[where]
        panel.set_ylabel(label)
        panel.set_xscale("log")
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
        for step in (memorized, generalized):
            if step is not None:
                panel.axvline(step, color="0.5", linewidth=1, linestyle=":")
    panels[0, 0].legend(frameon=False, loc="center left", bbox_to_anchor=(0.25, 0.45), fontsize=9)
    panels[0, 0].set_ylim(-3, 103)
    panels[1, 0].set_yscale("log")
    panels[1, 1].set_ylim(0, 100)
    for panel in panels[1]:
        panel.set_xlabel("training step")
    for step, text in ((memorized, "memorized"), (generalized, "generalized")):
        if step is not None:
            panels[0, 0].annotate(
                text,
                (step, 1.01),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=9,
                color="0.3",
            )
    if memorized is None:
        title = "Not even the training sums were memorized"
    elif generalized is None:
        title = f"Memorized at step {memorized:,}, not generalized"
    else:
        times = generalized / memorized
        title = (
            f"Memorized at step {memorized:,}, generalized at step {generalized:,}: {times:.0f} times as late"
        )
    figure.suptitle(title)
    return figure


def waves(weights: Mapping[str, Any]) -> Figure:
    """Draw the weights of a few nodes as functions of the number, and the frequencies of all nodes.

    Nanda et al., *Progress Measures for Grokking via Mechanistic Interpretability*, 2023: a network that adds
    modulo p turns numbers into angles.

    Args:
        weights: by moment or network, `[numbers, nodes]`.

    Returns:
        A figure with a row each: the weights of the five strongest nodes, and the share of each frequency in
        each node's power, nodes sorted by their frequency.

    >>> wave = np.cos(2 * np.pi * 2 * np.arange(7) / 7)[:, None]
    >>> waves({"after": np.tile(wave, 6)}).get_suptitle()
    'Of the weights of a node, one wave makes up: after 100 %'
    """
    figure = new_figure(11.5, 2.6 * len(weights) + 0.8)
    panels = figure.subplots(len(weights), 2, squeeze=False, width_ratios=[1.25, 1])
    texts = []
    for (left, right), (name, A) in zip(panels, weights.items(), strict=True):
        A = np.asarray(A, np.float64)
        numbers = np.arange(len(A))
        power = np.abs(np.fft.rfft(A, axis=0)[1:]) ** 2  # [frequencies, nodes]
        shares = power / np.maximum(power.sum(0), 1e-30)
        strongest = np.argsort(-power.sum(0), kind="stable")[:N_WAVES]
        for row, node in enumerate(strongest):
            scale = max(np.abs(A[:, node]).max(), 1e-30)
            color = LINE_COLORS[row % len(LINE_COLORS)]
            left.plot(numbers, -2.2 * row + A[:, node] / scale, ".-", color=color, linewidth=1, markersize=4)
        left.set_yticks(-2.2 * np.arange(len(strongest)), [f"node {node}" for node in strongest])
        left.tick_params(axis="y", length=0)
        left.set_ylabel(name, fontsize=11)
        left.spines[["top", "right", "left"]].set_visible(False)
        order = np.argsort(shares.argmax(0) - 1e-3 * shares.max(0), kind="stable")
        mapped = right.imshow(
            100 * shares[:, order], cmap="cividis", vmin=0, vmax=100, aspect="auto", origin="lower",
            extent=(0, A.shape[1], 0.5, len(power) + 0.5), interpolation="nearest",
        )  # fmt: skip
        right.set_ylabel("waves in all\nnumbers (frequency)")
        texts.append(f"{name} {100 * power.max(0).sum() / max(power.sum(), 1e-30):.0f} %")
    panels[-1, 0].set_xlabel("first number (its weight into each node, drawn to one height)")
    panels[-1, 1].set_xlabel("nodes, sorted by their frequency")
    figure.colorbar(mapped, ax=panels[:, 1].tolist(), label="share of the node's power (%)", pad=0.02)
    figure.suptitle(f"Of the weights of a node, one wave makes up: {'; '.join(texts)}")
    return figure
