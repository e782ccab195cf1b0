"""How results show themselves: one table, which fits where it is printed, and one mixin for every result type.

A result type that derives from `ShowsTable` says what its table is; `print`, a terminal, a notebook and pandas
then all show that table:

    >>> class Ages(ShowsTable):
    ...     def table(self, rows: int | None = ROWS) -> TextTable:
    ...         out = TextTable("Ages")
    ...         out.add_column("name")
    ...         out.add_column("age")
    ...         out.add_row("Ada", 36)
    ...         return out
    >>> Ages()
    Ages
      name   age
     ────────────
      Ada     36
"""

from __future__ import annotations

import html
import json
import math
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

# A longer table is folded to this many rows.
ROWS = 30
# Names and source lines are shortened to READABLE characters before a column is dropped, to SHORTEST after that.
READABLE, SHORTEST = 20, 8
# How HTML aligns a column. Notebooks align every cell to the right and wrap it, unless its style says otherwise; the
# attribute survives where styles are removed.
NUMBER = {"th": 'align="right"', "td": 'align="right" style="white-space:nowrap"'}
TEXT = {"th": 'style="text-align:left"', "td": 'style="text-align:left;white-space:nowrap"'}


@dataclass(frozen=True)
class Column:
    """A column of a `TextTable`.

    Attributes:
        header: its title, also in a data frame.
        form: how numbers are written, as in `format(number, form)`.
        drop: 0 for a column that is always shown; where a table is too wide, the highest go first.
        shorten: whether its texts may lose their middle: `blocks/0/…/gain`. Those of `"line"` are source lines, such
            as `model.py:18 (Net.__call__)`, which lose the function first and keep the number.
        footer: what stands below its cells.
    """

    header: str
    form: str = ""
    drop: int = 0
    shorten: bool | Literal["line"] = False
    footer: str = ""


