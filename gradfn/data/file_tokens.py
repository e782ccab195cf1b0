"""Characters of a text of any size as tokens, decoded from its file on demand.

The file is first read once: to hash it, to check that it is UTF-8, to collect its characters, and to count how many
characters start in each block of bytes. These counts (8 bytes per 4,096 bytes of the file) locate any slice of the
tokens: its blocks are read from the memory-mapped file, decoded and looked up.
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
from jax.typing import DTypeLike
from jaxtyping import PyTree

from gradfn.data._tokenizer import Tokenizer, characters
from gradfn.data.dataset import DataError, data_errors
from gradfn.files import open_regular

BLOCK = 1 << 12  # bytes
READ = 1 << 20  # bytes per read, a multiple of BLOCK
TOKENS = 1 << 18  # tokens decoded at a time
BOM = codecs.BOM_UTF8


@dataclass(frozen=True, eq=False)
class FileTokens:
    """A read-only array of tokens `[N]` in a file: slices are read on demand, `np.asarray` reads all of it.

    Attributes:
        name: of the file, for errors.
        content: its bytes, memory-mapped, without a byte order mark.
        before: `[blocks + 1]`, the number of characters that start before each block.
        coder: the tokenizer.
        start: the index of the first token in the file.
        stop: the index after the last token in the file.
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
        """The number of tokens, `(N,)`."""
        return (len(self),)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return 1

    @property
    def nbytes(self) -> int:
        """The size in bytes of the tokens as a numpy array."""
        return len(self) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.stop - self.start

    def __repr__(self) -> str:
        return f"FileTokens({self.name!r}, {len(self):,} {self.dtype})"

    def __getitem__(self, key: Any) -> PyTree:
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
                f"expected an integer or a slice as index of tokens in a file, got {key!r:.60}. "
                "np.asarray(tokens) reads all of them"
            ) from None
        if not -len(self) <= i < len(self):
            raise IndexError(f"index must be in [{-len(self):,}, {len(self):,}), got {i:,}")
        return self._read(i % len(self), i % len(self) + 1)[0]

    def __iter__(self) -> Iterator[PyTree]:
        return (token for piece in self.pieces() for token in piece)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self._read(0, len(self)).astype(dtype or self.dtype, copy=False)

    def pieces(self) -> Iterator[np.ndarray]:
        """Yield all tokens in pieces."""
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
        # A token starts in the last block that has at most that many tokens before it.
        first, last = np.searchsorted(self.before, [start, stop], "right") - 1
        low, high = int(first) * BLOCK, (int(last) + 1) * BLOCK
        data = self.content[low:high].tobytes()
        previous = int(self.content[low - 1]) if low else 0
        starts: Any = range(len(data))
        if not _bytes_are_tokens(data, previous):
            starts = np.flatnonzero(_starts(data, previous))
        inside = stop - self.before[first]
        cut = slice(starts[start - self.before[first]], starts[inside] if inside < len(starts) else len(data))
        try:
            tokens = self.coder.encode(one_line_end(data[cut].decode()))
        except ValueError as error:
            raise DataError(f"{self.name}: the file has changed since it was opened ({error})") from error
        if len(tokens) != stop - start:
            raise DataError(f"{self.name}: the file has changed since it was opened")
        return tokens


def file_tokens(file: Path) -> tuple[FileTokens, str]:
    """Return the tokens of a file's characters, and the file's sha256.

    Text is read as in Python's text mode: line ends become newlines, and a byte order mark is dropped.

    Raises:
        DataError: the file is missing, not a regular file, empty or not UTF-8.
    """
    digest, counts, last = hashlib.sha256(), [np.zeros(1, np.int64)], 0
    occurs = np.zeros(0x110000, bool)  # by code point
    start = 0
    with ThreadPoolExecutor(1) as hashing:  # which takes as long as everything else
        hashed = hashing.submit(digest.update, b"")
        for data, text in decoded(file):
            hashed.result()
            hashed = hashing.submit(digest.update, data)
            if data == BOM and not text:
                start = len(BOM)
            elif data:
                counts.append(_counts(data, last))
                last = data[-1]
                _collect(text, occurs)
    before = np.cumsum(np.concatenate(counts))
    if occurs[ord("\r")]:
        occurs[ord("\r")], occurs[ord("\n")] = False, True
    if not before[-1]:
        raise DataError(f"{file}: the file is empty")
    coder = characters("".join(map(chr, np.flatnonzero(occurs))))
    content = np.memmap(file, np.uint8, "r", offset=start)
    return FileTokens(str(file), content, before, coder, 0, int(before[-1])), digest.hexdigest()


def decoded(file: Path) -> Iterator[tuple[bytes, str]]:
    """Yield a file's bytes in pieces, each with the text that it completes.

    A byte order mark is yielded first, with an empty text.

    Raises:
        DataError: the file is missing, not a regular file or not UTF-8; the message gives the byte's offset.
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
                    "in gf.data.text, which accepts every file"
                ) from error
            if not data:
                return
            yield data, text
            at += len(data)


def one_line_end(text: str) -> str:
    """Return a text with all line ends as newlines, as Python's text mode reads it."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _bytes_are_tokens(data: bytes, previous: int) -> bool:
    return data.isascii() and previous != 13 and b"\r" not in data


def _starts(data: bytes, previous: int) -> np.ndarray:
    r"""Return for each byte whether it starts a token; `previous` is the byte before the first.

    All bytes start a character except UTF-8 continuation bytes and the second byte of `\r\n`.
    """
    array = np.frombuffer(data, np.uint8)
    starts = (array & 0xC0) != 0x80
    if previous == 13 or b"\r" in data:
        after_return = np.concatenate([[previous == 13], array[:-1] == 13])
        starts &= ~((array == 10) & after_return)
    return starts


def _counts(data: bytes, previous: int) -> np.ndarray:
    """Return the number of tokens that start in each block of bytes."""
    full = len(data) // BLOCK * BLOCK
    if _bytes_are_tokens(data, previous):
        counts = np.full(full // BLOCK, BLOCK)
        rest = len(data) - full
    else:
        starts = _starts(data, previous)
        counts = np.count_nonzero(starts[:full].reshape(-1, BLOCK), axis=1)  # [bytes] -> [blocks, BLOCK]
        rest = int(np.count_nonzero(starts[full:]))
    return np.append(counts, rest) if len(data) > full else counts


def _collect(text: str, occurs: np.ndarray) -> None:
    """Mark the characters of a text in `occurs`."""
    # Drop known ASCII characters first, which is fast: usually nothing is left.
    known = np.flatnonzero(occurs[:128]).astype(np.uint8).tobytes()
    rest = text.encode().translate(None, known).decode()
    occurs[np.frombuffer(rest.encode("utf-32-le"), np.uint32)] = True
