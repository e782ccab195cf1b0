"""Rows in memory that are made when they are read."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

from gradfn.train.rows import Row, RowSequence


class LazyRows(RowSequence):
    """Rows that read like a list, each made whenever it is read.

    The row of an inspection is a dict of a hundred numbers and more. To make it takes longer than a step of a small
    network, and it takes twenty times the memory of the arrays that it is made of.

    >>> rows = LazyRows()
    >>> rows.extend(2, lambda start, stop: [{"step": step} for step in range(start, stop)])
    >>> rows.extend(1, lambda start, stop: [{"step": 7}])
    >>> rows, rows[-1], len(rows[1:])
    ([{'step': 0}, {'step': 1}, {'step': 7}], {'step': 7}, 2)
    """

    def __init__(self) -> None:
        self._parts: list[Callable[[int, int], list[Row]]] = []
        self._ends = [0]  # part i is the rows [ends[i], ends[i + 1])

    def extend(self, n: int, make: Callable[[int, int], list[Row]]) -> None:
        """Append `n` rows; `make` returns those from `start` to `stop`."""
        self._parts.append(make)
        self._ends.append(len(self) + n)

    def __len__(self) -> int:
        return self._ends[-1]

    def _from(self, start: int, stop: int) -> Iterator[Row]:
        while start < stop:
            i = bisect.bisect_right(self._ends, start) - 1
            first, end = self._ends[i], min(self._ends[i + 1], stop)
            yield from self._parts[i](start - first, end - first)
            start = end

    def __repr__(self) -> str:
        return repr(list(self)) if len(self) <= 3 else f"<{len(self):,} rows, the last of them {self[-1]}>"
