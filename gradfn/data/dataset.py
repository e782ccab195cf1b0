"""The type of all data sets: three parts, each a pair of arrays, with a name and a shape."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gradfn.files import FileError

Examples = tuple[np.ndarray, np.ndarray]
"""Inputs [N, ...] and targets [N, ...]; row i of both is example i."""


class DataError(FileError):
    """A data file is missing, damaged or of another kind; the message names the file and a remedy."""


@contextlib.contextmanager
def data_errors() -> Iterator[None]:
    """Convert a FileError of the block to a DataError."""
    try:
        yield
    except DataError:
        raise
    except FileError as error:
        raise DataError(str(error)) from error


class Dataset(NamedTuple):
    """Training, validation and test examples with a name and a shape; all arrays are numpy arrays.

    Attributes:
        train: inputs [N, features] float32 and targets: labels [N] int32, or values [N, 1] float32.
        validation: the same, for tuning and early stopping; N is 0 if none was requested.
        test: the same, for the final evaluation.
        name: a name for figures.
        shape: the shape of one input before it was flattened, (28, 28) for an image of 784 pixels.
        classes: the name of each label; empty for regression.
        target_mean: the mean that was subtracted from regression targets, in their original unit.
        target_std: the divisor after that: `y * target_std + target_mean` is the original value.

    >>> import gradfn as gf
    >>> gf.data.digits()
    Dataset('digits, 8x8 resized to 28x28': 1,257 train, 180 validation, 360 test; inputs 28x28; 10 classes)
    """

    train: Examples
    validation: Examples
    test: Examples
    name: str
    shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    target_mean: float = 0.0
    target_std: float = 1.0

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{len(getattr(self, part)[1]):,} {part}" for part in ("train", "validation", "test")
        )
        shape = "x".join(map(str, self.shape))
        target = f"{len(self.classes)} classes" if self.classes else "regression"
        return f"Dataset({self.name!r}: {parts}; inputs {shape}; {target})"
