"""Train a convolutional network to read handwritten digits, and draw its filters and what activates them."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import gradfn as gf
from gradfn import runs
from gradfn.pages.images import filter_images, image_maps
from gradfn.runs.cnn_net import keep_cnn_net

from ._common import ClassifierResult, DigitOptions, load_digits, six_digits, train_classifier

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EXPECTED = (
    runs.Expectation("test accuracy", at_least=0.97, unit="%"),
    runs.Expectation("test accuracy", at_least=0.99, unit="%", given="--data mnist"),
)
EPOCHS = {"digits": 30, "mnist": 6}


@dataclass(frozen=True)
class Config(DigitOptions):
    """Options of a run; the defaults train on the built-in digits."""

    channels: tuple[int, ...] = runs.option((8, 16), "filters of each convolution", at_least=1)
    window: int = runs.option(5, "height and width of the filters", at_least=1)
    hidden: int = runs.option(64, "nodes in the hidden dense layer", at_least=1)
    epochs: int | None = runs.option(
        None,
        "how often to go through the training digits (default: 30 times, 6 times with MNIST)",
        at_least=1,
    )
    batch: int = runs.option(32, "digits per step", at_least=1)
    rate: float = runs.option(
        0.003, "AdamW's learning rate after warm-up; it falls to a hundredth on half a cosine", above=0
    )


def run(config: Config) -> ClassifierResult:
    """Train, evaluate and draw; see `train_classifier`."""
    config = runs.settle("cnn", config)
    data = load_digits(config)
    net = gf.cnn((28, 28, 1), config.channels, (config.hidden,), 10, config.window)
    epochs = config.epochs or EPOCHS[config.data]

    def figures(loss: Any, params: Any) -> dict[str, Figure]:
        filters = filter_images(params["conv1"]["W"], "conv1")
        return {"filters": filters, "maps": maps(loss, params, data)}

    def keep(folder: Path, params: Any, probabilities: Any) -> None:
        keep_cnn_net(
            folder, params, data, probabilities, enlarged_from=8 if config.data == "digits" else None
        )

    return train_classifier("cnn", config, net, data, epochs, 0.03, EXPECTED, figures, keep)


def maps(loss: Any, params: Any, data: gf.data.Dataset) -> Figure:
    """Draw where each filter of the first convolution is active, for six digits."""
    images, labels = six_digits(data)
    batch = jnp.asarray(images), jnp.asarray(labels)
    captured = jax.jit(gf.capture(gf.batch_mean(loss), sites="a1", keep="a1"))(params, batch)
    fired = np.asarray(captured["a1"].value)  # [digits, 28, 28, filters]
    columns = {f"filter {i}": fired[..., i] for i in range(min(fired.shape[-1], 10))}
    pictures = images.reshape(fired.shape[:3])  # [digits, 28, 28]
    # [filters] each
    on_strokes, on_background = fired[pictures > 0.5].mean(0), fired[pictures < 0.1].mean(0)
    n_more = (on_strokes > on_background).sum()
    title = f"{n_more} of {fired.shape[-1]} filters of conv1 are more active on strokes than on background"
    return image_maps(images.reshape(-1, *data.shape), columns, title, "activation")
