"""Watch the boundary of a small network form between two moons."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

import tempfile
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
from gradfn.files import replace_file
from gradfn.pages.figures import curves, new_figure
from gradfn.runs.training_set import About, TrainingSet, keep_training_set
from gradfn.timings import phase

from ._common import SeededOptions, conclude, defaults

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EXPECTED = (runs.Expectation("test accuracy", at_least=0.96, unit="%"),)
N_TEST = 1000
GRID = 100  # points along each axis of a picture


@dataclass(frozen=True)
class Config(SeededOptions):
    """Options of a run."""

    hidden: tuple[int, ...] = runs.option(
        (16,), "nodes in each hidden layer; () for none, which is a straight line", at_least=1
    )
    activation: str = runs.option("tanh", "of the hidden nodes: a name from gf.layers.activations")
    points: int = runs.option(300, "points to train on", at_least=2)
    noise: float = runs.option(0.15, "standard deviation of the noise added to each coordinate", at_least=0)
    steps: int = runs.option(1000, "training steps, each on all points", at_least=1)
    rate: float = runs.option(0.03, "Adam's learning rate", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        gf.layers.activation(self.activation)


class Result(NamedTuple):
    """The result of a run."""

    params: dict[str, jax.Array]
    steps: np.ndarray  # [frames]
    frames: np.ndarray  # [frames, GRID, GRID], probability of the second moon at each point of the plane
    test_accuracy: float  # in [0, 1]
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Train, keep the parameters at some steps, and draw; it writes into the folder of the result."""
    config = runs.settle("moons", config)
    folder = runs.start("moons", config)
    train, test = moons(config)
    net = gf.mlp([2, *config.hidden, 2], activation=config.activation)
    print(gf.table(net.spec))
    start = net.init(jax.random.key(config.seed))
    with phase("training"):
        kept, losses = jax.block_until_ready(trained(net, start, train, config))

    steps = moments(config.steps)
    axes = [np.linspace(low, high, GRID, dtype=np.float32) for low, high in ((-1.7, 2.7), (-1.2, 1.7))]
    plane = np.stack(np.meshgrid(*axes), -1).reshape(-1, 2)  # [GRID, GRID, 2] -> [GRID^2, 2]
    of_points = jax.vmap(net.apply, (None, 0))
    of_moments = jax.jit(jax.vmap(of_points, (0, None)))
    frames = np.asarray(jax.nn.softmax(of_moments(kept, plane))[..., 1]).reshape(-1, GRID, GRID)
    answers = np.asarray(of_moments(kept, test[0])).argmax(-1)  # [frames, N_TEST]
    accuracies = (answers == test[1]).mean(1)

    params = jax.tree.map(lambda leaf: leaf[-1], kept)
    accuracy = float(accuracies[-1])
    history = [
        {"step": int(step), "loss": float(loss), "test_accuracy": float(share)}
        for step, loss, share in zip(steps, losses, accuracies, strict=True)
    ]
    runs.keep_training(folder, history, params)
    keep_for_page(folder, config, start, train, test)
    with phase("pictures"):
        figures = {"strip": strip(steps, frames, accuracies, axes, train), "curves": curves(history)}
        animation(steps, frames, accuracies, axes, train, folder / "boundary.gif")
    outcome = judge(config, accuracy)
    conclude(folder, outcome, figures, others=["boundary.gif"], test_accuracy=accuracy)
    return Result(params, steps, frames, accuracy, folder, outcome)


