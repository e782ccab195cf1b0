"""Figures of a single node: what it sees, and how often it fires under which bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradfn.report.figures import LINE_COLOURS, _figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def what_a_node_sees(weights: Any, images: Any, labels: Any, bias: float) -> Figure:
    """Draw a node's weights, and pixel by pixel what it adds up of some images.

    Args:
        weights: `[height, width]`.
        images: `[n, height, width]`.
        labels: integers `[n]`, what the images are.
        bias: what to fire over is its negative.

    Returns:
        A figure with the weights and a column an image: the image, the image times the weights, and the sum.

    >>> figure = what_a_node_sees(np.ones([2, 2]), [np.zeros([2, 2]), np.ones([2, 2])], [0, 1], -3)
    >>> figure.get_suptitle()
    'Pixels times weights, added up: of these 2 typical digits, the 1 comes to more than 3'
    """
    weights, images = np.asarray(weights), np.asarray(images)
    products = images * weights
    sums = products.sum((1, 2))
    limit = float(np.abs(weights).max()) or 1.0
    n = len(images)
    figure = _figure(1.15 * (n + 1.8) + 0.6, 3.6, "compressed")
    grid = figure.add_gridspec(2, n + 2, width_ratios=[0.9, 0.9, *[1] * n])
    of_weights = figure.add_subplot(grid[:, :2])
    scale: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
    drawn = of_weights.imshow(weights, **scale)
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
            color=LINE_COLOURS[1] if fires else "0.35",
            fontweight="bold" if fires else None,
        )
        panels += [above, below]
    for panel in panels:
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[:].set_color("0.8")
    figure.colorbar(drawn, ax=panels, label="weight; below, pixel × weight", pad=0.01, aspect=30)
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
    figure = _figure(13.0, 4.8)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.45])
    rng = np.random.default_rng(0)  # spreads the dots of a row, which would hide each other
    shown = rng.permutation(len(sums))[:4000]
    for colour, of_colour in (("0.6", labels != best), (LINE_COLOURS[1], labels == best)):
        index = shown[of_colour[shown]]
        height = labels[index] + rng.uniform(-0.35, 0.35, len(index))
        left.plot(sums[index], height, ".", color=colour, markersize=3, alpha=0.6, rasterized=True)
    for threshold, colour in ((0.0, "0.3"), (-bias, LINE_COLOURS[0])):
        left.axvline(threshold, color=colour, linewidth=1.5)
        left.annotate(
            f"bias {-threshold:g}:\nfires right of here" if threshold else "no bias",
            (threshold, 1.0),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=colour,
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
        colour = "black" if rates[i, digit] > 0.5 else "white"
        right.text(
            i, digit, f"{100 * rates[i, digit]:.0f}", ha="center", va="center", color=colour, fontsize=8
        )
    right.set_xticks(range(len(biases)), [f"{value:g}" for value in biases], fontsize=9)
    right.get_xticklabels()[list(biases).index(bias)].set(color=LINE_COLOURS[0], fontweight="bold")
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
