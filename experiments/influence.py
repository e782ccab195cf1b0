"""Ask which training digits a prediction rests on, and train again without them to see whether it is true."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf
from gradfn import runs
from gradfn.display import TextTable
from gradfn.pages.figures import LINE_COLORS, new_figure
from gradfn.pages.images import bare
from gradfn.timings import phase

from ._common import DigitOptions, conclude, defaults, start_on_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EXPECTED = (
    runs.Expectation("linear datamodeling score, gradients", at_most=0.6),
    runs.Expectation("linear datamodeling score, EK-FAC", at_least=0.6),
    runs.Expectation("linear datamodeling score, conjugate gradients", at_least=0.7),
    runs.Expectation("rise of the loss without the digits that EK-FAC names", at_least=0.3, unit="nats"),
    runs.Expectation("rise of the loss without random digits", at_most=0.1, unit="nats"),
)

GRADIENTS, EKFAC, EXACT = "gradients", "EK-FAC", "conjugate gradients"
TESTED = 50  # test digits whose predictions are traced back
LEFT_OUT = 8  # of them, those that are trained for again without the digits that helped most
REMOVED = 10  # training digits that are removed for one test digit
RATE = 0.01  # of Adam, falling to zero
DECAY = 1e-3  # times the squared weights, in the loss
# Of the Gauss-Newton matrix, for conjugate gradients: five times what the squared weights add. It matters little: with
# what they add themselves the score is 0.849 instead of 0.852. EK-FAC chooses its own.
DAMPING = 10 * DECAY


@dataclass(frozen=True)
class Config(DigitOptions):
    """Options of a run; the defaults train 64-16-10 nets on 256 of the built-in digits, 8x8."""

    hidden: int = runs.option(16, "nodes in the hidden layer", at_least=1)
    examples: int = runs.option(256, "training digits", at_least=20)
    subsets: int = runs.option(64, "random halves of the training digits to train on again", at_least=4)
    nets: int = runs.option(
        3, "nets of different initial weights, over which losses and scores are averaged", at_least=1
    )
    steps: int = runs.option(400, "of training, each on all training digits", at_least=1)


class Result(NamedTuple):
    """The result of a run."""

    scores: dict[str, np.ndarray]  # by method, [test, train]
    datamodeling: dict[str, float]  # by method, the linear datamodeling score in [-1, 1]
    losses: np.ndarray  # [test], after training on all digits
    # By method, [left out], after training without the digits that it names.
    without: dict[str, np.ndarray]
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Train, trace predictions back to training digits, train again without these, and compare; draw all of it."""
    options = {} if config.data == "mnist" else {"size": 8}
    config, data, folder = start_on_digits("influence", config, **options)
    train, test = (tuple(map(jnp.asarray, part)) for part in (data.train, data.test))
    train, test = (
        jax.tree.map(lambda x: x[: config.examples], train),
        jax.tree.map(lambda x: x[:TESTED], test),
    )
    n = len(train[1])
    net = gf.mlp([train[0].shape[1], config.hidden, 10], "tanh")
    fit = trainer(net, train, config)
    losses_after = jax.jit(lambda masks: losses_of(net, fit, masks, test, config))

    with phase("training"):
        params = fit(jnp.ones(n))
    print(f"{config.nets} nets of {gf.count(net.spec):,} parameters, trained on {n} digits")
    with phase("training"):
        scores = {name: averaged(method, params, train, test) for name, method in methods(net).items()}
    halves = random_halves(n, config)
    masks, names = masks_without(scores, n, config)
    with phase("training"):
        print(f"training again: {config.nets * (len(halves) + len(masks))} nets")
        everything = np.asarray(losses_after(jnp.asarray(np.concatenate([halves, masks]))))  # [masks, test]
    of_halves, of_masks = everything[: len(halves)], everything[len(halves) :]
    datamodeling = {
        name: linear_datamodeling_score(of_method, halves, of_halves) for name, of_method in scores.items()
    }
    # One mask with all digits, then those of each method for each test digit.
    losses = of_masks[0]
    of_each = of_masks[1:].reshape(len(names), LEFT_OUT, -1)  # [methods, left out, test]
    own = np.arange(LEFT_OUT)
    without = {name: of_name[own, own] for name, of_name in zip(names, of_each, strict=True)}
    print(table(datamodeling, losses[:LEFT_OUT], without))

    outcome = judge(config, datamodeling, losses[:LEFT_OUT], without)
    with phase("pictures"):
        as_images = lambda part: np.asarray(part).reshape(-1, *data.shape)  # noqa: E731
        figures = {
            "influence": without_them(
                as_images(test[0][:LEFT_OUT]),
                np.asarray(test[1][:LEFT_OUT]),
                as_images(train[0]),
                np.asarray(train[1]),
                scores[EKFAC][:LEFT_OUT],
                losses[:LEFT_OUT],
                without,
            ),
            "agreement": agreement(datamodeling, scores[EKFAC] @ halves.T / n, of_halves),
        }
    conclude(
        folder,
        outcome,
        figures,
        data.name,
        datamodeling=datamodeling,
        losses=losses[:LEFT_OUT].tolist(),
        without={name: values.tolist() for name, values in without.items()},
    )
    return Result(scores, datamodeling, losses, without, folder, outcome)


