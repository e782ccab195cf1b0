"""Text for people: tables that show themselves under `print`, in a terminal and in a notebook."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


class TextTable(Table):
    """A `rich` table that `print` shows as text (a plain one shows its address)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(box=box.SIMPLE, caption_justify="left", **settings)

    def __str__(self) -> str:
        console = Console(width=1000, color_system=None)  # wide: a table is as wide as it needs to be
        with console.capture() as capture:
            console.print(self)
        lines = [line.rstrip() for line in capture.get().splitlines()]
        return "\n".join(line for line in lines if line)
