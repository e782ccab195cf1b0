"""The data set and the initial parameters of a run in one small file, for the page of the run to train on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np

from gradfn.files import FileError, open_regular, parse_json, replace_file
from gradfn.tensors import open_tensors

TRAINING_SET = "training_set.safetensors"
LIMIT = 16 << 20  # bytes of the file
PIXELS = 784


class About(TypedDict):
    """What the file says of the training, beside its arrays."""

    inputs: Literal["plane", "image"]
    data: str
    activation: str
    rate: float
    batch: int  # 0 for all examples
    steps: int
    seed: int
    examples: int  # of the run's training data, of which the file may hold fewer
    levels: int  # the value of a pixel that is 1 for the network; 1 for points of the plane


class TrainingSet(NamedTuple):
    """What the page trains with.

    Attributes:
        params: initial `W1`, `b1`, ... as `gf.mlp` has them, float32.
        train: inputs `[n, 2]` float32 or images `[n, side * side]` uint8, and labels `[n]` int32.
        test: the same for testing.
        spline: `[28, side]`, which enlarges the images in each direction; None where they are not enlarged.
        about: the run's settings.
    """

    params: dict[str, np.ndarray]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    spline: np.ndarray | None
    about: About


def keep_training_set(folder: Path, training_set: TrainingSet) -> Path:
    """Write what the page needs to train into the folder of a run; return the file."""
    from safetensors.numpy import save

    arrays = {name: np.asarray(array, np.float32) for name, array in training_set.params.items()}
    for name, (x, y) in (("train", training_set.train), ("test", training_set.test)):
        arrays |= {f"{name}_x": np.asarray(x), f"{name}_y": np.asarray(y, np.int32)}
    if training_set.spline is not None:
        arrays["spline"] = np.asarray(training_set.spline, np.float32)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    about = {"about": json.dumps(training_set.about)}
    replace_file(folder / TRAINING_SET, save(contiguous, metadata=about))
    return folder / TRAINING_SET


def load_training_set(file: Path) -> TrainingSet:
    """Read what `keep_training_set` wrote.

    Raises:
        FileError: the file cannot be read, or its arrays do not belong together.
    """
    open_regular(file, LIMIT).close()
    with open_tensors(file) as content:
        about = parse_json((content.metadata() or {}).get("about", ""), About, str(file))
        arrays = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    _check(file, arrays, about)
    return TrainingSet(
        train=(arrays.pop("train_x"), arrays.pop("train_y")),
        test=(arrays.pop("test_x"), arrays.pop("test_y")),
        spline=arrays.pop("spline", None),
        about=about,
        params=arrays,
    )


def sizes(params: Mapping[str, Any]) -> list[int]:
    """Return the nodes per layer of a `gf.mlp`, inputs first.

    >>> sizes({"W1": np.zeros([3, 2]), "b1": np.zeros(3), "W2": np.zeros([2, 3]), "b2": np.zeros(2)})
    [2, 3, 2]
    """
    n_layers = sum(name.startswith("W") for name in params)
    return [params["W1"].shape[1], *(len(params[f"W{i}"]) for i in range(1, n_layers + 1))]


def _check(file: Path, arrays: Mapping[str, np.ndarray], about: About) -> None:
    """Raise a FileError unless there are the arrays that the page trains with, of the right shapes and dtypes."""
    n_layers = sum(name.startswith("W") for name in arrays)
    weights = {f"{kind}{layer}" for layer in range(1, n_layers + 1) for kind in "Wb"}
    expected = weights | {"train_x", "train_y", "test_x", "test_y"}
    if not n_layers or set(arrays) - {"spline"} != expected:
        found = ", ".join(sorted(arrays))
        raise FileError(f"{file}: expected the arrays W1, b1, ..., train_x and others, got {found!r:.200}")
    image = about["inputs"] == "image"
    side = arrays["spline"].shape[-1] if "spline" in arrays and arrays["spline"].ndim == 2 else 28
    n_in, n_out = (side * side, 10) if image else (2, 2)
    dtypes = dict.fromkeys(arrays, "float32") | {"train_y": "int32", "test_y": "int32"}
    if image:
        dtypes |= {"train_x": "uint8", "test_x": "uint8"}
    shapes: dict[str, tuple[int, ...]] = {}
    for part in ("train", "test"):
        n = max(arrays[f"{part}_y"].size, 1)
        shapes |= {f"{part}_x": (n, n_in), f"{part}_y": (n,)}
    before = PIXELS if image else 2
    for layer in range(1, n_layers + 1):
        width = n_out if layer == n_layers else max(arrays[f"b{layer}"].size, 1)
        shapes |= {f"W{layer}": (width, before), f"b{layer}": (width,)}
        before = width
    if "spline" in arrays:
        shapes["spline"] = (28, side)
    for name, array in arrays.items():
        if array.shape != shapes[name] or array.dtype != dtypes[name]:
            expected_here = f"{list(shapes[name])} {dtypes[name]}"
            raise FileError(
                f"{file}: {name}: expected {expected_here}, got {list(array.shape)} {array.dtype}"
            )
        if not np.isfinite(array).all():
            raise FileError(f"{file}: {name}: expected finite numbers")
    for name in ("train_y", "test_y"):
        if arrays[name].min() < 0 or arrays[name].max() >= n_out:
            raise FileError(f"{file}: {name}: expected labels from 0 to {n_out - 1}")
    if min(about["rate"], about["steps"], about["levels"]) <= 0 or min(about["batch"], about["seed"]) < 0:
        raise FileError(f"{file}: expected a rate, steps and levels > 0, a batch size and a seed >= 0")
