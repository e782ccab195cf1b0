"""A curve of any number of points in constant memory: what is left of them is what a chart can show.

Points that follow each other are gathered in buckets. A bucket has the range and the mean of its points, so a single
spike among a million points is still seen; and it says how many of them were not finite, which is shown as a gap.
The idea is that of M4 (Jugel et al. 2014, "M4: A Visualization-Oriented Time Series Data Aggregation", section 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

CAPACITY = 600  # buckets that a curve has at most
LARGEST = 1e300  # what is larger is drawn as this, so that differences and products stay finite
# The fields of a bucket, in the order of an array [fields, buckets].
FIRST, LAST, LOW, HIGH, MEAN, N_FINITE, N_OTHER = range(7)


class Bucket(NamedTuple):
    """Points of a curve that follow each other.

    Attributes:
        first: x of the first one.
        last: x of the last one.
        low: the smallest finite y; inf where there is none.
        high: the largest finite y; -inf where there is none.
        mean: of the finite y.
        n_finite: how many are finite.
        n_other: how many are not.
    """

    first: float
    last: float
    low: float
    high: float
    mean: float
    n_finite: int
    n_other: int

    @property
    def x(self) -> float:
        """The middle, an integer if possible."""
        return self.first if self.first == self.last else _plain(self.first / 2 + self.last / 2)


class Curve:
    """A curve that takes points and keeps at most `CAPACITY` buckets of them.

    All buckets have the same number of points, but for the last one, which may have fewer.

    Attributes:
        n: how many points it took.
        ends: the first and the last finite point; empty if there is none.

    >>> curve = Curve([(0, 2.0), (10, float("nan")), (20, 1.0)])
    >>> [(bucket.x, bucket.mean, bucket.n_other) for bucket in curve.buckets(300)]
    [(0, 2.0, 0), (10, 0.0, 1), (20, 1.0, 0)]
    >>> [(bucket.x, bucket.low, bucket.high, bucket.n_other) for bucket in curve.buckets(1)]
    [(10, 1.0, 2.0, 1)]
    """

    def __init__(self, points: Iterable[tuple[float, float | None]] = ()) -> None:
        self.n = 0
        self.ends: list[tuple[float, float]] = []
        self._every = 1  # points in a bucket
        self._buckets = np.zeros([7, 0])
        points = list(points)
        self.extend([x for x, _ in points], [y for _, y in points])

    def extend(self, xs: Sequence[float] | np.ndarray, ys: Sequence[float | None] | np.ndarray) -> None:
        """Take points in the order of the curve; None is a number that was not finite."""
        x, y = np.clip(_floats(xs), -LARGEST, LARGEST), _floats(ys)
        x[np.isnan(x)] = 0.0
        finite = np.isfinite(y)
        if finite.any():
            first, last = ((_plain(x[i]), float(y[i])) for i in np.flatnonzero(finite)[[0, -1]])
            self.ends = [self.ends[0] if self.ends else first, last]
        total = self.n + len(x)
        while total > self._every * CAPACITY:
            self._every *= 2
            self._buckets = _merged(self._buckets, np.arange(self._buckets.shape[1]) // 2)
        y = np.clip(y, -LARGEST, LARGEST)
        low, high, mean = (np.where(finite, y, nothing) for nothing in (np.inf, -np.inf, 0.0))
        points = np.stack([x, x, low, high, mean, finite, ~finite])  # [fields, points]
        # The last bucket is merged with the points that follow, unless it is full.
        n_full = self.n // self._every
        full, partial = np.split(self._buckets, [n_full], axis=1)
        index = np.concatenate([np.full(partial.shape[1], n_full), np.arange(self.n, total) // self._every])
        new = _merged(np.concatenate([partial, points], axis=1), index)
        self._buckets = np.concatenate([full, new], axis=1)
        self.n = total

    def buckets(self, limit: int) -> list[Bucket]:
        """Return the whole curve as at most `limit` buckets, of one point each if that is enough."""
        n = self._buckets.shape[1]
        merged = _merged(self._buckets, np.arange(n) // max(-(-n // limit), 1))
        return [
            Bucket(_plain(first), _plain(last), low, high, mean, int(n_finite), int(n_other))
            for first, last, low, high, mean, n_finite, n_other in merged.T.tolist()
        ]


def _merged(buckets: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Merge buckets `[fields, n]` that follow each other and have the same index `[n]`."""
    if not len(index):
        return buckets
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    n_finite = np.add.reduceat(buckets[N_FINITE], starts)
    sizes = np.diff(starts, append=len(index))
    # Shares first: a sum of large numbers may overflow.
    share = buckets[N_FINITE] / np.repeat(np.maximum(n_finite, 1), sizes)
    low, high = np.minimum.reduceat(buckets[LOW], starts), np.maximum.reduceat(buckets[HIGH], starts)
    mean = np.add.reduceat(share * buckets[MEAN], starts)
    return np.stack(
        [
            buckets[FIRST, starts],
            buckets[LAST, starts + sizes - 1],
            *(low, high, np.where(n_finite > 0, np.clip(mean, low, high), 0.0)),
            *(n_finite, np.add.reduceat(buckets[N_OTHER], starts)),
        ]
    )


def _floats(values: Sequence[Any] | np.ndarray) -> np.ndarray:
    try:
        return np.array(values, np.float64)
    except OverflowError:  # an integer of 400 digits
        return np.array([_float(value) for value in values])


def _float(value: Any) -> float:
    try:
        return np.nan if value is None else float(value)
    except OverflowError:
        return np.inf


def _plain(x: float) -> float:
    """Return an integer as one, as steps are."""
    return int(x) if abs(x) < 2**53 and float(x).is_integer() else float(x)
