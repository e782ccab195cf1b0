"""Figures of a network of two inputs: the boundary that it draws in the plane, as a strip and as a film."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradfn.files import replace_file
from gradfn.report.figures import _figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00")  # of the two classes, Okabe and Ito's
N_SHOWN = 8
LAST_FRAMES = 12  # how often a film shows its end, before it begins again


def strip(steps: Any, frames: Any, accuracies: Any, axes: Sequence[Any], points: tuple[Any, Any]) -> Figure:
    """Draw some moments of a boundary that forms, from the first step to the last.

    Args:
        steps: `[frames]`.
        frames: `[frames, height, width]`, the probability of the second class in the plane.
        accuracies: `[frames]`, on new points, in [0, 1].
        axes: the coordinates of the plane's columns `[width]` and rows `[height]`.
        points: `[n, 2]` and their classes `[n]`.

    Returns:
        A figure with eight panels at most.

    >>> axes = [np.linspace(0, 1, 3), np.linspace(0, 1, 2)]
    >>> points = np.zeros([4, 2]), np.array([0, 1, 0, 1])
    >>> strip([0, 9], [np.zeros([2, 3]), np.ones([2, 3])], [0.5, 1.0], axes, points).get_suptitle()
    'The boundary bends round the moons: 50.0 % of new points right at step 0, 100.0 % at step 9'
    """
    shown = np.unique(np.linspace(0, len(steps) - 1, min(N_SHOWN, len(steps))).round().astype(int))
    n_columns = -(-len(shown) // 2)
    figure = _figure(3.1 * n_columns + 1.0, 5.4)
    panels = figure.subplots(2, n_columns, squeeze=False, sharex=True, sharey=True).ravel()
    for panel, i in zip(panels, shown, strict=False):
        drawn = _plane(panel, frames[i], axes, points)
        panel.set_title(f"step {steps[i]:,}: {100 * accuracies[i]:.1f} % right", fontsize=10)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    bar = figure.colorbar(
        drawn, ax=list(panels), label="probability of the orange moon (black: 50 %)", pad=0.01
    )
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    figure.supxlabel("first input", fontsize=10)
    figure.supylabel("second input", fontsize=10)
    first, last = (f"{100 * accuracies[i]:.1f} %" for i in (0, -1))
    figure.suptitle(
        f"The boundary bends round the moons: {first} of new points right at step {steps[0]:,}, "
        f"{last} at step {steps[-1]:,}"
    )
    return figure


def animation(
    steps: Any, frames: Any, accuracies: Any, axes: Sequence[Any], points: tuple[Any, Any], path: Path
) -> Path:
    """Write all moments of a boundary that forms as an animated GIF; the arguments are those of `strip`.

    Args:
        steps: `[frames]`.
        frames: `[frames, height, width]`.
        accuracies: `[frames]`.
        axes: the coordinates of the plane's columns and rows.
        points: `[n, 2]` and their classes `[n]`.
        path: the file.

    Returns:
        The path.
    """
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _figure(4.2, 3.3)
    figure.set_layout_engine("none")  # a layout of its own for each frame would make the picture jump
    FigureCanvasAgg(figure)
    panel = figure.add_axes((0.03, 0.03, 0.94, 0.85))

    def draw(i: int) -> list[Any]:
        panel.clear()
        _plane(panel, frames[i], axes, points)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_title(f"step {steps[i]:,}: {100 * accuracies[i]:.1f} % of new points right", fontsize=11)
        return []

    order = [*range(len(steps)), *[len(steps) - 1] * LAST_FRAMES]
    film = FuncAnimation(figure, draw, order, init_func=list, cache_frame_data=False)
    with tempfile.TemporaryDirectory() as folder:
        film.save(Path(folder) / "film.gif", PillowWriter(fps=8), dpi=90)
        replace_file(path, (Path(folder) / "film.gif").read_bytes())
    return path


def _plane(panel: Any, frame: Any, axes: Sequence[Any], points: tuple[Any, Any]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("classes", [COLOURS[0], "white", COLOURS[1]])
    extent = (axes[0][0], axes[0][-1], axes[1][0], axes[1][-1])
    drawn = panel.imshow(
        frame, cmap=colours, vmin=0, vmax=1, origin="lower", extent=extent, aspect="auto", alpha=0.75
    )
    if np.min(frame) < 0.5 < np.max(frame):
        panel.contour(axes[0], axes[1], frame, [0.5], colors="black", linewidths=1.5)
    x, y = points
    for label, (colour, marker) in enumerate(zip(COLOURS, "os", strict=True)):
        of_class = y == label
        panel.plot(
            x[of_class, 0], x[of_class, 1], marker, color=colour, markersize=3, markeredgecolor="white",
            markeredgewidth=0.4,
        )  # fmt: skip
    return drawn
