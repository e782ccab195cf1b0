"""The IDX file format of MNIST and its relatives, as described on http://yann.lecun.com/exdb/mnist."""

import gzip
import hashlib
import math
import os
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from gradfn.data.dataset import DataError, data_errors
from gradfn.files import open_regular

UNSIGNED_BYTE = 0x08
MOST_DIMENSIONS = 32  # numpy's limit before version 2
CHUNK = 1 << 20  # bytes per read
GZIP = b"\x1f\x8b"  # the first bytes of gzip data; IDX starts with two zeros


def read_idx(file: str | os.PathLike[str]) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzip-compressed or not.

    Memory use is bounded by the data actually present, not by the size that the header claims.

    Args:
        file: its path. A name that ends in `.gz` requires gzip data.

    Returns:
        A uint8 array of the shape in the file's header, [N, 28, 28] for MNIST's images.

    Raises:
        DataError: the file is missing, not a regular file, truncated, too long, empty or not IDX of unsigned bytes.

    >>> import gradfn as gf
    >>> import pathlib, struct, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "labels")
    ...     _ = file.write_bytes(struct.pack(">HBBI", 0, 8, 1, 3) + bytes([7, 2, 1]))
    ...     gf.data.read_idx(file)
    array([7, 2, 1], dtype=uint8)
    """
    return read(Path(file), str(file))


def read(file: Path, name: str, limit: int | None = None) -> np.ndarray:
    """Read an IDX file: see `read_idx`.

    Args:
        file: its path.
        name: its name in errors; a name that ends in `.gz` requires gzip data.
        limit: the maximum size of the (decompressed) data in bytes.
    """
    with data_errors(), open_regular(file) as content:
        start = content.read(16)
        content.seek(0)
        if not start:
            raise DataError(f"{name}: the file is empty. Download it again")
        if start[:2] != GZIP and name.endswith(".gz"):
            is_idx = start[:2] == b"\0\0"
            hint = "If it is decompressed, remove .gz from its name" if is_idx else "Download it again"
            raise DataError(f"{name}: expected gzip data, got a file that starts with {start!r}. {hint}")
        try:
            if start[:2] != GZIP:
                return parse(content, name, limit)
            with gzip.GzipFile(fileobj=content) as decompressed:
                return parse(decompressed, name, limit)
        except MemoryError as error:
            raise DataError(f"{name}: the data do not fit in memory") from error
        except (EOFError, OSError, zlib.error) as error:
            fault = "truncated or damaged gzip data" if start[:2] == GZIP else "cannot be read"
            raise DataError(f"{name}: {fault} ({error}). Download it again") from error


def parse(content: IO[bytes] | gzip.GzipFile, name: str, limit: int | None = None) -> np.ndarray:
    """Parse the (decompressed) content of an IDX file: see `read`."""
    # Every dimension must be at least 1: then no single wrong byte in the header gives a consistent length, so
    # damage is always detected.
    start = content.read(4)
    if len(start) < 4:
        raise DataError(
            f"{name}: truncated: expected a header of 4 bytes, got {len(start)}. Download it again"
        )
    zeros, kind, ndim = struct.unpack(">HBB", start)
    if zeros != 0:
        raise DataError(f"{name}: not an IDX file: expected two zero bytes at the start, got {start!r}")
    if kind != UNSIGNED_BYTE:
        raise DataError(f"{name}: expected IDX data of unsigned bytes (0x08), got type 0x{kind:02x}")
    dimensions = content.read(4 * ndim)
    if len(dimensions) < 4 * ndim:
        length = 4 + len(dimensions)
        raise DataError(
            f"{name}: truncated: expected a header of {4 + 4 * ndim} bytes, got {length}. Download it again"
        )
    shape = struct.unpack(f">{ndim}I", dimensions)
    if ndim == 0 or 0 in shape:
        raise DataError(
            f"{name}: expected an array that is not empty, got shape {list(shape)} in its IDX header"
        )
    if ndim > MOST_DIMENSIONS:
        raise DataError(f"{name}: expected at most {MOST_DIMENSIONS} dimensions, got {ndim}")
    expected = math.prod(shape)
    described = f"{' x '.join(map(str, shape))} = {expected:,} bytes of data"
    if limit is not None and expected > limit:
        raise DataError(f"{name}: expected at most {limit:,} bytes, got {described} in its header")
    # Grows with the data actually read, because the header may be wrong.
    data = bytearray()
    while len(data) < expected and (piece := content.read(min(CHUNK, expected - len(data)))):
        data += piece
    rest = content.read(CHUNK) if len(data) == expected else b""
    if rest or len(data) < expected:
        got = f"{len(data) + len(rest):,}{' or more' if len(rest) == CHUNK else ''}"
        fault = "too long" if rest else "truncated"
        raise DataError(f"{name}: {fault}: expected {described}, got {got}. Download it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def sha256(array: np.ndarray) -> str:
    """Return the sha256 of the (decompressed) IDX file of an array."""
    header = struct.pack(f">HBB{array.ndim}I", 0, UNSIGNED_BYTE, array.ndim, *array.shape)
    digest = hashlib.sha256(header)
    digest.update(array.data)
    return digest.hexdigest()