class TextTable:
    """A table of values that is written out when it is shown, as wide as there is room for.

    `print` uses the width of the terminal, or of the environment variable `COLUMNS`, or 80. Where a table is wider,
    names are shortened, then whole columns are dropped and listed below; numbers are never cut. A notebook and
    `to_dataframe` show every column.

    Args:
        title: a line above the table.
        caption: lines below it.
    """

    def __init__(self, title: str = "", caption: str = "") -> None:
        self.title, self.caption = title, caption
        self.columns: list[Column] = []
        self.rows: list[tuple[Any, ...]] = []
        self.weights: list[float] = []

    def add_column(
        self,
        header: str,
        form: str = "",
        *,
        drop: int = 0,
        shorten: bool | Literal["line"] = False,
        footer: str = "",
    ) -> None:
        """Add a column: see `Column`."""
        self.columns.append(Column(header, form, drop, shorten, footer))

    def add_row(self, *cells: Any, weight: float = 0) -> None:
        """Add a row, one value per column; None is an empty cell. Rows of the largest weight outlast folding."""
        self.rows.append(cells)
        self.weights.append(weight)

    def folded(self, rows: int | None, rest: str) -> TextTable:
        """Return the same table with at most that many rows, and a last line that says how to see the others.

        Args:
            rows: how many rows stay, those of the largest weight, in their order; None for all.
            rest: the call that shows all of them, for instance `"norms.table(rows=None)"`.
        """
        if rows is None or len(self.rows) <= rows:
            return self
        heaviest = sorted(range(len(self.rows)), key=lambda i: -self.weights[i])[:rows]
        note = f"{len(self.rows) - rows:,} of {len(self.rows):,} rows are not shown: {rest} lists them"
        out = TextTable(self.title, "\n".join(filter(None, [self.caption, note])))
        out.columns = self.columns
        for i in sorted(heaviest):
            out.add_row(*self.rows[i], weight=self.weights[i])
        return out

    def to_dataframe(self) -> pandas.DataFrame:
        """Return the rows as a pandas data frame, numbers unrounded.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError("to_dataframe needs pandas: pip install pandas") from None
        return pandas.DataFrame(self.rows, columns=[column.header for column in self.columns])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        width = options.max_width
        widths = self._fitted(width)
        table = Table(box=box.SIMPLE, show_footer=any(column.footer for column in self.columns))
        for k, size in widths.items():
            column = self.columns[k]
            table.add_column(
                Text(column.header),
                Text(column.footer),
                justify="right" if self._is_numeric(k) else "left",
                no_wrap=True,
                min_width=size,
            )
        for row in self.rows:
            texts = {k: _text(row[k], self.columns[k].form) for k in widths}
            cells = [_shortened(texts[k], size, self.columns[k].shorten) for k, size in widths.items()]
            table.add_row(*map(Text, cells))
        if self.title:
            yield Text(self.title)
        yield table
        hidden = [k for k in range(len(self.columns)) if k not in widths and any(self._texts(k))]
        dropped = ", ".join(self.columns[k].header for k in hidden)
        note = f"not shown in {width} columns: {dropped}" if dropped else ""
        for line in filter(None, [*self.caption.splitlines(), note]):
            yield from map(Text, textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False))

    def _cells(self, k: int) -> list[Any]:
        return [row[k] for row in self.rows]

    def _is_numeric(self, k: int) -> bool:
        cells = [cell for cell in self._cells(k) if cell is not None]
        return bool(cells) and all(map(_is_number, cells))

    def _texts(self, k: int) -> list[str]:
        column = self.columns[k]
        return [column.footer, *[_text(cell, column.form) for cell in self._cells(k)]]

    def _fitted(self, width: int) -> dict[int, int]:
        """Return the columns that fit into a width, by number, and how wide each is."""
        from rich.cells import cell_len

        texts = {k: self._texts(k) for k in range(len(self.columns))}
        full = {k: max(map(cell_len, [self.columns[k].header, *texts[k]])) for k in texts}
        # A column without a single text is left out, unless the table has no rows at all.
        shown = [k for k in texts if any(texts[k]) or not self.rows]

        def widths(least: int) -> dict[int, int]:
            """Shorten as much as is needed and allowed, the last columns first: the first one has the names."""
            out = {k: full[k] for k in shown}
            for k in reversed(shown):
                # Three more for each column, for the space between them, and one for the margin.
                excess = sum(out.values()) + 3 * len(out) + 1 - width
                shortest = max(least, cell_len(self.columns[k].header))
                if self.columns[k].shorten and excess > 0:
                    out[k] = max(out[k] - excess, min(shortest, out[k]))
            return out

        def fits(least: int) -> bool:
            return sum(widths(least).values()) + 3 * len(shown) + 1 <= width

        while not fits(READABLE) and any(self.columns[k].drop for k in shown):
            shown.remove(max(shown, key=lambda k: (self.columns[k].drop, k)))
        return widths(READABLE if fits(READABLE) else SHORTEST)

    def __str__(self) -> str:
        from rich.console import Console

        width = shutil.get_terminal_size((80, 24)).columns
        # With soft_wrap, a table that cannot be made to fit is not cut. In a notebook, rich would display what it
        # captures as an empty output.
        console = Console(width=width, color_system=None, soft_wrap=True, force_jupyter=False)
        with console.capture() as capture:
            console.print(self)
        lines = [line.rstrip() for line in capture.get().splitlines()]
        return "\n".join(line for line in lines if line)

    def __repr__(self) -> str:
        return str(self)

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": self.to_html()}

    def to_html(self) -> str:
        """Return the table as HTML, with all columns that are not empty.

        Colors and fonts are those of the page around it: a notebook, light or dark, or a site.
        """
        columns = [k for k in range(len(self.columns)) if not self.rows or any(self._texts(k))]
        form = {k: NUMBER if self._is_numeric(k) else TEXT for k in columns}

        def line(kind: str, texts: Mapping[int, str]) -> str:
            cells = (f"<{kind} {form[k][kind]}>{html.escape(texts[k])}</{kind}>" for k in columns)
            return f"<tr>{''.join(cells)}</tr>"

        head = line("th", {k: self.columns[k].header for k in columns})
        body = "".join(
            line("td", {k: _text(row[k], self.columns[k].form) for k in columns}) for row in self.rows
        )
        foot = line("th", {k: self.columns[k].footer for k in columns})
        foot = f"<tfoot>{foot}</tfoot>" if any(column.footer for column in self.columns) else ""
        title = f'<caption style="text-align:left">{html.escape(self.title)}</caption>' if self.title else ""
        table = f"<table>{title}<thead>{head}</thead><tbody>{body}</tbody>{foot}</table>"
        below = "".join(f"<p>{html.escape(text)}</p>" for text in self.caption.splitlines())
        return f'<div style="overflow-x:auto;font-variant-numeric:tabular-nums">{table}{below}</div>'


class ShowsTable:
    """Mixin of result types that show themselves as tables: under `print`, in a terminal, in a notebook, to pandas.

    A subclass says what its table is; a dataclass is declared with `repr=False`. Inside `jit`, `vmap` and
    `jax.eval_shape`, where there are no values yet, the text says so.
    """

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return the result as a table of at most that many rows; None for all."""
        raise NotImplementedError

    def tables(self) -> list[TextTable]:
        """Return what `print` shows."""
        return [self.table()]

    def to_dataframe(self) -> pandas.DataFrame:
        """Return all rows of the table as a pandas data frame."""
        return self.table(rows=None).to_dataframe()

    def __str__(self) -> str:
        return _abstract(self) or "\n".join(map(str, self.tables()))

    def __repr__(self) -> str:
        return str(self)

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        return _abstract(self) or Group(*self.tables())

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        shown = {"text/plain": str(self)}
        return (
            shown if _abstract(self) else shown | {"text/html": "".join(t.to_html() for t in self.tables())}
        )


