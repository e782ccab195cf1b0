"""What every data set is: three parts, each a pair of arrays, and what one needs to know to show them."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gradfn.files import FileError

Examples = tuple[np.ndarray, np.ndarray]
"""Inputs [N, ...] and targets [N, ...]: row i of the one belongs to row i of the other."""


class DataError(FileError):
    """A data file is missing, damaged or not what its name says; the message names it and says what to do."""


@contextlib.contextmanager
def data_errors() -> Iterator[None]:
    """Raise a DataError for a file of data that cannot be used, where the block raises a FileError."""
    try:
        yield
    except DataError:
        raise
    except FileError as error:
        raise DataError(str(error)) from error


class Dataset(NamedTuple):
    """Train, validation and test examples with their name and shape; all arrays are numpy's, on no device.

    Attributes:
        train: inputs [N, features] float32 and targets: labels [N] int32, or values [N, 1] float32.
        validation: the same, for choosing settings and early stopping; N is 0 where none was asked for.
        test: the same, for the one number reported at the end.
        name: what to write on a figure.
        shape: the shape of one input before it was flattened, (28, 28) for an image of 784 pixels.
        classes: the name of each label, empty for regression.
        target_mean: what was taken off a regression target, in its own unit.
        target_std: what it was divided by then, so `y * target_std + target_mean` is the original value.

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
