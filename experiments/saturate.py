"""Make networks deeper, measure vanishing, exploding and saturated gradients, and compare the remedies."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

import math
from collections.abc import Callable, Mapping, Sequence
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
    runs.Expectation("gradient in ten sigmoid layers, first / last", at_most=1e-3),
    runs.Expectation("test accuracy of ten sigmoid layers", at_most=0.2, unit="%"),
    runs.Expectation("the same with residual connections", at_least=0.8, unit="%"),
    runs.Expectation("the same with layer norm", at_least=0.8, unit="%"),
    runs.Expectation("test accuracy of ten ReLU layers with He's initialization", at_least=0.8, unit="%"),
)

ACTIVATIONS = ("sigmoid", "tanh", "relu", "gelu")
WIRINGS = ("plain", "residual", "layer norm")
DEPTHS = (1, 2, 3, 5, 7, 10)  # hidden layers
# Standard deviation of a weight, given how many inputs its node has.
STARTS: dict[str, Callable[[int], float]] = {
    "small": lambda n_in: 0.3 / math.sqrt(n_in),
    "LeCun": lambda n_in: 1 / math.sqrt(n_in),  # keeps the scale through a linear layer
    "He": lambda n_in: math.sqrt(2 / n_in),  # keeps the scale through relus
    "N(0, 1)": lambda n_in: 1.0,
}


@dataclass(frozen=True)
class Config(DigitOptions):
    """Options of a run."""

    width: int = runs.option(32, "nodes in each hidden layer", at_least=1)
    steps: int = runs.option(300, "training steps of each network", at_least=1)
    batch: int = runs.option(64, "digits per step", at_least=1)
    rate: float = runs.option(0.02, "learning rate of SGD with momentum 0.9", above=0)


class Outcome(NamedTuple):
    """The result of the networks with one activation and one wiring, by start and depth."""

    # [starts, layers]: of the gradient with respect to the weighted sums, ten layers, untrained.
    norms: np.ndarray
    # [starts, layers]: share of saturated values or dead nodes; None where neither is defined.
    off: np.ndarray | None
    # [starts, depths]: on the test digits after training.
    accuracies: np.ndarray


class Result(NamedTuple):
    """The result of a run."""

    outcomes: dict[tuple[str, str], Outcome]  # by activation and wiring
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Examine every network, train it, and draw; it writes into the folder of the result."""
    config, data, folder = start_on_digits("saturate", config, size=8)
    outcomes = {}
    for activation in ACTIVATIONS:
        for wiring in WIRINGS:
            found = outcomes[activation, wiring] = outcome(config, data, activation, wiring)
            deepest = ", ".join(
                f"{start} {100 * share:.0f} %"
                for start, share in zip(STARTS, found.accuracies[:, -1], strict=True)
            )
            print(f"{activation}, {wiring}: with {DEPTHS[-1]} hidden layers {deepest} right")

    lecun = list(STARTS).index("LeCun")
    plain, residual = (outcomes["sigmoid", wiring] for wiring in ("plain", "residual"))
    lost, kept = (100 * found.norms[lecun, 0] / found.norms[lecun, -1] for found in (plain, residual))
    stuck, learns = (found.accuracies[lecun, -1] for found in (plain, residual))
    off = {name: shares for name in ACTIVATIONS if (shares := outcomes[name, "plain"].off) is not None}
    shut = off["tanh"][list(STARTS).index("N(0, 1)")].mean()
    with phase("pictures"):
        figures = {
            "flow": gradient_flow(
                {kind: found.norms for kind, found in outcomes.items()},
                list(STARTS),
                f"Of the last layer's gradient, ten layers of sigmoids (LeCun) leave the first {lost:.1g} %, "
                f"with residual connections {kept:.0f} %",
            ),
            "saturated": saturation(
                off,
                list(STARTS),
                {"sigmoid": "saturated values", "tanh": "saturated values", "relu": "dead nodes"},
                f"Weights from N(0, 1) shut {100 * shut:.0f} % of all tanh values before training starts",
            ),
            "learned": learned(
                {kind: found.accuracies for kind, found in outcomes.items()},
                list(STARTS),
                DEPTHS,
                f"After {config.steps} steps, ten layers of sigmoids (LeCun) read {100 * stuck:.0f} % of the test "
                f"digits, with residual connections {100 * learns:.0f} %",
            ),
        }
    judged = judge(config, outcomes)
    conclude(folder, judged, figures, data.name)
    return Result(outcomes, folder, judged)


