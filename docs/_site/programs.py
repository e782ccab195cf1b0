"""Files for programs that write code, and what the code of a page prints.

`llms.txt` (https://llmstxt.org) lists the pages; `llms-reference.txt` has every public name with its signature, below
the rules that `docs/programs.md` states.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path, PurePosixPath

import public

OUTPUT = "<!-- output -->"
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def files(root: Path, nav: list) -> dict[str, str]:
    """Return the texts by name, for a navigation as `mkdocs.yml` has it."""
    return {"llms.txt": index(root, nav), "llms-reference.txt": compact(root)}


def compact(root: Path) -> str:
    """Return the rules, then every public name with signature and summary, one per line."""
    page = (root / "docs" / "programs.md").read_text(encoding="utf-8")
    rules = page.split("\n## Rules\n")[1].split("\n## ")[0].strip()
    parts = []
    for name, entries in public.pages().items():
        lines = [f"{entry.signature}\n    {_plain(entry)}" for entry in entries]
        parts.append(f"## {public.TITLES[name]}\n\n" + "\n".join(lines))
    return (
        "# gradfn: every public name\n\n"
        f"{len(public.public_names())} names; `import gradfn as gf`. Types and defaults are those of the source.\n\n"
        f"## Rules\n\n{rules}\n\n" + "\n\n".join(parts) + "\n"
    )


def _plain(entry: public.Entry) -> str:
    also = f" Also {', '.join(entry.names[1:])}." if entry.names[1:] else ""
    return entry.summary + also


def index(root: Path, nav: list) -> str:
    """Return llms.txt: what gradfn is, and a link to each page of the navigation."""
    about = (root / "README.md").read_text(encoding="utf-8").split("\n\n")[1]
    lines = ["# gradfn", "", f"> {' '.join(about.split())}", ""]
    lines += ["- [Every public name, with the rules](llms-reference.txt)"]

    def add(items: list, depth: int = 0) -> None:
        for item in items:
            ((title, target),) = item.items() if isinstance(item, dict) else (("Overview", item),)
            if isinstance(target, list):
                lines.extend(["", f"## {title}", ""] if depth == 0 else [])
                add(target, depth + 1)
            else:
                lines.append(f"- [{title}]({target.removesuffix('.md')}.html)")

    add(nav)
    return "\n".join(lines) + "\n"


def with_output(markdown: str, source: PurePosixPath) -> str:
    """Return a page in which each mark `<!-- output -->` is replaced by what the code above it prints.

    The code blocks of a page that has such marks run in order, in one namespace, in this process.
    """
    if OUTPUT not in markdown:
        return markdown
    names: dict[str, object] = {"__name__": "__docs__"}
    out, position, printed = [], 0, ""
    for match in re.finditer(rf"{PYTHON.pattern}|^{re.escape(OUTPUT)}$", markdown, PYTHON.flags):
        out.append(markdown[position : match.start()])
        position = match.end()
        if match[0] == OUTPUT:
            assert printed.strip(), f"{source}: {OUTPUT} follows code that prints nothing"
            out.append(f"```text {{ .output }}\n{printed.rstrip()}\n```")
        else:
            out.append(match[0])
            printed = _run(match[1], source, names)
    return "".join([*out, markdown[position:]])


def _run(code: str, source: PurePosixPath, names: dict[str, object]) -> str:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "84"
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "example.py", "exec"), names)
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return printed.getvalue()
