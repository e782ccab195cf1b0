"""A trained `gf.cnn` in one small file, for the page of its run to compute with."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np

from gradfn.files import FileError
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

CNN_NET = "cnn_net.safetensors"
PAD_SIDE = 28  # pixels per side of the images that can be drawn in the page


class About(TypedDict):
    """What the file says of the network, beside its arrays."""

    activation: Activation
    image: list[int]
    data: str


class CnnNet(NamedTuple):
    """What the page computes with.

    Attributes:
        params: of a `gf.cnn`, by path: `conv1/W` `[channels, in, window, window]`, `conv1/b`, ..., `dense1/W`, ...,
            float32.
        samples: images `[n, height * width * channels]` float32; n may be 0.
        labels: what they are, `[n]` int32.
        spline: `[28, 8]`, which enlarged the 8x8 images of `gf.data.digits` in each direction; None where the
            images had their size from the start.
        about: `activation`; `image`, which is `[height, width, channels]`; and the `data`'s name.
    """

    params: dict[str, np.ndarray]
    samples: np.ndarray
    labels: np.ndarray
    spline: np.ndarray | None
    about: About

    @property
    def n_convs(self) -> int:
        """The number of convolutions."""
        return _count(self.params, "conv")

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.params[f"dense{_count(self.params, 'dense')}/b"])

    @property
    def products(self) -> int:
        """The number of multiplications in a forward pass."""
        height, width, _ = self.about["image"]
        total = sum(array.size for name, array in self.params.items() if name.startswith("dense"))
        for i in range(self.n_convs):
            total += (height >> i) * (width >> i) * self.params[f"conv{i + 1}/W"].size
        return total


def keep_cnn_net(
    folder: Path,
    params: Mapping[str, Mapping[str, Any]],
    data: Dataset,
    probabilities: Any,
    activation: str = "relu",
    image: Sequence[int] = (28, 28, 1),
    enlarged_from: int | None = None,
) -> Path:
    """Write a trained `gf.cnn` into its run's folder, so that `gradfn report` can show it at work.

    Beside the parameters it keeps a test image of each label, and the two that the network is wrong about most
    surely.

    Args:
        folder: of the run.
        params: of a `gf.cnn` with one or more convolutions.
        data: what it was trained on.
        probabilities: `[n, classes]`, of each class for each test image.
        activation: a name from `gf.layers.activations`, other than softmax.
        image: `[height, width, channels]`.
        enlarged_from: the side of the images before they were enlarged to 28x28 (8 for `gf.data.digits`), so
            that the page can prepare what is drawn in the same way; None for images of their original size.

    Returns:
        The file.

    Raises:
        ValueError: another activation, another shape of images, or a network without a convolution.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"keep_cnn_net: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if math.prod(data.shape) != math.prod(image):
        raise ValueError(f"keep_cnn_net: expected images of {list(image)}, got {list(data.shape)}")
    if "conv1" not in params:
        raise ValueError("keep_cnn_net: expected a network with a convolution, conv1 is missing")
    chosen = choose_samples(data.test[1], np.asarray(probabilities))
    arrays = flat_params(params)
    arrays |= {"samples": data.test[0][chosen], "labels": np.asarray(data.test[1][chosen], np.int32)}
    if enlarged_from is not None:
        from gradfn.data._digits import spline

        arrays["spline"] = spline(enlarged_from, PAD_SIDE).astype(np.float32)
    about = {"activation": activation, "image": list(image), "data": data.name}
    return write_net(folder / CNN_NET, arrays, about)


def flat_params(params: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return the parameters of a `gf.cnn` by path, in float32.

    >>> {name: array.tolist() for name, array in flat_params({"conv1": {"b": [0.5]}}).items()}
    {'conv1/b': [0.5]}
    """
    return {
        f"{layer}/{name}": np.asarray(array, np.float32)
        for layer, arrays in params.items()
        for name, array in arrays.items()
    }


def load_cnn_net(file: Path) -> CnnNet:
    """Read what `keep_cnn_net` wrote.

    Raises:
        FileError: the file cannot be read, or its arrays are not those of such a network.
    """
    about, arrays = read_net(file, About)
    return cnn_net(file, about, arrays)


def cnn_net(file: Path, about: About, arrays: dict[str, np.ndarray]) -> CnnNet:
    """Return a network of its arrays, with `samples` and `labels` among them, which is removed from `arrays`.

    Raises:
        FileError: the arrays are not those of such a network; it names the file.
    """
    _check(file, about["image"], arrays)
    return CnnNet(
        samples=arrays.pop("samples"),
        labels=arrays.pop("labels"),
        spline=arrays.pop("spline", None),
        about=about,
        params=arrays,
    )


def _check(file: Path, image: Sequence[int], arrays: Mapping[str, np.ndarray]) -> None:
    """Raise a FileError unless there are the arrays that the page computes with, of the right shapes and dtypes."""
    if len(image) != 3 or min(image) < 1:
        raise FileError(f"{file}: image: expected [height, width, channels], got {list(image)!s:.100}")
    height, width, n_in = image
    n_samples = next(iter(arrays.get("samples", np.zeros(0)).shape), 0)
    n_convs, n_denses = max(_count(arrays, "conv"), 1), max(_count(arrays, "dense"), 1)
    if min(height, width) >> n_convs == 0:
        raise FileError(f"{file}: image: {list(image)} is too small for {n_convs} poolings")
    # -1 is any length from 1 up.
    shapes: dict[str, tuple[int, ...]] = {"samples": (n_samples, math.prod(image)), "labels": (n_samples,)}
    for i in range(1, n_convs + 1):
        n_out = max(arrays.get(f"conv{i}/b", np.zeros(0)).size, 1)
        window = max(arrays.get(f"conv{i}/W", np.zeros(0)).shape[-1:], default=1) or 1
        shapes |= {f"conv{i}/W": (n_out, n_in, window, window), f"conv{i}/b": (n_out,)}
        n_in = n_out
    n_in *= (height >> n_convs) * (width >> n_convs)
    for i in range(1, n_denses + 1):
        n_out = max(arrays.get(f"dense{i}/b", np.zeros(0)).size, 1)
        shapes |= {f"dense{i}/W": (n_out, n_in), f"dense{i}/b": (n_out,)}
        n_in = n_out
    if "spline" in arrays:
        shapes["spline"] = (PAD_SIDE, -1)
        if list(image) != [PAD_SIDE, PAD_SIDE, 1]:
            raise FileError(f"{file}: spline: enlarges images to [28, 28, 1], but images have {list(image)}")
    names = "conv1/W, conv1/b, ..., dense1/W, dense1/b, ..., samples and labels"
    check_arrays(file, arrays, shapes, names)
    check_labels(file, arrays["labels"], n_in)


def _count(arrays: Mapping[str, Any], kind: str) -> int:
    """Return the number of layers of a kind."""
    return sum(bool(re.fullmatch(f"{kind}[0-9]+/W", name)) for name in arrays)
