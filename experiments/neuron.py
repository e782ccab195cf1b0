"""Make one node by hand, with weights for a stroke and a bias for inactivity, and draw which digits activate it."""

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
    runs.Expectation("digits that activate the node without a bias", unit="%"),
    runs.Expectation("digits that activate the node with the bias", at_most=0.1, unit="%"),
    runs.Expectation("fives among these", at_least=0.65, unit="%"),
)

BIASES = tuple(range(0, -21, -1))


@dataclass(frozen=True)
class Config(DigitOptions):
    """Options of a run; the region is in pixels of the 28x28 image."""

    top: int = runs.option(11, "first row of the region of interest", at_least=0, at_most=27)
    left: int = runs.option(0, "its first column", at_least=0, at_most=27)
    height: int | None = runs.option(None, "its rows (default: 5, or what is left below the first)")
    width: int | None = runs.option(
        None, "its columns (default: 16, or what is left to the right of the first)"
    )
    ring: int = runs.option(3, "how far the negative surround reaches; 0 for none", at_least=0, at_most=28)
    bias: int = runs.option(-10, "the bias for inactivity that is drawn in detail, beside none")

    def __post_init__(self) -> None:
        super().__post_init__()
        runs.within(1, 28 - self.top, height=self.height)
        runs.within(1, 28 - self.left, width=self.width)
        runs.within(BIASES[-1], -1, bias=self.bias)