def deep(n_in: int, width: int, activation: str, wiring: str) -> tuple[gf.Net, list[str]]:
    """Return a net of up to ten hidden layers, of which `apply(params, (x, depth))` uses `depth`.

    That all depths are one program spares compiling sixty.
    """
    n_more = DEPTHS[-1] - 1
    squash, norm = gf.layers.activation(activation), gf.layers.layer_norm(width)
    block = {"dense": gf.layers.dense(width, width)} | ({"norm": norm} if wiring == "layer norm" else {})
    spec = {
        "first": gf.layers.dense(n_in, width).spec,
        "more": {name: gf.repeat(net, n_more).spec for name, net in block.items()},
        "last": gf.layers.dense(width, 10).spec,
    }

    def apply(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, depth = example
        z = gf.tap(gf.layers.affine(params["first"]["W"], params["first"]["b"], x), "z1")
        a = gf.tap(squash(z), "a1")

        def layer(a: jax.Array, each: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
            own, i = each
            before = norm.apply(own["norm"], a) if wiring == "layer norm" else a
            z = gf.tap(gf.layers.affine(own["dense"]["W"], own["dense"]["b"], before), "z")
            after = gf.tap(squash(z), "a")
            after = a + after if wiring == "residual" else after
            return jnp.where(i < depth - 1, after, a), None

        a, _ = jax.lax.scan(layer, a, (params["more"], jnp.arange(n_more)))
        return gf.layers.affine(params["last"]["W"], params["last"]["b"], a)

    return gf.Net(spec, apply), ["z1", "z", "a1", "a"]


def start(net: gf.Net, std: Callable[[int], float], key: jax.Array) -> Any:
    """Return initial parameters with hidden weights of that standard deviation."""
    params = net.init(key)

    def sampled(name: str, W: jax.Array) -> jax.Array:
        return std(W.shape[-1]) * jax.random.normal(jax.random.fold_in(key, len(name)), W.shape)

    first = params["first"] | {"W": sampled("first", params["first"]["W"])}
    dense = params["more"]["dense"] | {"W": sampled("dense", params["more"]["dense"]["W"])}
    return params | {"first": first, "more": params["more"] | {"dense": dense}}


def outcome(config: Config, data: gf.data.Dataset, activation: str, wiring: str) -> Outcome:
    """Examine and train the networks with one activation and one wiring: all starts and depths at once."""
    train, test = jax.tree.map(jnp.asarray, (data.train, data.test))
    net, sites = deep(train[0].shape[1], config.width, activation, wiring)
    one = gf.classification_loss(net)
    of_batch = gf.batch_mean(lambda params, example: one(params, ((example[0], example[2]), example[1])))

    def loss(params: Any, batch: Any, depth: jax.Array) -> jax.Array:
        x, y = batch
        return of_batch(params, (x, y, jnp.broadcast_to(depth, y.shape)))

    key = jax.random.key(config.seed)
    made = [start(net, std, key) for std in STARTS.values()]
    of_starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)  # [starts, ...]

    some = jax.tree.map(lambda part: part[:256], train)
    stats = ["rms", "saturated", "dead"]
    look = jax.jit(jax.vmap(gf.inspect(loss, sites=sites, stats=stats, input_grads=False), (0, None, None)))
    inspection = jax.device_get(look(of_starts, some, jnp.int32(DEPTHS[-1])))
    # [starts, layers]
    rms = np.concatenate([inspection.grad_stats["z1"].rms[:, None], inspection.grad_stats["z"].rms], 1)
    first, more = inspection.stats["a1"], inspection.stats["a"]
    off = None
    for name in ("saturated", "dead"):
        if getattr(first, name) is not None:
            off = np.concatenate([getattr(first, name)[:, None], getattr(more, name)], 1)

    optimizer = optax.sgd(config.rate, momentum=0.9)
    n_epochs = -(-config.steps * config.batch // len(train[1])) + 1
    orders = [
        gf.data.epoch_order(len(train[1]), config.batch, config.seed, epoch) for epoch in range(n_epochs)
    ]
    order = jnp.asarray(np.concatenate(orders)[: config.steps])  # [steps, batch]

    @jax.jit
    def trained(params: Any, depths: jax.Array) -> jax.Array:
        def of_one(params: Any, depth: jax.Array) -> jax.Array:
            def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
                params, state = carry
                batch = jax.tree.map(lambda part: part[rows], train)
                grads = jax.grad(loss)(params, batch, depth)
                updates, state = optimizer.update(grads, state)
                return (optax.apply_updates(params, updates), state), None

            (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), order)
            answers = jax.vmap(lambda x: net.apply(params, (x, depth)))(test[0])
            # Predictions of parameters that are not finite count as wrong.
            return ((answers.argmax(-1) == test[1]) & jnp.isfinite(answers).all(-1)).mean()

        return jax.vmap(jax.vmap(of_one, (None, 0)), (0, None))(params, depths)

    with phase("training"):
        accuracies = np.asarray(trained(of_starts, jnp.asarray(DEPTHS)))
    return Outcome(rms * math.sqrt(config.width), off, accuracies)


def judge(config: Config, outcomes: dict[tuple[str, str], Outcome]) -> runs.Outcome:
    """Compare gradients and test accuracies of ten layers with what is expected."""
    names = list(STARTS)
    lecun, he = names.index("LeCun"), names.index("He")
    plain = outcomes["sigmoid", "plain"]
    deepest = {kind: each.accuracies[:, -1] for kind, each in outcomes.items()}
    measured = {
        "gradient in ten sigmoid layers, first / last": plain.norms[lecun, 0] / plain.norms[lecun, -1],
        "test accuracy of ten sigmoid layers": deepest["sigmoid", "plain"][lecun],
        "the same with residual connections": deepest["sigmoid", "residual"][lecun],
        "the same with layer norm": deepest["sigmoid", "layer norm"][lecun],
        "test accuracy of ten ReLU layers with He's initialization": deepest["relu", "plain"][he],
    }
    return runs.judge(EXPECTED, measured, defaults(config))


Kinds = Mapping[tuple[str, str], Any]  # by the name of a column of panels (an activation) and that of a row


def gradient_flow(norms: Kinds, lines: Sequence[str], title: str) -> Figure:
    """Draw how large the gradient is at each layer, as a share of that at the last.

    Args:
        norms: by the panel's column and row, `[lines, layers]`.
        lines: what each line is.
        title: the figure's.

    Returns:
        A figure with a grid of panels that share their axes.

    >>> gradient_flow({("relu", "plain"): [[0.1, 1.0]]}, ["He"], "A tenth").axes[0].get_title()
    'relu'
    """
    columns, rows = (list(dict.fromkeys(kind[i] for kind in norms)) for i in range(2))
    figure = new_figure(2.7 * len(columns) + 1.6, 2.1 * len(rows) + 1.2)
    panels = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    for (column, row), values in norms.items():
        panel = panels[rows.index(row), columns.index(column)]
        values = np.asarray(values, np.float64)
        layers = np.arange(1, values.shape[1] + 1)
        for name, line, color, style in zip(
            lines, values, cycle(LINE_COLORS), cycle(LINE_STYLES), strict=False
        ):
            last = line[-1] if line[-1] > 0 else np.nan
            shares = np.where(line > 0, line / last, np.nan)  # zeros are not defined on a logarithmic scale
            panel.plot(layers, shares, style, color=color, label=name, linewidth=1.8)
        panel.axhline(1e-3, color="0.6", linewidth=0.8)
        panel.set_yscale("log")
        panel.set_xticks(layers)
        panel.tick_params(labelsize=8)
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
        if row == rows[0]:
            panel.set_title(column, fontsize=11)
        if column == columns[0]:
            panel.set_ylabel(row, fontsize=11)
    panels[-1, 0].text(layers[-1], 1.2e-3, "1/1,000: vanished", color="0.4", fontsize=8, ha="right")
    low, high = panels[0, 0].get_ylim()
    panels[0, 0].set_ylim(max(low, 1e-9), min(high, 1e6))
    figure.supxlabel("layer (the loss is on the right, the gradient goes to the left)", fontsize=10)
    figure.supylabel("gradient of the weighted sums (norm), as a share of the last layer's", fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", title="initial weights", frameon=False)
    figure.suptitle(title)
    return figure


def saturation(shares: Mapping[str, Any], rows: Sequence[str], what: Mapping[str, str], title: str) -> Figure:
    """Draw the share of each layer that is saturated (sigmoid, tanh) or dead (relu).

    Args:
        shares: by activation, `[rows, layers]` in [0, 1].
        rows: what each row is.
        what: by activation, what the shares are of.
        title: the figure's.

    Returns:
        A figure with one panel per activation.

    >>> saturation({"relu": [[0.0, 0.5]]}, ["He"], {"relu": "dead nodes"}, "Half").axes[0].get_title()
    'relu: dead nodes'
    """
    figure = new_figure(4.2 * len(shares) + 1.6, 0.5 * len(rows) + 1.9)
    panels = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    for panel, (name, values) in zip(panels, shares.items(), strict=True):
        mapped = _shares(panel, np.asarray(values, np.float64))
        panel.set_title(f"{name}: {what[name]}", fontsize=11)
        panel.set_xticks(range(np.shape(values)[1]), range(1, np.shape(values)[1] + 1))
        panel.set_yticks(range(len(rows)), rows)
        panel.set_xlabel("layer")
    panels[0].set_ylabel("initial weights")
    figure.colorbar(mapped, ax=list(panels), label="share of the layer (%)", pad=0.01)
    figure.suptitle(title)
    return figure


def learned(accuracies: Kinds, rows: Sequence[str], depths: Sequence[int], title: str) -> Figure:
    """Draw which networks have learned: one panel per wiring, a group of rows per activation, one column per depth.

    Args:
        accuracies: by activation and wiring, `[rows, depths]` in [0, 1].
        rows: what each row of a group is.
        depths: numbers of hidden layers.
        title: the figure's.

    Returns:
        A figure with one panel per wiring.

    >>> learned({("relu", "plain"): [[0.5, 0.9]]}, ["He"], [1, 2], "Two").axes[0].get_title()
    'plain'
    """
    activations, wirings = (list(dict.fromkeys(kind[i] for kind in accuracies)) for i in range(2))
    n = len(rows)
    figure = new_figure(3.1 * len(wirings) + 2.8, 0.27 * n * len(activations) + 1.8)
    panels = figure.subplots(1, len(wirings), squeeze=False, sharey=True)[0]
    for panel, wiring in zip(panels, wirings, strict=True):
        mapped = _shares(
            panel, np.concatenate([np.asarray(accuracies[name, wiring]) for name in activations])
        )
        for group in range(1, len(activations)):
            panel.axhline(n * group - 0.5, color="white", linewidth=4)
        panel.set_title(wiring, fontsize=11)
        panel.set_xticks(range(len(depths)), depths)
        panel.set_xlabel("hidden layers")
        panel.set_yticks(range(n * len(activations)), list(rows) * len(activations), fontsize=9)
    for group, name in enumerate(activations):
        panels[0].text(
            -0.36, n * (group + 0.5) - 0.5, name, rotation=90, va="center", ha="center", fontsize=11,
            transform=panels[0].get_yaxis_transform(),
        )  # fmt: skip
    figure.colorbar(mapped, ax=list(panels), label="test digits right (%)", pad=0.01)
    figure.supxlabel("10 %: it guesses; 0 %: its numbers are no longer finite", fontsize=10)
    figure.suptitle(title)
    return figure


def _shares(panel: Any, values: np.ndarray) -> Any:
    """Draw shares as colored cells with their percentages in them."""
    mapped = panel.imshow(
        100 * values, cmap="cividis", vmin=0, vmax=100, aspect="auto", interpolation="nearest"
    )
    for row, column in np.ndindex(*values.shape):
        color = "black" if values[row, column] > 0.5 else "white"
        text = f"{100 * values[row, column]:.0f}"
        panel.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    panel.tick_params(length=0)
    return mapped