def array_table(title: str, arrays: Any) -> TextTable:
    """Return a table with one row per array of a tree: its shape, smallest and largest element."""
    import jax

    out = TextTable(title)
    out.add_column("array", shorten=True)
    for header in ("shape", "smallest", "largest"):
        out.add_column(header)
    for path, array in jax.tree_util.tree_leaves_with_path(arrays):
        if hasattr(array, "shape"):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            out.add_row(name, array.shape, *extremes(array))
    return out


def extremes(array: Any) -> tuple[Any, Any]:
    """Return the smallest and the largest element of an array; None where it has no order or no elements."""
    import jax.numpy as jnp

    ordered = any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))
    return (array.min().item(), array.max().item()) if ordered and array.size else (None, None)


def _abstract(result: Any) -> str:
    """Return what to print of a result that has no values yet, empty for any other."""
    import jax

    leaves = jax.tree.leaves(result)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return f"{type(result).__name__} (being traced: return it from jit to print it)"
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return f"{type(result).__name__} (shapes and dtypes only)"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _text(value: Any, form: str) -> str:
    if value is None:
        return ""
    if isinstance(value, (bool, str)):
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
    if isinstance(value, Integral):
        return format(int(value), form or ",")
    if isinstance(value, Real):
        return format(float(value), form or ".3g")
    return str(list(value)) if isinstance(value, (list, tuple)) else str(value)


def _shortened(text: str, size: int, how: bool | Literal["line"] = True) -> str:
    """Return a text of at most that many characters; its middle goes, for both ends tell names apart.

    >>> _shortened("model.py:18 (Net.__call__)", 20, "line"), _shortened("model.py:18", 8, "line")
    ('model.py:18', 'mod…y:18')
    """
    if how == "line" and len(text) > size:
        text = text.partition(" (")[0]
    if len(text) <= size:
        return text
    head = (size - 1) // 2
    return f"{text[:head]}…{text[len(text) - (size - 1 - head) :]}"


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


def is_weight(path: str, shape: Sequence[int]) -> bool:
    """Tell whether an array counts as weights: it has two or more axes and its name is not `bias`.

    >>> is_weight("conv/weight", [6, 1, 3, 3]), is_weight("conv/bias", [6, 1, 1]), is_weight("b1", [16])
    (True, False, False)
    """
    return len(shape) > 1 and path.rpartition("/")[2] != "bias"


def parameter_table(
    arrays: Iterable[tuple[str, Sequence[int], str, int]],
    state: Sequence[tuple[str, Sequence[int], str, int, str]] = (),
) -> TextTable:
    """Return the table that `gf.table` documents.

    Args:
        arrays: the name, shape, dtype and bytes per value of each.
        state: the same of arrays that are not parameters, with the kind of each.
    """
    rows = sorted(arrays, key=lambda row: reading_order(row[0]))
    sizes = [math.prod(shape) for _, shape, _, _ in rows]
    size_bytes = [size * itemsize for size, (_, _, _, itemsize) in zip(sizes, rows, strict=True)]
    weights = sum(
        size for size, (name, shape, _, _) in zip(sizes, rows, strict=True) if is_weight(name, shape)
    )
    caption = f"{weights:,} weights + {sum(sizes) - weights:,} biases = {sum(sizes):,} parameters"
    if state:
        n = sum(math.prod(shape) for _, shape, *_ in state)
        caption += f"; state, which is not counted: {n:,} values in {len(state)} arrays"
    out = TextTable(caption=caption)
    out.add_column("path", footer="parameters" if state else "total", shorten=True)
    out.add_column("shape")
    out.add_column("dtype", footer=f"{len(rows)} arrays", drop=1)
    out.add_column("count", footer=f"{sum(sizes):,}")
    out.add_column("bytes", footer=f"{sum(size_bytes):,}", drop=2)
    if state:
        out.add_column("state")
    for (name, shape, dtype, _), size, n_bytes in zip(rows, sizes, size_bytes, strict=True):
        out.add_row(name, shape, dtype, size, n_bytes, *([""] if state else []))
    for name, shape, dtype, itemsize, kind in sorted(state, key=lambda row: reading_order(row[0])):
        size = math.prod(shape)
        out.add_row(name, shape, dtype, size, size * itemsize, kind)
    return out


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
