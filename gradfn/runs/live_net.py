"""Files of networks that run in the page of their run: what those of all kinds share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from gradfn.files import FileError, open_regular, parse_json, replace_file
from gradfn.tensors import open_tensors

LIMIT = 1 << 30  # bytes of the file
MISTAKES = 2
# Of a node, those that assets/core/activations.js knows.
Activation = Literal[
    "sigmoid",
    "tanh",
    "relu",
    "leaky_relu",
    "elu",
    "selu",
    "gelu",
    "gelu_exact",
    "silu",
    "softplus",
    "identity",
]
ACTIVATIONS = get_args(Activation)
T = TypeVar("T")


def write_net(file: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> Path:
    """Write arrays and their description, as JSON, into one safetensors file; return the file."""
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    replace_file(file, save(contiguous, metadata={"about": json.dumps(about)}))
    return file


def read_net(file: Path, form: type[T]) -> tuple[T, dict[str, np.ndarray]]:
    """Read what `write_net` wrote.

    Args:
        file: its path.
        form: of the description, as in `gradfn.files.read_json`.

    Raises:
        FileError: the file cannot be read, or its description has another form.
    """
    open_regular(file, LIMIT).close()
    with open_tensors(file) as content:
        about = parse_json(content.metadata()["about"], form, str(file))
        return about, {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118


def check_arrays(
    file: Path, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], names: str
) -> None:
    """Raise a FileError unless a file has the arrays that the page computes with.

    Args:
        file: its path.
        arrays: what it contains.
        shapes: of the arrays that it must have; -1 is any length from 1 up. `labels` must be int32, all others float32.
        names: of these arrays, in words.
    """
    if shapes.keys() != arrays.keys():
        found = ", ".join(sorted(arrays))
        raise FileError(f"{file}: expected the arrays {names}, got {found!r:.200}")
    for name, shape in shapes.items():
        array, dtype = arrays[name], "int32" if name == "labels" else "float32"
        fits = len(array.shape) == len(shape) and all(
            n == m or (m == -1 and n > 0) for n, m in zip(array.shape, shape, strict=True)
        )
        if not fits or array.dtype != dtype:
            expected = f"[{', '.join('n' if n == -1 else str(n) for n in shape)}] {dtype}"
            raise FileError(f"{file}: {name}: expected {expected}, got {list(array.shape)} {array.dtype}")
        if not np.isfinite(array).all():
            raise FileError(f"{file}: {name}: expected finite numbers")


def check_labels(file: Path, labels: np.ndarray, n_classes: int) -> None:
    """Raise a FileError unless all labels are in [0, n_classes)."""
    if labels.size and (labels.min() < 0 or labels.max() >= n_classes):
        found = f"{labels.min()} to {labels.max()}"
        raise FileError(f"{file}: labels: expected 0 to {n_classes - 1}, got {found}")


def choose_samples(labels: np.ndarray, probabilities: np.ndarray) -> list[int]:
    """Return the first correctly classified test example of each label, then the most confident mistakes."""
    predicted, sure = probabilities.argmax(1), probabilities.max(1)
    right, wrong = np.flatnonzero(predicted == labels), np.flatnonzero(predicted != labels)
    firsts = []
    for label in np.unique(labels):
        known = right[labels[right] == label]
        firsts.append(int(known[0] if len(known) else np.flatnonzero(labels == label)[0]))
    confident = [int(i) for i in wrong[np.argsort(-sure[wrong], kind="stable")] if i not in firsts]
    return firsts + confident[:MISTAKES]
