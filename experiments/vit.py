"""Train a vision transformer to read handwritten digits, and draw which patches its attention goes to."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import gradfn as gf
from gradfn import runs
from gradfn.pages.figures import LINE_COLORS, new_figure
from gradfn.pages.images import bare

from ._common import (
    ClassifierResult,
    DigitOptions,
    check_heads,
    heads_for,
    load_digits,
    six_digits,
    train_classifier,
)
from ._language import attention_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EXPECTED = (
    runs.Expectation("test accuracy", at_least=0.95, unit="%"),
    runs.Expectation("test accuracy", at_least=0.98, unit="%", given="--data mnist"),
)
EPOCHS = {"digits": 40, "mnist": 10}


@dataclass(frozen=True)
class Config(DigitOptions):
    """Options of a run; the defaults train on the built-in digits."""

    patch: int = runs.option(7, "height and width of a patch", at_least=1)
    layers: int = runs.option(3, "blocks", at_least=1)
    heads: int | None = runs.option(
        None, "attention heads per block (default: 4, or as many below that as divide the width)", at_least=1
    )
    width: int = runs.option(64, "features of a patch", at_least=1)
    hidden: int = runs.option(128, "nodes of the feed-forward layers", at_least=1)
    epochs: int | None = runs.option(
        None,
        "how often to go through the training digits (default: 40 times, 10 times with MNIST)",
        at_least=1,
    )
    batch: int = runs.option(64, "digits per step", at_least=1)
    rate: float = runs.option(
        0.002, "AdamW's learning rate after warm-up; it falls to a hundredth on half a cosine", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if 28 % self.patch:
            raise ValueError(f"patch must divide 28, got {self.patch}")
        check_heads(self)


def run(config: Config) -> ClassifierResult:
    """Train, evaluate and draw; see `train_classifier`."""
    config = runs.settle("vit", config)
    data = load_digits(config)
    net = gf.vit(
        gf.ViTConfig(
            patch=config.patch,
            n_layers=config.layers,
            n_heads=heads_for(config),
            width=config.width,
            hidden=config.hidden,
        )
    )
    epochs = config.epochs or EPOCHS[config.data]

    def figures(loss: Any, params: Any) -> dict[str, Figure]:
        images, labels = six_digits(data)
        weights = attention_of(loss, params, (images, labels))
        return {"attention": attention(images.reshape(-1, *data.shape), weights)}

    return train_classifier("vit", config, net, data, epochs, 0.05, EXPECTED, figures)


def attention(images: Any, weights: Mapping[str, Any]) -> Figure:
    """Draw how much of the attention each patch gets in the first and the last block, averaged over heads and queries.

    Args:
        images: `[n, height, width]`.
        weights: by block, in order, `[n, heads, patches, patches]`.

    Returns:
        A figure with one row per block and one column per image. Its title compares the attention that patches with ink
        get with their number.

    >>> even = np.full([2, 1, 4, 4], 0.25)
    >>> attention(np.ones([2, 28, 28]), {"block 0": even}).get_suptitle()
    'No block prefers ink: patches with ink, 100 % of all, get 100 % of the attention in block 0'
    """
    images = np.asarray(images, np.float64)
    n, height, width = images.shape
    blocks = dict.fromkeys([next(iter(weights)), list(weights)[-1]])
    shares = {name: np.asarray(weights[name], np.float64).mean((1, 2)) for name in blocks}  # [n, patches]
    side = math.isqrt(next(iter(shares.values())).shape[1])
    # [n, height, width] -> which patches have ink, [n, patches]
    patches = images.reshape(n, side, height // side, side, width // side)
    ink = (patches.mean((2, 4)) > 0.1).reshape(n, -1)

    figure = new_figure(1.5 * n + 1.0, 1.62 * len(shares) + 1.0, "compressed")
    panels = figure.subplots(len(shares), n, squeeze=False)
    centers = (np.arange(side) + 0.5) * height / side - 0.5
    x, y = np.meshgrid(centers, centers)
    for row, (name, of_images) in zip(panels, shares.items(), strict=True):
        for panel, image, share in zip(row, images, of_images, strict=True):
            # Pale, so that the dots stand out.
            panel.imshow(image, cmap="gray_r", vmin=0, vmax=2.5, interpolation="nearest")
            panel.scatter(x, y, 1400 * share, color=LINE_COLORS[1], alpha=0.75, linewidth=0)
            bare(panel)
        row[0].set_ylabel(name, fontsize=11)
    figure.supxlabel("area of a dot: share of the attention that the patch gets", fontsize=10)

    of_ink = {name: float((of_images * ink).sum(1).mean()) for name, of_images in shares.items()}
    best = max(of_ink, key=lambda name: of_ink[name])
    texts = [f"{100 * share:.0f} % of the attention in {name}" for name, share in of_ink.items()]
    texts[1:] = [text.replace(" of the attention", "") for text in texts[1:]]
    prefers = (
        f"In {best} the attention goes to ink" if of_ink[best] > ink.mean() + 0.05 else "No block prefers ink"
    )
    figure.suptitle(f"{prefers}: patches with ink, {100 * ink.mean():.0f} % of all, get {', '.join(texts)}")
    return figure
