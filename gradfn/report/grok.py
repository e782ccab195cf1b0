"""Figures of grokking: accuracies far apart in time, norms, and the waves that weights become."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from gradfn.report.figures import LINE_COLOURS, History, _figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_WAVES = 5


def grokking(histories: Mapping[str, History], by_heart: int | None, understood: int | None) -> Figure:
    """Draw accuracies, norms and the purity of waves over training, on a logarithmic scale of steps.

    Args:
        histories: by network, a dict an evaluation with `step`, `train_accuracy`, `test_accuracy`, `weight_norm`,
            `gradient_norm` and `wave_share`.
        by_heart: the first network's step at which the training examples are known.
        understood: that at which the others are.

    Returns:
        A figure with four panels.

    >>> names = ("step", "train_accuracy", "test_accuracy", "weight_norm", "gradient_norm", "wave_share")
    >>> grokking({"decay": [dict.fromkeys(names, 1)]}, 100, 5000).get_suptitle()
    'Known by heart at step 100, understood at step 5,000: 50 times as late'
    """
    figure = _figure(11.0, 7.0)
    panels = figure.subplots(2, 2, sharex=True)
    for (name, history), colour in zip(histories.items(), cycle(LINE_COLOURS), strict=False):
        steps = [row["step"] for row in history]
        for metric, style, label in (("train", "--", "training sums"), ("test", "-", "other sums")):
            values = [100 * row[f"{metric}_accuracy"] for row in history]
            panels[0, 0].plot(steps, values, style, color=colour, label=f"{label}, {name}")
        for panel, metric, scale in (
            (panels[0, 1], "weight_norm", 1), (panels[1, 0], "gradient_norm", 1), (panels[1, 1], "wave_share", 100),
        ):  # fmt: skip
            panel.plot(steps, [scale * row[metric] for row in history], color=colour, label=name)
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
        for step in (by_heart, understood):
            if step is not None:
                panel.axvline(step, color="0.5", linewidth=1, linestyle=":")
    panels[0, 0].legend(frameon=False, loc="center left", bbox_to_anchor=(0.25, 0.45), fontsize=9)
    panels[0, 0].set_ylim(-3, 103)
    panels[1, 0].set_yscale("log")
    panels[1, 1].set_ylim(0, 100)
    for panel in panels[1]:
        panel.set_xlabel("training step")
    for step, text in ((by_heart, "known\nby heart"), (understood, "understood")):
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
    if by_heart is None:
        said = "Not even known by heart"
    elif understood is None:
        said = f"Known by heart at step {by_heart:,}, not understood"
    else:
        times = understood / by_heart
        said = f"Known by heart at step {by_heart:,}, understood at step {understood:,}: {times:.0f} times as late"
    figure.suptitle(said)
    return figure


def waves(weights: Mapping[str, Any]) -> Figure:
    """Draw what the weights of a few nodes are, number by number, and the frequencies in all of them.

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
    figure = _figure(11.5, 2.6 * len(weights) + 0.8)
    panels = figure.subplots(len(weights), 2, squeeze=False, width_ratios=[1.25, 1])
    told = []
    for (left, right), (name, A) in zip(panels, weights.items(), strict=True):
        A = np.asarray(A, np.float64)
        numbers = np.arange(len(A))
        power = np.abs(np.fft.rfft(A, axis=0)[1:]) ** 2  # [frequencies, nodes]
        shares = power / np.maximum(power.sum(0), 1e-30)
        strongest = np.argsort(-power.sum(0), kind="stable")[:N_WAVES]
        for row, node in enumerate(strongest):
            scale = max(np.abs(A[:, node]).max(), 1e-30)
            colour = LINE_COLOURS[row % len(LINE_COLOURS)]
            left.plot(numbers, -2.2 * row + A[:, node] / scale, ".-", color=colour, linewidth=1, markersize=4)
        left.set_yticks(-2.2 * np.arange(len(strongest)), [f"node {node}" for node in strongest])
        left.tick_params(axis="y", length=0)
        left.set_ylabel(name, fontsize=11)
        left.spines[["top", "right", "left"]].set_visible(False)
        order = np.argsort(shares.argmax(0) - 1e-3 * shares.max(0), kind="stable")
        drawn = right.imshow(
            100 * shares[:, order], cmap="cividis", vmin=0, vmax=100, aspect="auto", origin="lower",
            extent=(0, A.shape[1], 0.5, len(power) + 0.5), interpolation="nearest",
        )  # fmt: skip
        right.set_ylabel("waves in all\nnumbers (frequency)")
        told.append(f"{name} {100 * power.max(0).sum() / max(power.sum(), 1e-30):.0f} %")
    panels[-1, 0].set_xlabel("first number (its weight into each node, drawn to one height)")
    panels[-1, 1].set_xlabel("nodes, sorted by their frequency")
    figure.colorbar(drawn, ax=panels[:, 1].tolist(), label="share of the node's power (%)", pad=0.02)
    figure.suptitle(f"Of the weights of a node, one wave makes up: {'; '.join(told)}")
    return figure
