"""Where the wall time of a process goes: phases, and within each of them what jax takes to compile.

Code names its phase: `with phase("pictures"): ...`, or `@phase("data")` above a function. Nothing is measured outside
of `measured`. The phases exclude each other: an inner one does not count for the outer one, and neither does compiling.
So they and the rest add up to the time since the start.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

from gradfn.display import TextTable

REST = "the rest"
PHASES = ("import", "data", "compile", "training", "pictures", REST)


class Timings:
    """The time of each phase so far.

    Args:
        started: when the first phase, "import", started, in seconds as `time.time` returns them. It ends now.

    Attributes:
        seconds: of each of `PHASES`.
        programs: how many programs jax compiled, or loaded from its cache on the disk.
        loaded: how many of them it loaded.
    """

    def __init__(self, started: float) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.programs = self.loaded = 0
        self._since = started
        # The phases that the process is in; the time counts for the last one.
        self._inside = [REST, "import"]
        self._compiling: list[tuple[float, float]] = []
        self.leave()

    def enter(self, name: str) -> None:
        """Start a phase, inside the current one."""
        self.count()
        self._inside.append(name)

    def leave(self) -> None:
        """End the current phase."""
        self.count()
        self._inside.pop()

    def count(self) -> None:
        """Add the time until now to the current phase."""
        now = time.time()
        self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    def compiled(self, start: float, end: float) -> None:
        """Move an interval from the current phase to "compile", without the parts that were moved before.

        jax reports what a compilation contains, such as the traces of functions that a traced one calls, before it.
        """
        seconds = end - start
        while self._compiling and self._compiling[-1][0] >= start:
            inner_start, inner_end = self._compiling.pop()
            seconds -= inner_end - inner_start
        self._compiling.append((start, end))
        self.seconds[self._inside[-1]] -= seconds
        self.seconds["compile"] += seconds

    def table(self) -> TextTable:
        """Return the seconds and the share of each phase."""
        self.count()
        total = sum(self.seconds.values())
        caption = f"{self.programs - self.loaded} programs compiled, {self.loaded} loaded from the cache"
        out = TextTable(caption=caption)
        out.add_column("phase", footer="total")
        out.add_column("seconds", ".2f", footer=f"{total:.2f}")
        out.add_column("share", ".0%")
        for name, seconds in self.seconds.items():
            out.add_row(name, seconds, seconds / total)
        return out


_timings: Timings | None = None


@contextlib.contextmanager
def measured(started: float) -> Iterator[Timings]:
    """Measure the phases of the block, and give what came before it to "import".

    Args:
        started: when that started, as `time.time` returns it; see `process_started`.
    """
    global _timings
    from jax import monitoring

    timings = _timings = Timings(started)

    def on_event(event: str, **kwargs: str | int) -> None:
        timings.loaded += event == "/jax/compilation_cache/cache_hits"

    def on_time_span(event: str, start_time: float, end_time: float, **kwargs: str | int) -> None:
        timings.programs += event == "/jax/core/compile/backend_compile_duration"
        # Another thread that compiles does not keep this one from its phase.
        if event.startswith("/jax/core/compile/") and _in_main_thread():
            timings.compiled(start_time, end_time)

    monitoring.register_event_listener(on_event)
    monitoring.register_event_time_span_listener(on_time_span)
    try:
        yield timings
    finally:
        _timings = None
        monitoring.unregister_event_listener(on_event)
        monitoring.unregister_event_time_span_listener(on_time_span)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the time of the block, or of the decorated function, for one of `PHASES`.

    >>> @phase("data")
    ... def read() -> int:
    ...     return 3
    >>> read()
    3
    """
    timings = _timings
    if timings is None or not _in_main_thread():
        yield
        return
    timings.enter(name)
    try:
        yield
    finally:
        timings.leave()


def so_far() -> dict[str, float] | None:
    """Return the seconds of each phase so far; None where they are not measured."""
    if _timings is None:
        return None
    _timings.count()
    return dict(_timings.seconds)


def process_started() -> float:
    """Return when this process started, as `time.time` returns it; where the system does not say so, now."""
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            # Field 22 of proc(5), in clock ticks since the boot. The second one, a name, may contain spaces.
            ticks = int(file.read().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return time.time()
    return time.time() - age


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
