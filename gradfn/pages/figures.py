"""Figures: pure functions from numpy arrays to matplotlib figures.

They use no global matplotlib state, so they work without a screen, in threads and in notebooks. Red and blue
stand for more and less, never red and green.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gradfn.files import replace_file
from gradfn.timings import phase

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = Sequence[dict[str, Any]]  # one dict per evaluation, as `gf.fit` returns them
Layout = Literal["constrained", "compressed"]  # compressed: for grids of images

MAX_WEIGHT_IMAGES = 100  # more would be too small to read
MAX_MISTAKES = 24
MAX_CHART = 300_000  # bytes of a chart as SVG; one of more, such as of thousands of dots, is PNG alone
LINE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito's, safe for color-blind readers
# The same colors for texts, dark enough to be read on white; a page in dark mode replaces them by its own.
TEXT_COLORS = {"#d55e00": "#b34f00", "#009e73": "#007a59", "#cc79a7": "#a8487f"}
LINE_STYLES = ("-", "--", "-.", ":")  # so that the lines are distinguished in black and white, too


def weight_images(W: Any, shape: Sequence[int] = (28, 28), name: str = "W1", what: str = "node") -> Figure:
    """Draw the rows of a weight matrix as images, on one diverging color scale centered at zero.

    Row i holds the weights from every input into node i, so each image is what its node looks for.

    Args:
        W: `[out, in]`.
        shape: the images' height and width in pixels; their product is `in`.
        name: what to call the matrix.
        what: what a row belongs to: a node, a filter.

    Returns:
        A figure with one image per row of `W`, the first 100 at most, and a color bar.

    Raises:
        ValueError: the rows do not have as many weights as the images have pixels.

    >>> from gradfn.pages.figures import weight_images
    >>> figure = weight_images(np.ones([16, 784]))
    >>> len(figure.axes)  # 16 images and the color bar
    17
    """
    W = np.asarray(W, np.float64)
    if W.ndim != 2 or W.shape[1] != math.prod(shape):
        expected = f"{list(shape)} images need [out, {math.prod(shape)}]"
        raise ValueError(f"weight_images: {expected}, got {list(W.shape)}")
    n_shown = min(len(W), MAX_WEIGHT_IMAGES)
    shown = W[:n_shown].reshape(n_shown, *shape)  # [n, in] -> [n, height, width]
    # The largest weights, often of inputs that are rarely on, would make the others pale.
    sizes = np.abs(shown[np.isfinite(shown)])
    limit = float(np.percentile(sizes, 99.5)) if sizes.any() else 1.0
    n_columns = _columns(n_shown)
    n_rows = math.ceil(n_shown / n_columns)
    cell = min(1.4, 11 / n_columns)  # inches
    figure = new_figure(max(n_columns * cell + 1.2, 4.5), n_rows * (cell + 0.2) + 0.4, "compressed")
    panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for i, panel in enumerate(panels):
        panel.set_axis_off()
        if i < n_shown:
            image = panel.imshow(shown[i], cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            panel.set_title(str(i), fontsize=8, pad=2, color="0.35")
    label = f"weight (red excites the {what}, blue inhibits it)" if n_rows > 1 else "weight"
    extend = "both" if sizes.any() and sizes.max() > limit else "neither"
    figure.colorbar(image, ax=list(panels), label=label, extend=extend, aspect=min(12 * n_rows, 50), pad=0.02)
    title = f"{name}: what each of the {len(W):,} hidden nodes looks for"
    if n_shown < len(W):
        title = f"{name}: what each of the first {n_shown} of {len(W):,} hidden nodes looks for"
    figure.suptitle(title if len(W) > 1 else f"{name}: what the hidden node looks for")
    return figure


def curves(
    history: History,
    loss_unit: str = "nats",
    ends: Mapping[str, float] = {},
    harder: str = "",
    from_zero: bool = True,
) -> Figure:
    """Draw the loss and the accuracy over training.

    Where the training loss is larger than the validation loss, which is unusual, the figure says why.

    Args:
        history: one dict per evaluation with `step`, `loss`, and other losses and accuracies, which are the
            names that end in these words: `test_loss`, `train_accuracy`. Accuracies are shares in [0, 1].
        loss_unit: of the losses.
        ends: by name, what the title reports instead of the last row, where the run measured it anew at the end
            (on all examples, say).
        harder: what makes training harder than evaluation, such as "with dropout"; "" where nothing does.
        from_zero: whether the axis of the losses starts at zero; lines that lie close together need an axis of their
            own range.

    Returns:
        A figure with a panel for the losses and, if there are any, one for the accuracies.

    Raises:
        ValueError: the history is empty.

    >>> from gradfn.pages.figures import curves
    >>> figure = curves([{"step": 1, "loss": 2.3, "test_accuracy": 0.1}, {"step": 2, "loss": 2.0}])
    >>> [panel.get_ylabel() for panel in figure.axes]
    ['loss (nats)', 'accuracy (%)']
    """
    if not history:
        raise ValueError("curves: the history is empty, so there is nothing to draw")
    names = dict.fromkeys(name for row in history for name in row)
    losses = [name for name in names if name.endswith("loss")]
    accuracies = [name for name in names if name.endswith("accuracy")]
    figure = new_figure(11.2 if accuracies else 7.4, 4.0)
    panels = figure.subplots(1, 1 + bool(accuracies), squeeze=False).ravel()
    _lines(panels[0], history, losses, 1.0)
    if from_zero:
        panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel(f"loss ({loss_unit})")
    label_lines(panels[0])
    why = _why_above(history, harder)
    if why:
        figure.supxlabel(fill(why, 130 if accuracies else 95), fontsize=9, color="0.35")
    if accuracies:
        _lines(panels[1], history, accuracies, 100.0)
        panels[1].set_ylabel("accuracy (%)")
        panels[1].set_ylim(top=100)
        label_lines(panels[1])
    figure.suptitle(_finding(history, accuracies or losses, ends))
    return figure


def confusion(labels: Any, predictions: Any, what: str = "examples") -> Figure:
    """Draw which class was taken for which: counts, one row per true class.

    Args:
        labels: integers `[n]`, the true classes.
        predictions: integers `[n]`, the predictions.
        what: what to call the examples: `"test digits"`.

    Returns:
        A figure with one panel; its title says how many are right and what the most frequent mistake is.

    Raises:
        ValueError: there are no examples, or there is not one prediction per label.

    >>> from gradfn.pages.figures import confusion
    >>> confusion([0, 1, 1, 1], [0, 1, 0, 0]).get_suptitle()
    '50.0 % of 4 examples right; 1 is most often taken for 0 (2 times)'
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1 or not len(labels):
        got = f"{list(predictions.shape)} for {list(labels.shape)}"
        raise ValueError(f"confusion: one prediction per label and at least one of them, got {got}")
    n_classes = int(max(labels.max(), predictions.max())) + 1
    counts = np.zeros([n_classes, n_classes], int)
    np.add.at(counts, (labels, predictions), 1)

    totals = counts.sum(1)  # [classes]
    shares = counts / np.maximum(totals, 1)[:, None]
    figure = new_figure(0.62 * n_classes + 2.4, 0.55 * n_classes + 1.7)
    panel = figure.subplots()
    # The square root makes even one mistake in a hundred visible.
    panel.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for true, predicted in np.ndindex(*counts.shape):
        if counts[true, predicted]:
            color = "white" if shares[true, predicted] > 0.4 else "black"
            panel.text(predicted, true, str(counts[true, predicted]), ha="center", va="center", color=color)
    panel.set_xticks(range(n_classes))
    panel.set_yticks(range(n_classes))
    panel.set_xlabel("predicted class")
    panel.set_ylabel("true class")
    right_side = panel.secondary_yaxis("right")
    right = [f"{100 * counts[i, i] / totals[i]:.0f} %" if totals[i] else "-" for i in range(n_classes)]
    right_side.set_yticks(range(n_classes), right)
    right_side.set_ylabel("right, share of the row")
    right_side.tick_params(length=0)
    panel.set_xticks(np.arange(n_classes + 1) - 0.5, minor=True)
    panel.set_yticks(np.arange(n_classes + 1) - 0.5, minor=True)
    panel.grid(which="minor", color="0.85", linewidth=0.6)
    panel.tick_params(which="minor", length=0)

    title = f"{100 * (labels == predictions).mean():.1f} % of {len(labels):,} {what} right"
    wrong = counts - np.diag(np.diag(counts))
    if wrong.max() > 1:
        true, predicted = np.unravel_index(wrong.argmax(), wrong.shape)
        title += f"; {true} is most often taken for {predicted} ({wrong.max()} times)"
    elif wrong.any():
        title += "; no two mistakes are alike"
    figure.suptitle(title)
    return figure


