"""The process around a command: a signal ends it with one line, and a failing output does not stop it."""

from __future__ import annotations

import _thread
import contextlib
import gc
import os
import signal
import sys
import threading
import time

TYPE_CHECKING = False  # typing's own would be imported before signals are handled, which must not take long
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import Any, NoReturn

    Handler = Callable[[int, FrameType | None], Any]

# The signals that may end a command, and the message for each. The exit code is 128 plus the signal's number.
SIGNALS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
ENDED = {128 + getattr(signal, name): message for name, message in SIGNALS.items() if hasattr(signal, name)}


# The signal that `stop` raised an exception for. A finalizer or another callback may have swallowed the exception.
raised: int | None = None


def numbers() -> list[int]:
    """Return the numbers of `SIGNALS` that this system has."""
    return [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]


def stop(number: int, frame: FrameType | None = None) -> None:
    """Handle a signal as Python does Ctrl-C, by an exception (SystemExit for others); the next one ends at once."""
    global raised
    if _ignores_exceptions(frame):
        # threading.Timer takes locks, which the interrupted code may hold.
        _thread.start_new_thread(_send_again, (number,))
        return
    raised = number
    handle(stop_at_once)
    raise end_of(number)


def end_of(number: int) -> BaseException:
    """Return the exception that ends a process after a signal: KeyboardInterrupt, or SystemExit with 128 plus it."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def _ignores_exceptions(frame: FrameType | None) -> bool:
    """Tell whether a frame is in a finalizer or a callback (of the garbage collector, as jax has, or a weak reference).

    Python prints exceptions there, and continues.
    """
    callbacks = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    while frame is not None:
        code = frame.f_code
        # The callbacks of weak sets and dictionaries are in weakref.py and _weakrefset.py.
        if code in callbacks or code.co_name == "__del__" or "weakref" in code.co_filename:
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    time.sleep(0.01)
    os.kill(os.getpid(), number)


def stop_at_once(number: int, frame: FrameType | None = None) -> NoReturn:
    """Handle a signal where an exception could surface anywhere, as in an import: print a line, and end the process."""
    with contextlib.suppress(OSError):
        os.write(2, f"gradfn: {ENDED[128 + number]}\n".encode())
    os._exit(128 + number)


def handle(handler: Handler) -> dict[int, Any]:
    """Handle the signals of `SIGNALS` from now on; return what handled them before.

    Those that the process ignores (under nohup, say) stay ignored, and outside of the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.getsignal(number) for number in numbers()}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    return before


@contextlib.contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Handle the signals of `SIGNALS` during the block: see `handle`.

    Raises:
        KeyboardInterrupt, SystemExit: after a signal, also where the interrupted code replaced `stop`'s exception by
            another, as NumPy does in an import that fails for whatever reason (by an ImportError).
    """
    global raised
    before = handle(handler)
    try:
        yield
    except Exception as error:
        if raised is not None:
            raise end_of(raised) from error
        raise
    finally:
        raised = None
        for number, old in before.items():
            signal.signal(number, old)


def exit_code(end: KeyboardInterrupt | SystemExit) -> int:
    """Return the exit code of an exception; the text that a SystemExit may carry is printed."""
    if isinstance(end, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def leave(code: int) -> NoReturn:
    """End the process with an exit code, after Ctrl-C at once.

    After a Ctrl-C while Python executed a string, as it does to make a dataclass, the interpreter would end itself by
    SIGINT on exit, even where the exception was handled.
    """
    if code == 128 + signal.SIGINT:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


STYLES = {"bold": "1", "red": "31"}


def styled(text: str, style: str) -> str:
    """Return a text for the standard output in bold or red, if that shows colors: see https://no-color.org."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if shows_colors(sys.stdout) else text


def shows_colors(stream: Any) -> bool:
    """Return whether to color what is written to a stream.

    `NO_COLOR` forbids colors and `FORCE_COLOR` demands them, also in a pipe; otherwise terminals that are not dumb
    show them.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and is_terminal(stream)


def is_terminal(stream: Any) -> bool:
    """Return whether a stream, which may be missing or closed, is a terminal."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


class Output:
    """A stream of text that replaces what it cannot encode, and drops what it cannot write.

    Attributes:
        stream: the wrapped stream; None where there is none.
        broken: whether writing has failed; nothing more is written then.
    """

    def __init__(self, stream: Any) -> None:
        self.stream, self.broken = stream, stream is None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text, as far as that is possible."""
        if not self.broken:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding or "ascii"
                self.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError):  # a closed pipe, a full disk; a closed stream
                self.broken = True
        return len(text)

    def flush(self) -> None:
        """Flush the stream, as far as that is possible."""
        if not self.broken:
            try:
                self.stream.flush()
            except (OSError, ValueError):
                self.broken = True


@contextlib.contextmanager
def optional(name: str) -> Iterator[None]:
    """Drop what the block prints where it cannot be written; `name` is `"stdout"` or `"stderr"`."""
    stream = getattr(sys, name)
    output = Output(stream)
    setattr(sys, name, output)
    try:
        yield
    finally:
        output.flush()
        if output.broken:
            discard(stream)
        setattr(sys, name, stream)


def discard(stream: Any) -> None:
    """Redirect a stream that cannot be written to the null device, so that flushing it on exit does not fail."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def open_missing_streams() -> None:
    """Give a process that was started without its standard streams (`>&-`) ones that lead nowhere.

    Otherwise the next file that it opens takes the number of the missing one, and what libraries print, such as
    XLA's log, goes into that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
