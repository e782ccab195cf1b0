"""Figures of one network trained with many learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from gradfn.report.figures import LINE_COLOURS, _figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 120  # of a curve: more would only be jitter


def fan(rates: Any, losses: Any, states: Sequence[str], guess: float) -> Figure:
    """Draw the loss of each learning rate over training, its colour the rate.

    Args:
        rates: `[rates]`.
        losses: `[rates, seeds, steps]` in nats; where they are not finite, nothing is drawn.
        states: of each rate.
        guess: the loss of a guess.

    Returns:
        A figure with a line a rate (the median of the seeds) in a band from the smallest to the largest.

    >>> fan([0.1, 1.0], np.ones([2, 3, 50]), ["stuck", "learning"], 2.3).get_suptitle()
    'One network, 2 learning rates: 1 stuck, 1 learning'
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    rates = np.asarray(rates, np.float64)
    values, steps = _smooth(np.asarray(losses, np.float64))
    values = np.maximum(values, 1e-6)  # a logarithm has no place for zeros
    figure = _figure(9.4, 5.6)
    panel = figure.subplots()
    scale = ScalarMappable(LogNorm(rates.min(), rates.max()), cmap="viridis")
    ends: dict[str, list[float]] = {}
    for rate, of_rate, name in zip(rates, values, states, strict=True):
        colour, middle = scale.to_rgba(rate), np.median(of_rate, 0)
        panel.fill_between(steps, of_rate.min(0), of_rate.max(0), color=colour, alpha=0.15, linewidth=0)
        panel.plot(steps, middle, color=colour, linewidth=1.8)
        ends.setdefault(name, []).append(middle[-1])
    panel.plot([0, steps[-1]], [guess, guess], ":", color="black", linewidth=1.2, zorder=5)
    for name, of_state in ends.items():
        height = np.exp(np.mean(np.log(of_state)))
        if np.isfinite(height):
            panel.annotate(
                name, (steps[-1], height), (8, 0), textcoords="offset points", va="center", fontsize=12
            )
    panel.set_yscale("log")
    panel.set_xlabel("training step")
    panel.set_ylabel("training loss (nats; dotted: a guess)")
    panel.set_xlim(0, steps[-1] * 1.14)
    panel.grid(color="0.92")
    panel.spines[["top", "right"]].set_visible(False)
    figure.colorbar(scale, ax=panel, label="learning rate", pad=0.01)
    told = [f"{len(of_state)} {name}" for name, of_state in ends.items()]
    figure.suptitle(f"One network, {len(rates)} learning rates: {', '.join(told)}")
    return figure


def valley(rates: Any, losses: Any, accuracies: Any, states: Sequence[str], guess: float) -> Figure:
    """Draw where each learning rate ended, a dot a network.

    Args:
        rates: `[rates]`.
        losses: `[rates, seeds]`, in the end, in nats.
        accuracies: `[rates, seeds]`, shares in [0, 1].
        states: of each rate.
        guess: the loss of a guess.

    Returns:
        A figure with a panel for the losses and one for the accuracies.

    >>> figure = valley([0.1, 1.0], np.ones([2, 3]), [[0.1], [1.0]], ["stuck", "learning"], 2.3)
    >>> figure.get_suptitle()
    'Rates from 1 to 1 learn; the best is 1 (100.0 % of the test examples right)'
    """
    rates, losses, accuracies = (np.asarray(x, np.float64) for x in (rates, losses, accuracies))
    figure = _figure(8.6, 6.0)
    panels = figure.subplots(2, 1, sharex=True)
    edges = np.sqrt(rates[1:] * rates[:-1])
    edges = np.concatenate([[rates[0] ** 2 / edges[0]], edges, [rates[-1] ** 2 / edges[-1]]])
    for panel, values, label in zip(
        panels,
        (losses, 100 * accuracies),
        ("training loss in the end (nats)", "test accuracy (%)"),
        strict=True,
    ):
        for name, group in groupby(range(len(rates)), key=lambda i: states[i]):
            members = list(group)
            low, high = edges[members[0]], edges[members[-1] + 1]
            panel.axvspan(low, high, color="0.93" if name == "learning" else "white", zorder=0)
            if panel is panels[0]:
                centre = math.sqrt(low * high)
                panel.text(
                    centre,
                    1.02,
                    name,
                    transform=panel.get_xaxis_transform(),
                    ha="center",
                    va="bottom",
                    fontsize=11,
                )
        for of_seed in values.T:
            panel.plot(rates, of_seed, "o", color=LINE_COLOURS[0], markersize=4, alpha=0.6)
        panel.plot(rates, np.median(values, 1), color=LINE_COLOURS[0])
        panel.set_ylabel(label)
        panel.set_xscale("log")
        panel.set_xlim(edges[0], edges[-1])
        panel.grid(color="0.88")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    panels[0].axhline(guess, color="0.3", linewidth=1, linestyle=":")
    panels[0].text(edges[-1], guess, "a guess ", color="0.3", fontsize=9, ha="right", va="bottom")
    panels[1].set_xlabel("learning rate (a dot is a network, the line their median)")
    medians = np.median(accuracies, 1)
    best = int(medians.argmax())
    learning = [rate for rate, name in zip(rates, states, strict=True) if name == "learning"]
    said = (
        f"Rates from {_told(min(learning))} to {_told(max(learning))} learn" if learning else "No rate learns"
    )
    figure.suptitle(
        f"{said}; the best is {_told(rates[best])} ({100 * medians[best]:.1f} % of the test examples right)"
    )
    return figure


def _told(rate: float) -> str:
    """Return a rate with two digits, and no exponent where there is a shorter way: 100, not 1e+02."""
    return f"{float(f'{rate:.2g}'):g}"


def _smooth(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return means over stretches of steps, `[..., points]`, and the last step of each stretch."""
    n_steps = losses.shape[-1]
    stretch = max(1, n_steps // POINTS)
    n = n_steps // stretch
    means = losses[..., : n * stretch].reshape(*losses.shape[:-1], n, stretch).mean(-1)
    return means, stretch * np.arange(1, n + 1)