def mistakes(
    images: Any, labels: Any, probabilities: Any, shape: Sequence[int] = (28, 28), what: str = "examples"
) -> Figure:
    """Draw misclassified images, the most confident mistakes first.

    Without mistakes, it draws the least confident correct predictions.

    Args:
        images: `[n, height * width]` or `[n, height, width]`.
        labels: integers `[n]`, the true classes.
        probabilities: `[n, classes]`, the predicted distribution.
        shape: the images' height and width in pixels.
        what: what to call the examples: `"test digits"`.

    Returns:
        A figure with one panel per image, 24 at most; each shows the predicted and the true class, and
        the probability of both.

    Raises:
        ValueError: there is not one label and one row of probabilities per image.

    >>> from gradfn.pages.figures import mistakes
    >>> mistakes(np.zeros([2, 784]), [0, 1], [[0.1, 0.9], [0.2, 0.8]]).get_suptitle()
    '1 of 2 examples misclassified, the most confident first'
    """
    images, labels, probabilities = np.asarray(images), np.asarray(labels), np.asarray(probabilities)
    if not len(images) == len(labels) == len(probabilities):
        got = f"{len(images)} images, {len(labels)} labels, {len(probabilities)} rows of probabilities"
        raise ValueError(f"mistakes: one label and one row of probabilities per image, got {got}")
    predicted = probabilities.argmax(1)
    sure = probabilities.max(1)
    wrong = np.flatnonzero(predicted != labels)
    if len(wrong):
        chosen = wrong[np.argsort(-sure[wrong], kind="stable")][:MAX_MISTAKES]
        title = f"{len(wrong):,} of {len(labels):,} {what} misclassified"
        few = len(chosen) == len(wrong)
        title += ", the most confident first" if few else f"; the {len(chosen)} most confident"
        second, second_word = labels, "is"
    else:
        chosen = np.argsort(sure, kind="stable")[:MAX_MISTAKES]
        title = f"No mistake in {len(labels):,} {what}; the {len(chosen)} least confident predictions"
        second, second_word = np.argsort(probabilities, 1)[:, -2], "next was"
    n_columns = min(8, max(len(chosen), 4))
    n_rows = max(1, math.ceil(len(chosen) / n_columns))
    figure = new_figure(1.4 * n_columns, 1.85 * n_rows + 0.4, "compressed")
    panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
    for panel, i in zip(panels, chosen, strict=False):
        panel.imshow(images[i].reshape(shape), cmap="gray_r", interpolation="nearest")
        predicted_text = f"predicted {predicted[i]} ({_percent(sure[i])})"
        second_text = f"{second_word} {second[i]} ({_percent(probabilities[i, second[i]])})"
        panel.set_title(f"{predicted_text}\n{second_text}", fontsize=9)
    figure.suptitle(title)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as a picture, atomically.

    Args:
        figure: from the functions above.
        path: the suffix determines the format: `.png`, `.svg`, `.pdf`.

    Returns:
        The path.

    >>> import tempfile
    >>> from gradfn.pages.figures import curves, save
    >>> save(curves([{"step": 1, "loss": 2.3}]), f"{tempfile.mkdtemp()}/curves.png").name
    'curves.png'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The title is stored as metadata; a page shows it as the description of the picture.
    about: dict[str, Any] = {"Title": figure.get_suptitle()}
    kind = path.suffix.removeprefix(".") or "png"
    replace_file(path, _drawn(figure, kind, about))
    return path


