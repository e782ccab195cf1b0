"""Compute one gradient in four ways: the chain rule by hand, jax.grad, gf.backprop by steps, finite differences."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

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
    """Draw the backward pass for one image through a net with one hidden layer, as its four equations.

    Args:
        by_hand: from `gf.chain_rule` with cross-entropy, as numpy arrays.
        W2: `[out, hidden]`, the last layer's weights.
        label: the image's class.
        shape: the image's height and width.

    Returns:
        A figure with three panels of bars on one scale, for the error that goes back, and the gradient of one node's
        weights. Its title reports how long the error is at both layers.

    >>> import jax, gradfn as gf
    >>> params = {"W1": np.ones([3, 4]), "b1": np.zeros(3), "W2": np.ones([2, 3]), "b2": np.zeros(2)}
    >>> by_hand = jax.jit(gf.chain_rule())(params, np.ones(4), 1)
    >>> equations(by_hand, params["W2"] + [[0], [1]], 1, (2, 2)).get_suptitle()
    'Backwards through the hidden layer the error of one 1 shrinks from 0.707 to 0'
    """
    error, error_before = (np.asarray(each, np.float64) for each in (by_hand.deltas[2], by_hand.deltas[1]))
    image = np.asarray(by_hand.a[0], np.float64)
    arriving = np.asarray(W2, np.float64).T @ error
    lengths = [float(np.linalg.norm(each)) for each in (error, arriving, error_before)]
    node = int(np.abs(error_before).argmax())

    figure = new_figure(12.4, 4.6)
    panels = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.15])
    limit = 1.05 * max(float(np.abs(each).max()) for each in (error, arriving, error_before)) or 1.0
    for panel, values, title, about, rows in zip(
        panels[:3],
        (error, arriving, error_before),
        ("BP1:  δ² = a² − y", "BP2:  (W²)ᵀ δ²", "BP2:  δ¹ = (W²)ᵀ δ² ⊙ σ'(z¹)"),
        (
            f"prediction minus truth:\nlength {lengths[0]:.3g}",
            f"through the weights:\nlength {lengths[1]:.3g}",
            f"times the slope, at most 1/4:\nlength {lengths[2]:.3g}",
        ),
        ("class", "hidden node", "hidden node"),
        strict=True,
    ):
        colors = ["#b2182b" if value > 0 else "#2166ac" for value in values]
        panel.barh(range(len(values)), values, 0.72, color=colors)
        panel.axvline(0, color="0.4", linewidth=0.8)
        panel.set_xlim(-limit, limit)
        panel.set_ylim(len(values) - 0.4, -0.6)
        panel.set_title(f"{title}\n{about}", fontsize=10)
        panel.set_ylabel(rows)
        panel.set_xlabel("error")
        if len(values) <= 20:
            panel.set_yticks(range(len(values)))
        panel.tick_params(axis="y", length=0, labelsize=8)
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[2].set_xlabel("error; BP3: it is also the\ngradient of the biases, ∂C/∂b¹")
    grad = error_before[node] * image.reshape(shape)
    largest = float(np.abs(grad).max()) or 1.0
    mapped = panels[3].imshow(grad, cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
    panels[3].set_title(f"BP4:  ∂C/∂W¹ = δ¹ (a⁰)ᵀ\nthe image times the error\nof node {node}", fontsize=10)
    _bare(panels[3])
    figure.colorbar(mapped, ax=panels[3], label="gradient of a weight", shrink=0.8)
    change = (
        "shrinks" if lengths[2] < 0.95 * lengths[0] else "grows" if lengths[2] > 1.05 * lengths[0] else "goes"
    )
    figure.suptitle(
        f"Backwards through the hidden layer the error of one {label} {change} from {lengths[0]:.3g} to "
        f"{lengths[2]:.3g}"
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
