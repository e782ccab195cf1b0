"""The source of gradfn as pages with an anchor per line, so that source links work without a network.

They are plain HTML, not pages of mkdocs: they would fill the search and the navigation.
"""

from __future__ import annotations

import functools
import subprocess
from html import escape
from pathlib import Path, PurePosixPath

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound

SHOWN = ("*.py", "*.pyi", "pyproject.toml", ".ci/run", "LICENSE", "CITATION.cff")


@functools.cache
def pages(root: Path) -> dict[str, str]:
    """Return the page of each tracked source file by its path on the site."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *SHOWN],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return {page_of(name): _page(root / name, name) for name in names if (root / name).exists()}


def page_of(name: str) -> str:
    """Return the path on the site of a file of the repository."""
    return f"source/{name}.html"


def _page(file: Path, name: str) -> str:
    text = file.read_text(encoding="utf-8")
    try:
        lexer = get_lexer_for_filename(name)
        # Each line is an element `L12` with a number that links to it.
        formatter = HtmlFormatter(
            linenos="inline", linespans="L", anchorlinenos=True, lineanchors="A", classprefix=""
        )
        body = highlight(text, lexer, formatter)
    except ClassNotFound:
        body = f"<pre>{escape(text)}</pre>"
    # `L-12` is pygments' own form.
    body = body.replace('id="L-', 'id="L').replace('href="#A-', 'href="#L')
    up = "../" * len(PurePosixPath(page_of(name)).parent.parts)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)} · gradfn</title>
<link rel="icon" href="{up}assets/logo.svg">
<link rel="stylesheet" href="{up}assets/source.css">
<header><a href="{up}index.html">gradfn</a> <span>{escape(name)}</span></header>
<main>{body}</main>
</html>
"""
