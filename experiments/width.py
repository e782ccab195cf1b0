"""Search widths and depths of the hidden layers, and compare them with the base case, one layer of mean width.

Some twenty shapes are few enough to try them all; a search library would have nothing to choose.
"""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

import time
from collections.abc import Sequence
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
from gradfn.pages.figures import LINE_COLORS, LINE_STYLES, new_figure
from gradfn.timings import phase

from ._common import DigitOptions, conclude, defaults, start_on_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EXPECTED = (
    runs.Expectation("test accuracy of the base case", unit="%"),
    runs.Expectation("test accuracy of the best network", unit="%"),
    runs.Expectation("test accuracy, best network - base case", at_most=0.01, unit="%"),
    runs.Expectation("parameters, smallest network within 1.5 points of the best / base case", at_most=0.1),
)

# Test accuracy below the best at which a smaller network counts as nearly as good.
NEARLY = 0.015


@dataclass(frozen=True)
class Config(DigitOptions):
    """Options of a run; every width is tried with every depth, except for networks with too many parameters."""

    widths: tuple[int, ...] = runs.option(
        (4, 8, 16, 32, 64, 128, 397, 794),
        "nodes in each hidden layer; the base case is added if it is not there",
        at_least=1,
    )
    depths: tuple[int, ...] = runs.option((1, 2, 3), "hidden layers", at_least=1)
    most: int = runs.option(700_000, "leave out networks with more parameters")
    seeds: int = runs.option(
        3,
        "networks of each shape, trained at once, each with its own initial weights and order of digits",
        at_least=1,
    )
    epochs: int = runs.option(12, "how often to go through the training digits", at_least=1)
    batch: int = runs.option(32, "digits per step", at_least=1)
    rate: float = runs.option(
        0.003, "AdamW's learning rate at the start; it falls to zero on half a cosine", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        runs.within(0, 2**32 - 1 - self.seeds, seed=self.seed)


class Tried(NamedTuple):
    """The result of the networks of one shape."""

    width: int
    depth: int
    parameters: int
    seconds: float  # to train one of them, without compilation
    validation: np.ndarray  # accuracy in [0, 1], one per seed
    test: np.ndarray


class Result(NamedTuple):
    """The result of a run."""

    tried: list[Tried]
    base: Tried  # one hidden layer, as wide as the mean of inputs and outputs
    best: Tried  # by validation accuracy
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Train every shape with every seed, compare, and draw; it writes into the folder of the result."""
    config, data, folder = start_on_digits("width", config)
    base_width = gf.hidden_width(784, 10)
    tried = []
    for width, depth in shapes(config, base_width):
        tried.append(one := trained(config, data, width, depth))
        print(
            f"{depth} x {width:3}: {one.parameters:7,} parameters, {one.seconds:6.2f} s, "
            f"test accuracy {100 * one.test.mean():.1f} %"
        )
    base = next(one for one in tried if (one.width, one.depth) == (base_width, 1))
    # By validation accuracy, so that the test digits do not influence the choice.
    best = max(tried, key=lambda one: one.validation.mean())

    small = smallest(tried, best, NEARLY)
    marked = {"base": base, "best": best, "small": small}
    rows = [one._asdict() | {name: one is its for name, its in marked.items()} for one in tried]
    with phase("pictures"):
        figures = {"trade": trade(rows), "map": search_map(rows)}
    outcome = judge(config, tried, base, best)
    rows_of_json = [
        one._replace(validation=one.validation.tolist(), test=one.test.tolist())._asdict() for one in tried
    ]
    conclude(folder, outcome, figures, data.name, tried=rows_of_json)
    return Result(tried, base, best, folder, outcome)


def sizes(width: int, depth: int) -> list[int]:
    """Return the nodes of each layer."""
    return [784, *[width] * depth, 10]


def shapes(config: Config, base_width: int) -> list[tuple[int, int]]:
    """Return the widths and depths to try, the base case among them."""
    pairs = {(width, depth) for width in config.widths for depth in config.depths}
    pairs = {pair for pair in pairs if gf.count(gf.mlp(sizes(*pair)).spec) <= config.most}
    return sorted(pairs | {(base_width, 1)}, key=lambda pair: pair[::-1])


def trained(config: Config, data: gf.data.Dataset, width: int, depth: int) -> Tried:
    """Train the networks of one shape, all seeds at once in one compiled program."""
    net = gf.mlp(sizes(width, depth), activation="relu")
    train, validation, test = jax.tree.map(jnp.asarray, tuple(data[:3]))
    seeds = range(config.seed, config.seed + config.seeds)
    orders = np.stack(  # [seeds, steps, batch]
        [
            np.concatenate(
                [gf.data.epoch_order(len(train[1]), config.batch, seed, e) for e in range(config.epochs)]
            )
            for seed in seeds
        ]
    )
    optimizer = optax.adamw(optax.cosine_decay_schedule(config.rate, orders.shape[1]), weight_decay=0.03)
    step = gf.train_step(gf.batch_mean(gf.classification_loss(net)), optimizer)
    right = gf.accuracy(net)

    def of_seed(key: jax.Array, order: jax.Array, parts: Any) -> tuple[jax.Array, jax.Array]:
        train, validation, test = parts

        def one(state: Any, rows: jax.Array) -> tuple[Any, None]:
            return step(state, jax.tree.map(lambda part: part[rows], train))[0], None

        state, _ = jax.lax.scan(one, gf.train_state(net.init(key), optimizer, key), order)
        return right(state.params, validation), right(state.params, test)

    arguments = (
        jnp.stack([jax.random.key(seed) for seed in seeds]),
        jnp.asarray(orders),
        (train, validation, test),
    )
    compiled = jax.jit(jax.vmap(of_seed, (0, 0, None))).lower(*arguments).compile()
    began = time.perf_counter()
    with phase("training"):
        shares = jax.block_until_ready(compiled(*arguments))
    seconds = (time.perf_counter() - began) / len(seeds)
    return Tried(width, depth, gf.count(net.spec), seconds, *map(np.asarray, shares))


def smallest(tried: list[Tried], best: Tried, within: float) -> Tried:
    """Return the smallest network whose test accuracy is nearly as good as the best."""
    enough = [one for one in tried if one.test.mean() >= best.test.mean() - within]
    return min(enough, key=lambda one: one.parameters)


def judge(config: Config, tried: list[Tried], base: Tried, best: Tried) -> runs.Outcome:
    """Compare the base case with the best network, and with the smallest that is nearly as good."""
    accuracies = base.test.mean(), best.test.mean()
    small = smallest(tried, best, NEARLY)
    measured = {
        "test accuracy of the base case": accuracies[0],
        "test accuracy of the best network": accuracies[1],
        "test accuracy, best network - base case": accuracies[1] - accuracies[0],
        "parameters, smallest network within 1.5 points of the best / base case": small.parameters
        / base.parameters,
    }
    return runs.judge(EXPECTED, measured, defaults(config))


Rows = Sequence[dict[str, Any]]  # width, depth, parameters, seconds, test [seeds], base, best, small


def trade(rows: Rows) -> Figure:
    """Draw the accuracy over its cost in parameters and in training time.

    Args:
        rows: one dict per shape: `width`, `depth`, `parameters`, `seconds`, `test` (accuracies, one per seed), and
            whether it is the `base` case, the `best` by validation, the smallest that is nearly as good (`small`).

    Returns:
        A figure with two panels, one line per depth; base case, best and smallest are marked.

    >>> row = {"width": 8, "depth": 1, "parameters": 90, "seconds": 0.1, "test": [0.9], "base": True, "best": True}
    >>> small = {**row, "width": 4, "parameters": 45, "base": False, "small": True}
    >>> trade([{**row, "small": False}, small]).get_suptitle()
    'The base case (1 x 8) reads 90.0 %, the best of 2 (1 x 8) 90.0 %, 1 x 4 with 1/2 of the parameters 90.0 %'
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = new_figure(11.5, 4.8)
    panels = figure.subplots(1, 2, sharey=True)
    depths = sorted({row["depth"] for row in rows})
    marks = {
        "base": "base case: mean(in, out)",
        "best": "best by validation",
        "small": "smallest nearly as good",
    }
    for panel, cost in zip(panels, ("parameters", "seconds"), strict=True):
        for depth, color, style in zip(depths, cycle(LINE_COLORS), cycle(LINE_STYLES), strict=False):
            members = sorted((row for row in rows if row["depth"] == depth), key=lambda row: row["width"])
            costs, wrong = [row[cost] for row in members], [_wrong(row) for row in members]
            label = f"{depth} hidden layer{'s' if depth > 1 else ''}"
            # Times of the smallest networks are too noisy for a line.
            line = style if cost == "parameters" else "none"
            panel.plot(costs, wrong, "o", linestyle=line, color=color, markersize=5, label=label)
            if cost == "parameters" and depth == depths[0]:
                for row, x, y in zip(members, costs, wrong, strict=True):
                    where: dict[str, Any] = {
                        "xy": (x, y),
                        "xytext": (0, -16),
                        "textcoords": "offset points",
                        "ha": "center",
                    }
                    panel.annotate(str(row["width"]), **where, fontsize=8, color=color)
        for which, marker in (("base", "*"), ("best", "o"), ("small", "s")):
            row = next(row for row in rows if row[which])
            look: dict[str, Any] = {
                "markersize": 15,
                "fillstyle": "none",
                "markeredgewidth": 1.5,
                "label": marks[which],
            }
            panel.plot(row[cost], _wrong(row), marker, color="black", linestyle="none", zorder=5, **look)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
        panel.yaxis.set_major_locator(FixedLocator([1, 2, 3, 5, 10, 20, 30, 50, 100]))
        panel.yaxis.set_major_formatter("{x:g} %")
        panel.yaxis.set_minor_locator(NullLocator())
    panels[0].set_ylim(bottom=0.85 * panels[0].get_ylim()[0])  # room for the numbers
    panels[0].set_xlabel("parameters (numbers: nodes in the one hidden layer)")
    panels[1].set_xlabel("time to train one network (s)")
    panels[0].set_ylabel("test examples wrong (mean over the seeds)")
    panels[1].legend(frameon=False, loc="upper right")
    base, best, small = (next(row for row in rows if row[which]) for which in marks)
    texts = [f"{100 - _wrong(row):.1f} %" for row in (base, best, small)]
    figure.suptitle(
        f"The base case ({_name(base)}) reads {texts[0]}, the best of {len(rows)} ({_name(best)}) {texts[1]}, "
        f"{_name(small)} with 1/{base['parameters'] / small['parameters']:.0f} of the parameters {texts[2]}"
    )
    return figure


def search_map(rows: Rows) -> Figure:
    """Draw the accuracy of every shape that was tried, as a table of depths and widths.

    Args:
        rows: as for `trade`.

    Returns:
        A figure with one panel; the base case and the best have frames.

    >>> row = {"width": 4, "depth": 1, "parameters": 90, "seconds": 0.1, "test": [0.9], "base": True, "best": True}
    >>> search_map([row]).get_suptitle()
    'All 1 shapes: from 90.0 % (1 x 4) to 90.0 % (1 x 4) of the test examples right'
    """
    from matplotlib.patches import Rectangle

    widths, depths = (sorted({row[name] for row in rows}) for name in ("width", "depth"))
    values = np.full([len(depths), len(widths)], np.nan)
    figure = new_figure(0.95 * len(widths) + 2.6, 0.7 * len(depths) + 2.0)
    panel = figure.subplots()
    for row in rows:
        values[depths.index(row["depth"]), widths.index(row["width"])] = 100 * np.mean(row["test"])
    low, high = np.nanmin(values), np.nanmax(values)
    # Most shapes differ little, so the colors start at the median.
    mapped = panel.imshow(
        values, cmap="cividis", vmin=2 * np.nanmedian(values) - high, vmax=high, aspect="auto"
    )
    middle = sum(mapped.get_clim()) / 2
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            panel.text(
                j, i, f"{value:.1f}", ha="center", va="center", color="black" if value > middle else "white"
            )
    for row in rows:
        corner = widths.index(row["width"]) - 0.47, depths.index(row["depth"]) - 0.46
        for which, color in (("best", "black"), ("base", LINE_COLORS[1])):
            if row[which]:
                panel.add_patch(Rectangle(corner, 0.94, 0.92, fill=False, edgecolor=color, linewidth=3))
    panel.set_xticks(range(len(widths)), widths)
    panel.set_yticks(range(len(depths)), depths)
    panel.tick_params(length=0)
    panel.set_xlabel(
        "nodes in each hidden layer (orange: the base case; black: best by validation; blank: too many parameters)"
    )
    panel.set_ylabel("hidden layers")
    extend = "min" if low < mapped.get_clim()[0] else "neither"
    figure.colorbar(mapped, ax=panel, label="test examples right (%)", extend=extend, pad=0.02)
    worst, top = (pick(rows, key=lambda row: np.mean(row["test"])) for pick in (min, max))
    figure.suptitle(
        f"All {len(rows)} shapes: from {low:.1f} % ({_name(worst)}) to {high:.1f} % ({_name(top)}) "
        "of the test examples right"
    )
    return figure


def _wrong(row: dict[str, Any]) -> float:
    """Return the test error of a shape in percent; at least 0.01, for the logarithmic scale."""
    return max(100 * (1 - float(np.mean(row["test"]))), 0.01)


def _name(row: dict[str, Any]) -> str:
    return f"{row['depth']} x {row['width']}"
