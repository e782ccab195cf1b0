"""Examples that a user gives for the networks in a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradfn.display import reading_order
from gradfn.runs.described_net import DescribedNet
from gradfn.runs.kept import Kept

MAX_EXAMPLES = 100  # in a page


def with_examples(kept: Sequence[Kept], x: np.ndarray, y: np.ndarray) -> list[Kept]:
    """Return runs whose networks have examples.

    Args:
        kept: the runs.
        x: inputs `[n, ...]`.
        y: targets `[n, ...]`.

    Raises:
        ValueError: they are not numbers, differ in length, or do not fit the network of any run.
    """
    for name, array in (("x", x), ("y", y)):
        if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
            raise ValueError(f"report: examples must be numbers, got {name} of {array.dtype}")
        if not array.ndim or not np.isfinite(array.astype(np.float64)).all():
            raise ValueError(
                f"report: examples must be finite arrays [n, ...], got {name} {list(array.shape)}"
            )
    if len(x) != len(y) or not len(x):
        raise ValueError(
            f"report: expected one target per example, got {len(x):,} inputs and {len(y):,} targets"
        )
    x, y = x[:MAX_EXAMPLES], y[:MAX_EXAMPLES]
    found = [isinstance(run.described, DescribedNet) for run in kept]
    if not any(found):
        raise ValueError(
            "report: examples are for networks of gf.mlp and gf.cnn that gf.fit trained, and there is no such network "
            "in this page"
        )
    return [
        run._replace(described=_with(run.described, x, y)) if isinstance(run.described, DescribedNet) else run
        for run in kept
    ]


def _with(net: DescribedNet, x: np.ndarray, y: np.ndarray) -> DescribedNet:
    """Return a network with examples that fit it."""
    biases = [name for name in net.params if name.rpartition("/")[2].startswith("b")]
    n_out = net.params[max(biases, key=reading_order)].size if biases else 0
    image: Any = net.settings.get("image")
    is_image = isinstance(image, list) and all(type(n) is int for n in image)
    n_in = net.params["W1"].shape[-1] if "W1" in net.params else math.prod(image) if is_image else 0
    if x[0].size != n_in:
        raise ValueError(f"report: expected examples of {n_in:,} inputs, got x {list(x.shape)}")
    integers = y.dtype.kind in "iu"
    needs_labels = net.loss == "classification_loss" or (net.loss == "quadratic_loss" and integers)
    if needs_labels:
        if not integers or y[0].size != 1:
            raise ValueError(
                f"report: expected an integer label per example, got y {list(y.shape)} {y.dtype}"
            )
        if y.min() < 0 or y.max() >= n_out:
            raise ValueError(
                f"report: expected labels from 0 to {n_out - 1:,}, got {y.min():,} to {y.max():,}"
            )
    elif y[0].size != n_out:
        raise ValueError(f"report: expected targets of {n_out:,} values, got y {list(y.shape)}")
    return net._replace(examples=(x, y))
