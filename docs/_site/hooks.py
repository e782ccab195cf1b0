"""What the documentation site does beyond mkdocs: pages that are made at build time, links, and files for programs.

The guides are written for readers of the repository, so that their links to other files of it work there. Here these
links lead to the page, the source page or the copy that the site has of the file.
"""

from __future__ import annotations

import functools
import html
import os
import re
from pathlib import Path, PurePosixPath

import live
import notebooks
import programs
import public
import reference
import sources
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[2]
# Pages outside docs/, and where they are on the site.
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "experiments/README.md": "experiments.md",
}
# The home of the site is docs/index.md, so a link to the README leads there.
MOVED = {**OUTSIDE, "README.md": "index.md", "docs/gallery/README.md": "gallery.md"}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^()\s]+)(\))")
# Code is skipped before links are looked for: fenced blocks and spans.
CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for picture in (ROOT / "benchmarks" / "results").glob("*.png"):
        files.append(File.generated(config, f"benchmarks/results/{picture.name}", abs_src_path=str(picture)))
    for page, text in reference.pages().items():
        files.append(File.generated(config, page, content=text))
    for page, text in sources.pages(ROOT).items():
        files.append(File.generated(config, page, content=text))
    for name, content in _notebooks().items():
        files.append(File.generated(config, name, content=content))
    for name, text in programs.files(ROOT, config.nav).items():
        files.append(File.generated(config, name, content=text))
    return files


@functools.cache
def _notebooks() -> dict[str, str | bytes]:
    return notebooks.pages(ROOT)


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """Check that the reference in the navigation is complete: `mkdocs.yml` lists its pages by hand."""
    listed = {page.file.src_uri for page in nav.pages}
    missing = sorted(set(reference.pages()) - listed)
    if missing:
        raise ValueError(f"mkdocs.yml: nav has no {', '.join(missing)}: list it under Reference")
    return nav


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links to files of the repository, and insert what a page's own code prints."""
    source = _in_repository(page.file)
    if source is None:
        return markdown
    markdown = live.with_cards(programs.with_output(markdown, source), ROOT)
    code = [match.span() for match in CODE.finditer(markdown)]

    def rewritten(match: re.Match[str]) -> str:
        if any(start <= match.start() < stop for start, stop in code):
            return match[0]
        target = _link(match[2], source, page, files)
        return match[1] + target + match[3] if target else match[1].strip("[](")

    return LINK.sub(rewritten, markdown)


def _in_repository(file: File) -> PurePosixPath | None:
    """Return the path in the repository of a page's source; None for pages that are made here."""
    if not file.abs_src_path:
        return None
    path = Path(file.abs_src_path)
    return PurePosixPath(path.relative_to(ROOT).as_posix()) if path.is_relative_to(ROOT) else None


def _link(target: str, source: PurePosixPath, page: Page, files: Files) -> str:
    """Return the link on the site for a link that a file of the repository has to another one; of a folder, nothing."""
    path, _, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:|/", path):
        return target
    found = os.path.normpath((source.parent / path).as_posix()).replace(os.sep, "/")
    if (ROOT / found).is_dir():
        return ""
    names = (MOVED.get(found), re.sub(r"\.py$", ".md", found.removeprefix("docs/")), sources.page_of(found))
    inside = next((name for name in names if name and files.get_file_from_path(name)), None)
    if inside is None:
        return target  # mkdocs reports it
    moved = os.path.relpath(inside, PurePosixPath(page.file.src_uri).parent.as_posix() or ".")
    return moved.replace(os.sep, "/") + (f"#{anchor}" if anchor else "")


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn every public name in code into a link to its entry of the reference."""
    return _linked_names(content, page, files)


# What is inside a link or a heading stays; a name may be a code span, or three or more tokens of a code block.
TOKENS = re.compile(
    r"(?P<keep><a [^>]*href.*?</a>|<h[1-6].*?</h[1-6]>)|<code>(?P<span>gf\.[\w.]+)(?P<rest>\([^<]*\))?</code>"
    r'|<span class="n">gf</span>(?P<block>(?:<span class="o">\.</span><span class="n">\w+</span>)+)',
    re.DOTALL,
)


def _linked_names(content: str, page: Page, files: Files) -> str:
    where = _addresses()

    def address(name: str) -> str | None:
        """Return the address of the longest public name that a dotted name starts with."""
        while name not in where:
            name, _, last = name.rpartition(".")
            if not last:
                return None
        target, anchor = where[name]
        file = files.get_file_from_path(target)
        assert file is not None, target
        return get_relative_url(file.url, page.url) + f"#{anchor}"

    def linked(match: re.Match[str]) -> str:
        if match["keep"]:
            return match[0]
        name = match["span"] or "gf" + re.sub(r"<[^>]*>", "", match["block"])
        found = address(name)
        return f'<a class="gf-name" href="{html.escape(found)}">{match[0]}</a>' if found else match[0]

    return TOKENS.sub(linked, content)


def _addresses() -> dict[str, tuple[str, str]]:
    """Return the page and the anchor of each public name."""
    out = {
        name: (f"reference/{entry.page}.md", entry.name) for entry in public.entries() for name in entry.names
    }
    spaces = {
        f"gf.{name}": (f"reference/{reference.page_of_namespace(name)}.md", "")
        for name in public.namespaces()
    }
    return {**{name: (page, anchor or "top") for name, (page, anchor) in spaces.items()}, **out}
