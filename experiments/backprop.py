"""Compute one gradient in four ways: the chain rule by hand, jax.grad, gf.backprop by steps, finite differences."""

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
from jax.flatten_util import ravel_pytree

import gradfn as gf
from gradfn import runs
from gradfn.files import replace_file
from gradfn.pages.figures import LINE_COLORS, new_figure, weight_images
from gradfn.timings import phase

from ._common import DigitOptions, conclude, load_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EXPECTED = (
    runs.Expectation("error of jax.grad", at_most=1e-12),
    runs.Expectation("error of gf.backprop", at_most=1e-12),
    runs.Expectation("error of finite differences", at_most=1e-8),
)

STEP = 1e-4  # of the central differences: their errors are of its square, those of rounding 1e-16 over it


@dataclass(frozen=True)
class Config(DigitOptions):
    """Options of a run."""

    hidden: int = runs.option(16, "nodes in the hidden layer", at_least=1)
    example: int = runs.option(0, "which of the training digits to take the gradient for")

    def __post_init__(self) -> None:
        super().__post_init__()
        runs.within(0, None, example=self.example)


class Result(NamedTuple):
    """The result of a run."""

    grads: dict[str, dict[str, np.ndarray]]  # by way and parameter
    errors: dict[str, dict[str, float]]  # by way and parameter, against the chain rule by hand
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Compute the gradient in each way, compare, and draw; it writes into the folder of the result."""
    config = runs.settle("backprop", config)
    data = load_digits(config)
    images, labels = data.train
    if config.example >= len(labels):
        raise runs.RunError(
            f"example: there are {len(labels):,} training digits, got number {config.example}"
        )
    folder = runs.start("backprop", config)

    net = gf.mlp([784, config.hidden, 10], activation="sigmoid")
    loss = gf.classification_loss(net)
    start = net.init(jax.random.key(config.seed))
    # In float64, so that differences come from the method and not from rounding.
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), start)
        example = jnp.asarray(images[config.example], jnp.float64), jnp.asarray(int(labels[config.example]))
        by_hand = jax.jit(gf.chain_rule())(params, *example)
        steps = gf.backprop(loss, keep=True)(params, example)
        print(steps)
        grads = {
            "by hand": by_hand.grads,
            "jax.grad": jax.jit(jax.grad(loss))(params, example),
            "gf.backprop": {c.name: c.value for step in steps for c in step.outgoing if c.name in params},
            "finite differences": finite_differences(loss, params, example),
        }
        grads = {way: {name: np.asarray(found[name]) for name in params} for way, found in grads.items()}
        by_hand = jax.tree.map(np.asarray, by_hand)
    errors = {
        way: errors_against(grads["by hand"], found) for way, found in grads.items() if way != "by hand"
    }
    replace_file(folder / "steps.txt", f"{steps}\n".encode())

    few = jax.tree.map(lambda part: jnp.asarray(part[:1000]), data.train)
    of_many = jax.jit(jax.grad(gf.batch_mean(loss)))(start, few)
    with phase("pictures"):
        figures = {
            "equations": equations(by_hand, np.asarray(start["W2"]), labels[config.example], data.shape),
            "agree": agreement(grads, errors, int(np.abs(by_hand.deltas[1]).argmax()), data.shape),
            "gradients": weight_images(of_many["W1"], data.shape, "∂C/∂W1"),
        }
    figures["gradients"].suptitle(
        f"∂C/∂W1: how {len(few[1]):,} digits want each hidden node's weights to change, before any training"
    )
    figures["gradients"].axes[-1].set_ylabel(
        "gradient (the loss falls when red weights shrink, blue ones grow)"
    )
    outcome = judge(errors)
    conclude(folder, outcome, figures, data.name, ["steps.txt"], errors=errors)
    return Result(grads, errors, folder, outcome)


def finite_differences(loss: Any, params: Any, example: Any) -> Any:
    """Return the gradient by central differences of each parameter: (C(w + h) - C(w - h)) / 2h."""
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def slopes(flat: jax.Array) -> jax.Array:
        def slope(i: jax.Array) -> jax.Array:
            up, down = (loss(unravel(flat.at[i].add(step)), example) for step in (STEP, -STEP))
            return (up - down) / (2 * STEP)

        return jax.lax.map(slope, jnp.arange(flat.size), batch_size=256)

    return unravel(slopes(flat))


def errors_against(by_hand: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> dict[str, float]:
    """Return by parameter the largest difference between two gradients, as a share of the largest gradient."""
    return {
        name: float(np.abs(found[name] - grad).max() / max(np.abs(grad).max(), 1e-300))
        for name, grad in by_hand.items()
    }


def judge(errors: dict[str, dict[str, float]]) -> runs.Outcome:
    """Compare the largest error of each method with what is expected of it; an error that is NaN is the largest."""
    return runs.judge(
        EXPECTED, {f"error of {name}": np.max(list(each.values())) for name, each in errors.items()}
    )


MARKERS = ("o", "s", "^", "D")


def equations(by_hand: Any, W2: Any, label: int, shape: Sequence[int] = (28, 28)) -> Figure:
    """Draw the four equations of backpropagation for one image and a net with one hidden layer.

    Args:
        by_hand: from `gf.chain_rule` with cross-entropy, as numpy arrays.
        W2: `[out, hidden]`, the last layer's weights.
        label: the image's class.
        shape: the image's height and width.

    Returns:
        A figure with a row of panels for the error that goes back, and one for the gradients that it leaves.

    >>> import jax, gradfn as gf
    >>> params = {"W1": np.ones([3, 4]), "b1": np.zeros(3), "W2": np.ones([2, 3]), "b2": np.zeros(2)}
    >>> equations(jax.jit(gf.chain_rule())(params, np.ones(4), 1), params["W2"], 1, (2, 2)).get_suptitle()
    'The chain rule for one 1: the error goes back (BP1, BP2) and leaves the gradients (BP3, BP4)'
    """
    answer, error, error_before = (
        np.asarray(x) for x in (by_hand.a[2], by_hand.deltas[2], by_hand.deltas[1])
    )
    slope = np.asarray(by_hand.a[1]) * (1 - np.asarray(by_hand.a[1]))
    image = np.asarray(by_hand.a[0]).reshape(shape)
    target = np.arange(len(answer)) == label
    W2 = np.asarray(W2)

    figure = new_figure(10.8, 8.0)
    halves: Any = figure.subfigures(2, 1)
    above, below = halves
    bp1, bp2 = above.subfigures(1, 2, width_ratios=[1, 2.1])
    bp3, bp4 = below.subfigures(1, 2, width_ratios=[1, 3.7])
    panels = bp1.subplots(1, 3)
    _vector(panels[0], answer, "a²\nthe prediction", range(len(answer)))
    _vector(panels[1], -target.astype(float), "− y\nthe truth")
    _vector(panels[2], error, "= δ²\nthe error")
    panels = bp2.subplots(1, 5, width_ratios=[2.4, 1, 1, 1, 1])
    _matrix(panels[0], W2.T, "(W²)ᵀ\nthe weights, read backwards")
    panels[0].set_ylabel("hidden node")
    _vector(panels[1], error, "· δ²\n ")
    _vector(panels[2], W2.T @ error, "= what\ncomes back")
    _vector(panels[3], slope, "⊙ σ'(z¹)\nthe slope")
    _vector(panels[4], error_before, "= δ¹\nthe error")
    _vector(bp3.subplots(), error_before, "one a node", range(len(error_before)))

    n_columns = math.ceil(math.sqrt(2.2 * len(error_before)))
    n_rows = math.ceil(len(error_before) / n_columns)
    parts = bp4.add_gridspec(1, 3, width_ratios=[0.5, 1.4, n_columns * 3.4 / n_rows])
    _vector(bp4.add_subplot(parts[0]), error_before, "δ¹\n ")
    panel = bp4.add_subplot(parts[1])
    panel.imshow(image, cmap="gray_r", interpolation="nearest")
    panel.set_title("· (a⁰)ᵀ\nthe image", fontsize=9)
    _bare(panel)
    grads = np.outer(error_before, image.ravel())
    limit = float(np.abs(grads).max()) or 1.0
    cells = parts[2].subgridspec(n_rows, n_columns)
    for i, grad in enumerate(grads):
        cell = bp4.add_subplot(cells[i // n_columns, i % n_columns])
        cell.imshow(grad.reshape(shape), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        cell.set_title(f"= node {i}" if i == 0 else f"node {i}", fontsize=8, pad=2)
        _bare(cell)
    equation = {
        bp1: "BP1:  δ² = a² − y",
        bp2: "BP2:  δ¹ = (W²)ᵀ δ² ⊙ σ'(z¹)",
        bp3: "BP3:  ∂C/∂b¹ = δ¹",
        bp4: "BP4:  ∂C/∂W¹ = δ¹ (a⁰)ᵀ: the image for each node, as red or blue as its error",
    }
    for part, text in equation.items():
        part.suptitle(text, fontsize=12, color=LINE_COLORS[0])
    figure.suptitle(
        f"The chain rule for one {label}: the error goes back (BP1, BP2) and leaves the gradients (BP3, BP4)"
    )
    figure.supxlabel(
        "Red is above zero, blue below; a panel's colors reach to the number under it.", fontsize=9
    )
    return figure


def agreement(
    grads: Mapping[str, Mapping[str, Any]],
    errors: Mapping[str, Mapping[str, float]],
    node: int,
    shape: Sequence[int] = (28, 28),
) -> Figure:
    """Draw a gradient as computed in several ways, and the differences from the first.

    Args:
        grads: by way, then by parameter: `W1` `[hidden, pixels]` and `W2` `[out, hidden]` among them.
        errors: for all ways but the first, by parameter: the largest difference, as a share of the largest
            gradient.
        node: of the first layer, to draw.
        shape: the images' height and width.

    Returns:
        A figure with a column of pictures a way, and a panel with the differences on a logarithmic scale.

    >>> grads = {way: {"W1": np.ones([2, 4]), "W2": np.ones([3, 2])} for way in ("by hand", "jax.grad")}
    >>> agreement(grads, {"jax.grad": {"W1": 1e-16, "W2": 0.0}}, 0, (2, 2)).get_suptitle()
    'Two ways to the same 14 numbers: they agree to 1e-16'
    """
    n = len(grads)
    first = next(iter(grads.values()))
    total = sum(np.asarray(leaf).size for leaf in first.values())
    figure = new_figure(2.05 * n + 5.2, 4.6)
    parts: Any = figure.subfigures(1, 2, width_ratios=[2.05 * n, 5.2])
    pictures, numbers = parts
    panels = pictures.subplots(2, n, squeeze=False, height_ratios=[1.35, 1])
    for column, (way, found) in zip(panels.T, grads.items(), strict=True):
        for panel, name in zip(column, ("W1", "W2"), strict=True):
            of_first, of_way = np.asarray(first[name]), np.asarray(found[name])
            if name == "W1":
                of_first, of_way = of_first[node], of_way[node].reshape(shape)
            limit = float(np.abs(of_first).max()) or 1.0
            mapped = panel.imshow(of_way, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            _bare(panel)
            if way == next(iter(grads)):
                panel.set_ylabel(f"∂C/∂W1 of node {node}" if name == "W1" else "∂C/∂W2", fontsize=9)
            if way == list(grads)[-1]:
                pictures.colorbar(mapped, ax=panel, fraction=0.05, pad=0.03)
        column[0].set_title(way, fontsize=10)

    panel = numbers.subplots()
    smallest = np.finfo(np.float64).eps / 4  # where a difference of zero is drawn
    names = list(first)
    for (way, of_leaves), color, marker in zip(
        errors.items(), cycle(LINE_COLORS), cycle(MARKERS), strict=False
    ):
        values = [max(of_leaves[name], smallest) for name in of_leaves]
        rows = [names.index(name) for name in of_leaves]
        panel.plot(
            values, rows, marker, color=color, label=way, markersize=9, fillstyle="none", markeredgewidth=2
        )
    panel.set_xscale("log")
    panel.set_xlim(smallest / 2, 1)
    panel.axvline(1, color="0.3")
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlabel(
        "largest difference to the gradient by hand,\nas a share of the largest gradient (1: all wrong)"
    )
    panel.grid(color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="upper right")
    worst = max(value for of_leaves in errors.values() for value in of_leaves.values())
    words = {2: "Two", 3: "Three", 4: "Four"}
    figure.suptitle(f"{words.get(n, n)} ways to the same {total:,} numbers: they agree to {worst:.0e}")
    return figure


def _bare(panel: Any) -> None:
    panel.set_xticks([])
    panel.set_yticks([])


def _vector(panel: Any, values: Any, title: str, names: Sequence[Any] | range | None = None) -> None:
    _matrix(panel, np.asarray(values, np.float64)[:, None], title)
    if names is not None:
        panel.set_yticks(range(len(values)), [str(name) for name in names], fontsize=8)
        panel.tick_params(length=0)


def _matrix(panel: Any, values: Any, title: str) -> None:
    """Draw values as cells, red above zero and blue below, and write under them how far the colors reach."""
    limit = float(np.abs(values).max()) or 1.0
    panel.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    panel.set_title(title, fontsize=9)
    _bare(panel)
    panel.set_xlabel(f"±{limit:.2g}", fontsize=8)
