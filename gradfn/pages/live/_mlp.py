"""A multilayer perceptron in the page of its run: to feed with numbers, and to step backwards through."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gradfn.pages.charts import short
from gradfn.pages.live._half import is_close
from gradfn.pages.live.arrays import as_json, encoded
from gradfn.pages.live.part import Live
from gradfn.runs.described_net import too_large

# What assets/mlp/network.js computes: the loss of the output against a label, or against a vector.
LOSSES = ("classification_loss", "regression_loss", "quadratic_loss")
NODES = 4096  # of all layers together: each is a button


class DenseNet(NamedTuple):
    """What the page computes with.

    Attributes:
        params: `W1` `[n, inputs]`, `b1` `[n]`, ..., as `gf.mlp` has them, float32.
        activation: of the hidden layers.
        output: of the last layer, or None.
        loss: one of `LOSSES`.
        labels: whether targets are labels; otherwise they are vectors.
        x: examples `[n, inputs]`; n may be 0.
        y: their labels `[n]`, or vectors `[n, outputs]`.
    """

    params: dict[str, np.ndarray]
    activation: str
    output: str | None
    loss: str
    labels: bool
    x: np.ndarray
    y: np.ndarray


def live_mlp(net: DenseNet, room: int) -> Live | str:
    """Return a network as a part of the page of at most `room` bytes, or a sentence why it is not."""
    n_layers = len(net.params) // 2
    sizes = [net.params["W1"].shape[1], *(len(net.params[f"b{i}"]) for i in range(1, n_layers + 1))]
    if sum(sizes) > NODES:
        return f"The network is too large to be shown: it has {sum(sizes):,} nodes, and the page shows {NODES:,}."
    about = {
        "sizes": short("-".join(map(str, sizes))),
        "inputs": sizes[0],
        "labels": net.labels,
        "examples": len(net.x),
    }
    for dtype in ("float32", "float16"):
        if dtype == "float16" and not is_close(
            net.params, net.activation, net.output, net.loss, net.x, net.y
        ):
            break
        content = as_json(described(net, dtype))
        if len(content) <= room:
            return Live("mlp", "Network", about | {"half": dtype == "float16"}, content)
    return too_large(sum(array.size for array in net.params.values()), room)


def described(net: DenseNet, dtype: str = "float32") -> dict[str, object]:
    """Return the network as JSON, its parameters in a dtype."""
    arrays = {name: encoded(array, dtype) for name, array in net.params.items()}
    arrays |= {"x": encoded(net.x, "float32"), "y": encoded(net.y, "int32" if net.labels else "float32")}
    about = {"activation": net.activation, "output": net.output, "loss": net.loss, "labels": net.labels}
    return about | {"arrays": arrays}
