"""Set the weights outside a region to zero: what remains of each prediction, and which region decides which digit."""

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
from gradfn.pages.figures import new_figure
from gradfn.pages.images import bare, signed_image
from gradfn.runs.digit_net import keep_digit_net
from gradfn.timings import phase

from ._common import DigitOptions, adamw_cosine, conclude, defaults, start_on_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EXPECTED = (
    runs.Expectation("error of the sums over regions", at_most=1e-5),
    runs.Expectation("test accuracy from the better half alone", at_least=0.3333, unit="%"),
    runs.Expectation("test accuracy from the best of 16 regions alone", at_most=0.3333, unit="%"),
)

EPOCHS = {"digits": 40, "mnist": 10}
GRID = 4  # regions per side: of 7 x 7 pixels


@dataclass(frozen=True)
class Config(DigitOptions):
    """Options of a run; the defaults examine a 784-16-10 net on the built-in digits."""

    hidden: int = runs.option(16, "nodes in the hidden layer")
    epochs: int | None = runs.option(
        None, "how often to go through the training digits (default: 40 times, 10 times with MNIST)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        runs.within(1, None, hidden=self.hidden, epochs=self.epochs)


class Result(NamedTuple):
    """The result of a run; shares are of all test digits, in [0, 1]."""

    params: dict[str, jax.Array]
    history: Sequence[dict[str, Any]]
    test_accuracy: float
    right_from: dict[str, float]  # by region: the share that is predicted correctly from it alone
    # [classes, rows, columns]: how far the probability of the right class falls without a region.
    falls: np.ndarray
    error: float  # of the sums over regions, as a share of the largest weighted sum
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Train, examine the net region by region, and draw."""
    config, data, folder = start_on_digits("regions", config)
    net = gf.mlp([784, config.hidden, 10])
    steps = (config.epochs or EPOCHS[config.data]) * (len(data.train[1]) // 32)
    fitted = gf.fit(
        gf.batch_mean(gf.classification_loss(net)),
        net.init(jax.random.key(config.seed)),
        data.train,
        adamw_cosine(steps),
        steps,
        seed=config.seed,
        folder=folder,
        resume=config.resume,
    )
    images, labels = (jnp.asarray(part) for part in data.test)
    cells = gf.attribution.grid_regions(data.shape, GRID)
    parts = named_regions(data.shape)
    of_cells = look(net, fitted.params, images, cells)
    of_parts = look(net, fitted.params, images, np.stack(list(parts.values())))

    everything = jax.nn.softmax(of_cells.output)  # [n, classes]
    accuracy = float((everything.argmax(1) == labels).mean())
    right = lambda answers: (answers.argmax(-1) == labels[:, None]).mean(0)  # noqa: E731
    from_cells, from_parts = (np.asarray(right(inspection.outputs)) for inspection in (of_cells, of_parts))
    right_from = dict(zip(parts, map(float, from_parts), strict=True)) | {
        f"region {i}": float(share) for i, share in enumerate(from_cells)
    }
    error = float(jnp.abs(of_cells.sums.sum(1) - of_cells.total).max() / jnp.abs(of_cells.total).max())
    falls = class_falls(everything, jax.nn.softmax(of_cells.without), labels)

    with phase("pictures"):
        figures = {
            "remains": remains_figure(of_parts, everything, parts, data, from_parts),
            "deciding": deciding_figure(falls, data),
            "sums": sums_figure(net, fitted.params, of_cells, data),
        }
    enlarged_from = 8 if config.data == "digits" else None
    keep_digit_net(folder, fitted.params, data, everything, enlarged_from=enlarged_from)
    outcome = judge(config, right_from, error)
    conclude(
        folder,
        outcome,
        figures,
        data.name,
        test_accuracy=accuracy,
        right_from=right_from,
        falls=falls.tolist(),
        error=error,
    )
    return Result(fitted.params, fitted.history, accuracy, right_from, falls, error, folder, outcome)


def named_regions(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return masks of the whole image, its halves, its middle, and what is around that."""
    height, width = shape
    rows, columns = np.indices((height, width))
    middle = (abs(rows - (height - 1) / 2) < height / 4) & (abs(columns - (width - 1) / 2) < width / 4)
    return {
        "all": np.ones((height, width), bool),
        "top half": rows < height / 2,
        "bottom half": rows >= height / 2,
        "left half": columns < width / 2,
        "right half": columns >= width / 2,
        "middle": middle,
        "rim": ~middle,
    }


def look(net: gf.Net, params: Any, images: jax.Array, masks: np.ndarray) -> gf.attribution.Regions:
    """Return the regions of each image, with a leading axis of images."""
    one = gf.attribution.regions(net.apply, masks)
    return jax.jit(lambda images: jax.lax.map(lambda image: one(params, image), images, batch_size=100))(
        images
    )


def class_falls(everything: Any, without: Any, labels: Any, classes: int = 10) -> np.ndarray:
    """Return by how much the right prediction's probability falls without each region, the mean of each class.

    Args:
        everything: `[n, classes]`, probabilities with all weights.
        without: `[n, regions, classes]`, with the weights inside the region zero.
        labels: `[n]`.

    Returns:
        `[classes, rows, columns]` of the grid of regions.
    """
    own = lambda p: jnp.take_along_axis(p, labels.reshape(-1, *[1] * (p.ndim - 1)), -1)[..., 0]  # noqa: E731
    fall = np.asarray(own(everything)[:, None] - own(without))  # [n, regions]
    side = round(fall.shape[1] ** 0.5)
    return np.stack([fall[np.asarray(labels) == k].mean(0).reshape(side, side) for k in range(classes)])


def remains_figure(inspection: Any, everything: Any, parts: dict[str, Any], data: Any, shares: Any) -> Any:
    """Draw what is predicted from each part of five digits, the first of each of five classes that is read right."""
    labels = data.test[1]
    predicted = np.asarray(everything.argmax(1))
    right = [np.flatnonzero((predicted == k) & (labels == k)) for k in (2, 3, 4, 5, 7)]
    chosen = [int(found[0]) for found in right if len(found)]
    probabilities = np.asarray(jax.nn.softmax(inspection.outputs[np.array(chosen)]))  # [5, parts, classes]
    best = max(list(parts)[1:5], key=lambda name: shares[list(parts).index(name)])
    title = (
        f"With the weights outside a region set to zero, the {best} reads {100 * max(shares[1:5]):.0f} % of the test "
        f"digits\n(gray: weights are zero; blue frame: right, orange: wrong; in brackets how sure)"
    )
    images = data.test[0][chosen].reshape(-1, *data.shape)
    return remains(
        images, parts, probabilities.argmax(-1), probabilities.max(-1), labels[chosen], shares, title
    )


def deciding_figure(falls: np.ndarray, data: Any) -> Any:
    """Draw which region decides which digit, over the mean image of each class."""
    images, labels = data.train
    means = np.stack([images[labels == k].mean(0).reshape(data.shape) for k in range(10)])
    most = falls.max((1, 2)).argmax()
    names = [f"{k}: up to {100 * falls[k].max():.0f} points" for k in range(10)]
    title = (
        f"Which region decides which digit: without its darkest one, the {most} loses {100 * falls.max():.0f} points "
        "of the right prediction's probability\n(outline: the class's mean image; mean over its test digits)"
    )
    label = "fall without the region (percentage points)"
    return heat_over_images(means, 100 * falls, names, title, label)


def sums_figure(net: gf.Net, params: Any, inspection: Any, data: Any) -> Any:
    """Draw the weighted sums of one digit, region by region, for each hidden node."""
    i = int(np.flatnonzero(data.test[1] == 3)[0]) if 3 in data.test[1] else 0
    sums = np.asarray(inspection.sums[i]).T.reshape(-1, GRID, GRID)[:20]  # [nodes, rows, columns]
    inputs = np.asarray(inspection.total[i] + params["b1"])[:20]
    names = [f"node {k}: {z:+.1f}, fires {1 / (1 + np.exp(-z)):.2f}" for k, z in enumerate(inputs)]
    image = data.test[0][i].reshape(data.shape)
    title = (
        f"One {data.test[1][i]} as the hidden nodes see it: the weighted sum is a sum over regions\n"
        "(above each node: the sum with its bias, and what the sigmoid makes of it)"
    )
    return heat_over_images(
        np.stack([image] * len(sums)), sums, names, title, "weighted sum over the region", columns=8
    )


def judge(config: Config, right_from: dict[str, float], error: float) -> runs.Outcome:
    """Compare the accuracies from parts of the image alone, and the error of the sums, with what is expected."""
    measured = {
        "error of the sums over regions": error,
        "test accuracy from the better half alone": max(
            share for name, share in right_from.items() if name.endswith("half")
        ),
        "test accuracy from the best of 16 regions alone": max(
            share for name, share in right_from.items() if name.startswith("region")
        ),
    }
    return runs.judge(EXPECTED, measured, defaults(config))


def heat_over_images(
    images: Any, heat: Any, names: Sequence[str], title: str, label: str, columns: int = 5
) -> Figure:
    """Draw signed heat maps over the outlines of images, all on one scale.

    Args:
        images: `[n, height, width]`, from 0 (background) to 1 (ink).
        heat: `[n, rows, columns]`, of a grid of regions that covers the image.
        names: what to call each.
        title: the figure's.
        label: what the heat is, with its unit.
        columns: images side by side.

    Returns:
        A figure with one panel per image, and a color bar.

    Raises:
        ValueError: not one map and one name per image.

    >>> figure = heat_over_images(np.ones([2, 8, 8]), np.ones([2, 4, 4]), "ab", "Two", "fall (%)")
    >>> [panel.get_title() for panel in figure.axes][:2]
    ['a', 'b']
    """
    images, heat = np.asarray(images), np.asarray(heat)
    if not len(images) == len(heat) == len(names):
        got = f"{len(images)} images, {len(heat)} maps, {len(names)} names"
        raise ValueError(f"heat_over_images: one map and one name per image, got {got}")
    n_rows = -(-len(images) // columns)
    figure = new_figure(1.75 * columns + 1.0, 1.95 * n_rows + 0.7, "compressed")
    panels = figure.subplots(n_rows, columns, squeeze=False).ravel()
    limit = float(np.abs(heat).max()) or 1.0
    for panel in panels[len(images) :]:
        panel.set_axis_off()
    for panel, image, values, name in zip(panels, images, heat, names, strict=False):
        bare(panel)
        mapped = signed_image(panel, values, image, limit)
        panel.set_title(name, fontsize=9)
    figure.colorbar(mapped, ax=panels.tolist(), label=label, pad=0.02, aspect=30)
    figure.suptitle(title)
    return figure


def remains(
    images: Any,
    masks: Mapping[str, Any],
    predicted: Any,
    sure: Any,
    labels: Any,
    shares: Sequence[float],
    title: str,
) -> Figure:
    """Draw what a network predicts from one region of each image alone.

    Args:
        images: `[n, height, width]`, from 0 (background) to 1 (ink).
        masks: by what each region is called, bool `[height, width]`.
        predicted: `[n, regions]`, the class it predicted.
        sure: `[n, regions]`, how sure it was, in [0, 1].
        labels: `[n]`, the true classes.
        shares: `[regions]`, of all test images, how many are predicted correctly from the region, in [0, 1].
        title: the figure's.

    Returns:
        A figure with one row per image and one column per region; frames are blue where the
        prediction is right and orange where it is not.

    >>> masks = {"all": np.ones([8, 8], bool)}
    >>> figure = remains(np.ones([1, 8, 8]), masks, [[3]], [[0.9]], [3], [0.97], "One")
    >>> figure.axes[0].get_title(), figure.axes[0].get_xlabel()
    ('all\\n97 % right', '3 (90 %)')
    """
    images, predicted, sure = np.asarray(images), np.asarray(predicted), np.asarray(sure)
    figure = new_figure(1.2 * len(masks) + 0.5, 1.35 * len(images) + 0.9, "compressed")
    panels = figure.subplots(len(images), len(masks), squeeze=False)
    for i, line in enumerate(panels):
        for j, (panel, mask) in enumerate(zip(line, masks.values(), strict=True)):
            bare(panel)
            # What is covered is light gray, so that paper and cover are distinguished.
            shown = np.where(mask, images[i], 0.18)
            panel.imshow(shown, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            right = predicted[i, j] == labels[i]
            panel.set_xlabel(f"{predicted[i, j]} ({100 * sure[i, j]:.0f} %)", fontsize=8, labelpad=2)
            for spine in panel.spines.values():
                spine.set(color="#0072b2" if right else "#d55e00", linewidth=2.5, visible=True)
    for panel, (name, share) in zip(panels[0], zip(masks, shares, strict=True), strict=True):
        panel.set_title(f"{name}\n{100 * share:.0f} % right", fontsize=9)
    figure.suptitle(title)
    return figure
