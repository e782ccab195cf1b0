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
MOST_DIMENSIONS = 32  # numpy's limit before its version 2
CHUNK = 1 << 20  # bytes read at a time
GZIP = b"\x1f\x8b"  # how gzip data start; IDX starts with two zeros


def read_idx(file: str | os.PathLike[str]) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzip-compressed or not.

    Memory grows with the data that are there, up to what the file's header says, whatever else a file contains.

    Args:
        file: its path. A name that ends in `.gz` must hold gzip data.

    Returns:
        An array uint8 of the shape that the file's header gives, [N, 28, 28] for MNIST's images.

    Raises:
        DataError: the file is missing, not a regular file, cut off, too long, empty or not IDX of unsigned bytes.

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
        name: what to call it in errors; where that ends in `.gz`, it must hold gzip data.
        limit: bytes that the (decompressed) data may have.
    """
    with data_errors(), open_regular(file) as content:
        start = content.read(16)
        content.seek(0)
        if not start:
            raise DataError(f"{name}: the file is empty. Fetch it again")
        if start[:2] != GZIP and name.endswith(".gz"):
            hint = "Decompressed already? Take .gz off its name" if start[:2] == b"\0\0" else "Fetch it again"
            raise DataError(f"{name}: not gzip data, though named .gz: it starts with {start!r}. {hint}")
        try:
            if start[:2] != GZIP:
                return parse(content, name, limit)
            with gzip.GzipFile(fileobj=content) as decompressed:
                return parse(decompressed, name, limit)
        except MemoryError as error:
            raise DataError(f"{name}: its data do not fit in memory") from error
        except (EOFError, OSError, zlib.error) as error:
            fault = "gzip data cut off or damaged" if start[:2] == GZIP else "cannot be read"
            raise DataError(f"{name}: {fault} ({error}). Fetch it again") from error


def parse(content: IO[bytes] | gzip.GzipFile, name: str, limit: int | None = None) -> np.ndarray:
    """Turn the (decompressed) content of an IDX file into an array: see `read`."""
    # Every dimension must be at least 1: then no single wrong byte in the header leads to a length that
    # fits, so damage is always seen.
    start = content.read(4)
    if len(start) < 4:
        raise DataError(f"{name}: cut off: {len(start)} bytes, not even an IDX header. Fetch it again")
    zeros, kind, ndim = struct.unpack(">HBB", start)
    if zeros != 0:
        raise DataError(f"{name}: not an IDX file: it starts with {start!r} and not with two zero bytes")
    if kind != UNSIGNED_BYTE:
        raise DataError(f"{name}: IDX data of type 0x{kind:02x}, where unsigned bytes (0x08) are expected")
    dimensions = content.read(4 * ndim)
    if len(dimensions) < 4 * ndim:
        length = 4 + len(dimensions)
        raise DataError(
            f"{name}: cut off: {length} bytes, the header alone needs {4 + 4 * ndim}. Fetch it again"
        )
    shape = struct.unpack(f">{ndim}I", dimensions)
    if ndim == 0 or 0 in shape:
        raise DataError(f"{name}: its IDX header describes an empty array, of shape {list(shape)}")
    if ndim > MOST_DIMENSIONS:
        raise DataError(f"{name}: expected at most {MOST_DIMENSIONS} dimensions, got {ndim}")
    expected = math.prod(shape)
    described = f"{' x '.join(map(str, shape))} = {expected:,} bytes of data"
    if limit is not None and expected > limit:
        raise DataError(f"{name}: expected at most {limit:,} bytes, but its header says {described}")
    # It grows with the data that are there, since a header may say anything.
    data = bytearray()
    while len(data) < expected and (piece := content.read(min(CHUNK, expected - len(data)))):
        data += piece
    rest = content.read(CHUNK) if len(data) == expected else b""
    if rest or len(data) < expected:
        got = f"{len(data) + len(rest):,}{' or more' if len(rest) == CHUNK else ''}"
        fault = "too long" if rest else "cut off"
        raise DataError(f"{name}: {fault}: its header says {described}, got {got}. Fetch it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def sha256(array: np.ndarray) -> str:
    """Return the sha256 of the (decompressed) IDX file that an array was read from."""
    header = struct.pack(f">HBB{array.ndim}I", 0, UNSIGNED_BYTE, array.ndim, *array.shape)
    digest = hashlib.sha256(header)
    digest.update(array.data)
    return digest.hexdigest()
