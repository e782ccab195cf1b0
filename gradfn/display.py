"""Text for people: tables that show themselves under `print`, in a terminal and in a notebook."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


class TextTable:
    """A table that becomes a `rich` one when it is shown, so that `import gradfn` need not wait for rich.

    `settings` and what `add_column` and `add_row` take are those of `rich.table.Table`.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.columns: list[tuple[str, dict[str, Any]]] = []
        self.rows: list[tuple[str, ...]] = []

    def add_column(self, header: str, **settings: Any) -> None:
        """Add a column."""
        self.columns.append((header, settings))

    def add_row(self, *cells: str) -> None:
        """Add a row, one cell a column."""
        self.rows.append(cells)

    def __rich__(self) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE, caption_justify="left", title_justify="left", **self.settings)
        for header, settings in self.columns:
            table.add_column(header, **settings)
        for row in self.rows:
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=1000, color_system=None)  # wide: a table is as wide as it needs to be
        with console.capture() as capture:
            console.print(self)
        lines = [line.rstrip() for line in capture.get().splitlines()]
        return "\n".join(line for line in lines if line)

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        return self.__rich__()._repr_mimebundle_(*args, **kwargs)


def to_json(content: Any, indent: int | None = None) -> str:
    """Return JSON that every reader takes: NaN and infinities, which JSON does not have, are null.

    >>> to_json({"loss": float("nan"), "rows": [1.0, float("inf")]})
    '{"loss": null, "rows": [1.0, null]}'
    """

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(inner) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(content), indent=indent, allow_nan=False)


def reading_order(name: str) -> list[Any]:
    """Return a key that sorts names as a reader would: by number, then weights before biases.

    >>> sorted(["b1", "W10", "W1", "blocks/10/W", "W2", "blocks/2/W"], key=reading_order)
    ['W1', 'b1', 'W2', 'W10', 'blocks/2/W', 'blocks/10/W']
    """
    *scopes, leaf = map(_numbered, name.split("/"))
    return [*((1, *scope) for scope in scopes), (0, *leaf[::-1])]


def _numbered(part: str) -> tuple[str, int]:
    stem = part.rstrip("0123456789")
    return stem, int(part[len(stem) :] or 0)
