"""Scalars for TensorBoard, written at once.

The writer of tensorboardX has a queue and a thread, which end in tracebacks, and in a program that hangs, when the disk
is full; its import takes that of torch, where torch is installed. A file of scalars needs little of its format
(https://www.tensorflow.org/tensorboard): records with checksums, each an `Event` in the encoding of protocol buffers.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

# Fields of the messages in event.proto and summary.proto.
EVENT_TIME, EVENT_STEP, EVENT_VERSION, EVENT_SUMMARY, EVENT_SESSION = 1, 2, 3, 5, 7
SUMMARY_VALUE, VALUE_TAG, VALUE_SCALAR, SESSION_STATUS = 1, 1, 2, 1
SESSION_START = 1
# How a field is encoded.
VARINT, BITS_64, BYTES, BITS_32 = 0, 1, 2, 5


class Events:
    """A new file of events in a folder; TensorBoard ignores events of `step` and later steps in older files."""

    def __init__(self, folder: Path, step: int) -> None:
        # TensorBoard reads files in alphabetical order.
        self.file = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._out = self.file.open("xb")
        start = _integer(SESSION_STATUS, SESSION_START)
        try:
            self._append(
                _record(_bytes(EVENT_VERSION, b"brain.Event:2"))
                + _record(_integer(EVENT_STEP, step) + _bytes(EVENT_SESSION, start))
            )
        except BaseException:
            self.close()
            raise

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append a scalar for each name.

        Raises:
            OSError: they cannot be written; the error names the file.
        """
        summary = b"".join(
            _bytes(SUMMARY_VALUE, _bytes(VALUE_TAG, _tag(name)) + _float(VALUE_SCALAR, value))
            for name, value in values.items()
        )
        self._append(_record(_integer(EVENT_STEP, step) + _bytes(EVENT_SUMMARY, summary)))

    def close(self) -> None:
        """Close the file; all events are in it already."""
        with contextlib.suppress(OSError):  # of events that could not be written, which raised one already
            self._out.close()

    def _append(self, data: bytes) -> None:
        try:
            self._out.write(data)
            self._out.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.file)) from error


def _tag(name: str) -> bytes:
    """Return a name as TensorBoard takes it."""
    return re.sub(r"[^-/\w.]", "_", name).lstrip("/").encode()


def _record(content: bytes) -> bytes:
    """Return an event with these fields and the current time, between its length and checksums."""
    data = struct.pack("<Bd", EVENT_TIME << 3 | BITS_64, time.time()) + content
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3 | VARINT) + _varint(value)


def _float(field: int, value: float) -> bytes:
    try:
        number = struct.pack("<f", value)
    except OverflowError:  # beyond float32
        number = struct.pack("<f", float("inf") if value > 0 else -float("inf"))
    return _varint(field << 3 | BITS_32) + number


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Return an integer >= 0 in groups of 7 bits, the lowest first; all but the last have the high bit set."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def masked_crc(data: bytes) -> int:
    """Return the masked CRC-32C of TensorFlow's records.

    >>> hex(masked_crc(b"123456789"))  # CRC-32C: 0xe3069283, RFC 3720
    '0xc78ab0e5'
    """
    crc, table = 0xFFFFFFFF, _crc_table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _crc_table() -> list[int]:
    """Return the CRC-32C of each byte, before the final inversion."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table
