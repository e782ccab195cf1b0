"""Explain a digit network: which pixels its predictions rest on, whether to trust such maps, which digits taught it."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf
from gradfn import runs
from gradfn.attribution import Randomized
from gradfn.display import TextTable
from gradfn.pages.figures import new_figure
from gradfn.pages.images import bare, robust_limit, signed_image
from gradfn.timings import phase

from ._common import DigitOptions, conclude, defaults, start_on_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EXPECTED = (
    runs.Expectation("largest gap of integrated gradients", at_most=0.01, unit="%"),
    runs.Expectation("randomization tests passed by saliency", at_least=2, unit="of 2"),
    runs.Expectation("randomization tests passed by an edge detector", at_most=0, unit="of 2"),
)

STEPS = {"digits": 1560, "mnist": 15_600}
RATE = 0.5  # of plain gradient descent, for which TracIn is defined
# For the test of labels: hidden nodes, digits and steps that suffice to memorize random labels.
WIDE, MEMORIZED, STEPS_MEMORIZED = 64, 300, 1500
N_TESTED = 30  # test digits that the randomization tests examine
N_TRACED = 100  # test digits whose predictions are traced back

Method = Callable[[Any, Any], jax.Array]  # (params, (image, class)) -> map


@dataclass(frozen=True)
class Config(DigitOptions):
    """Options of a run; the defaults explain a 784-16-10 net on the built-in digits."""

    hidden: int = runs.option(16, "nodes in the hidden layer")
    steps: int | None = runs.option(None, "of training, 32 digits each (default: 1,560; with MNIST 15,600)")
    path: int = runs.option(
        64, "gradients along the path from a blank image to the digit, for the integrated gradients"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        runs.within(1, None, hidden=self.hidden, steps=self.steps, path=self.path)


class Result(NamedTuple):
    """The result of a run."""

    params: dict[str, jax.Array]
    history: Sequence[dict[str, Any]]
    test_accuracy: float  # in [0, 1]
    gap: float  # of the integrated gradients: the largest of all test digits, as a share of the score
    tests: dict[str, tuple[Randomized, Randomized]]  # by method: weights random, labels shuffled
    same_label: float  # of the five training digits that helped a prediction most, the share with its label
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Train, explain, test the explanations, and trace the predictions back to training digits; draw all of it."""
    config, data, folder = start_on_digits("saliency", config)
    net = gf.mlp([784, config.hidden, 10])
    steps = config.steps or STEPS[config.data]
    fitted = gf.fit(
        gf.batch_mean(gf.classification_loss(net)),
        net.init(jax.random.key(config.seed)),
        data.train,
        optax.sgd(RATE),
        steps,
        seed=config.seed,
        keep_every=-(-steps // 5),
        folder=folder,
        resume=config.resume,
    )
    images, labels = (jnp.asarray(part) for part in data.test)
    predicted = jax.vmap(net.apply, (None, 0))(fitted.params, images).argmax(1)
    accuracy = float((predicted == labels).mean())

    gap = largest_gap(net, fitted.params, (images, predicted), config.path)
    tests = believable(net, fitted.params, data, (images[:N_TESTED], predicted[:N_TESTED]), config)
    print(table(tests))
    kept = list(gf.train.kept(folder, like=fitted.params).values())
    traced = gf.attribution.tracin(gf.classification_loss(net))(
        kept, data.train, (images[:N_TRACED], predicted[:N_TRACED]), RATE
    )
    best = np.argsort(-np.asarray(traced), 1)[:, :5]
    same_label = float((data.train[1][best] == np.asarray(predicted[:N_TRACED])[:, None]).mean())

    print(f"of the 5 training digits that helped a prediction most, {100 * same_label:.0f} % have its label")
    with phase("pictures"):
        figures = {
            "maps": maps_figure(net, fitted.params, data, tests, config.path),
            "tests": tests_figure(tests, data),
            "influence": influence_figure(net, fitted.params, data, np.asarray(traced)),
        }
    outcome = judge(config, gap, tests)
    conclude(
        folder,
        outcome,
        figures,
        data.name,
        test_accuracy=accuracy,
        gap=gap,
        passed={name: [test.passed for test in both] for name, both in tests.items()},
        same_label=same_label,
    )
    return Result(fitted.params, fitted.history, accuracy, gap, tests, same_label, folder, outcome)


def explanations(net: gf.Net, path: int = 64) -> dict[str, Method]:
    """Return methods to explain the prediction `class` to an image; the last one uses only the image."""
    f, key = net.apply, jax.random.key(0)
    return {
        "saliency": lambda params, example: gf.attribution.saliency(f, example[1])(params, example[0]),
        "smooth gradient": lambda params, example: gf.attribution.smooth_grad(f, example[1])(
            params, example[0], key=key
        ),
        "gradient x input": lambda params, example: gf.attribution.grad_times_input(f, example[1])(
            params, example[0]
        ),
        "integrated gradients": lambda params, example: (
            gf.attribution.integrated_gradients(f, example[1], steps=path)(params, example[0]).attributions
        ),
        "occlusion": lambda params, example: gf.attribution.occlusion(
            f, 4, 2, target=example[1], shape=(28, 28)
        )(params, example[0]),
        "edge detector": lambda params, example: edges(example[0].reshape(28, 28)).reshape(-1),
    }


def edges(image: jax.Array) -> jax.Array:
    """Return the edges of an image: a baseline that does not use the network."""
    down, right = jnp.gradient(image)
    return jnp.hypot(down, right)


def largest_gap(net: gf.Net, params: Any, examples: Any, path: int) -> float:
    """Return the largest completeness gap of integrated gradients, relative to the score."""
    gap = jax.jit(
        lambda image, k: (
            gf.attribution.integrated_gradients(net.apply, k, steps=path)(params, image).relative_gap
        )
    )
    return float(jax.lax.map(lambda example: gap(*example), examples, batch_size=100).max())


def believable(
    net: gf.Net, params: Any, data: gf.data.Dataset, examples: Any, config: Config
) -> dict[str, tuple[Randomized, Randomized]]:
    """Run both randomization tests on all methods."""
    key_weights, key_labels = jax.random.split(jax.random.key(config.seed + 1))
    wide = gf.mlp([784, WIDE, 10])
    part = tuple(half[:MEMORIZED] for half in data.train)
    learned: dict[bytes, Any] = {}  # the two networks are the same for all methods

    def train(examples: Any, key: jax.Array) -> Any:
        labels = np.asarray(examples[1]).tobytes()
        if labels not in learned:
            fitted = gf.fit(
                gf.batch_mean(gf.classification_loss(wide)),
                wide.init(key),
                examples,
                optax.adam(0.003),
                1500,
                progress=False,
            )
            learned[labels] = fitted.params
            share = gf.accuracy(wide)(fitted.params, jax.tree.map(jnp.asarray, examples))
            print(f"for the test of labels: {100 * share:.0f} % of {MEMORIZED} digits memorized")
        return learned[labels]

    of_net, of_wide = explanations(net, config.path), explanations(wide, config.path)
    return {
        name: (
            gf.attribution.randomize_weights(of_net[name], net.init)(params, examples, key=key_weights),
            gf.attribution.randomize_labels(of_wide[name], train)(part, examples, key=key_labels),
        )
        for name in of_net
    }


def table(tests: dict[str, tuple[Randomized, Randomized]]) -> TextTable:
    """Return the results of the randomization tests as a table."""
    shown = TextTable(title="similarity of the maps (rank correlation of magnitudes)")
    names = [name for test in next(iter(tests.values())) for name in test.names]
    for header in ("method", *(f"{name} random" for name in names), ""):
        shown.add_column(header)
    for method, both in tests.items():
        numbers = [f"{rank:.2f}" for test in both for rank in test.rank_abs]
        shown.add_row(method, *numbers, "passes" if passes(both) else "FAILS")
    return shown


def maps_figure(net: gf.Net, params: Any, data: gf.data.Dataset, tests: Any, path: int) -> Any:
    """Draw the map of each method for five digits, the first of each of five classes that is predicted correctly."""
    images, labels = data.test
    probabilities = np.asarray(jax.nn.softmax(jax.vmap(net.apply, (None, 0))(params, jnp.asarray(images))))
    predicted = probabilities.argmax(1)
    right = [np.flatnonzero((predicted == k) & (labels == k)) for k in range(10)]
    chosen = [int(found[0]) for found in right if len(found)][::2][:5]
    examples = jnp.asarray(images[chosen]), jnp.asarray(predicted[chosen])
    columns = {}
    for name, method in explanations(net, path).items():
        maps = np.asarray(jax.jit(jax.vmap(method, (None, 0)))(params, examples))
        maps = maps if maps.ndim == 3 else maps.reshape(-1, *data.shape)
        columns[f"{name}\n{'passes' if passes(tests[name]) else 'FAILS'}"] = maps
    names = [f"{predicted[i]} ({100 * probabilities[i].max():.0f} %)" for i in chosen]
    good = [name for name, both in tests.items() if passes(both)]
    names_of_good = " and ".join(good) or "none"
    title = f"Six maps of what speaks for five predictions; {names_of_good} rest{'s' * (len(good) == 1)} on"
    title += " what was learned, the others show the digit whatever was learned"
    return signed_maps(images[chosen].reshape(-1, *data.shape), columns, title, names)


def passes(both: tuple[Randomized, Randomized]) -> bool:
    """Return whether a method passed the test of weights and that of labels."""
    return all(test.passed for test in both)


def tests_figure(tests: dict[str, tuple[Randomized, Randomized]], data: gf.data.Dataset) -> Any:
    """Draw the maps of one digit while the learned weights are randomized."""
    images = data.test[0][:N_TESTED].reshape(-1, *data.shape)
    rows: dict[str, Any] = {}
    notes: dict[str, list[str]] = {}
    for name in ("saliency", "gradient x input", "edge detector"):
        of_weights, of_labels = tests[name]
        rows[name] = np.concatenate([of_weights.maps[:, 0], of_labels.maps[:, 0]]).reshape(-1, *data.shape)
        same = [f"alike: {rank:.2f}" for rank in (*of_weights.rank_abs, *of_labels.rank_abs)]
        notes[name] = ["", *same[:-1], "", same[-1]]
    columns = [
        "trained net",
        *(f"{name}\nrandom" for name in tests["saliency"][0].names),
        f"{MEMORIZED} digits,\ntrue labels",
        f"{MEMORIZED} digits,\nshuffled labels",
    ]
    needs = [name for name in rows if passes(tests[name])]
    title = (
        f"Take away what was learned, and {' and '.join(needs) or 'nothing'} changes altogether; an edge detector "
        "stays the same\n"
        f"(alike: rank correlation of magnitudes, 1 is the same; mean of {N_TESTED} digits)"
    )
    return randomized_maps(images[0], rows, columns, notes, title)


def influence_figure(net: gf.Net, params: Any, data: gf.data.Dataset, scores: np.ndarray) -> Any:
    """Draw which training digits taught the net two wrong or uncertain predictions, and two confident ones."""
    images, labels = (part[: len(scores)] for part in data.test)
    probabilities = np.asarray(jax.nn.softmax(jax.vmap(net.apply, (None, 0))(params, jnp.asarray(images))))
    predicted, sure = probabilities.argmax(1), probabilities.max(1)
    order = np.lexsort((sure, predicted == labels))  # mistakes first, then uncertain predictions
    chosen = [*order[:2], *order[len(order) // 2 : len(order) // 2 + 2]]
    names = [f"predicted {predicted[i]} ({100 * sure[i]:.0f} %)\nit is {labels[i]}" for i in chosen]
    as_images = lambda part: part.reshape(-1, *data.shape)  # noqa: E731
    helped = np.argsort(-scores[chosen], 1)[:, :5]
    share = (data.train[1][helped] == predicted[chosen][:, None]).mean()
    return influences(
        as_images(images[chosen]),
        names,
        as_images(data.train[0]),
        data.train[1],
        scores[chosen],
        f"Training digits that taught the net these predictions: {100 * share:.0f} % of those that helped most "
        "have the label it gave\n(under each: its label and its TracIn score over 5 checkpoints)",
    )


def judge(config: Config, gap: float, tests: dict[str, tuple[Randomized, Randomized]]) -> runs.Outcome:
    """Compare the gap of integrated gradients, and the randomization tests passed, with what is expected."""
    passed = {name: sum(test.passed for test in both) for name, both in tests.items()}
    measured = {
        "largest gap of integrated gradients": gap,
        "randomization tests passed by saliency": passed["saliency"],
        "randomization tests passed by an edge detector": passed["edge detector"],
    }
    return runs.judge(EXPECTED, measured, defaults(config, "data"))


FOR, AGAINST = "#b2182b", "#2166ac"  # the ends of RdBu_r


def signed_maps(
    images: Any,
    maps: Mapping[str, Any],
    title: str,
    names: Sequence[str] = (),
    label: str = "share of the map's largest value (red speaks for the prediction, blue against it)",
) -> Figure:
    """Draw images and, beside each, signed maps of it over the outline of its strokes.

    Args:
        images: `[n, height, width]`, from 0 (background) to 1 (ink).
        maps: by what each column is called, `[n, height', width']` of any sign and resolution.
        title: the figure's.
        names: what to call each row; nothing where empty.
        label: of the color bar.

    Returns:
        A figure with one row per image; each map has a scale of its own, as their units differ.

    Raises:
        ValueError: not one map, or one name, an image.

    >>> figure = signed_maps(np.ones([2, 8, 8]), {"saliency": np.ones([2, 8, 8])}, "Two", ["a", "b"])
    >>> [panel.get_title() for panel in figure.axes][:2]
    ['image', 'saliency']
    """
    images = np.asarray(images)
    for name, values in {**maps, **({"names": names} if len(names) else {})}.items():
        if len(values) != len(images):
            raise ValueError(f"signed_maps: {name}: one per image, {len(images)}, got {len(values)}")
    n_columns = 1 + len(maps)
    figure = new_figure(1.45 * n_columns + 0.9, 1.45 * len(images) + 0.9, "compressed")
    panels = figure.subplots(len(images), n_columns, squeeze=False)
    mapped = None
    for i, row in enumerate(panels):
        for panel in row:
            bare(panel)
        row[0].imshow(images[i], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        if len(names):
            row[0].set_ylabel(names[i], fontsize=9)
        for panel, values in zip(row[1:], maps.values(), strict=True):
            mapped = signed_image(panel, np.asarray(values[i]) / robust_limit(values[i]), images[i])
    for panel, name in zip(panels[0], ("image", *maps), strict=True):
        panel.set_title(name, fontsize=9)
    if mapped is not None:
        figure.colorbar(mapped, ax=panels.ravel().tolist(), label=label, pad=0.02, extend="both", aspect=30)
    figure.suptitle(title)
    return figure


def randomized_maps(
    image: Any,
    maps: Mapping[str, Any],
    columns: Sequence[str],
    notes: Mapping[str, Sequence[str]],
    title: str,
) -> Figure:
    """Draw each method's map of one image while the learned weights are randomized.

    Args:
        image: `[height, width]`, from 0 (background) to 1 (ink).
        maps: by the name of the method, `[columns, height, width]`; each map has a scale of its own.
        columns: what is random in each.
        notes: by the name of the method, what to write under each map.
        title: the figure's.

    Returns:
        A figure with one row per method.

    >>> image = np.ones([8, 8])
    >>> figure = randomized_maps(image, {"saliency": image[None]}, ["trained"], {"saliency": ["1.00"]}, "One")
    >>> figure.axes[0].get_xlabel()
    '1.00'
    """
    figure = new_figure(1.45 * len(columns) + 0.6, 1.65 * len(maps) + 0.9, "compressed")
    panels = figure.subplots(len(maps), len(columns), squeeze=False)
    for line, (name, values) in zip(panels, maps.items(), strict=True):
        for panel, one, note in zip(line, np.asarray(values), notes[name], strict=True):
            bare(panel)
            mapped = signed_image(panel, one / robust_limit(one), np.asarray(image))
            panel.set_xlabel(note, fontsize=9, labelpad=2)
        line[0].set_ylabel(name, fontsize=9)
    for panel, column in zip(panels[0], columns, strict=True):
        panel.set_title(column, fontsize=9)
    label = "share of the map's largest value"
    figure.colorbar(mapped, ax=panels.ravel().tolist(), label=label, pad=0.02, extend="both", aspect=30)
    figure.suptitle(title)
    return figure


def influences(
    tests: Any,
    test_names: Sequence[str],
    train: Any,
    train_labels: Any,
    scores: Any,
    title: str,
    n_best: int = 5,
) -> Figure:
    """Draw test images and, beside each, the training images that helped and harmed its prediction most.

    Args:
        tests: `[n, height, width]`.
        test_names: what to write under each test image.
        train: `[m, height, width]`.
        train_labels: `[m]`, what the training images are predicted to be.
        scores: `[n, m]`, from `gf.attribution.tracin`.
        title: the figure's.
        n_best: how many training images per side.

    Returns:
        A figure with one row per test image: it, then the helpful ones, the most helpful first, then the harmful
        ones, the most harmful first; under each stand its label and score.

    >>> images = np.zeros([4, 8, 8])
    >>> figure = influences(images[:1], ["a"], images, [0, 1, 2, 3], [[1.0, -1.0, 0.5, -0.5]], "One", n_best=1)
    >>> [panel.get_xlabel() for panel in figure.axes]
    ['a', '0 (+1)', '1 (-1)']
    """
    tests, train, scores = np.asarray(tests), np.asarray(train), np.asarray(scores)
    n_columns = 1 + 2 * n_best
    figure = new_figure(1.02 * n_columns + 0.6, 1.3 * len(tests) + 0.9, "compressed")
    panels = figure.subplots(len(tests), n_columns, squeeze=False)
    for i, line in enumerate(panels):
        order = np.argsort(-scores[i], kind="stable")
        chosen = [*order[:n_best], *order[::-1][:n_best]]
        for panel in line:
            bare(panel)
        line[0].imshow(tests[i], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        line[0].set_xlabel(test_names[i], fontsize=8, labelpad=2)
        for panel, j, color in zip(line[1:], chosen, [FOR] * n_best + [AGAINST] * n_best, strict=True):
            panel.imshow(train[j], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            panel.set_xlabel(f"{train_labels[j]} ({scores[i, j]:+.2g})", fontsize=8, labelpad=2)
            for spine in panel.spines.values():
                spine.set(color=color, linewidth=1.5)
    panels[0, 0].set_title("test digit", fontsize=9)
    panels[0, 1 + n_best // 2].set_title("helped most", fontsize=10, color=FOR)
    panels[0, 1 + n_best + n_best // 2].set_title("harmed most", fontsize=10, color=AGAINST)
    figure.suptitle(title)
    return figure
