"""SIGINT (Ctrl-C, a notebook's interrupt), SIGTERM and SIGHUP, deferred until a run can stop."""

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
from gradfn.train.processes import largest


class Stop:
    """Whether a signal arrived, in this process or in another one that trains with it.

    Attributes:
        signal: its number; None if none arrived in this process.
        message: printed when the block has ended because of it.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.message = ""
        self._agreed: int | None = None

    def agree(self) -> bool:
        """Return whether a signal has arrived in any process; each of them calls this at the same point."""
        self._agreed = largest(self.signal or 0) or None
        return self._agreed is not None

    @property
    def number(self) -> int | None:
        """The number of the signal that ends the block; None where none does."""
        return self.signal if self.signal is not None else self._agreed

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise console.end_of(number)
        self.signal = number


@contextlib.contextmanager
def deferred(active: bool) -> Iterator[Stop]:
    """Report the first signal to the block, which ends when it can; a second signal ends it at once.

    Handlers are set in the main thread, and restored at the end. Signals that are ignored, or that are handled
    outside Python, are left alone.

    Args:
        active: whether to defer signals at all.

    Raises:
        KeyboardInterrupt: at the end of the block, for SIGINT.
        SystemExit: for SIGTERM and SIGHUP, with 128 plus their number; the program's own handler, if any, is called
            first.
    """
    stop, previous = Stop(), {}
    main = threading.current_thread() is threading.main_thread()
    if active and main and console.raised is not None:
        raise console.end_of(console.raised)
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
    if (ended := stop.number) is not None:
        handler = previous.get(ended)
        # The command line prints its own message.
        if stop.message and handler is not console.stop:
            # The error of a closed pipe must not replace the signal.
            with contextlib.suppress(OSError, ValueError):
                print(stop.message, file=sys.stderr, flush=True)
        _call(handler, ended)
        raise console.end_of(ended)


def _call(handler: Any, number: int) -> None:
    """Call the program's own handler for a signal, if any."""
    if callable(handler) and handler is not signal.default_int_handler:
        handler(number, inspect.currentframe())
