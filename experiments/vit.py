"""Train a vision transformer to read handwritten digits, and draw its patches and where it looks."""

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
from gradfn.report.language import attention_of
from gradfn.train import adamw_warmup_cosine
from gradfn.train.augment import shifted

EXPECTED = (
    "at least 95 % of the built-in test digits right (half a minute), and 98 % of MNIST's (--data mnist, some three "
    "minutes on 2 cores)"
)
EPOCHS = {"digits": 40, "mnist": 10}
PROMISED = {"digits": 0.95, "mnist": 0.98}


@dataclass(frozen=True)
class Config:
    """Options of a run; the defaults train on the built-in digits."""

    data: Literal["digits", "mnist"] = "digits"
    """digits: 1,797 real ones that come with scikit-learn, 8x8 resized to 28x28 (not MNIST); mnist: the 70,000"""
    data_path: str | None = None
    """folder with MNIST's four files (else $GRADFN_MNIST, else a download into the cache)"""
    patch: int = 7
    """height and width of a patch"""
    layers: int = 3
    """blocks"""
    heads: int | None = None
    """attention heads per block (else 4, or as many below that as divide the width)"""
    width: int = 64
    """features of a patch"""
    hidden: int = 128
    """nodes of the feed-forward layers"""
    epochs: int | None = None
    """how often to go through the training digits (else 40 times, 10 times with MNIST)"""
    batch: int = 64
    """digits a step"""
    rate: float = 0.002
    """AdamW's learning rate after warm-up; it falls to a hundredth on half a cosine"""
    seed: int = 0
    """decides the first weights, the order of the digits and how they are shifted"""
    resume: bool = False
    """go on with an interrupted run: the latest, or that in --folder"""
    folder: str | None = None
    """where to keep the run (else runs/vit/<time>)"""

    def __post_init__(self) -> None:
        names = ("patch", "layers", "heads", "width", "hidden", "epochs", "batch")
        runs.within(1, None, **{name: getattr(self, name) for name in names})
        runs.within(0, 2**32 - 1, seed=self.seed)
        if 28 % self.patch:
            raise ValueError(f"patch: a number that divides 28, came {self.patch}")
        if self.heads and self.width % self.heads:
            raise ValueError(f"heads: a number that divides the width of {self.width}, came {self.heads}")
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
    config = runs.settle("vit", config)
    data = gf.data.mnist(config.data_path) if config.data == "mnist" else gf.data.digits()
    print(data)
    n_train = len(data.train[1])
    if config.batch > n_train:
        raise runs.RunError(f"batch: there are {n_train:,} training digits, got {config.batch}")
    net = gf.vit(
        gf.ViTConfig(
            patch=config.patch,
            n_layers=config.layers,
            n_heads=runs.heads_for(config),
            width=config.width,
            hidden=config.hidden,
        )
    )
    folder = runs.begin("vit", config)
    print(gf.table(net.spec))

    loss = gf.classification_loss(net)
    steps = (config.epochs or EPOCHS[config.data]) * (n_train // config.batch)
    fitted = gf.fit(
        shifted(gf.batch_mean(loss), data.shape),
        net.init(jax.random.key(config.seed)),
        data.train,
        adamw_warmup_cosine(steps, config.rate, final_rate=config.rate / 100, warmup=steps // 20, decay=0.05),
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
        "patches": filter_images(fitted.params["patches"]["W"], "patches"),
        "attention": attention(loss, fitted.params, data, 28 // config.patch),
    }
    pictures = classifier_figures(folder, figures, fitted.history, data, probabilities)
    verdict = judge(config, accuracy)
    runs.finish(folder, {"test_accuracy": accuracy, "verdict": verdict})
    print(f"{verdict}\npictures: {folder}/{', '.join(file.name for file in pictures)}")
    return Result(fitted.params, fitted.history, accuracy, folder, verdict)


def attention(loss: Any, params: Any, data: Any, side: int) -> Any:
    """Draw how much of the attention each patch gets, head by head in the first and the last block."""
    images, labels = six_digits(data)
    examples = zip(jnp.asarray(images), jnp.asarray(labels), strict=True)
    of_each = [attention_of(loss, params, example) for example in examples]
    columns: dict[str, Any] = {}
    # [digits, side * patch, side * patch] -> which patches have ink, [digits, patches]
    pictures = images.reshape(len(images), side, 28 // side, side, 28 // side)
    ink = (pictures.mean((2, 4)) > 0.1).reshape(len(images), -1)
    inked = []
    for block in dict.fromkeys([min(of_each[0]), max(of_each[0])]):
        weights = np.stack([blocks[block] for blocks in of_each])  # [digits, heads, patches, patches]
        shares = weights.mean(2).reshape(len(images), -1, side, side)  # over those that look
        inked.append((weights.mean((1, 2)) * ink).sum(1).mean())
        columns |= {f"{block}\nhead {head}": shares[:, head] for head in range(shares.shape[1])}
    told = " and ".join(f"{100 * share:.0f} %" for share in inked)
    title = f"Patches with ink, {100 * ink.mean():.0f} % of all, get {told} of the attention of these blocks"
    return image_maps(images.reshape(-1, *data.shape), columns, title, "attention")


def judge(config: Config, accuracy: float) -> str:
    """Say what was reached against what was expected."""
    reached, promised = f"test accuracy {100 * accuracy:.2f} %", PROMISED[config.data]
    names = ("data", "data_path", "seed", "resume", "folder")
    as_promised = Config(**{name: getattr(config, name) for name in names})
    if runs.options(config) != runs.options(as_promised):
        return f"{reached} (nothing was promised for these options)"
    enough = "reached" if accuracy >= promised else "NOT reached"
    return f"{reached}; expected at least {100 * promised:.1f} %: {enough}"
