"""Deterministic train, validation and test parts."""

import numpy as np

from gradfn.data._arrays import as_array
from gradfn.data._checks import integer
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
        others, sample = sampled(size, seed, len(rows), y[rows] if stratify else None)
        return rows[others], rows[sample]

    rest, in_test = take(np.arange(n), test)
    in_train, in_validation = take(rest, validation)
    return (x[in_train], y[in_train]), (x[in_validation], y[in_validation]), (x[in_test], y[in_test])


def sampled(size: int, seed: int, n: int, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Choose `size` of n rows at random, with the proportions of their labels; return the other rows, and these.

    They are those of scikit-learn's `train_test_split`, which takes a second to import.

    Raises:
        ValueError: a label that only one row has.
    """
    random = np.random.RandomState(seed)  # whose numbers never change
    if labels is None:
        order = random.permutation(n)
        return order[size:], order[:size]
    _, label_of_row, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if counts.min() < 2:
        raise ValueError("stratify needs two examples per label or more")
    others_of_label = _shares(counts, n - size, random)
    sample_of_label = _shares(counts - others_of_label, size, random)
    others, sample = [], []
    for label, (n_others, n_sample) in enumerate(zip(others_of_label, sample_of_label, strict=True)):
        rows = np.flatnonzero(label_of_row == label)
        rows = rows[random.permutation(len(rows))]
        others.append(rows[:n_others])
        sample.append(rows[n_others : n_others + n_sample])
    return random.permutation(np.concatenate(others)), random.permutation(np.concatenate(sample))


def _shares(counts: np.ndarray, size: int, random: np.random.RandomState) -> np.ndarray:
    """Return how many of each label a sample has: in proportion to the counts, the largest remainders rounded up."""
    exact = counts / counts.sum() * size
    shares = np.floor(exact)
    remainders = exact - shares
    missing = int(size - shares.sum())
    for remainder in np.unique(remainders)[::-1]:
        if missing == 0:
            break
        (equal,) = np.where(remainders == remainder)
        chosen = random.choice(equal, size=min(len(equal), missing), replace=False)
        shares[chosen] += 1
        missing -= len(chosen)
    return shares.astype(int)
