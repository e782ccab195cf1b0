"""Checkpoints that are written while training continues."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO

from gradfn.files import replacing
from gradfn.layout import CHECKPOINT, CHECKPOINTS
from gradfn.tensors import Tensor, write_tensors
from gradfn.train import sharded
from gradfn.train.checkpoint import host_copy, metadata, tensors
from gradfn.train.log import Log
from gradfn.train.notes import Notes
from gradfn.train.processes import agreed, gathered, is_first
from gradfn.train.step import TrainState

# Writing checkpoints takes at most one part in this many of the time.
SHARE = 20
PIECE = 1 << 28  # bytes written, and flushed to the disk, at a time


class Saver:
    """Writes a run's checkpoints in a thread, one at a time, and rarely enough to cost little.

    A state stays in memory while it is being written. So `fit` runs one chunk of steps meanwhile, and waits before the
    next one, which would need memory for a third state.

    Args:
        log: of the run.
        seconds: the shortest time from one checkpoint to the next.
        copies: whether `fit` gives up a state's memory when it takes the next step, so that a copy on the host must be
            made before.
        folder: of the run, for every process; by default the log's. If there is none, nothing is written.
    """

    def __init__(self, log: Log, seconds: float, copies: bool = False, folder: Path | None = None) -> None:
        self.step: int | None = None  # of the last checkpoint that was started
        self._log, self._seconds, self._copies = log, seconds, copies
        self._folder = folder or log.folder
        self._ended, self._pause = time.monotonic(), seconds
        self._writing: threading.Event | None = None  # set when the checkpoint that is being written is done
        self._thread = threading.Thread()
        self._error: BaseException | None = None
        self._canceled = threading.Event()

    def due(self) -> bool:
        """Return whether it is time for the next checkpoint; process 0 decides, and every process must ask."""
        due = self._writing is None and time.monotonic() - self._ended >= self._pause
        return bool(agreed(due))

    def save(self, step: int, state: TrainState, notes: Notes) -> None:
        """Start to write a checkpoint, once the one before it is written.

        It is the folder `checkpoint` where the state is split over devices, which each process writes its part of,
        and one file otherwise, which process 0 writes.
        """
        self.wait()
        if self._folder is None:
            return
        self.step = step
        is_split = sharded.is_split(state)
        if is_split:
            write = sharded.begin(self._folder / CHECKPOINTS, step, state, asdict(notes))
        elif is_first():
            state = gathered(state)
            content = tensors(host_copy(state) if self._copies else state), metadata(asdict(notes), state)
            write = functools.partial(self._write_file, *content)
        else:
            return
        self._writing = threading.Event()
        arguments = (self._writing, write, is_split)
        self._thread = threading.Thread(target=self._write, args=arguments, name="gradfn checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is on the disk.

        Raises:
            OSError: it could not be written; the one before it still exists.
        """
        self._finish()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
                return
            if not issubclass(kind, Exception):  # a second signal
                self._canceled.set()
            self._finish()  # its own error must not replace the one that ended the run
        except BaseException:
            self._canceled.set()
            self._finish()
            raise

    def _finish(self) -> None:
        """Wait for the thread, if there is one.

        `Thread.join` is not enough: if a signal interrupts it, Python considers the thread finished. And a signal may
        arrive before the thread has started.
        """
        if self._writing is not None:
            while not self._writing.wait(timeout=1.0) and self._thread.is_alive():
                pass
            self._writing = None

    def _write(self, done: threading.Event, write: Callable[[], None], is_split: bool) -> None:
        assert self._folder
        began = time.monotonic()
        try:
            self._log.sync()  # the rows that the checkpoint refers to must be on the disk before it
            write()
            if is_first():
                # The older ones, of either kind.
                if is_split:
                    (self._folder / CHECKPOINT).unlink(missing_ok=True)
                sharded.tidy(self._folder / CHECKPOINTS, keep=int(is_split))
        except BaseException as error:
            self._error = error
        self._ended = time.monotonic()
        self._pause = max(self._seconds, SHARE * (self._ended - began))
        done.set()

    def _write_file(self, arrays: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
        assert self._folder
        with replacing(self._folder / CHECKPOINT) as out:
            write_tensors(_Pieces(out, self._canceled), arrays, notes, checksum=True)  # type: ignore[arg-type]


class _CanceledError(Exception):
    """A checkpoint that is no longer needed."""


class _Pieces:
    """A file that is flushed to the disk in pieces, so that a write can be canceled at any time without delay."""

    def __init__(self, out: IO[bytes], canceled: threading.Event) -> None:
        self._out, self._canceled = out, canceled
        self._since = 0  # bytes since the last flush to the disk

    def write(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            self._out.write(piece)
            self._since += len(piece)
            if self._since >= PIECE:
                self._out.flush()
                os.fsync(self._out.fileno())
                self._since = 0
            if self._canceled.is_set():
                raise _CanceledError