def trainer(net: gf.Net, train: Any, config: Config) -> Callable[[jax.Array], Any]:
    """Return a function that trains nets on a subset of the training digits, `[n]` of 0 and 1: their parameters."""
    loss = gf.classification_loss(net)
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, config.steps))

    def objective(params: Any, mask: jax.Array) -> jax.Array:
        each = jax.vmap(loss, (None, 0))(params, train)
        return mask @ each / mask.sum() + DECAY * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    def one(key: jax.Array, mask: jax.Array) -> Any:
        def step(state: Any, _: None) -> tuple[Any, None]:
            params, state = state
            updates, state = optimizer.update(jax.grad(objective)(params, mask), state)
            return (optax.apply_updates(params, updates), state), None

        start = net.init(key)
        return jax.lax.scan(step, (start, optimizer.init(start)), length=config.steps)[0][0]

    keys = jax.random.split(jax.random.key(config.seed), config.nets)
    return jax.jit(lambda mask: jax.vmap(one, (0, None))(keys, mask))


def losses_of(net: gf.Net, fit: Callable, masks: jax.Array, test: Any, config: Config) -> jax.Array:
    """Return the losses of the test digits after training on each subset, averaged over the nets: `[subsets, test]`."""
    each = jax.vmap(gf.classification_loss(net), (None, 0))
    return jax.lax.map(
        lambda mask: jax.vmap(lambda params: each(params, test))(fit(mask)).mean(0), masks, batch_size=16
    )


def methods(net: gf.Net) -> dict[str, Callable[[Any, Any, Any], jax.Array]]:
    """Return methods `(params, train, test) -> [test, train]`."""
    loss = gf.classification_loss(net)
    gradients = gf.attribution.tracin(loss)
    return {
        GRADIENTS: lambda params, train, test: gradients([params], train, test, 1.0),
        EKFAC: gf.attribution.influence(loss, gf.curvature.ekfac(net.apply, "softmax")),
        EXACT: gf.attribution.influence(loss, gf.curvature.ggn_vp(net.apply), damping=DAMPING),
    }


def averaged(method: Callable, params: Any, train: Any, test: Any) -> np.ndarray:
    """Return the scores `[test, train]` of a method, averaged over the nets."""
    nets = [jax.tree.map(lambda p, i=i: p[i], params) for i in range(len(jax.tree.leaves(params)[0]))]
    return np.mean([np.asarray(method(net, train, test)) for net in nets], 0)


