"""Follow how noisy the gradient is while a network learns digits: noise scale, hardest examples, conflicts."""

from __future__ import annotations

# Before what takes long to import, so that Ctrl-C is answered from the first moment.
if __name__ == "__main__":
    from gradfn.cli import script

    script(__file__)

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import gradfn as gf
from gradfn import runs
from gradfn.report.figures import save_all
from gradfn.report.noise import agreement, largest_gradients, noise_over_training

EXPECTED = (
    "the noise scale to at least double, and batches of 32 to tell it within a factor of 2, in half a minute"
)


@dataclass(frozen=True)
class Config:
    """Options of a run; the defaults train 784-16-10 on the built-in digits."""

    hidden: int = 16
    """nodes in the hidden layer"""
    data: Literal["digits", "mnist"] = "digits"
    """digits: 1,797 real ones that come with scikit-learn, 8x8 resized to 28x28 (not MNIST); mnist: the 70,000"""
    data_path: str | None = None
    """folder with MNIST's four files (else $GRADFN_MNIST, else a download into the cache)"""
    epochs: int = 20
    """how often to go through the training digits"""
    batch: int = 32
    """digits a step"""
    every: int = 1
    """measure the noise each so many steps"""
    rate: float = 0.1
    """learning rate of stochastic gradient descent"""
    seed: int = 0
    """decides the first weights and the order of the digits"""
    resume: bool = False
    """go on with an interrupted run: the latest, or that in --folder"""
    folder: str | None = None
    """where to keep the run (else runs/noise/<time>)"""

    def __post_init__(self) -> None:
        runs.within(1, None, hidden=self.hidden, epochs=self.epochs, every=self.every)
        runs.within(2, None, batch=self.batch)
        runs.within(0, 2**32 - 1, seed=self.seed)
        runs.positive(rate=self.rate)


class Result(NamedTuple):
    """What came of a run."""

    noise: Sequence[dict[str, Any]]  # one row per measurement, see gf.fit
    first: float  # noise scale before training, from all training digits
    second: float  # the same of training's second half
    estimate: float  # of the second half, from the batches alone
    folder: Path
    verdict: str


def run(config: Config) -> Result:
    """Train, measure and draw; what it writes is in the result's folder."""
    config = runs.settle("noise", config)
    data = gf.data.mnist(config.data_path) if config.data == "mnist" else gf.data.digits()
    print(data if config.data == "mnist" else f"{data}\n(8x8 pixels, resized: this is not MNIST)")
    n_train = len(data.train[1])
    if config.batch > n_train:
        raise runs.RunError(f"batch: there are {n_train:,} training digits, got {config.batch}")
    folder = runs.begin("noise", config)

    net = gf.mlp([784, config.hidden, 10], activation="sigmoid")
    loss, start = gf.classification_loss(net), net.init(jax.random.key(config.seed))
    # What batches estimate, all training digits tell (the first 10,000 of MNIST's).
    images, labels = (jnp.asarray(part[:10_000]) for part in data.train)
    measure = jax.jit(gf.per_example.noise_scale(loss))

    def exact(params: Any) -> dict[str, jax.Array]:
        seen = measure(params, (images, labels))
        return {"gradient_square": seen.gradient_square, "variance": seen.variance}

    steps = config.epochs * (n_train // config.batch)
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
    figures = {
        "noise": noise_over_training(
            fitted.noise, config.batch, [{"step": 0} | before, *fitted.history], (first, second)
        ),
        "largest": largest_gradients(images, labels, answers, norms, data.shape),
        "agreement": agreement(classes.total, digits, "digit, before training"),
    }
    save_all(figures, folder, data.name)
    verdict = judge(config, first, second, estimate)
    runs.finish(folder, {"first": first, "second": second, "estimate": estimate, "verdict": verdict})
    print(f"{verdict}\npictures: {folder}/noise.png, largest.png, agreement.png")
    return Result(fitted.noise, first, second, estimate, folder, verdict)


def scale(rows: list[dict[str, Any]]) -> float:
    """Return the noise scale of several measures: each sum first, then their ratio."""
    signal, noise = (sum(row[name] for row in rows) for name in ("gradient_square", "variance"))
    return float(noise / signal) if signal > 0 else float("nan")


def judge(config: Config, first: float, second: float, estimate: float) -> str:
    """Say what was reached against what was expected."""
    reached = f"noise scale {first:.0f} examples at the start, {second:.0f} in the second half"
    reached += f"; batches of {config.batch} say {estimate:.0f}"
    if config != Config(seed=config.seed, resume=config.resume, folder=config.folder):
        return f"{reached} (nothing was promised for these options)"
    good = second >= 2 * first and second / 2 <= estimate <= 2 * second
    return f"{reached}; expected twice the start, agreement within 2: {'reached' if good else 'NOT reached'}"
