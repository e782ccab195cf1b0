"""A trained digit network in one small file, for the page of its run to compute with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

import numpy as np

from gradfn.runs.live_net import (
    ACTIVATIONS,
    Activation,
    check_arrays,
    check_labels,
    choose_samples,
    read_net,
    write_net,
)

if TYPE_CHECKING:
    from gradfn.data import Dataset

DIGIT_NET = "digit_net.safetensors"
PIXELS, LABELS = 784, 10


class About(TypedDict):
    """What the file says of the network, beside its arrays."""

    activation: Activation
    output: Activation | None
    loss: Literal["cross-entropy", "quadratic"]
    data: str


class DigitNet(NamedTuple):
    """What the page computes with.

    Attributes:
        params: `W1` `[hidden, 784]`, `b1` `[hidden]`, ... as `gf.mlp` has them, float32.
        samples: test images `[n, 784]` float32 in [0, 1].
        labels: what they are, `[n]` int32.
        spline: `[28, 8]`, which enlarged the 8x8 images of `gf.data.digits` in each direction; None where the
            images had 28x28 pixels from the start.
        about: `activation` of the hidden layers, `output` of the last (or None), `loss` and the `data`'s name.
    """

    params: dict[str, np.ndarray]
    samples: np.ndarray
    labels: np.ndarray
    spline: np.ndarray | None
    about: About


def keep_digit_net(
    folder: Path,
    params: Mapping[str, Any],
    data: Dataset,
    probabilities: Any,
    activation: str = "sigmoid",
    output: str | None = None,
    loss: Literal["cross-entropy", "quadratic"] = "cross-entropy",
    enlarged_from: int | None = None,
) -> Path:
    """Write a trained `gf.mlp` on 28x28 digits into its run's folder, so that `gradfn report` can show it at work.

    Beside the parameters it keeps a test image of each digit, and the two that the network is wrong about most
    surely.

    Args:
        folder: of the run.
        params: of a `gf.mlp` with 784 inputs and 10 outputs.
        data: what it was trained on, `gf.data.digits()` or `gf.data.mnist()`.
        probabilities: `[n, 10]`, how sure it was of each class of each test image.
        activation: of its hidden layers: sigmoid, tanh, relu or gelu.
        output: of its last layer: one of these, or None.
        loss: what it was trained with.
        enlarged_from: the side of the images before they were enlarged to 28x28 (8 for `gf.data.digits`), so
            that the page can prepare what is drawn in the same way; None for images of 28x28 pixels.

    Returns:
        The file.

    Raises:
        ValueError: another activation, or another shape of images.
    """
    for name in (activation, output):
        if name is not None and name not in ACTIVATIONS:
            raise ValueError(f"keep_digit_net: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    if tuple(data.shape) != (28, 28):
        raise ValueError(f"keep_digit_net: expected images of 28x28 pixels, got {list(data.shape)}")
    chosen = choose_samples(data.test[1], np.asarray(probabilities))
    arrays = {name: np.asarray(array, np.float32) for name, array in params.items()}
    arrays |= {"samples": data.test[0][chosen], "labels": np.asarray(data.test[1][chosen], np.int32)}
    if enlarged_from is not None:
        from gradfn.data._digits import spline

        arrays["spline"] = spline(enlarged_from, 28).astype(np.float32)
    about = {"activation": activation, "output": output, "loss": loss, "data": data.name}
    return write_net(folder / DIGIT_NET, arrays, about)


def load_digit_net(file: Path) -> DigitNet:
    """Read what `keep_digit_net` wrote.

    Raises:
        FileError: the file cannot be read, or its arrays are not those of such a network.
    """
    about, arrays = read_net(file, About)
    _check(file, arrays)
    return DigitNet(
        samples=arrays.pop("samples"),
        labels=arrays.pop("labels"),
        spline=arrays.pop("spline", None),
        about=about,
        params=arrays,
    )


def _check(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise a FileError unless there are the arrays that the page computes with, of the right shapes and dtypes."""
    n_layers = sum(name.startswith("W") for name in arrays)
    n_samples = next(iter(arrays.get("samples", np.zeros(0)).shape), 0)
    # -1 is any length from 1 up.
    shapes: dict[str, tuple[int, ...]] = {"samples": (-1, PIXELS), "labels": (n_samples,)}
    n_in = PIXELS
    for layer in range(1, max(n_layers, 1) + 1):
        n_out = LABELS if layer == n_layers else max(arrays.get(f"b{layer}", np.zeros(0)).size, 1)
        shapes |= {f"W{layer}": (n_out, n_in), f"b{layer}": (n_out,)}
        n_in = n_out
    if "spline" in arrays:
        shapes["spline"] = (28, -1)
    check_arrays(file, arrays, shapes, "W1, b1, ..., samples and labels")
    check_labels(file, arrays["labels"], LABELS)
