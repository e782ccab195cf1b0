"""Follow how noisy the gradient is while a network learns digits: noise scale, hardest examples, conflicts."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf
from gradfn import runs
from gradfn.pages.figures import LINE_COLORS, label_lines, new_figure
from gradfn.timings import phase

from ._common import DigitOptions, conclude, defaults, start_on_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EXPECTED = (
    runs.Expectation("noise scale at the start", unit="examples"),
    runs.Expectation("noise scale in the second half", unit="examples"),
    runs.Expectation("noise scale, second half / start", at_least=2),
    runs.Expectation(
        "noise scale in the second half, estimate from batches / exact", at_least=0.5, at_most=2
    ),
)


@dataclass(frozen=True)
class Config(DigitOptions):
    """Options of a run; the defaults train 784-16-10 on the built-in digits."""

    hidden: int = runs.option(16, "nodes in the hidden layer", at_least=1)
    epochs: int = runs.option(20, "how often to go through the training digits", at_least=1)
    batch: int = runs.option(32, "digits per step", at_least=2)
    every: int = runs.option(1, "measure the noise every N steps", at_least=1)
    rate: float = runs.option(0.1, "learning rate of stochastic gradient descent", above=0)


class Result(NamedTuple):
    """The result of a run."""

    noise: Sequence[dict[str, Any]]  # one row per measurement, see gf.fit
    first: float  # noise scale before training, from all training digits
    second: float  # the same of training's second half
    estimate: float  # of the second half, from the batches alone
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Train, measure and draw; it writes into the folder of the result."""
    config, data, folder = start_on_digits("noise", config)

    net = gf.mlp([784, config.hidden, 10], activation="sigmoid")
    loss, start = gf.classification_loss(net), net.init(jax.random.key(config.seed))
    # The exact values, from all training digits (the first 10,000 of MNIST's).
    images, labels = (jnp.asarray(part[:10_000]) for part in data.train)
    measure = jax.jit(gf.per_example.noise_scale(loss))

    def exact(params: Any) -> dict[str, jax.Array]:
        inspection = measure(params, (images, labels))
        return {"gradient_square": inspection.gradient_square, "variance": inspection.variance}

    steps = config.epochs * (len(data.train[1]) // config.batch)
    fitted = gf.fit(
        gf.batch_mean(loss),
        start,
        data.train,
        optax.sgd(config.rate, momentum=0.9),
        steps,
        batch_size=config.batch,
        seed=config.seed,
        evaluate=exact,
        noise_every=config.every,
        folder=folder,
        resume=config.resume,
    )

    print(f"at the end, from {len(labels):,} training digits at once:")
    print(measure(fitted.params, (images, labels)))
    norms = jax.jit(gf.per_example.norms(loss))(fitted.params, (images, labels)).total
    answers = jax.vmap(net.apply, (None, 0))(fitted.params, images).argmax(1)
    classes = jax.jit(gf.per_example.grad_cosines(loss, groups=10))(start, (images, labels), by=labels)
    digits = [str(digit) for digit in range(10)]
    before = exact(start)
    first = scale([before])
    second = scale([row for row in fitted.history if row["step"] > steps / 2])
    estimate = scale([row for row in fitted.noise if row["step"] > steps / 2])
    with phase("pictures"):
        figures = {
            "noise": noise_over_training(
                fitted.noise, config.batch, [{"step": 0} | before, *fitted.history], (first, second)
            ),
            "largest": largest_gradients(images, labels, answers, norms, data.shape),
            "agreement": agreement(classes.total, digits, "digit, before training"),
        }
    outcome = judge(config, first, second, estimate)
    conclude(folder, outcome, figures, data.name, first=first, second=second, estimate=estimate)
    return Result(fitted.noise, first, second, estimate, folder, outcome)


def scale(rows: list[dict[str, Any]]) -> float:
    """Return the noise scale of several measurements: the ratio of their sums."""
    signal, noise = (sum(row[name] for row in rows) for name in ("gradient_square", "variance"))
    return float(noise / signal) if signal > 0 else float("nan")


def judge(config: Config, first: float, second: float, estimate: float) -> runs.Outcome:
    """Compare the growth of the noise scale, and its estimate from batches, with what is expected."""
    measured = {
        "noise scale at the start": first,
        "noise scale in the second half": second,
        "noise scale, second half / start": second / first,
        "noise scale in the second half, estimate from batches / exact": estimate / second,
    }
    return runs.judge(EXPECTED, measured, defaults(config))


def noise_over_training(
    rows: Sequence[dict[str, Any]],
    batch_size: int,
    exact: Sequence[dict[str, Any]] = (),
    scales: tuple[float, float] | None = None,
) -> Figure:
    """Draw the noise scale over training, beside the batch size.

    Args:
        rows: from `gf.fit(..., noise_every=N).noise`.
        batch_size: of training, in examples.
        exact: rows with `step`, `gradient_square` and `variance` from all training examples.
        scales: the noise scale at the start and in the second half, for the title; by default the title reports
            the running estimate.

    Raises:
        ValueError: no row has a running scale.

    >>> row = {"gradient_square": 1.0, "variance": 9.0, "scale": 9.0, "running_scale": 9.0}
    >>> noise_over_training([row | {"step": 0}, row | {"step": 10}], 32).axes[0].get_ylabel()
    'noise scale (examples)'
    """
    known = [row for row in rows if row["running_scale"]]
    if not known:
        raise ValueError(
            "noise_over_training: no row has a running scale above zero, so there is nothing to draw"
        )
    figure = new_figure(8.6, 4.4)
    panel = figure.subplots()
    each = [row for row in rows if row["scale"]]
    panel.plot(
        [r["step"] for r in each],
        [r["scale"] for r in each],
        ".",
        color="0.8",
        markersize=4,
        label="_batches",
    )
    steps, running = [row["step"] for row in known], [row["running_scale"] for row in known]
    panel.plot(steps, running, color=LINE_COLORS[0], linewidth=2, label="estimate\nfrom batches")
    true = [
        (row["step"], row["variance"] / row["gradient_square"]) for row in exact if row["gradient_square"] > 0
    ]
    if true:
        panel.plot(*zip(*true, strict=True), "D", color=LINE_COLORS[1], label="all training\nexamples")
    last = max(row["step"] for row in [*rows, *exact])
    panel.plot([0, last], [batch_size] * 2, "--", color=LINE_COLORS[2], label=f"batch in use:\n{batch_size}")
    panel.set_yscale("log")
    # Single batches scatter over many powers of ten; a few of them are not worth the space of the rest.
    heights = [*running, *(scale for _, scale in true), float(batch_size)]
    panel.set_ylim(min(heights) / 3, 5 * max(heights))
    panel.set_xlim(0, max(last, 1))
    panel.set_xlabel("training step")
    panel.set_ylabel("noise scale (examples)")
    panel.grid(color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
    label_lines(panel, gap=0.13)
    missing = len(rows) - len(each)
    gray = "gray: one batch each" + (
        f" (in {missing} of {len(rows)} measures noise hid the gradient: no gray dot there)"
        if missing
        else ""
    )
    panel.set_title(gray, fontsize=10)
    if scales is None:
        n = len(running)
        early, late = float(np.median(running[: n // 4 + 1])), float(np.median(running[-n // 4 :]))
        finding = f"The running estimate of the noise scale goes from about {early:.0f} to about {late:.0f} examples: "
    else:
        early, late = scales
        finding = (
            f"The noise scale goes from {early:.0f} examples at the start to {late:.0f} in the second half:\n"
        )
    finding += "large batches pay late" if late > 2 * early else "one size of batch serves throughout"
    figure.suptitle(finding)
    return figure


def largest_gradients(
    images: Any, labels: Any, predictions: Any, norms: Any, shape: Sequence[int] = (28, 28), n: int = 10
) -> Figure:
    """Draw how large the gradients of single examples are, and the examples with the largest.

    Args:
        images: `[B, pixels]`.
        labels: integers `[B]`.
        predictions: integers `[B]`, the network's predictions.
        norms: `[B]`, of the examples' gradients.
        shape: of an image, in pixels.
        n: how many to show.

    Raises:
        ValueError: arrays of unlike length.

    >>> import numpy as np
    >>> figure = largest_gradients(np.zeros([3, 784]), [0, 1, 2], [0, 1, 1], [0.1, 0.1, 9.0], n=2)
    >>> figure.axes[1].get_title()
    '2, predicted 1\\n|g| 9'
    """
    images, labels, predictions, norms = map(np.asarray, (images, labels, predictions, norms))
    if not len(images) == len(labels) == len(predictions) == len(norms):
        got = ", ".join(str(len(part)) for part in (images, labels, predictions, norms))
        raise ValueError(f"largest_gradients: one label, prediction and norm per image, got {got}")
    order = np.argsort(-norms, kind="stable")[:n]
    n_columns = min(5, len(order))
    n_rows = -(-len(order) // n_columns)
    figure = new_figure(4.6 + 1.35 * n_columns, max(1.75 * n_rows + 0.6, 3.6))
    halves: Any = figure.subfigures(1, 2, width_ratios=[4.4, 1.35 * n_columns])
    left, right = halves
    panel = left.subplots()
    positive = norms[norms > 0]
    low, high = (positive.min(), positive.max()) if len(positive) else (0.1, 1.0)
    edges = np.geomspace(max(low, high * 1e-6), high * 1.0001, 40)
    right_answers = labels == predictions
    parts = [np.maximum(norms[mask], edges[0]) for mask in (right_answers, ~right_answers)]
    panel.hist(parts, edges, stacked=True, color=[LINE_COLORS[0], LINE_COLORS[1]], label=["right", "wrong"])
    panel.set_xscale("log")
    panel.set_xlabel("norm of an example's gradient")
    panel.set_ylabel("examples")
    panel.legend(frameon=False, title="prediction")
    panel.spines[["top", "right"]].set_visible(False)
    cells = right.subplots(n_rows, n_columns, squeeze=False).ravel()
    for cell in cells:
        cell.set_axis_off()
    for cell, i in zip(cells, order, strict=False):
        cell.imshow(images[i].reshape(shape), cmap="gray_r", interpolation="nearest")
        predicted = f"predicted {predictions[i]}" if predictions[i] != labels[i] else "right"
        cell.set_title(f"{labels[i]}, {predicted}\n|g| {norms[i]:.2g}", fontsize=9)
    share = np.square(norms[order]).sum() / max(np.square(norms).sum(), 1e-300)
    figure.suptitle(
        f"{len(order)} of {len(norms):,} examples make {100 * share:.0f} % of the squared gradients"
    )
    return figure


def agreement(cosines: Any, names: Sequence[str], what: str = "classes") -> Figure:
    """Draw which gradients agree: a matrix of cosines on one diverging scale from -1 to 1.

    Args:
        cosines: `[n, n]`, from `gf.per_example.grad_cosines`; NaN for groups without examples.
        names: n of them.
        what: what is compared.

    Raises:
        ValueError: not a square matrix with one name per row.

    >>> agreement([[1.0, -0.5], [-0.5, 1.0]], ["3", "8"]).get_suptitle()
    'Gradients of 3 and 8 disagree most (cosine -0.50)'
    """
    matrix = np.asarray(cosines, np.float64)
    if matrix.shape != (len(names), len(names)):
        raise ValueError(f"agreement: expected [{len(names)}, {len(names)}], got {list(matrix.shape)}")
    figure = new_figure(0.5 * len(names) + 2.2, 0.5 * len(names) + 1.2)
    panel = figure.subplots()
    shown = panel.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    panel.set_xticks(range(len(names)), names)
    panel.set_yticks(range(len(names)), names)
    panel.set_xlabel(what)
    panel.set_ylabel(what)
    figure.colorbar(shown, label="cosine (red: a step for one helps the other, blue: harms it)")
    apart = matrix + 2 * np.eye(len(names))
    if np.isfinite(apart).any():
        i, j = np.unravel_index(np.nanargmin(apart), apart.shape)
        verb = "disagree most" if matrix[i, j] < 0 else "agree least"
        figure.suptitle(
            f"Gradients of {names[int(i)]} and {names[int(j)]} {verb} (cosine {matrix[i, j]:.2f})"
        )
    return figure
