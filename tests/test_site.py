"""The documentation site: every public name is in it, no link is broken, and it works from a file without a network."""

from __future__ import annotations

import functools
import re
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import gradfn as gf
from tests.report.browser import CHROMIUM, browser

ROOT = Path(__file__).parents[1]
SITE = ROOT / "site"
built = pytest.mark.skipif(
    not (SITE / "index.html").exists(), reason="`python3 make.py docs` builds the site that this test opens"
)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH, to open the site in")


@pytest.fixture
def tools(monkeypatch):
    """The modules of `docs/_site`, which import one another by name."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "_site")
    import programs
    import public
    import reference

    yield types.SimpleNamespace(public=public, reference=reference, programs=programs)
    for name in ("public", "reference", "programs"):
        sys.modules.pop(name)


def listed():
    """Every public name, from the public lists."""
    names = {f"gf.{name}" for name in gf.__all__}
    for name in gf.__all__:
        if isinstance(getattr(gf, name), types.ModuleType):
            names |= {f"gf.{name}.{inner}" for inner in getattr(gf, name).__all__}
    return names


def test_the_reference_has_an_entry_for_every_public_name(tools):
    assert tools.public.public_names() == listed()
    text = "\n".join(tools.reference.pages().values())
    anchors = re.findall(r'<a id="(gf\.[\w.]+)"></a>', text)
    spaces = {f"gf.{name}" for name in tools.public.namespaces()}
    assert sorted(anchors) == sorted(listed() - spaces)


def test_the_compact_reference_has_every_public_name_and_the_rules(tools):
    text = tools.programs.compact(ROOT)
    assert f"{len(listed())} names" in text
    for name in listed():
        assert re.search(rf"^(.* Also .*)?{re.escape(name)}\b", text, re.MULTILINE), name
    rules = text.split("## Rules")[1].split("\n## ")[0]
    assert "gf.batch_mean(loss)` makes the loss of a batch" in rules
    for space in tools.public.namespaces():
        assert f"`gf.{space}`" in rules


def test_a_mark_is_replaced_by_what_the_code_above_it_prints(tools):
    page = "```python\nx = 1\n```\n\n```python\nprint(x + 1)\n```\n\n<!-- output -->\n"
    assert tools.programs.with_output(page, Path("page.md")).endswith("```text { .output }\n2\n```\n")
    with pytest.raises(AssertionError, match="prints nothing"):
        tools.programs.with_output("```python\nx = 1\n```\n<!-- output -->", Path("page.md"))


VERBATIM = ("code", "pre", "script", "style")


class Links(HTMLParser):
    """The anchors of a page, and what it refers to: as a link, or as one of its parts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.parts: set[str] = set()
        self.text: list[str] = []  # outside of code
        self.verbatim = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.verbatim += tag in VERBATIM
        values = dict(attrs)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag in ("script", "img", "iframe", "source") and values.get("src"):
            self.parts.add(values["src"])
        if values.get("href"):
            (self.parts if tag == "link" and values.get("rel") != "canonical" else self.links).add(
                values["href"]
            )

    def handle_endtag(self, tag):
        self.verbatim -= tag in VERBATIM

    def handle_data(self, data):
        if not self.verbatim:
            self.text.append(data)


@functools.cache
def parsed(file):
    return Links(file.read_text(encoding="utf-8"))


def pages():
    """Every page that mkdocs wrote; the live pages of the gallery have tests of their own."""
    skipped = {SITE / "gallery", SITE / "assets", SITE / "source"}
    return [file for file in sorted(SITE.rglob("*.html")) if not skipped & set(file.parents)]


@built
@pytest.mark.slow
def test_no_link_of_the_site_is_broken():
    broken = []
    for file in pages():
        if file.name == "404.html":  # its links start at the root of a server
            continue
        for link in parsed(file).links | parsed(file).parts:
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            target = (file.parent / unquote(path)).resolve() if path else file
            if not target.is_file() or (
                anchor and target.suffix == ".html" and unquote(anchor) not in parsed(target).anchors
            ):
                broken.append(f"{file.relative_to(SITE)}: {link}")
    assert not broken, "\n".join(broken)


@built
def test_no_link_is_left_as_text():
    """A line of a page that starts with `#1052](` becomes a heading, and the link around it is lost."""
    for file in pages():
        text = "".join(parsed(file).text)
        assert not re.search(r"\]\([^)\s]+\)", text), file.relative_to(SITE)


@built
def test_no_page_has_a_part_from_another_host():
    for file in pages():
        for part in parsed(file).parts:
            assert not re.match(r"(https?:)?//", part), f"{file.relative_to(SITE)}: {part}"


@built
def test_every_public_name_has_an_anchor_in_the_site(tools):
    where = {name: entry.page for entry in tools.public.entries() for name in entry.names}
    for name, page in where.items():
        found = parsed(SITE / "reference" / f"{page}.html").anchors
        assert {name, name.replace("gf.", "gradfn.", 1)} & found, name
        assert name in found, name


@built
@in_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1440, 390])
def test_search_and_pages_work_from_a_file(width):
    expected = {
        "per_example norms": "reference/per_example.html#gradfn.per_example.norms",
        "nan": "reference/inspection.html#gradfn.nan_",
        "hessian": "reference/curvature.html#gradfn.curvature.hessian_",
    }
    with browser() as chromium:
        context = chromium.new_context(viewport={"width": width, "height": 900}, offline=True)
        page, wrong = context.new_page(), []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None
        )
        for name in ("index.html", "reference/curvature.html", "gallery.html", "story.html"):
            page.goto((SITE / name).as_uri())
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        for query, found in expected.items():
            page.goto((SITE / "index.html").as_uri())
            if width < 960:
                page.locator("label.md-header__button[for=__search]").click()
            page.locator("input.md-search__input").click()
            # The search listens to keys, so setting the text alone does not start it.
            page.locator("input.md-search__input").press_sequentially(query)
            page.locator(".md-search-result__item").first.wait_for(timeout=60_000)
            page.wait_for_timeout(500)
            links = page.locator("a.md-search-result__link").evaluate_all("all => all.map(one => one.href)")
            assert any(found in re.sub(r"\?h=[^#]*", "", link) for link in links), (query, links)
        assert wrong == [], wrong
