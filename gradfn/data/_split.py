"""Deterministic train, validation and test parts."""

import numpy as np

from gradfn.data._arrays import as_array
from gradfn.data._checks import integer, sklearn
from gradfn.data.dataset import Examples


def split(
    x: np.ndarray,
    y: np.ndarray,
    *,
    validation: int,
    test: int,
    seed: int = 0,
    stratify: bool = False,
) -> tuple[Examples, Examples, Examples]:
    """Split examples at random, the same way each time, into train, validation and test.

    The test part depends on `test` and `seed` alone, so changing `validation` never moves a training example into
    the test part.

    Args:
        x: inputs [N, ...]: an array, a data frame (by position, not by label), a list or a PyTorch tensor.
        y: targets [N, ...], likewise; with `stratify`, labels [N].
        validation: the number of validation examples; 0 for none.
        test: the number of test examples; 0 for none. All others, at least one, are for training.
        seed: from 0 to 2**32 - 1.
        stratify: keep the proportions of the labels in every part (each part needs one example per label or more).

    Returns:
        `(x, y)` of train, validation and test, in random order.

    Raises:
        ValueError: x and y differ in length, are not arrays or have columns that are not numeric, or the parts are
            too large or too small; TypeError: a size is not an integer.

    >>> import gradfn as gf
    >>> import numpy as np
    >>> x, y = np.arange(10), np.arange(10) % 2
    >>> train, validation, test = gf.data.split(x, y, validation=2, test=4, stratify=True)
    >>> len(train[0]), len(validation[0]), sorted(test[1].tolist())
    (4, 2, [0, 0, 1, 1])
    """
    x, y = as_array(x, "x"), as_array(y, "y")
    n = len(x)
    if len(y) != n:
        raise ValueError(f"x and y must have one row per example, got {n:,} rows of x and {len(y):,} of y")
    integer("seed", seed, 0, 2**32 - 1)
    integer("test", test, 0)
    integer("validation", validation, 0)
    train = n - test - validation
    if train < 1:
        raise ValueError(
            f"expected at least one training example, got test={test:,} and validation={validation:,} of {n:,} "
            "examples. Make them smaller"
        )
    if stratify:
        labels = len(np.unique(y))
        for part, size in (("test", test), ("validation", validation), ("train", train)):
            if 0 < size < labels:
                raise ValueError(f"{part} needs one example per label, at least {labels}, got {size}")

    def take(rows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample `size` of the rows; return the others, and the sample."""
        if size == 0:
            return rows, rows[:0]
        others, sample = sklearn("model_selection").train_test_split(
            rows, test_size=size, random_state=seed, stratify=y[rows] if stratify else None
        )
        return others, sample

    rest, in_test = take(np.arange(n), test)
    in_train, in_validation = take(rest, validation)
    return (x[in_train], y[in_train]), (x[in_validation], y[in_validation]), (x[in_test], y[in_test])
