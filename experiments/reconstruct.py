"""Let a dense and a convolutional net draw what each digit should look like, beside digits as people write them."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gradfn as gf
from gradfn import runs
from gradfn.files import inner_folder
from gradfn.pages.figures import new_figure
from gradfn.pages.images import bare
from gradfn.timings import phase
from gradfn.train.augment import shifted

from ._common import DigitOptions, adamw_cosine, conclude, defaults, in_parts, start_on_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EXPECTED = (
    runs.Expectation(
        "drawings of the dense network most like a digit of their class", at_least=9, unit="of 10"
    ),
)

STEPS = {"digits": 2400, "mnist": 12_000}
N_CLASSES = 10


@dataclass(frozen=True)
class Config(DigitOptions):
    """Options of a run; the defaults ask a 784-16-10 net and a small convolutional one about the built-in digits."""

    hidden: int = runs.option(16, "nodes in the dense net's hidden layer", at_least=1)
    steps: int | None = runs.option(
        None,
        "of the dense net's training, 32 digits each (default: 2,400; MNIST: 12,000); the other takes a third",
        at_least=1,
    )
    noise: float = runs.option(
        0.5,
        "standard deviation of the noise on the training digits, in units of full ink, which smooths what is learned",
        at_least=0,
    )
    climb: int = runs.option(256, "steps up the score of a class", at_least=1)


class Drawings(NamedTuple):
    """What a net drew, a row each class, and how like a digit it is."""

    images: np.ndarray  # [classes, height, width]
    sure: np.ndarray  # [classes], how sure the net is of its class, in [0, 1]
    nearest: np.ndarray  # [classes], the training digit that is most like it
    of_own_class: int  # for how many that digit is of their class
    test_accuracy: float  # of the net, in [0, 1]


class Result(NamedTuple):
    """The result of a run."""

    params: dict[str, Any]  # by the name of the net
    drawings: dict[str, Drawings]
    history: Sequence[dict[str, Any]]
    test_accuracy: float  # of the dense net, in [0, 1]
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Train two nets, let them draw each class, and compare the drawings with real digits."""
    config, data, folder = start_on_digits("reconstruct", config)
    steps = config.steps or STEPS[config.data]
    dense, conv = gf.mlp([784, config.hidden, N_CLASSES]), gf.cnn((28, 28, 1), (8, 16), (64,), N_CLASSES, 5)
    ways = {
        "dense net": (dense, noisy(gf.classification_loss(dense), config.noise), steps, folder),
        "convolutional net": (
            conv,
            shifted(gf.batch_mean(gf.classification_loss(conv)), data.shape),
            -(-steps // 3),
            inner_folder(folder, "conv"),
        ),
    }
    params, drawings, histories = {}, {}, []
    for name, (net, loss, n_steps, where) in ways.items():
        print(f"{name}: {gf.count(net.spec):,} parameters")
        fitted = gf.fit(
            loss,
            net.init(jax.random.key(config.seed)),
            data.train,
            adamw_cosine(n_steps),
            n_steps,
            seed=config.seed,
            folder=where,
            resume=config.resume,
        )
        params[name], drawings[name] = fitted.params, draw(net, fitted.params, data, config)
        histories.append(fitted.history)

    outcome = judge(config, drawings["dense net"].of_own_class)
    for name, one in drawings.items():
        likeness = f"{one.of_own_class} of {N_CLASSES} drawings are most like a digit of their class"
        print(f"{name}: test accuracy {100 * one.test_accuracy:.1f} %, {likeness}")
    accuracy = drawings["dense net"].test_accuracy
    counts = {name: one.of_own_class for name, one in drawings.items()}
    with phase("pictures"):
        figures = {"wanted": wanted_figure(drawings, data)}
    conclude(folder, outcome, figures, data.name, test_accuracy=accuracy, of_own_class=counts)
    return Result(params, drawings, histories[0], accuracy, folder, outcome)


def noisy(loss: Any, sd: float) -> Any:
    """Return the mean over a batch of a loss of one example, its input noisy each time otherwise.

    Bishop, *Training with Noise is Equivalent to Tikhonov Regularization*, 1995: it keeps the slope with respect
    to the input small, so that what the net wants to see is smooth.
    """

    def noisy_loss(params: Any, example: Any, key: jax.Array) -> jax.Array:
        x, label = example
        return loss(params, (x + sd * jax.random.normal(key, x.shape, x.dtype), label))

    return gf.batch_mean(noisy_loss)


def draw(net: gf.Net, params: Any, data: gf.data.Dataset, config: Config) -> Drawings:
    """Let a net draw each class, and compare with the training digits."""
    # From gray, not from paper: there all units of a relu net may be off, and no slope shows the way.
    key, gray = jax.random.key(config.seed), jnp.full(784, 0.5)

    @jax.jit
    def climb(label: jax.Array) -> tuple[jax.Array, jax.Array]:
        wanted = gf.attribution.maximize(net.apply, label, shape=data.shape, steps=config.climb)
        x = wanted(params, gray, key=key).x
        return x, jax.nn.softmax(net.apply(params, x))[label]

    images, sure = jax.lax.map(climb, jnp.arange(N_CLASSES))
    digits, labels = data.train
    nearest = correlations(np.asarray(images), digits).argmax(1)
    return Drawings(
        images=np.asarray(images).reshape(-1, *data.shape),
        sure=np.asarray(sure),
        nearest=nearest,
        of_own_class=int((labels[nearest] == np.arange(N_CLASSES)).sum()),
        test_accuracy=float(
            jax.jit(in_parts(gf.accuracy(net)))(params, jax.tree.map(jnp.asarray, data.test))
        ),
    )


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the correlation of each image of one batch with each of another: how alike, whatever the ink.

    Args:
        a: `[n, pixels]`.
        b: `[m, pixels]`.

    Returns:
        `[n, m]`, from -1 to 1.
    """
    centered = [part - part.mean(1, keepdims=True) for part in (a, b)]
    a, b = (part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12) for part in centered)
    return a @ b.T


def wanted_figure(drawings: dict[str, Drawings], data: gf.data.Dataset) -> Any:
    """Draw what each class wants to see, beside the class's mean and the nearest training digit."""
    digits, labels = data.train
    as_images = lambda part: part.reshape(-1, *data.shape)  # noqa: E731
    rows = {"class mean": as_images(np.stack([digits[labels == k].mean(0) for k in range(N_CLASSES)]))}
    notes = {}
    for name, one in drawings.items():
        # Each drawing is shown from paper to its own darkest ink: some are pale.
        darkest = one.images.max((1, 2), keepdims=True)
        drawing, nearest = f"{name}\ndraws", f"nearest digit\n({name.split()[0]})"
        rows |= {
            drawing: one.images / np.where(darkest > 0, darkest, 1),
            nearest: as_images(digits[one.nearest]),
        }
        notes[drawing] = [f"{100 * sure:.0f} % sure" for sure in one.sure]
        notes[nearest] = [f"a {label}" for label in labels[one.nearest]]
    counts = [f"{one.of_own_class} of {N_CLASSES} drawings of the {name}" for name, one in drawings.items()]
    title = f"The nearest training digit is of the wanted class for {' and '.join(counts)}"
    return image_rows(rows, [str(k) for k in range(N_CLASSES)], title, notes)


def judge(config: Config, of_own_class: int) -> runs.Outcome:
    """Compare the number of drawings that are most like a digit of their class with what is expected."""
    name = "drawings of the dense network most like a digit of their class"
    return runs.judge(EXPECTED, {name: of_own_class}, defaults(config, "data"))


def image_rows(
    rows: Mapping[str, Any], columns: Sequence[str], title: str, notes: Mapping[str, Sequence[str]] = {}
) -> Figure:
    """Draw rows of images of the same things side by side, from 0 (background) to 1 (ink).

    Args:
        rows: by what each row is called, `[n, height, width]`.
        columns: what each column is called.
        title: the figure's.
        notes: by the name of a row, what to write under each of its images.

    Returns:
        A figure with `n` columns.

    Raises:
        ValueError: a row without one image per column.

    >>> figure = image_rows({"mean": np.zeros([2, 8, 8])}, "01", "Two means", {"mean": ["a", "b"]})
    >>> figure.axes[0].get_title(), figure.axes[1].get_xlabel()
    ('0', 'b')
    """
    figure = new_figure(1.05 * len(columns) + 1.0, 1.22 * len(rows) + 0.7, "compressed")
    panels = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (name, images) in zip(panels, rows.items(), strict=True):
        if len(images) != len(columns):
            raise ValueError(f"image_rows: {name}: one image per column, {len(columns)}, got {len(images)}")
        for i, (panel, image) in enumerate(zip(line, np.asarray(images), strict=True)):
            bare(panel)
            panel.imshow(image, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            if name in notes:
                panel.set_xlabel(notes[name][i], fontsize=8, labelpad=2)
        line[0].set_ylabel(name, fontsize=9)
    for panel, column in zip(panels[0], columns, strict=True):
        panel.set_title(column, fontsize=10)
    figure.suptitle(title)
    return figure