def moons(config: Config) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return training and test points of two interleaved half circles.

    Each is `[n, 2]` float32, and `[n]` which half circle they are of.
    """
    from sklearn.datasets import make_moons

    x, y = make_moons(config.points + N_TEST, noise=config.noise, random_state=config.seed)
    x, y = x.astype(np.float32), y.astype(np.int32)
    return (x[N_TEST:], y[N_TEST:]), (x[:N_TEST], y[:N_TEST])


def keep_for_page(folder: Path, config: Config, start: Any, train: Any, test: Any) -> None:
    """Keep the points and the initial parameters, so that the page of the run can train on them."""
    about: About = {
        "inputs": "plane",
        "data": "two moons",
        "activation": config.activation,
        "rate": config.rate,
        "batch": 0,
        "steps": config.steps,
        "seed": config.seed,
        "examples": len(train[1]),
        "levels": 1,
    }
    keep_training_set(folder, TrainingSet(jax.tree.map(np.asarray, start), train, test, None, about))


def moments(steps: int) -> np.ndarray:
    """Return the steps to draw: dense at the start, where most changes; the last one is `steps`."""
    return np.unique(np.round(np.geomspace(1, steps + 1, 48)).astype(int)) - 1


def trained(net: gf.Net, params: Any, points: Any, config: Config) -> tuple[Any, np.ndarray]:
    """Return the parameters at each moment, `[frames, ...]`, and the loss there, `[frames]`."""
    optimizer = optax.adam(config.rate)
    step = gf.train_step(gf.batch_mean(gf.classification_loss(net)), optimizer)
    batch = jax.tree.map(jnp.asarray, points)
    look = jnp.zeros(config.steps + 1, bool).at[moments(config.steps)].set(True)
    n_frames = int(look.sum())

    @jax.jit
    def train(params: Any) -> Any:
        def one(carry: Any, looking: jax.Array) -> tuple[Any, None]:
            state, kept, losses, i = carry
            after, metrics = step(state, batch)
            # The parameters of a step that is not drawn are overwritten at the next one.
            kept = jax.tree.map(lambda frames, leaf: frames.at[i].set(leaf), kept, state.params)
            return (after, kept, losses.at[i].set(metrics["loss"]), i + looking), None

        kept = jax.tree.map(lambda leaf: jnp.zeros([n_frames, *leaf.shape]), params)
        state = gf.train_state(params, optimizer, jax.random.key(config.seed))
        return jax.lax.scan(one, (state, kept, jnp.zeros(n_frames), 0), look.astype(int))[0][1:3]

    kept, losses = train(params)
    return kept, np.asarray(losses)


def judge(config: Config, accuracy: float) -> runs.Outcome:
    """Compare the test accuracy with what is expected."""
    return runs.judge(EXPECTED, {"test accuracy": accuracy}, defaults(config))


COLORS = ("#0072b2", "#d55e00")  # of the two classes, Okabe and Ito's
N_SHOWN = 8
LAST_FRAMES = 12  # how many times an animation repeats its last frame


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
    figure = new_figure(3.1 * n_columns + 1.0, 5.4)
    panels = figure.subplots(2, n_columns, squeeze=False, sharex=True, sharey=True).ravel()
    for panel, i in zip(panels, shown, strict=False):
        mapped = _plane(panel, frames[i], axes, points)
        panel.set_title(f"step {steps[i]:,}: {100 * accuracies[i]:.1f} % right", fontsize=10)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    bar = figure.colorbar(
        mapped, ax=list(panels), label="probability of the orange moon (black: 50 %)", pad=0.01
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

    figure = new_figure(4.2, 3.3)
    figure.set_layout_engine("none")  # a layout of its own for each frame would make the animation jump
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

    colors = LinearSegmentedColormap.from_list("classes", [COLORS[0], "white", COLORS[1]])
    extent = (axes[0][0], axes[0][-1], axes[1][0], axes[1][-1])
    mapped = panel.imshow(
        frame, cmap=colors, vmin=0, vmax=1, origin="lower", extent=extent, aspect="auto", alpha=0.75
    )
    if np.min(frame) < 0.5 < np.max(frame):
        panel.contour(axes[0], axes[1], frame, [0.5], colors="black", linewidths=1.5)
    x, y = points
    for label, (color, marker) in enumerate(zip(COLORS, "os", strict=True)):
        of_class = y == label
        panel.plot(
            x[of_class, 0], x[of_class, 1], marker, color=color, markersize=3, markeredgecolor="white",
            markeredgewidth=0.4,
        )  # fmt: skip
    return mapped
