"""Train a network with one hidden layer to read handwritten digits, and draw what it learned."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gradfn as gf
from gradfn import runs
from gradfn.data._digits import spline
from gradfn.pages.figures import weight_images
from gradfn.runs.digit_net import keep_digit_net
from gradfn.runs.training_set import About, TrainingSet, keep_training_set
from gradfn.timings import phase

from ._common import (
    ClassifierResult,
    DigitOptions,
    adamw_cosine,
    classifier_figures,
    classifier_measures,
    conclude,
    start_on_digits,
)

# Images of 28x28 pixels that the page trains on, at most: 600 kB of its 5 MB. Those of 8x8 pixels all fit.
PAGE_TRAIN, PAGE_TEST = 470, 100

EXPECTED = (runs.Expectation("test accuracy", at_least=0.93, unit="%"),)


@dataclass(frozen=True)
class Config(DigitOptions):
    """Options of a run; the defaults train 784-16-10 on the built-in digits."""

    hidden: int = runs.option(16, "nodes in the hidden layer", at_least=1)
    epochs: int = runs.option(40, "how often to go through the training digits", at_least=1)
    batch: int = runs.option(32, "digits per step", at_least=1)
    rate: float = runs.option(
        0.003, "Adam's learning rate at the start; it falls to zero on half a cosine", above=0
    )


def run(config: Config) -> ClassifierResult:
    """Train, measure and draw; it writes into the folder of the result."""
    config, data, folder = start_on_digits("digits", config)

    net = gf.mlp([784, config.hidden, 10], activation="sigmoid")
    print(gf.table(net.spec))
    start = net.init(jax.random.key(config.seed))
    loss = gf.classification_loss(net)
    steps = config.epochs * (len(data.train[1]) // config.batch)
    fitted = gf.fit(
        gf.batch_mean(loss),
        start,
        data.train,
        adamw_cosine(steps, config.rate),
        steps,
        batch_size=config.batch,
        seed=config.seed,
        evaluate=classifier_measures(net, loss, data),
        inspect_every=steps // 20 or None,  # a run of a few steps is not inspected
        folder=folder,
        resume=config.resume,
    )

    images, labels = data.test
    probabilities = jax.nn.softmax(jax.vmap(net.apply, (None, 0))(fitted.params, jnp.asarray(images)))
    accuracy = float((np.asarray(probabilities).argmax(1) == labels).mean())
    outcome = judge(config, accuracy)
    with phase("pictures"):
        figures = {"weights": weight_images(fitted.params["W1"], data.shape)}
        figures |= classifier_figures(fitted.history, data, probabilities)
    keep_digit_net(
        folder, fitted.params, data, probabilities, enlarged_from=8 if config.data == "digits" else None
    )
    keep_for_page(folder, config, start, data, steps)
    conclude(folder, outcome, figures, data.name, test_accuracy=accuracy)
    return ClassifierResult(fitted.params, fitted.history, accuracy, folder, outcome)


def keep_for_page(folder: Path, config: Config, start: Any, data: gf.data.Dataset, steps: int) -> None:
    """Keep digits and the initial parameters, so that the page of the run can train on them."""
    small = config.data == "digits"
    source = gf.data.digits(size=8) if small else data  # the same split, 8x8 pixels in 17 levels
    levels = 16 if small else 255
    n_train, n_test = (None, None) if small else (PAGE_TRAIN, PAGE_TEST)
    train, test = (
        (np.round(levels * images[:n]).astype(np.uint8), labels[:n])
        for (images, labels), n in ((source.train, n_train), (source.test, n_test))
    )
    about: About = {
        "inputs": "image",
        "data": data.name,
        "activation": "sigmoid",
        "rate": config.rate,
        "batch": min(config.batch, len(train[1])),
        "steps": max(steps, 1),
        "seed": config.seed,
        "examples": len(data.train[1]),
        "levels": levels,
    }
    enlarging = spline(8, 28) if small else None
    keep_training_set(folder, TrainingSet(jax.tree.map(np.asarray, start), train, test, enlarging, about))


def judge(config: Config, accuracy: float) -> runs.Outcome:
    """Compare the test accuracy with what is expected of 16 or more hidden nodes on the built-in digits."""
    promised = config.data == "digits" and config.hidden >= 16 and config.epochs >= Config.epochs
    return runs.judge(EXPECTED, {"test accuracy": accuracy}, promised)
