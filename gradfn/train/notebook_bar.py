"""The progress of a run in a notebook: one line that is redrawn where it stands, and stays when the run ends."""

from __future__ import annotations

import html
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

# Seconds between two drawings: each is a message to the browser.
EVERY = 0.1


def in_notebook() -> bool:
    """Return whether what is printed appears in the cell of a notebook."""
    return type(sys.stdout).__module__ == "ipykernel.iostream"


class NotebookBar:
    """A progress bar with the methods of `rich.progress.Progress` that a log uses.

    The line is a display of IPython that is replaced by its identifier. Frontends keep the last version alone, so a
    saved notebook holds one line per run, however long it was.

    Attributes:
        last: the line that stays when the run ends; None for the one that was shown last.
    """

    def __init__(self) -> None:
        self.last: str | None = None
        self._text, self._left = "", ""
        self._completed, self._total = 0, 1
        self._handle: Any = None
        self._drawn = -EVERY

    @property
    def console(self) -> Console:
        """Where lines that stay are printed: the cell, which has room for long ones."""
        from rich.console import Console

        return Console(file=sys.stdout, width=200, force_jupyter=False, color_system=None, soft_wrap=True)

    def add_task(self, description: str, *, total: int, completed: int, left: str) -> TaskID:
        """Show the line for the first time."""
        from rich.progress import TaskID

        self._total = total
        self.update(TaskID(0), completed=completed, description=description, left=left)
        return TaskID(0)

    def update(self, task: TaskID, *, completed: int, description: str, left: str) -> None:
        """Replace the line, unless it was just replaced."""
        self._completed, self._text, self._left = completed, description, left
        if time.monotonic() - self._drawn >= EVERY:
            self._draw(ended=False)

    def __enter__(self) -> NotebookBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last line without the bar."""
        self._draw(ended=True)

    def _draw(self, ended: bool) -> None:
        from IPython.display import display

        text = self._text.replace(f"step {self._completed:,} ", f"step {self._completed:,}/{self._total:,} ")
        if ended:
            text, bar = self.last or text, ""
        else:
            text += f", {self._left} left"
            bar = f'<progress value="{self._completed}" max="{self._total}" style="width: 12em"></progress> '
        shown = {
            "text/plain": text,
            "text/html": f'<div style="font-variant-numeric: tabular-nums">{bar}{html.escape(text)}</div>',
        }
        self._drawn = time.monotonic()
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)
