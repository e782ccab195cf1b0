"""The network of a run of `gf.fit` that describes itself, as the part of the page for its kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradfn.files import FileError
from gradfn.layout import MODEL
from gradfn.pages.live._cnn import live_cnn
from gradfn.pages.live._digits import live_digits
from gradfn.pages.live._mlp import LOSSES, DenseNet, live_mlp
from gradfn.pages.live.part import Live
from gradfn.runs.cnn_net import cnn_net
from gradfn.runs.described_net import DescribedNet
from gradfn.runs.digit_net import LABELS, PIXELS, DigitNet
from gradfn.runs.kept import Kept
from gradfn.runs.live_net import ACTIVATIONS

SHOWN = 10  # examples of images in a page


def described(run: Kept, room: int) -> Live | str | None:
    """Return the network of a run that describes itself: see `gradfn.pages.live.KINDS`."""
    net = run.described
    if net is None or isinstance(net, str):
        return net
    try:
        return _dense(net, room) if net.net == "mlp" else _convolutional(net, room)
    except _UnfitError as error:
        return f"The network does not run in the page: {error}."


class _UnfitError(ValueError):
    """What a description says does not fit the parameters, or cannot be computed in a page."""


def _dense(net: DescribedNet, room: int) -> Live | str:
    """Return a `gf.mlp` as the page of digits, if it has 784 inputs, 10 outputs and labels; else as that of any."""
    sizes = _check_dense(net.params)
    activation, output = net.settings.get("activation"), net.settings.get("output")
    for name in (activation, output):
        if name not in ACTIVATIONS and not (name is None and name is output):
            raise _UnfitError(f"it knows the activations {', '.join(ACTIVATIONS)}, and this is {name!r:.50}")
    if net.loss not in LOSSES:
        raise _UnfitError(f"it knows the losses {', '.join(LOSSES)}, and this is {net.loss!r:.50}")
    x, y = net.examples or (np.zeros([0, sizes[0]]), None)
    x = x.reshape(-1, sizes[0]).astype(np.float32)
    labels = net.loss == "classification_loss" or (net.loss == "quadratic_loss" and sizes[-1] > 1)
    if y is not None and net.loss == "quadratic_loss":
        labels = y.dtype.kind in "iu"
    if labels:
        y = np.zeros(len(x), np.int32) if y is None else y.reshape(-1).astype(np.int32)
    else:
        y = np.zeros([len(x), sizes[-1]]) if y is None else y.reshape(len(x), sizes[-1])
    if labels and (sizes[0], sizes[-1]) == (PIXELS, LABELS):
        about: Any = {
            "activation": activation,
            "output": output,
            "loss": "cross-entropy" if net.loss == "classification_loss" else "quadratic",
            "data": "your data",
        }
        if not x.size or (x.min() >= 0 and x.max() <= 1):  # images: ink from 0 to 1
            digits = DigitNet(dict(net.params), x[:SHOWN], y[:SHOWN], None, about)
            return live_digits(digits, room)
    return live_mlp(DenseNet(dict(net.params), str(activation), output, net.loss, labels, x, y), room)


def _check_dense(params: Mapping[str, np.ndarray]) -> list[int]:
    """Return the nodes per layer, inputs first."""
    n_layers = len(params) // 2
    expected = {f"{kind}{i}" for i in range(1, n_layers + 1) for kind in "Wb"}
    if not n_layers or params.keys() != expected or params["W1"].ndim != 2:
        raise _UnfitError("its checkpoint does not have the parameters W1, b1, ... of gf.mlp")
    sizes = [params["W1"].shape[1]]
    for i in range(1, n_layers + 1):
        weights, biases = params[f"W{i}"], params[f"b{i}"]
        if weights.shape != (biases.size, sizes[-1]) or biases.ndim != 1 or not weights.size:
            raise _UnfitError(f"W{i} and b{i} in its checkpoint do not fit together")
        sizes.append(biases.size)
    return sizes


def _convolutional(net: DescribedNet, room: int) -> Live | str:
    """Return a `gf.cnn` as the page of convolutional networks."""
    activation, image = net.settings.get("activation"), net.settings.get("image")
    if net.loss != "classification_loss":
        raise _UnfitError(f"for gf.cnn it knows the classification_loss, and this is {net.loss!r:.50}")
    if activation not in ACTIVATIONS:
        raise _UnfitError(
            f"it knows the activations {', '.join(ACTIVATIONS)}, and this is {activation!r:.50}"
        )
    if not (isinstance(image, list) and len(image) == 3 and all(type(n) is int for n in image)):
        raise _UnfitError(f"its images have the shape {image!r:.50}")
    x, y = net.examples or (np.zeros([0]), np.zeros([0]))
    arrays = {**net.params, "labels": y.reshape(-1).astype(np.int32)[:SHOWN]}
    arrays["samples"] = x.reshape(len(x), math.prod(image)).astype(np.float32)[:SHOWN]
    about: Any = {"activation": activation, "image": image, "data": "your data"}
    try:
        return live_cnn(cnn_net(Path(MODEL), about, arrays), room)
    except FileError as error:
        raise _UnfitError(str(error)) from error
