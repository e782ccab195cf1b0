"""Characters of a text of any size as tokens, which are made from its file when they are asked for.

The file is read once, at the beginning: to hash it, to see that it is UTF-8, to collect its characters, and to count
how many of them begin in each block of bytes. With these counts (8 bytes for 4,096 of the file) any slice of the
tokens is found: its blocks are read from the mapped file, decoded and looked up.
"""

from __future__ import annotations

import codecs
import hashlib
import operator
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradfn.data._tokenizer import Tokenizer, characters
from gradfn.data.dataset import DataError, data_errors
from gradfn.files import open_regular

BLOCK = 1 << 12  # bytes
READ = 1 << 20  # bytes read at a time, in blocks
TOKENS = 1 << 18  # made at a time
BOM = codecs.BOM_UTF8


@dataclass(frozen=True, eq=False)
class FileTokens:
    """A read-only array of tokens `[N]` that is in a file: slices are read, `np.asarray` reads all of it.

    Attributes:
        name: of the file, for errors.
        content: its bytes, mapped into memory, without a byte order mark.
        before: `[blocks + 1]`, how many of the file's characters begin before each block.
        coder: from characters to tokens.
        start: the first of these tokens, counted in the file.
        stop: what comes after the last of them.
    """

    name: str
    content: np.ndarray
    before: np.ndarray
    coder: Tokenizer
    start: int
    stop: int

    @property
    def dtype(self) -> np.dtype:
        """The tokens' dtype."""
        return self.coder.encode("").dtype

    @property
    def shape(self) -> tuple[int]:
        """How many tokens there are."""
        return (len(self),)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return 1

    @property
    def nbytes(self) -> int:
        """How many bytes the tokens take in memory, where `np.asarray` puts them."""
        return len(self) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.stop - self.start

    def __repr__(self) -> str:
        return f"FileTokens({self.name!r}, {len(self):,} {self.dtype})"

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            chosen = range(*key.indices(len(self)))
            if not chosen:
                return np.empty(0, self.dtype)
            first, last = min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1])
            return self._read(first, last + 1)[:: chosen.step]
        try:
            i = operator.index(key)
        except TypeError:
            raise TypeError(
                "tokens in a file are taken by integers and slices; np.asarray(tokens) reads all of them"
            ) from None
        if not -len(self) <= i < len(self):
            raise IndexError(f"there are {len(self):,} tokens, got index {i:,}")
        return self._read(i % len(self), i % len(self) + 1)[0]

    def __iter__(self) -> Iterator[Any]:
        return (token for piece in self.pieces() for token in piece)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._read(0, len(self)).astype(dtype or self.dtype, copy=False)

    def pieces(self) -> Iterator[np.ndarray]:
        """Yield all tokens, a piece at a time."""
        return (self[at : at + TOKENS] for at in range(0, len(self), TOKENS))

    def part(self, start: int, stop: int) -> FileTokens:
        """Return a slice without reading it."""
        return FileTokens(
            self.name, self.content, self.before, self.coder, self.start + start, self.start + stop
        )

    def _read(self, start: int, stop: int) -> np.ndarray:
        if stop - start <= TOKENS:
            return self._decode(start, stop)
        tokens = np.empty(stop - start, self.dtype)
        for at in range(start, stop, TOKENS):
            end = min(at + TOKENS, stop)
            tokens[at - start : end - start] = self._decode(at, end)
        return tokens

    def _decode(self, start: int, stop: int) -> np.ndarray:
        if start == stop:
            return np.empty(0, self.dtype)
        start, stop = self.start + start, self.start + stop
        # The last block of which as many tokens come before is the one that the token begins in.
        first, last = np.searchsorted(self.before, [start, stop], "right") - 1
        begin, end = int(first) * BLOCK, (int(last) + 1) * BLOCK
        data = self.content[begin:end].tobytes()
        previous = int(self.content[begin - 1]) if begin else 0
        starts: Any = range(len(data))
        if not _bytes_are_tokens(data, previous):
            starts = np.flatnonzero(_starts(data, previous))
        inside = stop - self.before[first]
        cut = slice(starts[start - self.before[first]], starts[inside] if inside < len(starts) else len(data))
        try:
            tokens = self.coder.encode(one_line_end(data[cut].decode()))
        except ValueError as error:
            raise DataError(f"{self.name}: has changed since it was opened ({error})") from error
        if len(tokens) != stop - start:
            raise DataError(f"{self.name}: has changed since it was opened")
        return tokens


