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
from gradfn.pages.figures import LINE_COLORS, LINE_STYLES, label_lines, new_figure
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

# The networks that are drawn: activation, wiring and initial weights. The printed lines report all.
SHOWN = {
    "sigmoid (LeCun)": ("sigmoid", "plain", "LeCun"),
    "sigmoid + residual": ("sigmoid", "residual", "LeCun"),
    "sigmoid + layer norm": ("sigmoid", "layer norm", "LeCun"),
    "relu (He)": ("relu", "plain", "He"),
    "relu (N(0, 1))": ("relu", "plain", "N(0, 1)"),
}
COLORS = (*LINE_COLORS, "0.35")
CLEAR = 0.1  # of all values, from which on they are named as saturated


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

    shown = {name: outcomes[activation, wiring] for name, (activation, wiring, _) in SHOWN.items()}
    starts = {name: list(STARTS).index(start) for name, (_, _, start) in SHOWN.items()}
    off = {name: shares for name in ACTIVATIONS if (shares := outcomes[name, "plain"].off) is not None}
    with phase("pictures"):
        figures = {
            "flow": gradient_flow({name: found.norms[starts[name]] for name, found in shown.items()}),
            "saturated": saturation(
                off,
                list(STARTS),
                {"sigmoid": "saturated values", "tanh": "saturated values", "relu": "dead nodes"},
            ),
            "learned": learned(
                {name: found.accuracies[starts[name]] for name, found in shown.items()}, DEPTHS, config.steps
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


def gradient_flow(norms: Mapping[str, Any]) -> Figure:
    """Draw how large the gradient is at each layer, as a share of that at the last, where it starts.

    Args:
        norms: by the name of a network, of its layers from the first to the last, `[layers]`.

    Returns:
        A figure with one line per network; its title reports what is left of the gradient at the first layer.

    >>> gradient_flow({"relu": [0.1, 1.0], "sigmoid": [1e-4, 1.0]}).get_suptitle()
    'Of the gradient at layer 2, 1/10,000 arrives at layer 1 with sigmoid, 10 % with relu'
    """
    figure = new_figure(8.6, 4.4)
    panel = figure.subplots()
    left = {}
    for (name, sizes), color, style in zip(norms.items(), cycle(COLORS), cycle(LINE_STYLES), strict=False):
        sizes = np.asarray(sizes, np.float64)
        n = len(sizes)
        last = sizes[-1] if sizes[-1] > 0 else np.nan
        # Zeros are not defined on a logarithmic scale.
        shares = np.where(sizes > 0, sizes / last, np.nan)
        left[name] = float(shares[0])
        panel.plot(np.arange(1, n + 1)[::-1], shares[::-1], style, color=color, label=name, linewidth=2)
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.set_ylim(max(low, 1e-9), min(high, 1e7))
    panel.axhline(1e-3, color="0.6", linewidth=0.8)
    panel.text(n, 1.25e-3, "1/1,000: vanished", color="0.4", fontsize=9)
    panel.set_xticks(range(1, n + 1))
    panel.set_xlim(n, 1)
    panel.set_xlabel("layer: the loss is on the left, the gradient goes back to the right")
    panel.set_ylabel("gradient of the weighted sums (norm),\nas a share of the last layer's")
    panel.grid(color="0.92")
    panel.spines[["top", "right"]].set_visible(False)
    label_lines(panel)
    first = min(left, key=lambda name: np.nan_to_num(left[name]))
    others = [name for name in left if name != first][:1]
    texts = [f"{_left(left[name])} with {name}" for name in others]
    figure.suptitle(
        f"Of the gradient at layer {n}, {_left(left[first])} arrives at layer 1 with {first}"
        + "".join(f", {text}" for text in texts)
    )
    return figure


def _left(share: float) -> str:
    if not share > 0:
        return "nothing"
    if share < 1e-6:
        return f"1/{float(f'{1e-6 / share:.2g}'):,.10g} million"
    return f"1/{float(f'{1 / share:.2g}'):,.0f}" if share < 0.01 else f"{100 * share:,.0f} %"


def saturation(shares: Mapping[str, Any], rows: Sequence[str], what: Mapping[str, str]) -> Figure:
    """Draw the share of values that are saturated or of nodes that are dead, averaged over layers.

    Args:
        shares: by activation, `[rows, layers]` in [0, 1].
        rows: what each row is, initial weights.
        what: by activation, what the shares are of.

    Returns:
        A figure with one panel per activation; its title names the largest share, or says that all are small.

    >>> saturation({"relu": [[0.0, 0.5]]}, ["He"], {"relu": "dead nodes"}).get_suptitle()
    'Before training, initial weights He give 25 % dead nodes with relu, the most of all'
    """
    means = {name: np.asarray(values, np.float64).mean(1) for name, values in shares.items()}
    figure = new_figure(3.2 * len(shares) + 1.0, 0.42 * len(rows) + 1.5)
    panels = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    for panel, (name, values) in zip(panels, means.items(), strict=True):
        colors = [LINE_COLORS[1] if value >= CLEAR else "0.6" for value in values]
        panel.barh(range(len(rows)), 100 * values, 0.62, color=colors)
        for row, value in enumerate(values):
            panel.text(100 * value + 2, row, f"{100 * value:.0f} %", va="center", fontsize=9)
        panel.set_title(f"{name}: {what[name]}", fontsize=11)
        panel.set_yticks(range(len(rows)), rows)
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.set_xlim(0, 100)
        panel.set_xticks((0, 25, 50, 75))
        panel.set_xlabel("share, over all layers (%)")
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[0].set_ylabel("initial weights")
    most = max(means, key=lambda name: means[name].max())
    row, share = int(means[most].argmax()), float(means[most].max())
    if share >= CLEAR:
        title = (
            f"initial weights {rows[row]} give {100 * share:.0f} % {what[most]} with {most}, the most of all"
        )
    else:
        title = f"no initial weights saturate much: at most {100 * share:.0f} % {what[most]} ({most}, {rows[row]})"
    figure.suptitle(f"Before training, {title}")
    return figure


def learned(accuracies: Mapping[str, Any], depths: Sequence[int], steps: int) -> Figure:
    """Draw which networks have learned, by their depth.

    Args:
        accuracies: by the name of a network, `[depths]` in [0, 1].
        depths: numbers of hidden layers.
        steps: of the training.

    Returns:
        A figure with one line per network; its title reports the accuracies of the first two at the largest depth.

    >>> learned({"relu": [0.9, 0.1], "sigmoid": [0.9, 0.8]}, [1, 2], 30).get_suptitle()
    'After 30 steps, 2 layers of relu read 10 % of the test digits, sigmoid 80 %'
    """
    figure = new_figure(8.6, 4.4)
    panel = figure.subplots()
    for (name, values), color, style in zip(
        accuracies.items(), cycle(COLORS), cycle(LINE_STYLES), strict=False
    ):
        values = 100 * np.asarray(values, np.float64)
        panel.plot(depths, values, style, color=color, label=name, linewidth=2, marker="o", markersize=4)
    panel.set_ylim(-3, 103)
    panel.axhline(10, color="0.6", linewidth=0.8)
    panel.text(depths[0], 11.5, "10 %: guessing", color="0.4", fontsize=9)
    panel.set_xticks(depths)
    panel.set_xlabel("hidden layers")
    panel.set_ylabel("test digits right (%); 0: no longer finite")
    panel.grid(color="0.92")
    panel.spines[["top", "right"]].set_visible(False)
    label_lines(panel)
    ends = [f"{100 * float(values[-1]):.0f} %" for values in accuracies.values()]
    names = list(accuracies)
    second = f", {names[1]} {ends[1]}" if len(names) > 1 else ""
    figure.suptitle(
        f"After {steps:,} steps, {depths[-1]} layers of {names[0]} read {ends[0]} of the test digits{second}"
    )
    return figure
