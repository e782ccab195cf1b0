"""Pictures of a loss's curvature: sharpness over training, the spectrum, the landscape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from gradfn.report.figures import LINE_COLOURS, _figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EDGE = 0.1  # as near to its limit, relatively, a sharpness is at the edge


def edge_of_stability(histories: Mapping[float, Sequence[dict[str, Any]]], loss_unit: str = "nats") -> Figure:
    """Draw the sharpness over training beside `2 / rate`, and the loss below, a colour a learning rate.

    Args:
        histories: by learning rate, rows with `step`, `sharpness` and `loss`.
        loss_unit: of the loss.

    Returns:
        A figure with two panels; its title says which rates end at their limit.

    Raises:
        ValueError: no rate, or one without rows.

    >>> rows = [{"step": s, "sharpness": 4.9, "loss": 1.0} for s in (0, 10, 20)]
    >>> edge_of_stability({0.4: rows}).get_suptitle()
    'Gradient descent ends at the edge of stability:\\nsharpness 4.9 of 2 / 0.4 = 5'
    """
    if not histories or not all(histories.values()):
        raise ValueError("edge_of_stability: one learning rate at least, and rows for each")
    figure = _figure(8.2, 6.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    at_edge, highest = [], 0.0
    for (rate, rows), colour in zip(histories.items(), cycle(LINE_COLOURS), strict=False):
        steps, sharp = ([row[name] for row in rows] for name in ("step", "sharpness"))
        limit, late = 2 / rate, late_sharpness(rows)
        upper.axhline(limit, color=colour, linestyle="--", linewidth=1.2)
        upper.annotate(
            f"2 / {rate:g} = {limit:.3g}",
            (1, limit),
            (6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=colour,
        )
        upper.plot(steps, sharp, color=colour, label=f"rate {rate:g}")
        lower.plot(steps[1:], [row["loss"] for row in rows][1:], color=colour)
        highest = max(highest, limit, *sharp)
        if abs(late / limit - 1) <= EDGE:
            at_edge.append(f"{late:.3g} of 2 / {rate:g} = {limit:.3g}")
    upper.set_ylabel("sharpness: largest eigenvalue\nof the loss's Hessian")
    upper.set_ylim(0, highest * 1.15)
    upper.legend(frameon=False, ncols=4, loc="upper right")
    lower.set_ylim(bottom=0)
    lower.set_ylabel(f"training loss\n({loss_unit})")
    lower.set_xlabel("step of gradient descent, with all examples")
    lower.set_xlim(left=0)
    for panel in (upper, lower):
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Gradient descent ends at the edge of stability:\nsharpness {', '.join(at_edge)}"
        if at_edge
        else "No sharpness ends at its limit of 2 / rate"
    )
    return figure


def late_sharpness(rows: Sequence[dict[str, Any]]) -> float:
    """Return the median sharpness of the last quarter of a history.

    >>> late_sharpness([{"sharpness": s} for s in (9.0, 3.0, 1.0, 2.0)])
    2.0
    """
    return float(np.median([row["sharpness"] for row in rows[-max(len(rows) // 4, 1) :]]))


def spectrum(
    densities: Mapping[str, tuple[Any, Any]], size: int, top: Any, curved: float, limit: float | None = None
) -> Figure:
    """Draw how the eigenvalues are spread, on a logarithmic scale, and where the largest ones are.

    Args:
        densities: by when or of what, a grid `[n]` and the share of eigenvalues per unit `[n]`, as
            `Spectrum.density` gives; the first one is what the title tells of.
        size: how many eigenvalues there are.
        top: `[k]`, the first one's largest eigenvalues, each to be marked.
        curved: how many of the first one's eigenvalues are above a tenth of the largest (`Spectrum.above`): the
            densities are too blurred to be counted.
        limit: `2 / rate`, to be drawn; None for none.

    Returns:
        A figure with one panel; its title says how few eigenvalues are large.

    >>> grid = np.linspace(-1.0, 10.0, 50)
    >>> spectrum({"Hessian": (grid, np.exp(-grid**2))}, 1000, [9.0, 0.5], 1).axes[0].get_xlabel()
    'eigenvalue: the curvature along its eigenvector'
    """
    top = np.sort(np.asarray(top, np.float64))[::-1]
    figure = _figure(8.2, 4.4)
    panel = figure.subplots()
    floor = 0.1  # a curve through less than that would only tell of the blur
    for (name, (grid, share)), colour, style in zip(
        densities.items(), cycle(LINE_COLOURS), cycle(("-", "--")), strict=False
    ):
        counts = np.maximum(size * np.asarray(share, np.float64), floor)
        panel.plot(grid, counts, style, color=colour, label=name)
        if style == "-":
            panel.fill_between(grid, floor, counts, color=colour, alpha=0.15, linewidth=0)
    panel.plot(
        top,
        np.full(len(top), floor * 1.4),
        "|",
        color="black",
        markersize=14,
        label=f"the {len(top)} largest, {next(iter(densities))}",
    )
    if limit is not None:
        panel.axvline(limit, color=LINE_COLOURS[3], linestyle=":", label=f"2 / rate = {limit:.3g}")
    panel.set_yscale("log")
    panel.set_ylim(bottom=floor)
    panel.set_xlabel("eigenvalue: the curvature along its eigenvector")
    panel.set_ylabel("eigenvalues per unit")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.suptitle(
        f"{next(iter(densities)).capitalize()}, about {curved:.0f} of {size:,} directions have "
        f"more than a tenth of the largest curvature ({top[0]:.2g})"
    )
    return figure


def landscape(
    steps: Any, losses: Any, along: Mapping[str, tuple[Any, Any]], curvature: float, loss_unit: str = "nats"
) -> Figure:
    """Draw the loss around some parameters: over a plane, and along single directions.

    Args:
        steps: `[n]`, of the plane's two directions, in lengths of the parameters' filters.
        losses: `[n, n]`, over the plane.
        along: by name, distances `[m]` and losses `[m]`; the first one is the direction that `curvature` is of.
        curvature: the eigenvalue of that direction, whose parabola is drawn.
        loss_unit: of the loss.

    Returns:
        A figure with two panels; its title says how much steeper the first direction is than the last.

    >>> x = np.linspace(-1, 1, 11)
    >>> lines = {"sharpest": (x, 4 * x**2), "random": (x, x**2)}
    >>> landscape(x, np.ones([11, 11]) + x**2, lines, 8.0).get_suptitle()
    'A step along the sharpest direction raises the loss 4 times as much as one along a random direction'
    """
    losses = np.asarray(losses, np.float64)
    figure = _figure(10.6, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    rises = []
    for (name, (distance, values)), colour in zip(along.items(), LINE_COLOURS, strict=False):
        distance, values = np.asarray(distance, np.float64), np.asarray(values, np.float64)
        left.plot(distance, values, color=colour, linewidth=2, label=name)
        rises.append((values[0] + values[-1]) / 2 - values[len(values) // 2])
    distance, values = (np.asarray(part, np.float64) for part in next(iter(along.values())))
    parabola = values[len(values) // 2] + curvature * distance**2 / 2
    left.plot(distance, parabola, ":", color="black", label=f"parabola of curvature {curvature:.2g}")
    left.set_ylim(top=max(np.max(v) for _, v in along.values()) * 1.15)
    left.set_xlabel("distance from the trained parameters (Euclidean, all parameters)")
    left.set_ylabel(f"training loss ({loss_unit})")
    left.grid(color="0.92")
    left.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)

    shown = np.maximum(losses, 1e-12)
    levels = np.geomspace(shown.min(), max(shown.max(), shown.min() * 1.1), 18)
    filled = right.contourf(steps, steps, shown.T, levels=levels, cmap="viridis", norm="log")
    right.contour(steps, steps, shown.T, levels=levels, colors="white", linewidths=0.4)
    right.plot(0, 0, "o", color=LINE_COLOURS[1], label="trained parameters")
    right.set_aspect("equal")
    right.set_xlabel("random direction 1 (1: as long as the weights)")
    right.set_ylabel("random direction 2")
    right.legend(loc="upper right", fontsize=8)
    bar = figure.colorbar(filled, ax=right, label=f"training loss ({loss_unit})")
    bar.ax.yaxis.set_major_formatter("{x:.2g}")
    bar.ax.yaxis.set_minor_formatter("")
    times = rises[0] / rises[-1] if rises[-1] > 0 else float("inf")
    told = f"{times:.0f}" if times < 1e6 else "many"
    figure.suptitle(
        f"A step along the sharpest direction raises the loss {told} times as much as one along a random direction"
    )
    return figure
