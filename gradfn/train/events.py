"""Scalars for TensorBoard, written at once.

The writer of tensorboardX has a queue and a thread, which end in tracebacks, and in a program that hangs, when the disk
is full. So only its format of events is used here: https://www.tensorflow.org/tensorboard.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from jaxtyping import PyTree


class Events:
    """A new file of events in a folder; TensorBoard ignores events of `step` and later steps in older files."""

    def __init__(self, folder: Path, step: int) -> None:
        # TensorBoard reads files in alphabetical order.
        self.file = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._out = self.file.open("xb")
        try:
            from tensorboardX.proto.event_pb2 import SessionLog

            start = SessionLog(status=SessionLog.START)
            self._append(_record(file_version="brain.Event:2") + _record(step=step, session_log=start))
        except BaseException:
            self.close()
            raise

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append a scalar for each name.

        Raises:
            OSError: they cannot be written; the error names the file.
        """
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import scalar

        summary = Summary(value=[one for name, value in values.items() for one in scalar(name, value).value])
        self._append(_record(step=step, summary=summary))

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


def _record(**content: PyTree) -> bytes:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data = Event(wall_time=time.time(), **content).SerializeToString()
    length = struct.pack("<Q", len(data))
    checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(checks) + data + next(checks)
