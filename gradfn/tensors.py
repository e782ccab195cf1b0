"""Files of named arrays, in the safetensors format: written one array at a time, read with checks.

The format is a length (8 bytes), a JSON header that says of each array its dtype, shape and place, and the arrays'
bytes one after another: https://github.com/huggingface/safetensors. The library's own writer needs all bytes at once;
this one needs those of one array, so that saving a state does not double the memory that it takes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from gradfn.files import FileError, open_regular

# The names of dtypes in the format, by their names in numpy and ml_dtypes.
NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
}  # fmt: skip
DTYPES = {stored: name for name, stored in NAMES.items()}
CHECKSUM = "/checksum"  # no array has this name: paths in a tree do not start with a slash
BLOCK = 1 << 20  # bytes that are read at a time
HEADER_LIMIT = 100_000_000  # bytes, the limit of the format


class Tensor(NamedTuple):
    """An array to write: its dtype and shape, and a function that loads it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]


def write_tensors(
    out: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], checksum: bool = False
) -> None:
    """Write named arrays and their metadata to an open file.

    Args:
        out: where to; see `gradfn.files.replacing`.
        tensors: by name. Each is loaded when it is written, and not kept.
        metadata: texts by name.
        checksum: whether to add an array of that name at the end, four bytes that `verify` compares.

    Raises:
        ValueError: a header of more than 100 MB, which no reader would accept.

    >>> import io, safetensors.numpy
    >>> out, ones = io.BytesIO(), np.ones([2], np.float32)
    >>> write_tensors(out, {"a": Tensor(ones.dtype, ones.shape, lambda: ones)}, {"by": "me"})
    >>> safetensors.numpy.load(out.getvalue())
    {'a': array([1., 1.], dtype=float32)}
    """
    # The largest items first, so that every array is aligned to the size of its items, as memory maps need it.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        dtype, shape, _ = tensors[name]
        start, end = end, end + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": NAMES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    if checksum:
        header[CHECKSUM] = {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"the header would have {len(text):,} bytes, at most {HEADER_LIMIT:,} can be read")
    # [...] -> [bytes]
    arrays = (np.ascontiguousarray(tensors[name].load()).reshape(-1).view(np.uint8).data for name in names)
    crc = 0
    parts: Iterator[bytes | memoryview] = itertools.chain([struct.pack("<Q", len(text)), text], arrays)
    for data in parts:
        out.write(data)
        crc = zlib.crc32(data, crc) if checksum else 0
        del data  # free it before the next array is loaded
    if checksum:
        out.write(struct.pack("<I", crc))


def verify(file: str | os.PathLike[str]) -> None:
    """Compare a file's bytes with the checksum at its end (CRC-32), which detects damage by a disk or a copy.

    Raises:
        FileError: they do not match, or there is no checksum.
    """
    with open_tensors(file) as content:
        if CHECKSUM not in content.keys():  # noqa: SIM118
            raise FileError(f"{file}: has no checksum; it is damaged, or an earlier version wrote it")
    with open_regular(file) as content:
        left, crc = os.fstat(content.fileno()).st_size - 4, 0
        while left > 0 and (data := content.read(min(left, BLOCK))):
            crc, left = zlib.crc32(data, crc), left - len(data)
        if content.read(5) != struct.pack("<I", crc):
            raise FileError(f"{file}: damaged: its content does not match its checksum")


@contextlib.contextmanager
def open_tensors(file: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a safetensors file as `safetensors.safe_open` does; its errors become FileErrors.

    Raises:
        FileError: the file is missing, not a regular file, damaged, or has arrays of a dtype that numpy lacks.
    """
    from safetensors import SafetensorError, safe_open

    open_regular(file).close()  # a pipe would wait forever
    try:
        with safe_open(Path(file), "numpy") as content:
            yield content
    except FileError:
        raise
    except (
        OSError,
        SafetensorError,
        TypeError,
        AttributeError,
        KeyError,
        ValueError,
        OverflowError,
    ) as error:
        raise FileError(f"{file}: not a readable safetensors file ({error})") from error


@contextlib.contextmanager
def open_rows(file: str | os.PathLike[str]) -> Iterator[Callable[[str, int, int], np.ndarray]]:
    """Open a file that `open_tensors` accepts, to read parts of its arrays without mapping it into memory.

    Yields:
        `(name, start, stop)` -> the rows from `start` to `stop` of an array.

    Raises:
        FileError: the file is missing, not a regular file, or ends before its arrays do.
    """
    with open_regular(file) as content:
        (length,) = struct.unpack("<Q", content.read(8))
        header = json.loads(content.read(length))

        def rows(name: str, start: int, stop: int) -> np.ndarray:
            shape = header[name]["shape"]
            array = np.empty((stop - start, *shape[1:]), DTYPES[header[name]["dtype"]])
            row = array.itemsize * int(np.prod(shape[1:], dtype=np.int64))
            content.seek(8 + length + header[name]["data_offsets"][0] + start * row)
            if content.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:  # type: ignore[attr-defined]
                raise FileError(f"{file}: {name}: the file ends before it does")
            return array

        yield rows


def is_stored(dtype: Any) -> bool:
    """Return whether the format has a dtype."""
    return np.dtype(dtype).name in NAMES
