"""Follow the sharpness of the digit network under gradient descent, and draw its spectrum and its landscape."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from gradfn.pages.figures import LINE_COLORS, new_figure
from gradfn.timings import phase

from ._common import SeededOptions, conclude, defaults

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EXPECTED = (
    runs.Expectation("sharpness * rate / 2 at rate 0.1", at_most=1),
    runs.Expectation("sharpness * rate / 2 at rate 0.2", at_least=0.9, at_most=1.1),
    runs.Expectation("sharpness * rate / 2 at rate 0.4", at_least=0.9, at_most=1.1),
    runs.Expectation("worst test accuracy", at_least=0.9, unit="%"),
)

LOSS_UNIT = "half the squared distance"
BLUR = 0.03  # width of a drawn eigenvalue, relative to the largest


@dataclass(frozen=True)
class Config(SeededOptions):
    """Options of a run; the defaults train 784-16-10 three times on the built-in digits."""

    hidden: int = runs.option(16, "nodes in the hidden layer", at_least=1)
    rates: tuple[float, ...] = runs.option(
        (0.1, 0.2, 0.4),
        "learning rates of plain gradient descent; spectrum and landscape are drawn for the last",
        above=0,
    )
    steps: int = runs.option(4000, "steps, each with all training digits", at_least=1)
    every: int = runs.option(40, "examine the sharpness every N steps", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rates:
            raise ValueError("rates must have at least one number, got none")


class Result(NamedTuple):
    """The result of a run."""

    histories: dict[float, list[dict[str, Any]]]  # by rate: step, loss, sharpness
    accuracies: dict[float, float]  # by rate, on the test digits, in [0, 1]
    eigenvalues: np.ndarray  # [10], the largest in the end, of the last rate
    trace: gf.curvature.Estimate
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Train with each rate, measure and draw; it writes into the folder of the result."""
    config = runs.settle("curvature", config)
    data = gf.data.digits()
    print(f"{data}\n(8x8 pixels, resized: this is not MNIST)")
    folder = runs.start("curvature", config)

    # Without subtracting the mean digit, one direction would have ten times the curvature of all others.
    mean = data.train[0].mean(0)
    batch, test = ((jnp.asarray(x - mean), jnp.asarray(y)) for x, y in (data.train, data.test))
    net = gf.mlp([784, config.hidden, 10], activation="tanh")
    loss = gf.batch_mean(gf.quadratic_loss(net))
    start = net.init(jax.random.key(config.seed))

    histories, accuracies = {}, {}
    for rate in config.rates:
        sharp = gf.curvature.sharpness(loss, rate)
        fitted = gf.fit(
            loss,
            start,
            lambda key: batch,  # every step sees all digits
            optax.sgd(rate),
            config.steps,
            evaluate=partial(_measure, sharp, batch),
            eval_every=config.every,
            folder=inner_folder(folder, f"rate-{rate:g}"),
            resume=config.resume,
            progress=False,
        )
        first = {"step": 0, "loss": float(loss(start, batch)), "sharpness": float(sharp(start, batch).value)}
        histories[rate] = [first, *fitted.history]
        accuracies[rate] = float(gf.accuracy(net)(fitted.params, test))
        print(
            f"rate {rate:g}: sharpness {late_sharpness(fitted.history):.2f} of {2 / rate:.2f} in the end, "
            f"loss {fitted.history[-1]['loss']:.4f}, test accuracy {100 * accuracies[rate]:.1f} %"
        )
    params, size = fitted.params, gf.count(net.spec)

    eigs = gf.curvature.hessian_eigs(loss, k=10, which="largest")(params, batch)
    trace = gf.curvature.hessian_trace(loss)(params, batch)
    print(f"the Hessian in the end, rate {rate:g}:\n{eigs}")
    print(f"its trace: {trace.value:.1f}, standard error {trace.standard_error:.1f}")

    spread = gf.curvature.hessian_spectrum(loss)
    spectra = {"after training": spread(params, batch), "before training": spread(start, batch)}
    densities = {name: one.density(width=BLUR * float(eigs.values[0])) for name, one in spectra.items()}
    curved = float(spectra["after training"].above(eigs.values[0] / 10))
    with phase("pictures"):
        figures = {
            "sharpness": edge_of_stability(histories, LOSS_UNIT),
            "spectrum": spectrum(densities, size, eigs.values, curved, 2 / rate),
            "landscape": _landscape(loss, params, batch, eigs),
        }
    outcome = judge(config, histories, accuracies)
    values = np.asarray(eigs.values)
    conclude(folder, outcome, figures, eigenvalues=values.tolist(), trace=float(trace.value))
    return Result(histories, accuracies, values, trace, folder, outcome)


