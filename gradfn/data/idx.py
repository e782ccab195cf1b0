"""The IDX file format of MNIST and its relatives, as described on http://yann.lecun.com/exdb/mnist."""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from gradfn.data.dataset import DataError

UNSIGNED_BYTE = 0x08


def read_idx(file: str | os.PathLike[str]) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzip-compressed or not.

    Args:
        file: its path. A name that ends in `.gz` must hold gzip data.

    Returns:
        An array uint8 of the shape that the file's header gives, [N, 28, 28] for MNIST's images.

    Raises:
        DataError: the file is missing, cut off, too long, empty or not IDX of unsigned bytes.

    >>> import gradfn as gf
    >>> import pathlib, struct, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "labels")
    ...     _ = file.write_bytes(struct.pack(">HBBI", 0, 8, 1, 3) + bytes([7, 2, 1]))
    ...     gf.data.read_idx(file)
    array([7, 2, 1], dtype=uint8)
    """
    return parse(contents(Path(file)), file)


def contents(file: Path) -> bytes:
    """Return a file's bytes, decompressed, or raise a DataError that names it."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{file}: there is no such file") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    return decompress(data, file)


def decompress(data: bytes, file: str | os.PathLike[str]) -> bytes:
    """Decompress gzip data; `file` is for the message, and by its name says whether gzip is a must."""
    if not data:
        raise DataError(f"{file}: the file is empty. Fetch it again")
    if data[:2] == b"\x1f\x8b":  # gzip's mark; IDX starts with two zeros
        try:
            return gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{file}: gzip data cut off or damaged ({error}). Fetch it again") from error
    if str(file).endswith(".gz"):
        hint = "Decompressed already? Take .gz off its name" if data[:2] == b"\0\0" else "Fetch it again"
        raise DataError(f"{file}: not gzip data, though named .gz: it starts with {data[:16]!r}. {hint}")
    return data


def parse(data: bytes, file: str | os.PathLike[str]) -> np.ndarray:
    """Turn the (decompressed) bytes of an IDX file into an array; `file` is for the message."""
    # Every dimension must be at least 1: then no single wrong byte in the header leads to a length that
    # fits, so damage is always seen.
    if len(data) < 4:
        raise DataError(f"{file}: cut off: {len(data)} bytes, not even an IDX header. Fetch it again")
    zeros, kind, ndim = struct.unpack_from(">HBB", data)
    if zeros != 0:
        raise DataError(f"{file}: not an IDX file: it starts with {data[:4]!r} and not with two zero bytes")
    if kind != UNSIGNED_BYTE:
        raise DataError(f"{file}: IDX data of type 0x{kind:02x}, where unsigned bytes (0x08) are expected")
    start = 4 + 4 * ndim
    if len(data) < start:
        raise DataError(f"{file}: cut off: {len(data)} bytes, the header alone needs {start}. Fetch it again")
    shape = struct.unpack_from(f">{ndim}I", data, 4)
    if ndim == 0 or 0 in shape:
        raise DataError(f"{file}: its IDX header describes an empty array, of shape {list(shape)}")
    expected, came = math.prod(shape), len(data) - start
    if came != expected:
        what = "cut off" if came < expected else "too long"
        raise DataError(
            f"{file}: {what}: its header says {' x '.join(map(str, shape))} = {expected:,} bytes of data, "
            f"{came:,} came. Fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()  # a copy can be written to