def file_tokens(file: Path) -> tuple[FileTokens, str]:
    """Return the tokens of a file's characters, and the file's sha256.

    Text is read as Python reads it: every end of a line is a newline, and a byte order mark is left out.

    Raises:
        DataError: the file is missing, not a regular file, empty or not UTF-8.
    """
    digest, counts, last = hashlib.sha256(), [np.zeros(1, np.int64)], 0
    seen = np.zeros(0x110000, bool)  # by code point
    start = 0
    with ThreadPoolExecutor(1) as hashing:  # which takes as long as all of the rest
        hashed = hashing.submit(digest.update, b"")
        for data, text in decoded(file):
            hashed.result()
            hashed = hashing.submit(digest.update, data)
            if data == BOM and not text:
                start = len(BOM)
            elif data:
                counts.append(_counts(data, last))
                last = data[-1]
                _collect(text, seen)
    before = np.cumsum(np.concatenate(counts))
    if seen[ord("\r")]:
        seen[ord("\r")], seen[ord("\n")] = False, True
    if not before[-1]:
        raise DataError(f"{file}: the file is empty")
    coder = characters("".join(map(chr, np.flatnonzero(seen))))
    content = np.memmap(file, np.uint8, "r", offset=start)
    return FileTokens(str(file), content, before, coder, 0, int(before[-1])), digest.hexdigest()


def decoded(file: Path) -> Iterator[tuple[bytes, str]]:
    """Yield a file's bytes, some at a time, each with the text that is complete with them.

    A byte order mark comes first, with no text.

    Raises:
        DataError: the file is missing, not a regular file or not UTF-8; the message counts bytes from the file's start.
    """
    decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
    with data_errors(), open_regular(file) as content:
        if content.read(len(BOM)) == BOM:
            at = len(BOM)
            yield BOM, ""
        content.seek(at)
        while True:
            data = content.read(READ)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file}: not in UTF-8 ({error.reason} at byte {at - pending + error.start:,}); try tokens=bytes "
                    "in gf.data.text, which takes every file"
                ) from error
            if not data:
                return
            yield data, text
            at += len(data)


def one_line_end(text: str) -> str:
    """Return a text whose lines all end with a newline, as Python's text mode reads them."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _bytes_are_tokens(data: bytes, previous: int) -> bool:
    return data.isascii() and previous != 13 and b"\r" not in data


def _starts(data: bytes, previous: int) -> np.ndarray:
    """Tell for each byte whether a token begins with it; `previous` is the byte before.

    Characters begin with all bytes but those that continue one. The second byte of a line's end begins nothing.
    """
    array = np.frombuffer(data, np.uint8)
    starts = (array & 0xC0) != 0x80
    if previous == 13 or b"\r" in data:
        after_return = np.concatenate([[previous == 13], array[:-1] == 13])
        starts &= ~((array == 10) & after_return)
    return starts


def _counts(data: bytes, previous: int) -> np.ndarray:
    """Return how many tokens begin in each block of bytes."""
    full = len(data) // BLOCK * BLOCK
    if _bytes_are_tokens(data, previous):
        counts = np.full(full // BLOCK, BLOCK)
        rest = len(data) - full
    else:
        starts = _starts(data, previous)
        counts = np.count_nonzero(starts[:full].reshape(-1, BLOCK), axis=1)  # [bytes] -> [blocks, BLOCK]
        rest = int(np.count_nonzero(starts[full:]))
    return np.append(counts, rest) if len(data) > full else counts


def _collect(text: str, seen: np.ndarray) -> None:
    """Mark the characters of a text as seen."""
    # What is known of ASCII goes first, at the speed of bytes: mostly nothing is left.
    known = np.flatnonzero(seen[:128]).astype(np.uint8).tobytes()
    rest = text.encode().translate(None, known).decode()
    seen[np.frombuffer(rest.encode("utf-32-le"), np.uint32)] = True
