"""Predict how far diabetes has gone after a year with one output node, and compare with linear regression."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

from collections.abc import Mapping, Sequence
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
from gradfn.pages.figures import LINE_COLORS, curves, new_figure
from gradfn.timings import phase

from ._common import SeededOptions, conclude, defaults

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EXPECTED = (
    runs.Expectation("test R²", at_least=0.3),
    runs.Expectation("test R² of linear regression"),
    runs.Expectation("test R² below that of linear regression", at_most=0.03),
)
MEASUREMENTS = (
    *("age", "sex", "body mass index", "blood pressure", "cholesterol", "LDL", "HDL", "cholesterol / HDL"),
    *("log triglycerides", "blood sugar"),
)


@dataclass(frozen=True)
class Config(SeededOptions):
    """Options of a run."""

    hidden: int | None = runs.option(
        None, "nodes in the hidden layer (default: the mean of inputs and outputs, which is 5)", at_least=1
    )
    nets: int = runs.option(
        10, "networks with different initial weights, whose predictions are averaged", at_least=1
    )
    steps: int = runs.option(
        1000, "training steps of each network, each on all training patients", at_least=1
    )
    rate: float = runs.option(
        0.01, "AdamW's learning rate at the start; it falls to zero on half a cosine", above=0
    )
    decay: float = runs.option(1.0, "weight decay: how strongly the weights are drawn to zero", at_least=0)


class Result(NamedTuple):
    """The result of a run."""

    params: dict[str, jax.Array]  # [nets, ...]
    predictions: dict[str, np.ndarray]  # by model, of the test patients, on the scale from 25 to 346
    r2: dict[str, float]  # by model, on the test patients
    slopes: np.ndarray  # [patients, 10], of the prediction by each measurement, for every test patient
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Train, predict, compare and draw; it writes into the folder of the result."""
    from sklearn.linear_model import LinearRegression

    config = runs.settle("regress", config)
    data = gf.data.diabetes()
    print(data)
    folder = runs.start("regress", config)
    net = gf.mlp([10, config.hidden or gf.hidden_width(10, 1), 1], activation="sigmoid")
    print(gf.table(net.spec))
    params, history = trained(net, data, config)

    def predict(params: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(net.apply, (0, None))(params, x).mean()  # of the networks

    x, y = data.test
    answer = jax.jit(jax.vmap(jax.value_and_grad(predict, argnums=1), (None, 0)))
    answers, of_inputs = map(np.asarray, answer(params, x))  # [patients], [patients, 10]
    linear = LinearRegression().fit(*data.train)
    answered = {"network": answers, "linear regression": linear.predict(x).ravel()}
    truth = original(data, y.ravel())
    answered = {name: original(data, values) for name, values in answered.items()}
    shares = {name: r2(truth, values) for name, values in answered.items()}
    coefficients = linear.coef_.ravel() * data.target_std
    of_inputs = of_inputs * data.target_std
    with phase("pictures"):
        figures = {
            "predictions": predictions(truth, answered, shares),
            "slopes": slopes(of_inputs, coefficients, MEASUREMENTS),
            "curves": curves(history, "squared standard deviations"),
        }
    runs.keep_training(folder, history, params)
    outcome = judge(config, shares)
    conclude(folder, outcome, figures, data.name, r2=shares)
    return Result(params, answered, shares, of_inputs, folder, outcome)


@phase("training")
def trained(net: gf.Net, data: gf.data.Dataset, config: Config) -> tuple[Any, list[dict[str, float]]]:
    """Train all networks at once; return their parameters `[nets, ...]` and the history of their mean losses."""
    train, validation = jax.tree.map(jnp.asarray, (data.train, data.validation))
    rates = optax.cosine_decay_schedule(config.rate, config.steps)
    optimizer = optax.adamw(rates, weight_decay=config.decay)
    loss = gf.batch_mean(gf.regression_loss(net))
    step = gf.train_step(loss, optimizer)

    @jax.jit
    @jax.vmap
    def train_one(key: jax.Array) -> Any:
        def one(state: Any, _: None) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            after, metrics = step(state, train)
            return after, (metrics["loss"], loss(state.params, validation))

        state = gf.train_state(net.init(key), optimizer, key)
        state, losses = jax.lax.scan(one, state, length=config.steps)
        return state.params, losses

    params, losses = train_one(jax.random.split(jax.random.key(config.seed), config.nets))
    means = [np.asarray(each).mean(0) for each in losses]  # [steps] each
    history = [
        {"step": i, "loss": float(means[0][i]), "validation_loss": float(means[1][i])}
        for i in range(config.steps)
    ]
    return params, history


def original(data: gf.data.Dataset, values: np.ndarray) -> np.ndarray:
    """Return values on the scale that they were measured on."""
    return values * data.target_std + data.target_mean


def r2(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return the share of the variance that is explained: 1 for all of it, 0 for predicting the mean."""
    return float(1 - np.square(truth - predicted).sum() / np.square(truth - truth.mean()).sum())


def judge(config: Config, r2: dict[str, float]) -> runs.Outcome:
    """Compare the share of the variance that is explained with what is expected."""
    ours, linear = r2["network"], r2["linear regression"]
    measured = {
        "test R²": ours,
        "test R² of linear regression": linear,
        "test R² below that of linear regression": linear - ours,
    }
    return runs.judge(EXPECTED, measured, defaults(config))


def predictions(truth: Any, answers: Mapping[str, Any], r2: Mapping[str, float]) -> Figure:
    """Draw the predictions of some models over the truth, and what they miss of it.

    Args:
        truth: `[n]`.
        predictions: by model, `[n]`.
        r2: by model, the share of the variance that it explains.

    Returns:
        A figure with one column per model: above the predictions, below the residuals.

    >>> predictions([1.0, 2.0], {"net": [1.0, 2.0]}, {"net": 1.0}).get_suptitle()
    'Of what sets patients apart (the variance), explained by net 100 %'
    """
    truth = np.asarray(truth, np.float64)
    figure = new_figure(4.4 * len(answers) + 0.6, 7.2)
    panels = figure.subplots(
        2, len(answers), squeeze=False, sharex=True, sharey="row", height_ratios=[1.6, 1]
    )
    everything = np.concatenate([truth, *[np.asarray(values) for values in answers.values()]])
    ends = np.array([everything.min(), everything.max()])
    for (above, below), (name, values), color in zip(
        panels.T, answers.items(), cycle(LINE_COLORS), strict=False
    ):
        values = np.asarray(values, np.float64)
        rmse = float(np.sqrt(np.mean(np.square(truth - values))))
        above.plot(ends, ends, color="0.5", linewidth=1)
        above.plot(truth, values, "o", color=color, markersize=5, alpha=0.7, markeredgewidth=0)
        above.set_title(f"{name}: R² {r2[name]:.2f}, off by {rmse:.0f} (rms)", fontsize=11)
        below.axhline(0, color="0.5", linewidth=1)
        below.vlines(truth, 0, values - truth, color=color, alpha=0.35, linewidth=1)
        below.plot(truth, values - truth, "o", color=color, markersize=4, alpha=0.7, markeredgewidth=0)
        below.set_xlabel("truth: progression of the disease (index)")
        for panel in (above, below):
            panel.grid(color="0.92")
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("prediction (index; line: as the truth)")
    panels[1, 0].set_ylabel("prediction minus truth")
    texts = ", ".join(f"{name} {100 * share:.0f} %" for name, share in r2.items())
    figure.suptitle(f"Of what sets patients apart (the variance), explained by {texts}")
    return figure


def slopes(gradients: Any, coefficients: Any, names: Sequence[str]) -> Figure:
    """Draw the gradient of a prediction by each input, for every example, beside the coefficients of a line.

    Args:
        gradients: `[n, inputs]`.
        coefficients: `[inputs]`, of linear regression; each the gradient of its predictions, everywhere.
        names: of the inputs.

    Returns:
        A figure with one row per input, the steepest on top.

    >>> slopes([[1.0, 2.0], [1.0, 4.0]], [1.0, 2.5], ["age", "sex"]).get_suptitle()
    'What moves the prediction: the gradient by each input; the steepest on average is sex (+3)'
    """
    gradients, coefficients = np.asarray(gradients, np.float64), np.asarray(coefficients, np.float64)
    means = gradients.mean(0)
    order = np.argsort(-np.abs(means), kind="stable")
    figure = new_figure(8.4, 0.42 * len(names) + 1.7)
    panel = figure.subplots()
    rng = np.random.default_rng(0)  # spreads the dots of a row, which would hide each other
    panel.axvline(0, color="0.5", linewidth=1)
    for row, i in enumerate(order):
        heights = row + rng.uniform(-0.25, 0.25, len(gradients))
        first = row == 0
        panel.plot(
            gradients[:, i], heights, ".", color=LINE_COLORS[0], markersize=4, alpha=0.5,
            label="network: one patient" if first else None,
        )  # fmt: skip
        panel.plot(
            [means[i]] * 2, [row - 0.35, row + 0.35], color=LINE_COLORS[0], linewidth=2.5,
            label="network: mean" if first else None,
        )  # fmt: skip
        panel.plot(
            coefficients[i], row, "D", color=LINE_COLORS[1], markersize=7,
            label="linear regression: its coefficient" if first else None,
        )  # fmt: skip
    panel.set_yticks(range(len(names)), [names[i] for i in order])
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlabel("change of the prediction (index) for one standard deviation more of the input")
    panel.grid(axis="x", color="0.92")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="lower right")
    top = int(order[0])
    figure.suptitle(
        f"What moves the prediction: the gradient by each input; the steepest on average is {names[top]} "
        f"({means[top]:+.2g})"
    )
    return figure