class Result(NamedTuple):
    """The result of a run."""

    weights: np.ndarray  # [28, 28]
    sums: np.ndarray  # [digits], weighted, without a bias
    rates: np.ndarray  # [biases, 10], share of each class that the node fires for
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Make the node, evaluate it on every digit with every bias, and draw; it writes into the folder of the result."""
    config, data, folder = start_on_digits("neuron", config)
    # Nothing is learned here, so all digits may be used.
    images, labels = (np.concatenate(parts) for parts in zip(*data[:3], strict=True))

    weights = node(config)
    activations = activation(jnp.asarray(weights.reshape(1, 784)), jnp.asarray(images))  # [biases, digits]
    fires = np.asarray(activations > 0.5)  # over the middle of [0, 1]: the weighted sum outweighs the bias
    rates = np.stack([fires[:, labels == digit].mean(1) for digit in range(10)], 1)  # [biases, 10]
    sums = images @ weights.ravel()

    shown = [typical(sums, np.flatnonzero(labels == digit)) for digit in range(10)]
    with phase("pictures"):
        figures = {
            "node": what_a_node_sees(weights, images[shown].reshape(-1, 28, 28), labels[shown], config.bias),
            "firing": firing_rates(sums, labels, BIASES, rates, config.bias),
        }
    outcome = judge(config, labels, fires)
    conclude(folder, outcome, figures, data.name, rates=rates.tolist())
    return Result(weights, sums, rates, folder, outcome)


def node(config: Config) -> np.ndarray:
    """Return the weights `[28, 28]`: 1 in the region, 0 far from it, and below 0 in a ring around it.

    The weights of the ring and of the region cancel, so that a uniform area gives 0: the node responds to a stroke
    with background beside it.
    """
    height = config.height or min(5, 28 - config.top)
    width = config.width or min(16, 28 - config.left)
    rows, columns = np.indices((28, 28))
    above, below = config.top - rows, rows - (config.top + height - 1)
    before, after = config.left - columns, columns - (config.left + width - 1)
    away = np.maximum.reduce([above, below, before, after])  # pixels from the region, 0 and less inside
    region, ring = away <= 0, (away > 0) & (away <= config.ring)
    surround = -region.sum() / ring.sum() if ring.any() else 0.0
    return np.where(region, 1.0, np.where(ring, surround, 0.0)).astype(np.float32)


def typical(sums: np.ndarray, index: np.ndarray) -> int:
    """Return the digit whose weighted sum is the median."""
    return int(index[np.argsort(sums[index])[len(index) // 2]])


@jax.jit
def activation(W: jax.Array, images: jax.Array) -> jax.Array:
    """Return the activation of the node for each image `[n, 784]` and each bias, in [0, 1]: `[biases, n]`."""

    def of_one(bias: jax.Array, image: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(gf.layers.affine(W, bias[None], image))[0]  # sigma(W a + b)

    of_all = jax.vmap(jax.vmap(of_one, (None, 0)), (0, None))
    return of_all(jnp.asarray(BIASES, W.dtype), images)


def judge(config: Config, labels: np.ndarray, fires: np.ndarray) -> runs.Outcome:
    """Compare for how many digits the node is active with what is expected; `fires` is `[biases, digits]`."""
    with_bias = fires[BIASES.index(config.bias)]
    measured = {
        "digits that activate the node without a bias": fires[0].mean(),
        "digits that activate the node with the bias": with_bias.mean(),
        "fives among these": (labels[with_bias] == 5).sum() / max(with_bias.sum(), 1),
    }
    return runs.judge(EXPECTED, measured, defaults(config))


def what_a_node_sees(weights: Any, images: Any, labels: Any, bias: float) -> Figure:
    """Draw a node's weights, and the terms of its weighted sum for some images, pixel by pixel.

    Args:
        weights: `[height, width]`.
        images: `[n, height, width]`.
        labels: integers `[n]`, what the images are.
        bias: what to fire over is its negative.

    Returns:
        A figure with the weights and one column per image: the image, the image times the weights, and the sum.

    >>> figure = what_a_node_sees(np.ones([2, 2]), [np.zeros([2, 2]), np.ones([2, 2])], [0, 1], -3)
    >>> figure.get_suptitle()
    'Pixels times weights, added up: of these 2 typical digits, the 1 comes to more than 3'
    """
    weights, images = np.asarray(weights), np.asarray(images)
    products = images * weights
    sums = products.sum((1, 2))
    limit = float(np.abs(weights).max()) or 1.0
    n = len(images)
    figure = new_figure(1.15 * (n + 1.8) + 0.6, 3.6, "compressed")
    grid = figure.add_gridspec(2, n + 2, width_ratios=[0.9, 0.9, *[1] * n])
    of_weights = figure.add_subplot(grid[:, :2])
    scale: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
    mapped = of_weights.imshow(weights, **scale)
    of_weights.set_title("its weights", fontsize=10)
    panels = [of_weights]
    for i in range(n):
        above, below = (figure.add_subplot(grid[row, i + 2]) for row in range(2))
        above.imshow(images[i], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        above.set_title(f"a {labels[i]}", fontsize=9)
        below.imshow(products[i], **scale)
        fires = sums[i] > -bias
        below.set_title(
            f"sum {sums[i]:.1f}" + ("\nFIRES" if fires else "\nsilent"),
            y=-0.5,
            fontsize=9,
            color=LINE_COLORS[1] if fires else "0.35",
            fontweight="bold" if fires else None,
        )
        panels += [above, below]
    for panel in panels:
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[:].set_color("0.8")
    figure.colorbar(mapped, ax=panels, label="weight; below, pixel × weight", pad=0.01, aspect=30)
    over = ", ".join(f"the {label}" for label, total in zip(labels, sums, strict=True) if total > -bias)
    figure.suptitle(
        f"Pixels times weights, added up: of these {n} typical digits, {over or 'none'} comes to more than {-bias:g}"
    )
    return figure


def firing_rates(sums: Any, labels: Any, biases: Sequence[float], rates: Any, bias: float) -> Figure:
    """Draw the weighted sums of each class, and the share of it that is over each threshold.

    Args:
        sums: `[n]`, without a bias.
        labels: integers `[n]`.
        biases: from 0 down.
        rates: `[biases, classes]`, shares in [0, 1].
        bias: that of them which the title tells of.

    Returns:
        A figure with two panels: dots, one an example, with the threshold as a line; and a table of shares.

    >>> figure = firing_rates([1.0, 12.0], [0, 1], [0, -10], [[1, 1], [0, 1]], -10)
    >>> figure.get_suptitle()
    'A bias of -10 asks for a weighted sum over 10: the node then fires for 100 % of the 1s, and 0 % of all others'
    """
    sums, labels, rates = np.asarray(sums), np.asarray(labels), np.asarray(rates, float)
    n_classes = rates.shape[1]
    chosen = rates[list(biases).index(bias)]
    best = int(chosen.argmax())
    figure = new_figure(13.0, 4.8)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.45])
    rng = np.random.default_rng(0)  # jitter, so that dots do not hide each other
    shown = rng.permutation(len(sums))[:4000]
    for color, of_color in (("0.6", labels != best), (LINE_COLORS[1], labels == best)):
        index = shown[of_color[shown]]
        height = labels[index] + rng.uniform(-0.35, 0.35, len(index))
        left.plot(sums[index], height, ".", color=color, markersize=3, alpha=0.6, rasterized=True)
    for threshold, color in ((0.0, "0.3"), (-bias, LINE_COLORS[0])):
        left.axvline(threshold, color=color, linewidth=1.5)
        left.annotate(
            f"bias {-threshold:g}:\nfires right of here" if threshold else "no bias",
            (threshold, 1.0),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=color,
            ha="center",
            fontsize=8,
        )
    left.set_yticks(range(n_classes))
    left.set_ylim(n_classes - 0.5, -0.5)
    left.set_xlabel("weighted sum (pixel × weight, added up); a dot is a digit")
    left.set_ylabel("digit")
    left.spines[["top", "right"]].set_visible(False)

    image = right.imshow(rates.T, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for digit, i in np.ndindex(n_classes, len(biases)):
        color = "black" if rates[i, digit] > 0.5 else "white"
        right.text(
            i, digit, f"{100 * rates[i, digit]:.0f}", ha="center", va="center", color=color, fontsize=8
        )
    right.set_xticks(range(len(biases)), [f"{value:g}" for value in biases], fontsize=9)
    right.get_xticklabels()[list(biases).index(bias)].set(color=LINE_COLORS[0], fontweight="bold")
    right.set_yticks(range(n_classes))
    right.set_xlabel("bias for inactivity")
    right.tick_params(length=0)
    right.set_title("share of each digit that it fires for (%)", fontsize=10)
    figure.colorbar(image, ax=right, label="firing rate", format=lambda x, _: f"{100 * x:.0f} %", pad=0.01)
    others = (sums[labels != best] > -bias).mean()
    figure.suptitle(
        f"A bias of {bias:g} asks for a weighted sum over {-bias:g}: the node then fires for "
        f"{100 * chosen[best]:.0f} % of the {best}s, and {100 * others:.0f} % of all others"
    )
    return figure
