"""Train a convolutional network to read handwritten digits, and draw its filters and what they fire on."""

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
import numpy as np

import gradfn as gf
from gradfn import runs
from gradfn.report.classifier import (
    classifier_figures,
    classifier_measures,
    six_digits,
    test_probabilities,
)
from gradfn.report.images import filter_images, image_maps
from gradfn.train import adamw_warmup_cosine
from gradfn.train.augment import shifted

EXPECTED = (
    "at least 97 % of the built-in test digits right (half a minute), and 99.0 % of MNIST's (--data mnist, "
    "about a minute on 2 cores)"
)
EPOCHS = {"digits": 30, "mnist": 6}
PROMISED = {"digits": 0.97, "mnist": 0.99}


@dataclass(frozen=True)
class Config:
    """Options of a run; the defaults train on the built-in digits."""

    data: Literal["digits", "mnist"] = "digits"
    """digits: 1,797 real ones that come with scikit-learn, 8x8 resized to 28x28 (not MNIST); mnist: the 70,000"""
    data_path: str | None = None
    """folder with MNIST's four files (else $GRADFN_MNIST, else a download into the cache)"""
    channels: tuple[int, ...] = (8, 16)
    """filters of each convolution"""
    window: int = 5
    """height and width of the filters"""
    hidden: int = 64
    """nodes in the hidden dense layer"""
    epochs: int | None = None
    """how often to go through the training digits (else 30 times, 6 times with MNIST)"""
    batch: int = 32
    """digits a step"""
    rate: float = 0.003
    """AdamW's learning rate after warm-up; it falls to a hundredth on half a cosine"""
    seed: int = 0
    """decides the first weights, the order of the digits and how they are shifted"""
    resume: bool = False
    """go on with an interrupted run: the latest, or that in --folder"""
    folder: str | None = None
    """where to keep the run (else runs/cnn/<time>)"""

    def __post_init__(self) -> None:
        runs.within(1, None, hidden=self.hidden, epochs=self.epochs, batch=self.batch, window=self.window)
        for channels in self.channels:
            runs.within(1, None, channels=channels)
        runs.within(0, 2**32 - 1, seed=self.seed)
        runs.positive(rate=self.rate)


class Result(NamedTuple):
    """What came of a run."""

    params: dict[str, Any]
    history: Sequence[dict[str, Any]]
    test_accuracy: float  # in [0, 1]
    folder: Path
    verdict: str


def run(config: Config) -> Result:
    """Train on digits that are shifted by up to two pixels, measure and draw."""
    config = runs.settle("cnn", config)
    data = gf.data.mnist(config.data_path) if config.data == "mnist" else gf.data.digits()
    print(data)
    n_train = len(data.train[1])
    if config.batch > n_train:
        raise runs.RunError(f"batch: there are {n_train:,} training digits, got {config.batch}")
    net = gf.cnn((28, 28, 1), config.channels, (config.hidden,), 10, config.window)
    folder = runs.begin("cnn", config)
    print(gf.table(net.spec))

    loss = gf.classification_loss(net)
    steps = (config.epochs or EPOCHS[config.data]) * (n_train // config.batch)
    fitted = gf.fit(
        shifted(gf.batch_mean(loss), data.shape),
        net.init(jax.random.key(config.seed)),
        data.train,
        adamw_warmup_cosine(steps, config.rate, final_rate=config.rate / 100, warmup=steps // 20, decay=0.03),
        steps,
        batch_size=config.batch,
        seed=config.seed,
        evaluate=classifier_measures(net, loss, data, n_train=5000),
        inspect_every=steps // 20 or None,  # a run of a few steps is not looked at
        folder=folder,
        resume=config.resume,
    )

    probabilities = np.asarray(test_probabilities(net, fitted.params, data))
    accuracy = float((probabilities.argmax(1) == data.test[1]).mean())
    figures = {
        "filters": filter_images(fitted.params["conv1"]["W"], "conv1"),
        "maps": maps(net, loss, fitted.params, data),
    }
    pictures = classifier_figures(folder, figures, fitted.history, data, probabilities)
    verdict = judge(config, accuracy)
    runs.finish(folder, {"test_accuracy": accuracy, "verdict": verdict})
    print(f"{verdict}\npictures: {folder}/{', '.join(file.name for file in pictures)}")
    return Result(fitted.params, fitted.history, accuracy, folder, verdict)


def maps(net: gf.Net, loss: Any, params: Any, data: Any) -> Any:
    """Draw where each filter of the first convolution fires, for six digits."""
    images, labels = six_digits(data)
    batch = jnp.asarray(images), jnp.asarray(labels)
    seen = gf.inspect(gf.batch_mean(loss), sites="a1", keep="a1", input_grads=False)(params, batch)
    fired = np.asarray(seen["a1"].value)  # [digits, 28, 28, filters]
    columns = {f"filter {i}": fired[..., i] for i in range(min(fired.shape[-1], 10))}
    pictures = images.reshape(fired.shape[:3])  # [digits, 28, 28]
    on_ink, on_paper = fired[pictures > 0.5].mean(0), fired[pictures < 0.1].mean(0)  # [filters] each
    title = (
        f"{(on_ink > on_paper).sum()} of {fired.shape[-1]} filters of conv1 fire more on ink than on paper"
    )
    return image_maps(images.reshape(-1, *data.shape), columns, title, "activation")


def judge(config: Config, accuracy: float) -> str:
    """Say what was reached against what was expected."""
    reached, promised = f"test accuracy {100 * accuracy:.2f} %", PROMISED[config.data]
    names = ("data", "data_path", "seed", "resume", "folder")
    as_promised = Config(**{name: getattr(config, name) for name in names})
    if runs.options(config) != runs.options(as_promised):
        return f"{reached} (nothing was promised for these options)"
    enough = "reached" if accuracy >= promised else "NOT reached"
    return f"{reached}; expected at least {100 * promised:.1f} %: {enough}"