def _drawn(figure: Figure, kind: str, about: dict[str, Any]) -> bytes:
    """Return a figure as a file of a kind."""
    from matplotlib import rc_context

    out = io.BytesIO()
    # In an SVG texts stay texts, and the same figure gives the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gradfn"}):
        if kind == "svg":
            about |= {"Date": None}
        figure.savefig(out, format=kind, dpi=130, bbox_inches="tight", pad_inches=0.12, metadata=about)
    if kind != "svg":
        return out.getvalue()
    # Each text lists ten fonts, of which most computers have one.
    sans = re.sub(rb"'DejaVu Sans'[^;\"]*", b"'DejaVu Sans', sans-serif", out.getvalue())
    return re.sub(rb"'DejaVu Sans Mono'[^;\"]*", b"'DejaVu Sans Mono', monospace", sans)


def is_chart(figure: Figure) -> bool:
    """Return whether a figure draws data with lines, marks or texts, and not only images.

    >>> from gradfn.pages.figures import curves, weight_images
    >>> is_chart(curves([{"step": 1, "loss": 2.3}])), is_chart(weight_images(np.ones([4, 784])))
    (True, False)
    """
    # The panel of a color bar belongs to an image.
    panels = [panel for panel in figure.axes if not hasattr(panel, "_colorbar")]
    return any(panel.lines or panel.patches or panel.collections or panel.texts for panel in panels)


