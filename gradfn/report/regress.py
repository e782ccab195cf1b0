"""Figures of a regression: predictions beside the truth, what they miss, and what each input does to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from gradfn.report.figures import LINE_COLOURS, _figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def predictions(truth: Any, answers: Mapping[str, Any], r2: Mapping[str, float]) -> Figure:
    """Draw the answers of some models over the truth, and what they miss of it.

    Args:
        truth: `[n]`.
        answers: by model, `[n]`.
        r2: by model, the share of the variance that it explains.

    Returns:
        A figure with a column a model: above the predictions, below the residuals.

    >>> predictions([1.0, 2.0], {"net": [1.0, 2.0]}, {"net": 1.0}).get_suptitle()
    'Of what sets patients apart (the variance), explained by net 100 %'
    """
    truth = np.asarray(truth, np.float64)
    figure = _figure(4.4 * len(answers) + 0.6, 7.2)
    panels = figure.subplots(
        2, len(answers), squeeze=False, sharex=True, sharey="row", height_ratios=[1.6, 1]
    )
    everything = np.concatenate([truth, *[np.asarray(values) for values in answers.values()]])
    ends = np.array([everything.min(), everything.max()])
    for (above, below), (name, values), colour in zip(
        panels.T, answers.items(), cycle(LINE_COLOURS), strict=False
    ):
        values = np.asarray(values, np.float64)
        rmse = float(np.sqrt(np.mean(np.square(truth - values))))
        above.plot(ends, ends, color="0.5", linewidth=1)
        above.plot(truth, values, "o", color=colour, markersize=5, alpha=0.7, markeredgewidth=0)
        above.set_title(f"{name}: R² {r2[name]:.2f}, off by {rmse:.0f} (rms)", fontsize=11)
        below.axhline(0, color="0.5", linewidth=1)
        below.vlines(truth, 0, values - truth, color=colour, alpha=0.35, linewidth=1)
        below.plot(truth, values - truth, "o", color=colour, markersize=4, alpha=0.7, markeredgewidth=0)
        below.set_xlabel("truth: progression of the disease (index)")
        for panel in (above, below):
            panel.grid(color="0.92")
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("prediction (index; line: as the truth)")
    panels[1, 0].set_ylabel("prediction minus truth")
    told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in r2.items())
    figure.suptitle(f"Of what sets patients apart (the variance), explained by {told}")
    return figure


def slopes(gradients: Any, coefficients: Any, names: Sequence[str]) -> Figure:
    """Draw the gradient of a prediction by each input, for every example, beside the coefficients of a line.

    Args:
        gradients: `[n, inputs]`.
        coefficients: `[inputs]`, of linear regression; each the gradient of its predictions, everywhere.
        names: of the inputs.

    Returns:
        A figure with a row an input, the steepest on top.

    >>> slopes([[1.0, 2.0], [1.0, 4.0]], [1.0, 2.5], ["age", "sex"]).get_suptitle()
    'What moves the prediction: the gradient by each input; the steepest on average is sex (+3)'
    """
    gradients, coefficients = np.asarray(gradients, np.float64), np.asarray(coefficients, np.float64)
    means = gradients.mean(0)
    order = np.argsort(-np.abs(means), kind="stable")
    figure = _figure(8.4, 0.42 * len(names) + 1.7)
    panel = figure.subplots()
    rng = np.random.default_rng(0)  # spreads the dots of a row, which would hide each other
    panel.axvline(0, color="0.5", linewidth=1)
    for row, i in enumerate(order):
        heights = row + rng.uniform(-0.25, 0.25, len(gradients))
        first = row == 0
        panel.plot(
            gradients[:, i], heights, ".", color=LINE_COLOURS[0], markersize=4, alpha=0.5,
            label="network: one patient" if first else None,
        )  # fmt: skip
        panel.plot(
            [means[i]] * 2, [row - 0.35, row + 0.35], color=LINE_COLOURS[0], linewidth=2.5,
            label="network: mean" if first else None,
        )  # fmt: skip
        panel.plot(
            coefficients[i], row, "D", color=LINE_COLOURS[1], markersize=7,
            label="linear regression: its coefficient" if first else None,
        )  # fmt: skip
    panel.set_yticks(range(len(names)), [names[i] for i in order])
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlabel("change of the prediction (index) for one standard deviation more of the input")
    panel.grid(axis="x", color="0.92")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="lower right")
    top = int(order[0])
    figure.suptitle(
        f"What moves the prediction: the gradient by each input; the steepest on average is {names[top]} "
        f"({means[top]:+.2g})"
    )
    return figure
