"""Pages in a real browser: Chromium without a window, driven by Playwright."""

from __future__ import annotations

import contextlib
import shutil
import time

import pytest

from gradfn.pages.page import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH, to run the page in")
# Functions for the scripts that run in the page.
HELPERS = """
const plain = (value) =>
  ArrayBuffer.isView(value) ? Array.from(value)
  : Array.isArray(value) ? value.map(plain)
  : value && typeof value === "object" ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, plain(v)]))
  : value;
const find = (selector) => document.querySelector(selector);
const text = (selector) => find(selector).innerText.replace(/\\s+/g, " ").trim();
"""


@contextlib.contextmanager
def browser():
    """Start the browser, and stop it: Playwright runs an event loop in this thread, beside which no other can run."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


@contextlib.contextmanager
def opened(tmp_path, kept, width=1280, dark=False, touch=False, hash_="", about=None, html=None):
    """Open the page of some runs, without a network; assert at the end that nothing went wrong in it.

    Args:
        tmp_path: where to write the page.
        kept: the runs.
        width: of the window, in pixels.
        dark: whether the system prefers dark colors.
        touch: whether the screen is one to touch.
        hash_: of the address, `"#live-0/..."`.
        about: descriptions of the experiments.
        html: the page itself, instead of that of runs.

    Yields:
        Playwright's page, once its networks run.
    """
    file = tmp_path / "page.html"
    file.write_text(page(kept, about or {}) if html is None else html)
    with browser() as started:
        context = started.new_context(
            viewport={"width": width, "height": 900 if width > 640 else 844},
            color_scheme="dark" if dark else "light",
            has_touch=touch,
            is_mobile=touch,
            offline=True,
            reduced_motion="reduce",
        )
        context.set_default_timeout(30_000)
        found, wrong = context.new_page(), []
        found.on("console", lambda message: wrong.append(message.text))
        found.on("pageerror", lambda error: wrong.append(str(error)))
        found.on(
            "request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None
        )
        found.goto(file.as_uri() + hash_)
        until(found, "window.ready")
        yield found
        assert wrong == [], wrong


def until(page, condition, timeout=30):
    """Wait until a condition in JavaScript holds in a page; Playwright's own waiting needs `eval`, which pages forbid.

    Args:
        page: Playwright's.
        condition: an expression.
        timeout: in seconds.
    """
    end = time.monotonic() + timeout
    while not page.evaluate(f"() => Boolean({condition})"):
        assert time.monotonic() < end, f"after {timeout} s still not true: {condition}"
        page.wait_for_timeout(20)


def in_page(tmp_path, kept, script, **inputs):
    """Run a script in the page of some runs; return what its function `result` returns."""
    with opened(tmp_path, kept) as found:
        return found.evaluate(
            f"async (inputs) => {{ {HELPERS}{script}\nreturn plain(await result()); }}", inputs
        )
