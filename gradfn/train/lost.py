"""Says in one sentence why jax ended one of several processes.

Where a process is lost, or where the processes do not meet, jax ends each of the others from a thread of its own, with
a log of several lines and `abort()`: no Python code runs there any more. So `gradfn.train.initialize` starts this file
as a program through which the process's stderr flows. It passes everything on at once, except for that log.
"""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable

# The first line of the log with which jax ends the process, and the last one before the stack trace.
FATAL = re.compile(rb"^F\d{4} .*Terminating process because the JAX distributed service", re.MULTILINE)
STACK = b"*** Check failure stack trace"
# Lines with which the log may start; those after them belong to it for this many seconds at most.
FIRST = re.compile(rb"^[WE]\d{4} \S+ +\d+ (coordination_service|preemption_sync_manager)")
SECONDS = 2.0
# The start of a line that may become one of these.
START = re.compile(rb"^[FWE](\d{0,4}|\d{4} .*)$")


def sentence(log: str, process: int, processes: int, address: str) -> str:
    """Return what happened, given jax's log of it.

    Args:
        log: from the line that matches `FATAL`.
        process: the index of the process that ended; -1 where it is not known.
        processes: how many there are; 0 where it is not known.
        address: of process 0; empty where it is not known.

    >>> print(sentence("... (stopped sending heartbeats):\\n1\\nThe tasks have crashed.", 0, 4, "10.0.0.1:1234"))
    process 0 of 4 ends because process 1 was lost: killed, ended by an error, or out of reach
    """
    me = "this process" if process < 0 else f"process {process}{f' of {processes}' if processes else ''}"
    where = f" at {address}" if address else ""
    if "newer incarnation" in log or "different incarnation" in log:
        return f"{me} ends because another process has the same index: each needs one of its own, from 0"
    if "RegisterTask" in log or "Wait_for_all_tasks" in log:
        if process == 0:
            return f"{me} ends because the others did not all reach it{where}"
        return f"{me} ends because process 0{where} cannot be reached, or another process did not reach it"
    if listed := re.search(r"stopped sending heartbeats\):\s*\n((?:.*\d+\s*\n)+)", log):
        lost = re.findall(r"(\d+)\s*$", listed[1], re.MULTILINE)
    elif named := re.search(r"Task .*?(\d+) heartbeat timeout", log):
        lost = [named[1]]
    elif any(part in log for part in ("Failed to send RPC", "Socket closed", "/Heartbeat", "UNAVAILABLE")):
        lost = ["0"]
    else:
        reason = " ".join(log.partition("absl::Status:")[2].split())
        return f"{me} ends because another process has ended ({reason[:300]})"
    if str(process) in lost:
        return (
            f"{me} ends because process 0 got no sign of life of it in time: it was too busy, or out of reach"
        )
    names = f"process {lost[0]} was" if len(lost) == 1 else f"processes {', '.join(lost)} were"
    return f"{me} ends because {names} lost: killed, ended by an error, or out of reach"


class Filter:
    """Passes text on, except for the log with which jax ends a process.

    Args:
        explain: from that log to the sentence to write instead.
    """

    def __init__(self, explain: Callable[[str], str]) -> None:
        self._explain = explain
        self._line = b""  # that has not ended
        self._held: bytes | None = None  # what may be the start of the log
        self._since = 0.0
        self._fatal: bytes | None = None
        self._done = False

    def feed(self, data: bytes) -> bytes:
        """Take some more text; return what to write now."""
        *lines, self._line = (self._line + data).split(b"\n")
        out = b"".join(self._next(line + b"\n") for line in lines)
        # What cannot be the start of jax's log is not kept waiting: a progress bar has no ends of lines.
        if self._line and self._held is None and self._fatal is None and not START.match(self._line):
            out, self._line = out + self._line, b""
        return out

    def late(self, end: bool = False) -> bytes:
        """Return what need not be held any longer; all of it at the end of the text."""
        if self._fatal is not None:
            return self._finished() if end else b""
        if self._held is not None and (end or time.monotonic() - self._since > SECONDS):
            held, self._held = self._held, None
            return held + (self._take_line() if end else b"")
        return self._take_line() if end else b""

    def _take_line(self) -> bytes:
        line, self._line = self._line, b""
        return line

    def _next(self, line: bytes) -> bytes:
        if self._fatal is not None:
            if line.startswith(STACK):
                return self._finished()
            self._fatal += line
            return b""
        if FATAL.match(line):
            self._fatal, self._held = line, None
            return b""
        if self._held is None and FIRST.match(line):
            self._held, self._since = b"", time.monotonic()
        if self._held is not None:
            self._held += line
            return b""
        return line

    def _finished(self) -> bytes:
        if self._done or self._fatal is None:
            return b""
        self._done = True
        return f"gradfn: {self._explain(self._fatal.decode(errors='replace'))}\n".encode()


def main(process: int, processes: int, address: str) -> None:
    """Pass stdin on to stderr until it ends, or until the process that started this one does."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = os.getppid()
    text = Filter(lambda log: sentence(log, process, processes, address))
    while True:
        alive = os.getppid() == parent
        ready, _, _ = select.select([0], [], [], 0.5 if alive else 0.0)
        data = os.read(0, 1 << 16) if ready else b""
        ended = bool(ready and not data) or not (alive or ready)
        out = text.feed(data) + text.late(end=ended)
        while out:
            out = out[os.write(2, out) :]
        if ended:
            return


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
