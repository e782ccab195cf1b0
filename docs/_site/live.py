"""The cards of live pages: `<!-- live digits moons -->` in a page becomes one card per name.

The pages are written by `docs/gallery/build.py`. A card leads to its page if that has been built, and otherwise shows
the command that builds it.
"""

from __future__ import annotations

import importlib.util
import re
from html import escape
from pathlib import Path
from types import ModuleType

MARK = re.compile(r"^<!-- live ([\w ]+) -->$", re.MULTILINE)


def with_cards(markdown: str, root: Path) -> str:
    """Return a page with cards instead of its marks."""
    if not MARK.search(markdown):
        return markdown
    gallery = _gallery(root)

    def cards(match: re.Match[str]) -> str:
        made = "".join(
            _card(name, gallery.EXAMPLES[name], root / "docs" / "gallery") for name in match[1].split()
        )
        return f'<div class="gf-cards">{made}</div>'

    return MARK.sub(cards, markdown)


def _card(name: str, example: object, folder: Path) -> str:
    picture = ""
    if (folder / f"{name}.png").exists():
        picture = f'<img class="gf-plain" src="gallery/{name}.png" alt="" width="960" height="600">'
    text = f"{picture}<b>{escape(example.title)}</b><span>{escape(example.text)}</span>"
    if (folder / f"{name}.html").exists():
        return f'<a class="gf-card" href="gallery/{name}.html">{text}</a>'
    return f'<div class="gf-card">{text}<code>python3 make.py gallery {name}</code></div>'


def _gallery(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gallery", root / "docs" / "gallery" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
