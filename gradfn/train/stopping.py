"""SIGINT (Ctrl-C, a notebook's interrupt), SIGTERM and SIGHUP, at a moment when a run can stop."""

from __future__ import annotations

import contextlib
import inspect
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from gradfn import console


class Stop:
    """Whether a signal came.

    Attributes:
        signal: its number; None where none came.
        message: what to say when the block has ended because of it.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.message = ""

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise _end(number)
        self.signal = number


@contextlib.contextmanager
def deferred(active: bool) -> Iterator[Stop]:
    """Let the first signal be known to the block, which ends when it can, and the second one end it at once.

    Handlers are those of the main thread, and are restored at the end. Signals that are ignored, or that other
    software handles outside of Python, are left to that.

    Args:
        active: whether to do so at all.

    Raises:
        KeyboardInterrupt: at the block's end, for SIGINT.
        SystemExit: for SIGTERM and SIGHUP, with 128 more than their number; the program's own handler is called
            first, where it has one.
    """
    stop, previous = Stop(), {}
    main = threading.current_thread() is threading.main_thread()
    try:
        for number in console.numbers() if active and main else ():
            handler = signal.getsignal(number)
            if handler not in (None, signal.SIG_IGN):
                previous[number] = handler
                signal.signal(number, stop._handle)
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stop.signal is not None:
        # The command line tells how to go on in its own words.
        if stop.message and previous[stop.signal] is not console.stop:
            with contextlib.suppress(OSError, ValueError):  # a closed pipe must not replace the signal
                print(stop.message, file=sys.stderr, flush=True)
        _call(previous[stop.signal], stop.signal)
        raise _end(stop.signal)


def _call(handler: Any, number: int) -> None:
    """Call the handler that the program itself has for a signal, if any."""
    if callable(handler) and handler is not signal.default_int_handler:
        handler(number, inspect.currentframe())


def _end(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
