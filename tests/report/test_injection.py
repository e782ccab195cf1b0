"""No text in a run becomes markup, an attribute or a script of its page."""

import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from gradfn.pages.page import page
from gradfn.runs import Expectation, judge
from gradfn.runs.curve import Curve
from gradfn.runs.digit_net import DigitNet
from gradfn.runs.kept import Kept, Part
from gradfn.runs.rows import inspections, metrics, spikes

PAYLOADS = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='",
    "</style><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "<!--",
    "--><script>alert(1)</script>",
    "{{ 7 * 7 }}{% include 'style.css' %}",
    "javascript:alert(1)",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "&lt;script&gt;alert(1)&lt;/script&gt;&#x3c;",
    "]]><script>alert(1)</script>",
    "</textarea></select></table><base href=//x>",
)


def titled(title):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("Title", title)
    out = io.BytesIO()
    Image.new("RGB", (3, 3)).save(out, "png", pnginfo=info)
    return out.getvalue()


def a_run(folder, text, n):
    """Return a run of `n` rows with a text wherever a run can have one."""
    stats = {text: {"rms": 0.5}}
    look = {"sites": stats, "site_grads": stats, "grads": stats, "flags": {text: [text]}}
    shapes = {text: (2, 3)}
    part = Part(
        metrics([[{"step": i, text: 1.0, f"{text}loss": 2.0, f"{text}accuracy": 0.5} for i in range(n)]]),
        inspections([look | {"step": i} for i in range(n)], shapes),
        shapes,
        Curve([(1, 2.0)]),
        spikes([{"step": i, "text": text} for i in range(n)]),
    )
    params = {"W1": np.zeros([10, 784], np.float32), "b1": np.zeros(10, np.float32)}
    about = {"activation": "relu", "output": None, "loss": "quadratic", "data": text}
    return Kept(
        folder=folder,
        experiment=text,
        options={text: text, f"{text}s": [text, text]},
        versions={text: text, "seed": text},
        result={
            "outcome": judge(
                [Expectation(text, at_least=1, given=text), Expectation("x", at_least=1, unit=text)],
                {text: 2.0},
            )
        },
        parts={text: part, f"{text}2": part},
        pictures={text: titled(text), f"{text}bad": text.encode()},
        net=DigitNet(params, np.zeros([1, 784], np.float32), np.zeros(1, np.int32), None, about),
        pictures_left_out={text: text},
    )


class Markup(HTMLParser):
    """The tags of a page, the names of their attributes, and everything that is not a text of the run."""

    def __init__(self, html):
        super().__init__()
        self.found, self.scripts, self.comments = [], [], 0
        self._in = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        values = [value for name, value in attrs if name in ("href", "src", "class", "id", "style")]
        self.found.append((tag, [name for name, _ in attrs], values))
        self._in = tag

    def handle_endtag(self, tag):
        self.found.append(tag)
        self._in = None

    def handle_comment(self, data):
        self.comments += 1

    def handle_data(self, data):
        if self._in in ("script", "style"):
            self.scripts.append(data)


def plain(markup):
    """Return the part of a page that must not depend on texts: pictures contain their own titles."""
    tags = [
        tag
        if isinstance(tag, str)
        else (*tag[:2], ["" if v and v.startswith("data:") else v for v in tag[2]])
        for tag in markup.found
    ]
    return tags, markup.comments, [text for text in markup.scripts if not text.startswith("{")]


@pytest.mark.parametrize("n", [2, 310])
@pytest.mark.parametrize("two", [False, True])
def test_texts_of_a_run_stay_texts(tmp_path, n, two):
    (tmp_path / "config.json").write_text("{}")

    def of(text):
        run = a_run(tmp_path, text, n)
        return page([run, run] if two else [run])

    expected = plain(Markup(of("a text")))
    assert len(expected[0]) > 500
    for payload in PAYLOADS:
        html = of(payload)
        found = Markup(html)
        assert plain(found) == expected, payload
        nets = [json.loads(text) for text in found.scripts if text.startswith("{")]
        assert [net["data"] for net in nets] == [payload] * (1 + two)
        assert "49" not in html.partition("<h1")[2].partition("</h1>")[0]
