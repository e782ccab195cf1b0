"""Scikit-learn's handwritten digits: real, small, and available without a download."""

from typing import Literal

import numpy as np

from gradfn.data._checks import sklearn
from gradfn.data._split import split
from gradfn.data.dataset import Dataset
from gradfn.timings import phase


@phase("data")
def digits(size: Literal[28, 8] = 28, validation: int = 180, test: int = 360, seed: int = 0) -> Dataset:
    """Load 1,797 real handwritten digits, flattened, with their labels.

    **This is not MNIST.** The images have 8x8 pixels and 17 gray levels. With `size=28` they are enlarged to 28x28
    with a cubic spline, so that networks for MNIST's 784 inputs accept them; they have no more detail than the
    original 64 pixels. For MNIST itself see `mnist`.

    Args:
        size: pixels per side: 28 (resized) or 8 (original).
        validation: the number of digits for validation (0 for none).
        test: the number of digits for the test part.
        seed: of the split, which is stratified by label.

    Returns:
        A `Dataset`: images [N, size*size] float32 from 0 (background) to 1 (stroke), in row-major order; labels [N]
        int32. All parts share writers, so the test part is easier than digits of unknown writers.

    Raises:
        ValueError: another size, or parts larger than the 1,797 digits; ImportError: scikit-learn is not installed.

    The data: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
    Repository, 1998 (its test part, as `sklearn.datasets.load_digits` has it).

    >>> import gradfn as gf
    >>> data = gf.data.digits(size=8)
    >>> images, labels = data.train
    >>> images.shape, images.dtype, labels.dtype, data.shape
    ((1257, 64), dtype('float32'), dtype('int32'), (8, 8))
    """
    if size not in (8, 28):
        raise ValueError(f"size must be 28 (resized) or 8 (original), got {size!r}")
    raw = sklearn("datasets").load_digits()
    images = raw.images / 16.0  # [1797, 8, 8], gray levels 0..16
    labels = raw.target.astype(np.int32)
    if size == 28:
        images = enlarge(images, 28)
    x = images.reshape(len(images), size * size).astype(np.float32)  # [N, size, size] -> [N, size*size]
    train, held, tested = split(x, labels, validation=validation, test=test, seed=seed, stratify=True)
    name = "digits 8x8" if size == 8 else "digits, 8x8 resized to 28x28"
    return Dataset(train, held, tested, name, (size, size), tuple("0123456789"))


def enlarge(images: np.ndarray, size: int) -> np.ndarray:
    """Resize square images [N, S, S] to [N, size, size] by a cubic spline, clipped to [0, 1].

    >>> import numpy as np
    >>> enlarge(np.ones([1, 8, 8]), 28).shape
    (1, 28, 28)
    """
    resize = spline(images.shape[-1], size)
    return np.clip(resize @ images @ resize.T, 0.0, 1.0)  # a spline overshoots at sharp edges


def spline(old: int, size: int) -> np.ndarray:
    """Return the matrix `[size, old]` that resizes the rows or the columns of an image by a cubic spline."""
    from scipy import ndimage  # slow to import

    # Resizing is linear and the same for rows and columns: one matrix, whose columns are the resized unit vectors,
    # resizes all images. It is computed on the host, so that the images are equal on all machines.
    columns = [
        ndimage.zoom(unit, size / old, order=3, mode="nearest", grid_mode=True) for unit in np.eye(old)
    ]
    return np.stack(columns, axis=1)
