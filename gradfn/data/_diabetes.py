"""Scikit-learn's diabetes data: a small real regression."""

import numpy as np

from gradfn.data._checks import sklearn
from gradfn.data._split import split
from gradfn.data.dataset import Dataset, Examples
from gradfn.timings import phase


@phase("data")
def diabetes(validation: int = 44, test: int = 89, seed: int = 0) -> Dataset:
    """Load 442 patients: ten measurements, and a measure of disease progression one year later.

    Inputs and targets are standardized with the mean and the standard deviation of the **training** part, so
    nothing of the test part leaks into training. On the original scale (25 to 346) a predicted `y` is
    `y * data.target_std + data.target_mean`, and an RMSE is multiplied by `target_std`. A constant prediction of
    the training mean has a mean squared error of 1.0 on the training part.

    Args:
        validation: the number of patients for validation (0 for none).
        test: the number of patients for the test part.
        seed: of the split.

    Returns:
        A `Dataset`: inputs [N, 10] float32 in the order age, sex, body mass index, blood pressure, s1 ... s6
        (blood serum); targets [N, 1] float32, for a network with one output node.

    Raises:
        ValueError: parts larger than the 442 patients; ImportError: scikit-learn is not installed.

    The data: B. Efron, T. Hastie, I. Johnstone, R. Tibshirani, Least Angle Regression, Annals of Statistics
    32, 2004.

    >>> import gradfn as gf
    >>> data = gf.data.diabetes()
    >>> x, y = data.train
    >>> x.shape, y.shape, bool(abs(y.mean()) < 1e-6), bool(abs(y.std() - 1) < 1e-6)
    ((309, 10), (309, 1), True, True)
    """
    raw = sklearn("datasets").load_diabetes(scaled=False)
    x, y = raw.data, raw.target[:, None]  # [442, 10], [442, 1]
    train, held, tested = split(x, y, validation=validation, test=test, seed=seed)
    if len(train[0]) < 2:
        raise ValueError(
            "standardization needs at least 2 training examples. Make validation or test smaller"
        )
    x_mean, x_std = train[0].mean(axis=0), train[0].std(axis=0)  # [10], [10]
    x_std = np.where(x_std > 0, x_std, 1.0)  # a tiny training part may contain one sex only
    y_mean, y_std = float(train[1].mean()), float(train[1].std()) or 1.0

    def scaled(part: Examples) -> Examples:
        x, y = part
        return ((x - x_mean) / x_std).astype(np.float32), ((y - y_mean) / y_std).astype(np.float32)

    return Dataset(
        scaled(train), scaled(held), scaled(tested), "diabetes", (10,), target_mean=y_mean, target_std=y_std
    )