def random_halves(n: int, config: Config) -> np.ndarray:
    """Return random halves of the training digits, `[subsets, n]` of 0 and 1."""
    rng = np.random.default_rng(config.seed)
    return np.stack([rng.permutation(n) < n // 2 for _ in range(config.subsets)]).astype(np.float32)


def masks_without(scores: Mapping[str, np.ndarray], n: int, config: Config) -> tuple[np.ndarray, list[str]]:
    """Return all digits, then for each method all but those that helped each test digit most: `[masks, n]`.

    The last method removes random digits.
    """
    rng = np.random.default_rng(config.seed + 1)
    removed = {name: np.argsort(-of[:LEFT_OUT], 1)[:, :REMOVED] for name, of in scores.items()}
    removed["random"] = np.stack([rng.permutation(n)[:REMOVED] for _ in range(LEFT_OUT)])
    masks = [np.ones(n, np.float32)]
    for rows in removed.values():
        for row in rows:
            mask = np.ones(n, np.float32)
            mask[row] = 0
            masks.append(mask)
    return np.stack(masks), list(removed)


def linear_datamodeling_score(scores: np.ndarray, subsets: np.ndarray, losses: np.ndarray) -> float:
    """Return the rank correlation of predicted and true losses over subsets, averaged over the test examples.

    Park et al., *TRAK: Attributing Model Behavior at Scale*, 2023. The prediction for a subset is the sum of
    its scores: the higher, the lower the loss.

    Args:
        scores: `[test, train]`, positive where a training example helped.
        subsets: `[subsets, train]` of 0 and 1, the examples that a net was trained on.
        losses: `[subsets, test]`, of these nets.

    >>> subsets = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    >>> linear_datamodeling_score(np.array([[3.0, 2.0, 1.0]]), subsets, np.array([[0.1], [0.5], [0.9]]))
    1.0
    """
    ranks = lambda x: np.argsort(np.argsort(x, 0), 0)  # noqa: E731
    pairs = zip(ranks(subsets @ scores.T).T, ranks(-losses).T, strict=True)
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs]))


def table(
    datamodeling: Mapping[str, float], losses: np.ndarray, without: Mapping[str, np.ndarray]
) -> TextTable:
    """Return the scores of the methods, and the losses without the digits that they name, as a table."""
    shown = TextTable(
        caption=f"averaged over {len(losses)} test digits; with all training digits: {losses.mean():.3f}"
    )
    for header, form in (
        ("method", ""),
        ("datamodeling score", ".2f"),
        (f"loss without {REMOVED} digits", ".3f"),
    ):
        shown.add_column(header, form)
    for name, values in without.items():
        shown.add_row(name, datamodeling.get(name), float(values.mean()))
    return shown


def rise(losses: np.ndarray, without: np.ndarray) -> float:
    """Return the rise of the mean loss, in nats, given the losses without some training digits."""
    return float((without - losses).mean())


def judge(
    config: Config, datamodeling: Mapping[str, float], losses: np.ndarray, without: Mapping[str, np.ndarray]
) -> runs.Outcome:
    """Compare the scores, and what training without the digits does, with what is expected."""
    measured = {f"linear datamodeling score, {name}": value for name, value in datamodeling.items()}
    measured["rise of the loss without the digits that EK-FAC names"] = rise(losses, without[EKFAC])
    measured["rise of the loss without random digits"] = rise(losses, without["random"])
    return runs.judge(EXPECTED, measured, defaults(config, "data"))


