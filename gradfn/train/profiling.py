"""A trace of some steps of a run, by jax's profiler: what the device and the host did, and when."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from gradfn.files import inner_folder
from gradfn.layout import PROFILE
from gradfn.train.processes import is_first


class Profile:
    """The steps of a run that are traced.

    Args:
        steps: the first step that is traced, and the one before which the trace ends; None traces nothing.
        total: the number of steps of the run.
        folder: of the run.

    Raises:
        ValueError: the steps are not two increasing integers within the run, or there is no folder.
    """

    def __init__(self, steps: Sequence[int] | None, total: int, folder: Path | None) -> None:
        self.edges: tuple[int, ...] = () if steps is None else _checked(steps, total)
        if steps is not None and folder is None:
            raise ValueError("fit: profile_steps needs a folder to write the trace into. Pass folder=...")
        self._folder = folder
        self._running = False

    def edges_after(self, step: int) -> list[int]:
        """Return the steps after this one at which a chunk must end."""
        return [edge for edge in self.edges if edge > step]

    def at(self, step: int) -> None:
        """Start the trace before its first step, and end it before the step after its last."""
        if not self.edges:
            return
        first, end = self.edges
        if first <= step < end and not self._running and is_first():
            assert self._folder
            jax.profiler.start_trace(str(inner_folder(self._folder, PROFILE)))
            self._running = True
        elif step >= end:
            self._stop()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """End the trace when the block ends, however it does."""
        try:
            yield
        finally:
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def _checked(steps: Any, total: int) -> tuple[int, int]:
    integers = isinstance(steps, Sequence) and len(steps) == 2 and all(type(step) is int for step in steps)
    if not (integers and 0 <= steps[0] < steps[1] <= total):
        raise ValueError(
            f"fit: profile_steps must be two steps, the first and the one after the last, with "
            f"0 <= first < end <= {total}, got {steps!r:.60}. Pass profile_steps=(10, 20)"
        )
    return steps[0], steps[1]
