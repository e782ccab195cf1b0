"""The rows of a run: each is a line of JSON appended to a file, and the most recent ones are in memory too.

JSON has no NaN and no infinities. A row has null instead, as every reader expects, and a list `not_finite` with the
value and the path of each of them, `[["-inf", "low"], ["nan", "sites", "a1", "mean"]]`; a row without any has no such
list. So a row read from the file equals the row that was written.
"""

from __future__ import annotations

import abc
import contextlib
import json
import math
import os
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, TypedDict, overload

from jaxtyping import PyTree

from gradfn.display import to_json
from gradfn.files import JSON_LIMIT, FileError, open_regular, open_to_append, parse_json
from gradfn.layout import NOT_FINITE

Row = dict[str, Any]
# The most recent rows stay in memory, up to this many bytes of JSON.
RECENT = 4 << 20
# Older rows are read in blocks of at most this many bytes, unless one row is larger.
BLOCK = 1 << 20


class Extent(TypedDict):
    """How far a file of rows reaches; a checkpoint holds this instead of the rows."""

    rows: int
    bytes: int
    crc: int  # CRC-32 of these bytes


class RowSequence(Sequence[Row], abc.ABC):
    """Rows that read like a list. A subclass knows its length, and yields the rows of a range."""

    @abc.abstractmethod
    def _from(self, start: int, stop: int) -> Iterator[Row]:
        """Yield the rows from `start` to `stop`."""

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        indices = range(len(self))[index]  # an IndexError, as of a list
        if isinstance(indices, int):
            return next(self._from(indices, indices + 1))
        if indices.step == 1:
            return list(self._from(indices.start, indices.stop))
        return [self[i] for i in indices]

    def __iter__(self) -> Iterator[Row]:
        return self._from(0, len(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (RowSequence, list, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> PyTree:
        return list, (list(self),)  # a copy, or another process, gets all rows


class Rows(RowSequence):
    """Rows that are appended to a file and can be read like a list.

    Older rows are read from the file when they are used. Once another run has replaced the file they are gone, and
    reading them raises a FileError.

    >>> import tempfile
    >>> rows = Rows(Path(tempfile.mkdtemp(), "metrics.jsonl"))
    >>> rows.open()
    >>> rows.append({"step": 1, "loss": 0.5})
    >>> rows.append({"step": 2, "loss": math.inf})
    >>> rows.close()
    >>> rows[-1], rows.file.read_text().splitlines()[-1]
    ({'step': 2, 'loss': inf}, '{"step": 2, "loss": null, "not_finite": [["inf", "loss"]]}')
    >>> rows.extent
    {'rows': 2, 'bytes': 84, 'crc': 1735388278}
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._ends = array("q", [0])  # row i is the bytes [ends[i], ends[i + 1])
        self._recent: deque[Row] = deque()
        self._out: IO[bytes] | None = None
        self._inode: tuple[int, int] | None = None  # of the file that the rows are in
        self._crc = 0
        self._synced = 0  # bytes that are on the disk

    @property
    def extent(self) -> Extent:
        """How far the file reaches."""
        return {"rows": len(self), "bytes": self._ends[-1], "crc": self._crc}

    def restore(self, extent: Extent, check: Callable[[Row], None]) -> None:
        """Read the rows that another process wrote, up to an extent; later ones are ignored.

        Args:
            extent: how far to read.
            check: raises a ValueError for an invalid row.

        Raises:
            FileError: there are fewer rows, or one cannot be read; it names the file.
        """
        size = extent["bytes"]
        if size == extent["rows"] == 0:
            return
        with open_regular(self.file) as content:
            found = os.fstat(content.fileno())
            if found.st_size < size:
                raise FileError(f"{self.file}: expected at least {size:,} bytes, got {found.st_size:,}")
            self._inode = found.st_dev, found.st_ino
            while self._ends[-1] < size:
                line = content.readline(min(JSON_LIMIT, size - self._ends[-1]))
                name = f"{self.file}: line {len(self) + 1:,}"
                if not line.endswith(b"\n"):
                    raise FileError(f"{name}: expected a row of JSON that ends at byte {size:,} or before")
                row = _parsed(line, name)
                try:
                    check(row)
                except ValueError as error:
                    raise FileError(f"{name}: {error}") from error
                self._remember(row, line)
        if (len(self), self._ends[-1]) != (extent["rows"], size):
            raise FileError(
                f"{self.file}: expected {extent['rows']:,} rows in {size:,} bytes, got {len(self):,}"
            )
        if self._crc != extent["crc"]:
            raise FileError(f"{self.file}: damaged: its rows do not match the checksum in the checkpoint")

    def later_steps(self) -> list[int]:
        """Return the steps of the rows in the file after those that were restored, which `open` removes."""
        steps: list[int] = []
        # What a killed run left there may be of any form.
        with contextlib.suppress(OSError, FileError, KeyError), open_regular(self.file) as content:
            content.seek(self._ends[-1])
            while (line := content.readline(JSON_LIMIT)).endswith(b"\n"):
                step = _parsed(line, str(self.file))["step"]
                if type(step) is not int:
                    break
                steps.append(step)
        return steps

    def open(self) -> None:
        """Open the file for appending, truncated to the rows that there are."""
        self._out = open_to_append(self.file, self._ends[-1])
        found = os.fstat(self._out.fileno())
        self._inode = found.st_dev, found.st_ino

    def append(self, row: Row) -> None:
        """Append a row, which is in the file when this returns, though not yet on the disk: see `sync`.

        Raises:
            OSError: the row cannot be written; the error names the file.
        """
        assert self._out
        line = _line(row)
        try:
            self._out.write(line)
            self._out.flush()
        except OSError as error:
            self._name(error)
        self._remember(row, line)

    def sync(self) -> None:
        """Wait until the rows are on the disk."""
        end = self._ends[-1]
        if self._out and self._synced < end:
            try:
                os.fsync(self._out.fileno())
            except OSError as error:
                self._name(error)
            self._synced = end

    def close(self) -> None:
        """Close the file; each row is in it already."""
        if self._out:
            with contextlib.suppress(OSError):  # of a row that could not be written, which raised one already
                self._out.close()
            self._out = None

    def _name(self, error: OSError) -> NoReturn:
        """Raise an error of writing again, with the name of the file."""
        raise OSError(error.errno, error.strerror, str(self.file)) from error

    def _remember(self, row: Row, line: bytes) -> None:
        self._ends.append(self._ends[-1] + len(line))
        self._crc = zlib.crc32(line, self._crc)
        self._recent.append(row)
        while self._ends[-1] - self._ends[len(self) - len(self._recent)] > RECENT:
            self._recent.popleft()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _from(self, start: int, stop: int) -> Iterator[Row]:
        """Yield the rows from `start` to `stop`, the older ones in one pass over the file."""
        in_file = min(len(self) - len(self._recent), stop)
        if start < in_file:
            yield from self._read(start, in_file)
        # By index: between two of them, rows may be appended and others leave memory.
        for i in range(max(start, in_file), stop):
            oldest = len(self) - len(self._recent)
            yield self._recent[i - oldest] if i >= oldest else self[i]

    def _read(self, start: int, stop: int) -> Iterator[Row]:
        with open_regular(self.file) as content:
            found = os.fstat(content.fileno())
            if (found.st_dev, found.st_ino) != self._inode or found.st_size < self._ends[stop]:
                raise FileError(f"{self.file}: another run has replaced it; its older rows are gone")
            content.seek(self._ends[start])
            while start < stop:
                end = start + 1
                while end < stop and self._ends[end + 1] - self._ends[start] <= BLOCK:
                    end += 1
                block = content.read(self._ends[end] - self._ends[start])
                for i in range(start, end):
                    line = block[self._ends[i] - self._ends[start] : self._ends[i + 1] - self._ends[start]]
                    yield _parsed(line, f"{self.file}: line {i + 1:,}")
                start = end

    def __repr__(self) -> str:
        if len(self._recent) == len(self):
            return repr(list(self._recent))
        return f"<{len(self):,} rows in {self.file}, the last of them {self[-1]}>"


def _line(row: Row) -> bytes:
    try:
        text = json.dumps(row, allow_nan=False)
    except ValueError:
        special = [[str(value), *path] for path, value in _not_finite(row, ())]
        text = to_json(row | {NOT_FINITE: special})
    return (text + "\n").encode()


def _not_finite(value: PyTree, path: tuple[PyTree, ...]) -> Iterator[tuple[tuple[PyTree, ...], float]]:
    if isinstance(value, float):
        if not math.isfinite(value):
            yield path, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _not_finite(inner, (*path, name))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _not_finite(inner, (*path, i))


def _parsed(line: bytes, name: str) -> Row:
    """Parse a line of a file of rows; `name` names it in a FileError."""
    row = parse_json(line, Row, name)
    try:
        for value, *path, last in row.pop(NOT_FINITE, ()):
            inner = row
            for key in path:
                inner = inner[key]
            if inner[last] is not None:
                raise ValueError(f"{last} is a number")
            inner[last] = float(value)
    except (LookupError, TypeError, ValueError) as error:
        raise FileError(f"{name}: {NOT_FINITE} does not fit the row ({error})") from error
    return row