def without_them(
    tests: np.ndarray,
    test_labels: np.ndarray,
    train: np.ndarray,
    train_labels: np.ndarray,
    scores: np.ndarray,
    losses: np.ndarray,
    without: Mapping[str, np.ndarray],
    shown: int = 4,
    n_best: int = 6,
) -> Figure:
    """Draw test digits, the training digits that helped each most, and its loss with and without these.

    Args:
        tests: `[n, height, width]`.
        test_labels: `[n]`.
        train: `[m, height, width]`.
        train_labels: `[m]`.
        scores: `[n, m]`, by EK-FAC.
        losses: `[n]`, after training on all.
        without: `[n]` each, after training without digits: those that EK-FAC names, and random ones.
        shown: the number of test digits to show, those with the largest rise.
        n_best: the number of training digits to show for each.

    >>> images, one = np.zeros([3, 8, 8]), np.ones(1)
    >>> without = {EKFAC: 2 * one, "random": one}
    >>> figure = without_them(images[:1], [3], images, [3, 5, 3], np.ones([1, 3]), one, without, 1)
    >>> [panel.get_xlabel() for panel in figure.axes][:2]
    ['a 3', '3']
    """
    chosen = np.argsort(losses - without[EKFAC])[:shown]
    figure = new_figure(0.92 * (1 + n_best) + 3.6, 1.12 * len(chosen) + 1.3)
    halves: Any = figure.subfigures(1, 2, width_ratios=[0.92 * (1 + n_best), 3.6])
    panels = halves[0].subplots(len(chosen), 1 + n_best, squeeze=False)
    for line, i in zip(panels, chosen, strict=True):
        best = np.argsort(-scores[i], kind="stable")[:n_best]
        for panel in line:
            bare(panel)
        line[0].imshow(tests[i], cmap="gray_r", vmin=0, vmax=1)
        line[0].set_xlabel(f"a {test_labels[i]}", fontsize=9, labelpad=2)
        for spine in line[0].spines.values():
            spine.set(color="black", linewidth=1.5)
        for panel, j in zip(line[1:], best, strict=False):
            panel.imshow(train[j], cmap="gray_r", vmin=0, vmax=1)
            panel.set_xlabel(f"{train_labels[j]}", fontsize=9, labelpad=2)
    panels[0, 0].set_title("test digit", fontsize=9)
    panels[0, 1 + n_best // 2].set_title(f"helped most, by EK-FAC ({n_best} of {REMOVED})", fontsize=9)
    bars = halves[1].subplots(len(chosen), 1, squeeze=False, sharex=True)[:, 0]
    kinds = {"with all": (losses, "0.6"), "without random": (without["random"], "0.8")}
    kinds["without those"] = (without[EKFAC], LINE_COLORS[1])
    for panel, i in zip(bars, chosen, strict=True):
        values = [values[i] for values, _ in kinds.values()]
        panel.barh(range(3), values, color=[color for _, color in kinds.values()])
        panel.set_yticks(range(3), list(kinds), fontsize=8)
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
    bars[0].set_title("loss of the test digit after training", fontsize=9)
    bars[-1].set_xlabel("nats")
    rises = {name: rise(losses, without[name]) for name in (EKFAC, "random")}
    figure.suptitle(
        f"Without the {REMOVED} training digits that EK-FAC names, a test digit's loss rises by "
        f"{rises[EKFAC]:.2f} nats;"
        f"\nwithout {REMOVED} random ones by {rises['random']:.2f} "
        f"(means of {len(losses)} test digits; below, the {len(chosen)} that rise most)"
    )
    return figure


def agreement(datamodeling: Mapping[str, float], predicted: np.ndarray, losses: np.ndarray) -> Figure:
    """Draw how well each method predicts the losses after training on random halves.

    Args:
        datamodeling: the linear datamodeling score of each method.
        predicted: `[test, subsets]`, the sum of the subset's scores by EK-FAC.
        losses: `[subsets, test]`.

    >>> figure = agreement({"EK-FAC": 0.7}, np.eye(3), np.eye(3))
    >>> figure.axes[0].get_xlabel()
    'linear datamodeling score'
    """
    figure = new_figure(9.2, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
    names = list(datamodeling)
    bars = left.barh(range(len(names)), [datamodeling[name] for name in names], color=LINE_COLORS[0])
    left.bar_label(bars, fmt="{:.2f}", padding=3)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlim(0, 1)
    left.set_xlabel("linear datamodeling score")
    left.set_title("rank correlation of predicted and true losses", fontsize=9)
    # In units of each test digit's spread over subsets, so that all have one panel.
    whole = lambda x: (x - x.mean(-1, keepdims=True)) / np.maximum(x.std(-1, keepdims=True), 1e-12)  # noqa: E731
    right.plot(
        whole(predicted).ravel(),
        -whole(losses.T).ravel(),
        ".",
        color=LINE_COLORS[0],
        alpha=0.15,
        markersize=4,
    )
    right.set_xlabel("predicted fall of the loss, by EK-FAC (standard deviations)")
    right.set_ylabel("true fall (standard deviations)")
    right.set_title("each dot: a test digit after training on a random half", fontsize=9)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    order = sorted(datamodeling, key=lambda name: -datamodeling[name])
    ranked = ", then ".join(f"{name} ({datamodeling[name]:.2f})" for name in order)
    figure.suptitle(f"Losses after training on other digits, best predicted by {ranked}")
    return figure
