"""Train a vision transformer to read handwritten digits, and draw its patches and its attention."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradfn as gf
from gradfn import runs
from gradfn.pages.images import filter_images, image_maps

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
        patches = filter_images(params["patches"]["W"], "patches")
        return {"patches": patches, "attention": attention(loss, params, data, 28 // config.patch)}

    return train_classifier("vit", config, net, data, epochs, 0.05, EXPECTED, figures)


def attention(loss: Any, params: Any, data: gf.data.Dataset, side: int) -> Figure:
    """Draw how much of the attention each patch gets, head by head in the first and the last block."""
    images, labels = six_digits(data)
    of_blocks = attention_of(loss, params, (images, labels))
    columns: dict[str, Any] = {}
    # [digits, side * patch, side * patch] -> which patches have ink, [digits, patches]
    pictures = images.reshape(len(images), side, 28 // side, side, 28 // side)
    ink = (pictures.mean((2, 4)) > 0.1).reshape(len(images), -1)
    inked = []
    for block in dict.fromkeys([min(of_blocks), max(of_blocks)]):
        weights = of_blocks[block]  # [digits, heads, patches, patches]
        shares = weights.mean(2).reshape(len(images), -1, side, side)  # averaged over the queries
        inked.append((weights.mean((1, 2)) * ink).sum(1).mean())
        columns |= {f"{block}\nhead {head}": shares[:, head] for head in range(shares.shape[1])}
    texts = " and ".join(f"{100 * share:.0f} %" for share in inked)
    title = f"Patches with ink, {100 * ink.mean():.0f} % of all, get {texts} of the attention of these blocks"
    return image_maps(images.reshape(-1, *data.shape), columns, title, "attention")
