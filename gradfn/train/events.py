"""Scalars, histograms and images for TensorBoard, written at once.

The writer of tensorboardX has a queue and a thread, which end in tracebacks, and in a program that hangs, when the disk
is full. So only its format of events is used here: https://www.tensorflow.org/tensorboard.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from gradfn.train.logged import histogram_edges


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

    def add(
        self,
        step: int,
        scalars: Mapping[str, float],
        histograms: Mapping[str, np.ndarray] | None = None,
        images: Mapping[str, bytes] | None = None,
    ) -> None:
        """Append what there is of a step.

        Args:
            step: the number of the step.
            scalars: by name.
            histograms: by name, as `row_histograms` returns them.
            images: by name, as PNG.

        Raises:
            OSError: they cannot be written; the error names the file.
        """
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        values += [
            Summary.Value(tag=name, histo=_histogram(counts)) for name, counts in (histograms or {}).items()
        ]
        values += [Summary.Value(tag=name, image=_image(data)) for name, data in (images or {}).items()]
        if values:
            self._append(_record(step=step, summary=Summary(value=values)))

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


def _histogram(counts: Sequence[float] | np.ndarray) -> Any:
    """Return the histogram of binary logarithms of magnitudes; a bin counts as its center in the sums."""
    from tensorboardX.proto.summary_pb2 import HistogramProto

    edges, n = histogram_edges(), np.asarray(counts, np.float64)
    centers, used = (edges[:-1] + edges[1:]) / 2, np.flatnonzero(n)
    low, high = (edges[used[0]], edges[used[-1] + 1]) if len(used) else (0.0, 0.0)
    return HistogramProto(
        min=low,
        max=high,
        num=n.sum(),
        sum=n @ centers,
        sum_squares=n @ np.square(centers),
        # TensorBoard takes the first bound to be that of an open bin.
        bucket_limit=edges.tolist(),
        bucket=[0.0, *n.tolist()],
    )


def _image(data: bytes) -> Any:
    from tensorboardX.proto.summary_pb2 import Summary

    width, height = struct.unpack(">II", data[16:24])  # in a PNG's header
    return Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=data)


def _record(**content: PyTree) -> bytes:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data = Event(wall_time=time.time(), **content).SerializeToString()
    length = struct.pack("<Q", len(data))
    checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(checks) + data + next(checks)
