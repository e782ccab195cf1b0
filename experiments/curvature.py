"""Follow the sharpness of the digit network under gradient descent, and draw its spectrum and its landscape."""

from __future__ import annotations

# Before what takes long to import, so that Ctrl-C is answered from the first moment.
if __name__ == "__main__":
    from gradfn.cli import script

    script(__file__)

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf
from gradfn import runs
from gradfn.files import inner_folder
from gradfn.report.curvature import EDGE, edge_of_stability, landscape, late_sharpness, spectrum
from gradfn.report.figures import save_all

EXPECTED = (
    "the largest eigenvalue of the Hessian within 10 % of 2 / rate in the end for rates 0.2 and 0.4, below it for 0.1, "
    "and at least 90 % of the test digits right; in less than a minute"
)
LOSS_UNIT = "half the squared distance"
PROMISED = 0.9
BLUR = 0.03  # of a drawn eigenvalue, over the largest


@dataclass(frozen=True)
class Config:
    """Options of a run; the defaults train 784-16-10 three times on the built-in digits."""

    hidden: int = 16
    """nodes in the hidden layer"""
    rates: tuple[float, ...] = (0.1, 0.2, 0.4)
    """learning rates of plain gradient descent; spectrum and landscape are drawn for the last"""
    steps: int = 4000
    """steps, each with all training digits"""
    every: int = 40
    """look at the sharpness each so many steps"""
    seed: int = 0
    """decides the first weights"""
    resume: bool = False
    """go on with an interrupted run: the latest, or that in --folder"""
    folder: str | None = None
    """where to keep the run (else runs/curvature/<time>)"""

    def __post_init__(self) -> None:
        runs.within(1, None, hidden=self.hidden, steps=self.steps, every=self.every)
        runs.within(0, 2**32 - 1, seed=self.seed)
        if not self.rates or not all(0 < rate < float("inf") for rate in self.rates):
            raise ValueError(f"rates: one number above 0 at least, came {self.rates}")


class Result(NamedTuple):
    """What came of a run."""

    histories: dict[float, list[dict[str, Any]]]  # by rate: step, loss, sharpness
    accuracies: dict[float, float]  # by rate, on the test digits, in [0, 1]
    eigenvalues: np.ndarray  # [10], the largest in the end, of the last rate
    trace: gf.curvature.Estimate
    folder: Path
    verdict: str


def run(config: Config) -> Result:
    """Train with each rate, measure and draw; what it writes is in the result's folder."""
    config = runs.settle("curvature", config)
    data = gf.data.digits()
    print(f"{data}\n(8x8 pixels, resized: this is not MNIST)")
    folder = runs.begin("curvature", config)

    # With the mean digit left in, one direction alone would have ten times the curvature of all others.
    mean = data.train[0].mean(0)
    batch, test = ((jnp.asarray(x - mean), jnp.asarray(y)) for x, y in (data.train, data.test))
    net = gf.mlp([784, config.hidden, 10], activation="tanh")
    loss = gf.batch_mean(gf.quadratic_loss(net))
    start = net.init(jax.random.key(config.seed))

    histories, accuracies = {}, {}
    for rate in config.rates:
        sharp = gf.curvature.sharpness(loss, rate)
        fitted = gf.fit(
            loss,
            start,
            lambda key: batch,  # every step sees all digits
            optax.sgd(rate),
            config.steps,
            evaluate=partial(_measure, sharp, batch),
            eval_every=config.every,
            folder=inner_folder(folder, f"rate-{rate:g}"),
            resume=config.resume,
            progress=False,
        )
        first = {"step": 0, "loss": float(loss(start, batch)), "sharpness": float(sharp(start, batch).value)}
        histories[rate] = [first, *fitted.history]
        accuracies[rate] = float(gf.accuracy(net)(fitted.params, test))
        print(
            f"rate {rate:g}: sharpness {late_sharpness(fitted.history):.2f} of {2 / rate:.2f} in the end, "
            f"loss {fitted.history[-1]['loss']:.4f}, test accuracy {100 * accuracies[rate]:.1f} %"
        )
    params, size = fitted.params, gf.count(net.spec)

    eigs = gf.curvature.hessian_eigs(loss, k=10, which="largest")(params, batch)
    trace = gf.curvature.hessian_trace(loss)(params, batch)
    print(f"the Hessian in the end, rate {rate:g}:\n{eigs}")
    print(f"its trace: {trace.value:.1f}, standard error {trace.standard_error:.1f}")

    spread = gf.curvature.hessian_spectrum(loss)
    spectra = {"after training": spread(params, batch), "before training": spread(start, batch)}
    densities = {name: one.density(width=BLUR * float(eigs.values[0])) for name, one in spectra.items()}
    curved = float(spectra["after training"].above(eigs.values[0] / 10))
    figures = {
        "sharpness": edge_of_stability(histories, LOSS_UNIT),
        "spectrum": spectrum(densities, size, eigs.values, curved, 2 / rate),
        "landscape": _landscape(loss, params, batch, eigs),
    }
    save_all(figures, folder)
    verdict = judge(config, histories, accuracies)
    values = np.asarray(eigs.values)
    result = {"eigenvalues": values.tolist(), "trace": float(trace.value), "verdict": verdict}
    runs.finish(folder, result)
    print(f"{verdict}\npictures: {', '.join(f'{folder}/{name}.png' for name in figures)}")
    return Result(histories, accuracies, values, trace, folder, verdict)


def _measure(sharp: Callable, batch: Any, params: Any) -> dict[str, Any]:
    return {"sharpness": sharp(params, batch).value}


def _landscape(loss: Any, params: Any, batch: Any, eigs: gf.curvature.Eigs) -> Any:
    """Draw the loss over a random plane, and along the sharpest and a random direction of length 1."""
    plane = gf.curvature.loss_landscape(loss, points=41)(params, batch)
    random = jax.tree.map(lambda d: d[:1], plane.directions)
    length = optax.tree.norm(random)
    ways = {
        "along the sharpest direction": jax.tree.map(lambda v: v[:1], eigs.vectors),
        "along a random direction": jax.tree.map(lambda d: d / length, random),
    }
    along = {}
    for name, way in ways.items():
        line = gf.curvature.loss_landscape(loss, dims=1, points=41)(params, batch, directions=way)
        along[name] = line.steps, line.losses
    return landscape(plane.steps, plane.losses, along, float(eigs.values[0]), LOSS_UNIT)


def judge(
    config: Config, histories: dict[float, list[dict[str, Any]]], accuracies: dict[float, float]
) -> str:
    """Say what was reached against what was expected."""
    ratios = {rate: late_sharpness(rows) * rate / 2 for rate, rows in histories.items()}
    said = ", ".join(f"{ratio:.2f} for {rate:g}" for rate, ratio in ratios.items())
    reached = f"sharpness over 2 / rate in the end: {said}; worst test accuracy {100 * min(accuracies.values()):.1f} %"
    if runs.options(config) != runs.options(Config(seed=config.seed)):
        return f"{reached} (nothing was promised for these options)"
    edges = all(abs(ratios[rate] - 1) <= EDGE for rate in (0.2, 0.4)) and ratios[0.1] < 1
    enough = edges and min(accuracies.values()) >= PROMISED
    expected = f"1 within {EDGE:g} for 0.2 and 0.4, below 1 for 0.1, at least {100 * PROMISED:.0f} %"
    return f"{reached}; expected {expected}: {'reached' if enough else 'NOT reached'}"
