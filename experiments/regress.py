"""Predict how far diabetes has gone after a year with one output node, and compare with linear regression."""

from __future__ import annotations

# Before what takes long to import, so that Ctrl-C is answered from the first moment.
if __name__ == "__main__":
    from gradfn.cli import script

    script(__file__)

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf
from gradfn import runs
from gradfn.report.figures import curves, save_all
from gradfn.report.regress import predictions, slopes

EXPECTED = (
    "a test R² of at least 0.30, and at most 0.03 below that of linear regression: what the ten measurements tell is "
    "nearly linear; in some ten seconds"
)
PROMISED_R2, PROMISED_BEHIND = 0.30, 0.03
MEASUREMENTS = (
    *("age", "sex", "body mass index", "blood pressure", "cholesterol", "LDL", "HDL", "cholesterol / HDL"),
    *("log triglycerides", "blood sugar"),
)


@dataclass(frozen=True)
class Config:
    """Options of a run."""

    hidden: int | None = None
    """nodes in the hidden layer (else the mean of inputs and outputs, which is 5)"""
    nets: int = 10
    """networks from different first weights; their mean is what is predicted"""
    steps: int = 1000
    """training steps of each network, each on all training patients"""
    rate: float = 0.01
    """AdamW's learning rate at the start; it falls to zero on half a cosine"""
    decay: float = 1.0
    """weight decay: how strongly the weights are drawn to zero"""
    seed: int = 0
    """decides the first weights; the patients are always parted alike"""
    resume: bool = False
    """go on with an interrupted run: the latest, or that in --folder"""
    folder: str | None = None
    """where to keep the run (else runs/regress/<time>)"""

    def __post_init__(self) -> None:
        runs.within(1, None, hidden=self.hidden, nets=self.nets, steps=self.steps)
        runs.within(0, 2**32 - 1, seed=self.seed)
        if not (0 < self.rate < float("inf") and 0 <= self.decay < float("inf")):
            raise ValueError(
                f"rate, decay: a number above 0 and one from 0 up, came {self.rate}, {self.decay}"
            )


class Result(NamedTuple):
    """What came of a run."""

    params: dict[str, jax.Array]  # [nets, ...]
    predictions: dict[str, np.ndarray]  # by model, of the test patients, on the scale from 25 to 346
    r2: dict[str, float]  # by model, on the test patients
    slopes: np.ndarray  # [patients, 10], of the prediction by each measurement, for every test patient
    folder: Path
    verdict: str


def run(config: Config) -> Result:
    """Train, predict, compare and draw; what it writes is in the result's folder."""
    from sklearn.linear_model import LinearRegression

    config = runs.settle("regress", config)
    data = gf.data.diabetes()
    print(data)
    folder = runs.begin("regress", config)
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
    figures = {
        "predictions": predictions(truth, answered, shares),
        "slopes": slopes(of_inputs, coefficients, MEASUREMENTS),
        "curves": curves(history, "squared standard deviations"),
    }
    runs.keep_training(folder, history, params)
    save_all(figures, folder, data.name)
    verdict = judge(config, shares)
    runs.finish(folder, {"r2": shares, "verdict": verdict})
    print(f"{verdict}\npictures: {folder}/predictions.png, slopes.png, curves.png")
    return Result(params, answered, shares, of_inputs, folder, verdict)


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


def r2(truth: np.ndarray, answers: np.ndarray) -> float:
    """Return the share of the variance that is explained: 1 for all of it, 0 for answering the mean."""
    return float(1 - np.square(truth - answers).sum() / np.square(truth - truth.mean()).sum())


def judge(config: Config, shares: dict[str, float]) -> str:
    """Say what was reached against what was expected."""
    ours, linear = shares["network"], shares["linear regression"]
    reached = f"test R² {ours:.3f}, that of linear regression {linear:.3f}"
    if runs.options(config) != runs.options(Config(seed=config.seed)):
        return f"{reached} (nothing was promised for these options)"
    enough = "reached" if ours >= max(PROMISED_R2, linear - PROMISED_BEHIND) else "NOT reached"
    return f"{reached}; expected at least {PROMISED_R2:.2f}, and at most {PROMISED_BEHIND} less than it: {enough}"