def _measure(sharp: Callable, batch: Any, params: Any) -> dict[str, Any]:
    return {"sharpness": sharp(params, batch).value}


def _landscape(loss: Any, params: Any, batch: Any, eigs: gf.curvature.Eigs) -> Any:
    """Draw the loss over a random plane, and along the sharpest and a random direction of length 1."""
    plane = gf.curvature.loss_landscape(loss, points=41)(params, batch)
    random = jax.tree.map(lambda d: d[:1], plane.directions)
    length = optax.tree.norm(random)
    ways = {
        "along the sharpest direction": jax.tree.map(lambda v: v[:1], eigs.vectors),
        "along a random direction": jax.tree.map(lambda d: d / length, random),
    }
    along = {}
    for name, way in ways.items():
        line = gf.curvature.loss_landscape(loss, dims=1, points=41)(params, batch, directions=way)
        along[name] = line.steps, line.losses
    return landscape(plane.steps, plane.losses, along, float(eigs.values[0]), LOSS_UNIT)


def judge(
    config: Config, histories: dict[float, list[dict[str, Any]]], accuracies: dict[float, float]
) -> runs.Outcome:
    """Compare the sharpness at the end, in units of 2 / rate, and the test accuracies with what is expected."""
    ratios = {
        f"sharpness * rate / 2 at rate {rate:g}": late_sharpness(rows) * rate / 2
        for rate, rows in histories.items()
    }
    worst = min(accuracies.values())
    return runs.judge(EXPECTED, ratios | {"worst test accuracy": worst}, defaults(config))


EDGE = 0.1  # the relative distance from its limit within which a sharpness is at the edge


def edge_of_stability(histories: Mapping[float, Sequence[dict[str, Any]]], loss_unit: str = "nats") -> Figure:
    """Draw the sharpness over training beside `2 / rate`, and the loss below, one color per learning rate.

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
    figure = new_figure(8.2, 6.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    at_edge, highest = [], 0.0
    for (rate, rows), color in zip(histories.items(), cycle(LINE_COLORS), strict=False):
        steps, sharp = ([row[name] for row in rows] for name in ("step", "sharpness"))
        limit, late = 2 / rate, late_sharpness(rows)
        upper.axhline(limit, color=color, linestyle="--", linewidth=1.2)
        upper.annotate(
            f"2 / {rate:g} = {limit:.3g}",
            (1, limit),
            (6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=color,
        )
        upper.plot(steps, sharp, color=color, label=f"rate {rate:g}")
        lower.plot(steps[1:], [row["loss"] for row in rows][1:], color=color)
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
    """Draw the density of the eigenvalues on a logarithmic scale, and the largest ones.

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
    figure = new_figure(8.2, 4.4)
    panel = figure.subplots()
    floor = 0.1  # below this, a curve would only show the blur
    for (name, (grid, share)), color, style in zip(
        densities.items(), cycle(LINE_COLORS), cycle(("-", "--")), strict=False
    ):
        counts = np.maximum(size * np.asarray(share, np.float64), floor)
        panel.plot(grid, counts, style, color=color, label=name)
        if style == "-":
            panel.fill_between(grid, floor, counts, color=color, alpha=0.15, linewidth=0)
    panel.plot(
        top,
        np.full(len(top), floor * 1.4),
        "|",
        color="black",
        markersize=14,
        label=f"the {len(top)} largest, {next(iter(densities))}",
    )
    if limit is not None:
        panel.axvline(limit, color=LINE_COLORS[3], linestyle=":", label=f"2 / rate = {limit:.3g}")
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
    figure = new_figure(10.6, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    rises = []
    for (name, (distance, values)), color in zip(along.items(), LINE_COLORS, strict=False):
        distance, values = np.asarray(distance, np.float64), np.asarray(values, np.float64)
        left.plot(distance, values, color=color, linewidth=2, label=name)
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
    right.plot(0, 0, "o", color=LINE_COLORS[1], label="trained parameters")
    right.set_aspect("equal")
    right.set_xlabel("random direction 1 (1: as long as the weights)")
    right.set_ylabel("random direction 2")
    right.legend(loc="upper right", fontsize=8)
    bar = figure.colorbar(filled, ax=right, label=f"training loss ({loss_unit})")
    bar.ax.yaxis.set_major_formatter("{x:.2g}")
    bar.ax.yaxis.set_minor_formatter("")
    times = rises[0] / rises[-1] if rises[-1] > 0 else float("inf")
    texts = f"{times:.0f}" if times < 1e6 else "many"
    figure.suptitle(
        f"A step along the sharpest direction raises the loss {texts} times as much as one along a random direction"
    )
    return figure