@phase("pictures")
def save_all(figures: Mapping[str, Figure], folder: Path, data: str = "") -> list[Path]:
    """Write figures as PNG under their names, each with the name of its data below its title.

    A chart of at most 300 kB is also written as SVG beside it, which a page shows in its own colors.

    Args:
        figures: by name.
        folder: where to put them.
        data: the name of the data; where it is empty, titles do not change.

    Returns:
        The PNG files, in order.

    >>> import tempfile
    >>> from gradfn.pages.figures import curves, save_all
    >>> figure = curves([{"step": 1, "loss": 2.3}])
    >>> [file.name for file in save_all({"curves": figure}, Path(tempfile.mkdtemp()), "digits")]
    ['curves.png']
    >>> figure.get_suptitle().endswith("(data: digits)")
    True
    """
    if data:
        for figure in figures.values():
            figure.suptitle(f"{figure.get_suptitle()}\n(data: {data})")
    for name, figure in figures.items():
        _save_chart(figure, folder / f"{name}.svg")
    return [save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def _save_chart(figure: Figure, path: Path) -> None:
    """Write a figure as SVG if it is a small chart; remove the file of an earlier one if it is not."""
    data = _drawn(figure, "svg", {"Title": figure.get_suptitle()}) if is_chart(figure) else b""
    if 0 < len(data) <= MAX_CHART:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    else:
        path.unlink(missing_ok=True)


def new_figure(width: float, height: float, layout: Layout = "constrained") -> Figure:
    """Return an empty figure, without pyplot's global state.

    Args:
        width: in inches.
        height: in inches.
        layout: "compressed" for grids of images.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'gradfn[run]'") from error
    return Figure(figsize=(width, height), layout=layout)


def label_lines(panel: Any, gap: float = 0.07, size: float = 10.0) -> None:
    """Write the name of each line of a panel beside its right end, in its color, instead of a legend.

    The panel's limits have to be final. Names whose lines end close together are moved apart.

    Args:
        panel: whose lines have labels; those whose label starts with "_" get no name.
        gap: the smallest distance of two names, as a share of the panel's height.
        size: of the letters, in points.
    """
    found = []
    for line in panel.lines:
        x, y = (np.asarray(part, np.float64) for part in (line.get_xdata(), line.get_ydata()))
        known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
        if str(line.get_label()).startswith("_") or not len(known):
            continue
        end = panel.transData.transform((x[known[-1]], y[known[-1]]))
        height = float(panel.transAxes.inverted().transform(end)[1])
        color = TEXT_COLORS.get(line.get_color(), line.get_color())
        found.append((min(max(height, 0.0), 1.0), line.get_label(), color))
    found.sort(key=lambda each: each[0])
    heights = spread([height for height, *_ in found], gap)
    for height, (_, name, color) in zip(heights, found, strict=True):
        panel.annotate(
            name, (1.02, height), xycoords="axes fraction", color=color, fontsize=size, va="center",
            annotation_clip=False,
        )  # fmt: skip


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Return ascending heights, moved as little as needed so that neighbors are at least `gap` apart.

    >>> [round(height, 2) for height in spread([0.0, 0.5, 0.52], 0.1)]
    [0.0, 0.46, 0.56]
    """
    groups: list[tuple[float, int]] = []  # the mean height of names that touch, and how many they are
    for height in heights:
        mean, n = height, 1
        while groups and mean - (n - 1) * gap / 2 < groups[-1][0] + (groups[-1][1] + 1) * gap / 2 - 1e-12:
            before, n_before = groups.pop()
            mean, n = (before * n_before + mean * n) / (n_before + n), n_before + n
        groups.append((mean, n))
    return [mean + gap * (i - (n - 1) / 2) for mean, n in groups for i in range(n)]


def _why_above(history: History, harder: str) -> str:
    """Return why the training loss is above the validation loss, or "" where it hardly ever is."""
    rows = [row for row in history if "loss" in row and "validation_loss" in row]
    n_above = sum(row["loss"] > row["validation_loss"] for row in rows)
    if not rows or n_above < 0.2 * len(rows):
        return ""
    share = "all" if n_above == len(rows) else f"{n_above} of {len(rows)}"
    return (
        f"Training loss above validation loss in {share} rows: it is averaged over the steps before a row"
        f"{f', {harder},' if harder else ''} while the network improves; validation is measured at their end."
    )


def _columns(n: int) -> int:
    """Return the number of columns of a grid of n cells that is slightly wider than high."""
    widest = max(1, math.ceil(math.sqrt(1.6 * n)))
    even = [columns for columns in range(math.ceil(math.sqrt(n)), 2 * widest) if n % columns == 0]
    return min([*even, widest], key=lambda columns: (columns not in even, abs(columns - widest)))


def _lines(panel: Any, history: History, names: Sequence[str], scale: float) -> None:
    for name, color, style in zip(names, cycle(LINE_COLORS), cycle(LINE_STYLES), strict=False):
        rows = [row for row in history if name in row]
        steps, values = [row["step"] for row in rows], [scale * row[name] for row in rows]
        marker = "o" if len(rows) < 3 else None  # a curve of one or two points needs markers
        panel.plot(steps, values, style, color=color, marker=marker, label=_words(name), clip_on=False)
    panel.set_xlim(left=0)
    panel.locator_params(axis="x", nbins=6)
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.set_xlabel("training step")
    panel.grid(color="0.9")
    panel.spines[["top", "right"]].set_visible(False)


def _finding(history: History, names: Sequence[str], measured: Mapping[str, float]) -> str:
    """Return a sentence with the final accuracies, or with the final losses where there are none."""
    ends = {name: row[name] for row in history for name in names if name in row}
    ends |= {name: measured[name] for name in ends if name in measured}
    texts = [
        f"{_words(name)} {f'{100 * end:.1f} %' if name.endswith('accuracy') else f'{end:.3g}'}"
        for name, end in ends.items()
    ]
    n_steps = history[-1]["step"]
    return f"After {n_steps:,} step{'s' if n_steps > 1 else ''}: {', '.join(texts)}"


def _percent(share: float) -> str:
    if share < 0.005:
        return "< 1 %"
    return "> 99 %" if share > 0.995 else f"{100 * share:.0f} %"


def _words(name: str) -> str:
    if name == "loss":
        return "training loss"
    return name.replace("train_", "training_").replace("_", " ")
