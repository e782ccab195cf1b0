"""The pages of the reference: one per namespace and one per group of the flat names, each entry by mkdocstrings."""

from __future__ import annotations

import functools
import inspect
import types

import public


@functools.cache
def pages() -> dict[str, str]:
    """Return the Markdown of each page by its path."""
    made = {f"reference/{page}.md": _page(page, entries) for page, entries in public.pages().items()}
    return {"reference/index.md": _index(), **made}


def page_of_namespace(name: str) -> str:
    """Return the stem of the page of a namespace."""
    return name if name in public.TITLES else "core"


def _page(page: str, entries: list[public.Entry]) -> str:
    """Return a page: what its namespace is, a table of its entries, and the entries."""
    space = public.namespaces().get(page)
    title = public.TITLES[page]
    first = f"{_summary(space)}\n" if space else ""
    return (
        f"# {title} {{ #top }}\n\n{first}\n{_table(entries)}\n\n" + "\n\n".join(map(_entry, entries)) + "\n"
    )


def _entry(entry: public.Entry) -> str:
    # The anchors are the names that people type; mkdocstrings adds its own, `gradfn.inspect`, on the heading.
    anchors = "".join(f'<a id="{name}"></a>' for name in entry.names)
    also = [f"`{name}`" for name in entry.names[1:]]
    note = f"\n\nAlso as {', '.join(also)}.\n" if also else ""
    short = entry.name.rpartition(".")[2]
    return f"""{anchors}

::: {entry.path}
    options:
      heading: "{entry.name}"
      toc_label: "{short}"
{note}"""


def _table(entries: list[public.Entry]) -> str:
    rows = [
        f"| [{_code(entry.name.rpartition('.')[2])}](#{entry.name}) | {_cell(entry.summary)} |"
        for entry in entries
    ]
    return "\n".join(["| name | |", "|---|---|", *rows])


def _code(name: str) -> str:
    """Return a name as code that a narrow screen breaks after dots and underscores only."""
    return "<code>" + name.replace(".", ".<wbr>").replace("_", "_<wbr>") + "</code>"


def _index() -> str:
    """Return the page that lists every public name."""
    parts = []
    for page, entries in public.pages().items():
        rows = [
            f"| [{_code(entry.name)}]({page}.md#{entry.name}) | {_cell(entry.summary)} |" for entry in entries
        ]
        table = "\n".join(["| name | |", "|---|---|", *rows])
        parts.append(f"## [{public.TITLES[page]}]({page}.md)\n\n{table}")
    count = len(public.public_names())
    return (
        f"# Reference\n\nAll {count} public names: those of `gradfn/__init__.pyi` and of each namespace's `__all__`. "
        "Everything else is private to gradfn. In the examples, gradfn is imported as `gf`. "
        "Results print as tables, and have `to_dataframe()`.\n\n" + "\n\n".join(parts) + "\n"
    )


def _summary(space: types.ModuleType) -> str:
    return inspect.getdoc(space) or ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
