"""Charts as SVG: what a file may contain, the colors that the page shows it in, and that a hostile one does nothing."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from gradfn.pages import figures, svg
from gradfn.pages.figures import confusion, curves, save_all, weight_images
from gradfn.pages.page import page
from gradfn.pages.pictures import Picture, PictureError, fitting, read_picture
from gradfn.pages.svg import SVGError, read_svg
from gradfn.runs.kept import read_run
from tests.report.browser import needs_browser, opened
from tests.report.test_page import picture, text_of, write_run

PLAIN = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="300pt" height="2in" '
    'viewBox="0 0 300 144">'
)


def drawing(content="", start=PLAIN, before=""):
    return f"{before}{start}{content}</svg>".encode()


def tiny(width, height):
    out = io.BytesIO()
    Image.new("RGB", (1, 1)).save(out, "png")
    data = out.getvalue()
    data = data[:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + data[24:]
    return f'<image xlink:href="data:image/png;base64,{base64.b64encode(data).decode()}"/>'


LAUGHS = '<defs><path id="g0" d="M0 0"/>' + "".join(
    f'<g id="g{i + 1}">{f"""<use xlink:href="#g{i}"/>""" * 10}</g>' for i in range(9)
)
ENTITIES = '<!DOCTYPE svg [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
HOSTILE = {
    "script": (drawing("<script>alert(1)</script>"), "has an element 'script'"),
    "event": (drawing(start=PLAIN[:-1] + ' onload="alert(1)">'), "has an attribute 'onload'"),
    "inner event": (drawing('<g onClick="alert(1)"/>'), "has an attribute 'onClick'"),
    "a page inside": (drawing("<foreignObject/>"), "has an element 'foreignObject'"),
    "html": (drawing('<script xmlns="http://www.w3.org/1999/xhtml"/>'), "has an element 'script'"),
    "another image": (drawing('<image href="https://example.com/a.png"/>'), "not a PNG inside of it"),
    "an SVG inside": (drawing('<image href="data:image/svg+xml;base64,AAAA"/>'), "not a PNG inside of it"),
    "no image": (drawing('<image href="data:image/png;base64,AAAA"/>'), "an image that is damaged"),
    "a large image": (drawing(tiny(100_000, 100_000)), "more than 25,000,000 pixels"),
    "many large images": (drawing(tiny(4000, 4000) * 2), "more than 25,000,000 pixels"),
    "another drawing": (drawing('<use href="other.svg#a"/>'), "refers to another file"),
    "paint from elsewhere": (drawing('<g style="fill: url(//example.com/#a)"/>'), "refers to another file"),
    "escaped": (drawing('<g style="fill: u\\72l(//example.com/#a)"/>'), "with an escape"),
    "a style sheet": (drawing("<style>@import '//example.com'</style>"), "has a style sheet"),
    "a style sheet of the file": (
        drawing(before='<?xml-stylesheet href="//example.com/a.css"?>'),
        "has a processing instruction",
    ),
    "entities": (drawing("&b;", before=ENTITIES), "declares an entity"),
    "a file": (drawing("&a;", before='<!DOCTYPE svg [<!ENTITY a SYSTEM "/etc/passwd">]>'), "declares an entity"),
    "a billion paths": (drawing(LAUGHS + '</defs><use xlink:href="#g9"/>'), "draws more than 100,000"),
    "a circle of references": (drawing('<g id="a"><use href="#a"/></g>'), "or refers to itself"),
    "a thousand levels": (drawing("<g>" * 1000 + "</g>" * 1000), "more than 60 elements inside each other"),
    "an animation": (drawing('<animate attributeName="x"/>'), "has an element 'animate'"),
    "not closed": (drawing()[:-6], "is not XML"),
    "not UTF-8": (drawing("<text>\u00e9</text>").decode().encode("latin-1"), "is not XML"),
    "another kind": (b"<html></html>", "is not SVG: its first element is 'html'"),
    "no size": (drawing(start=PLAIN.replace(' width="300pt"', "")), "has no width in pixels"),
    "a relative size": (drawing(start=PLAIN.replace("2in", "100%")), "has no height in pixels"),
    "no viewBox": (drawing(start=PLAIN.replace("viewBox", "box")), "has no viewBox"),
    "too many pixels": (drawing(start=PLAIN.replace("2in", "9999999in")), "expected at most 25,000,000 pixels"),
    "nothing drawn": (drawing(start=PLAIN.replace("2in", "0")), "expected at most 25,000,000 pixels"),
    "too many bytes": (drawing(" " * svg.MAX_BYTES), "expected at most 1,000,000 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_drawing_that_is_not_shown_says_why(name):
    data, why = HOSTILE[name]
    with pytest.raises(PictureError, match=re.escape(why)):
        read_picture(data)


def test_a_drawing_has_a_size_and_a_title():
    assert read_svg(drawing()) == (400, 192, "")
    titled = drawing("<title>  a &lt;b&gt;\n c</title><g><title>another</title></g>")
    assert read_svg(titled) == (400, 192, "a <b> c")
    long = read_picture(drawing(f"<title>{'x' * 100_000}</title>"))
    assert (long.kind, len(long.title)) == ("svg+xml", 1000)
    with pytest.raises(SVGError, match="is not XML"):
        read_svg(b"")


def test_charts_are_also_written_as_svg_with_texts_and_images_are_not(tmp_path):
    history = [{"step": 1, "loss": 2.3, "validation_loss": 2.0}, {"step": 9, "loss": 1.3}]
    made = {
        "curves": curves(history),
        "confusion": confusion([0, 1, 1], [0, 1, 0]),
        "weights": weight_images(np.ones([4, 784])),
    }
    (tmp_path / "weights.svg").write_text("of an earlier run")
    assert [file.name for file in save_all(made, tmp_path, "a < b")] == [f"{name}.png" for name in made]
    assert {file.name for file in tmp_path.iterdir()} == {
        *(f"{name}.png" for name in made), "curves.svg", "confusion.svg",
    }  # fmt: skip
    for name in ("curves", "confusion"):
        data = (tmp_path / f"{name}.svg").read_bytes()
        found = read_picture(data)
        with Image.open(tmp_path / f"{name}.png") as png:
            assert found.title == " ".join(png.info["Title"].split())
            assert found.width / found.height == pytest.approx(png.width / png.height, rel=0.03)
        assert len(data) < figures.MAX_CHART
    text = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert ">training step<" in text.replace("\n", "")
    before = (tmp_path / "curves.svg").read_bytes()
    save_all({"curves": curves(history)}, tmp_path, "a < b")
    assert before == (tmp_path / "curves.svg").read_bytes()


def test_a_chart_of_too_many_marks_is_png_alone(tmp_path):
    figure = figures.new_figure(4, 3)
    points = np.random.default_rng(0).normal(size=[2, 20_000])
    figure.subplots().plot(*points, "o")
    save_all({"dots": figure}, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["dots.png"]


def run_with(tmp_path, files):
    folder = write_run(tmp_path / "run")
    for file in folder.glob("*.png"):
        file.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return read_run(folder)


def test_the_page_prefers_a_drawing_and_falls_back_on_its_png(tmp_path):
    png = picture(np.random.default_rng(0), 40)
    good, bad = drawing("<title>good</title>"), HOSTILE["script"][0]
    run = run_with(
        tmp_path, {"a.png": png, "a.svg": good, "b.png": png, "b.svg": bad, "c.svg": good, "d.svg": bad}
    )
    html = page([run])
    shown = re.findall(r'<img( class="drawing")? src="data:image/([^;]*);', html)
    assert shown == [(' class="drawing"', "svg+xml"), ("", "png"), (' class="drawing"', "svg+xml")]
    text = text_of(html)
    assert "b.svg: has an element 'script', which charts do not need" in text
    assert "d.svg: has an element 'script'" in text


def test_without_room_a_drawing_becomes_its_png_or_is_left_out():
    still = read_picture(picture(np.random.default_rng(0), 40))
    large = read_picture(drawing(f"<desc>{'x' * 50_000}</desc>"))
    both, alone = large._replace(still=still), large
    found, left_out = fitting({"both": both, "alone": alone}, 20_000)
    assert found["both"].kind == "png"
    assert left_out == {"alone": "the page would be too large"}
    assert fitting({"both": both, "alone": alone}, 10**6)[0] == {"both": both, "alone": alone}


def pixels(shot):
    with Image.open(io.BytesIO(shot)) as image:
        return np.asarray(image.convert("RGB"), int)


# What each color of the page is, by the style sheet.
COLORS = """() => Object.fromEntries(["--raised", "--ink", "--c0", "--c1"].map((name) => {
  const probe = document.createElement("i");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color.match(/\\d+/g).map(Number);
  probe.remove();
  return [name, found];
}))"""


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_charts_have_the_colors_of_the_page_in_light_and_dark(tmp_path, width):
    history = [{"step": i, "loss": 2.3 - i / 9, "validation_loss": 1.9} for i in range(9)]
    figure = curves(history)
    figure.axes[0].texts[-1].set_fontsize(40)
    figure.axes[0].text(4, 0.1, "\u2588" * 6)  # black where nothing else is written
    for line in figure.axes[0].lines:  # thick, so that a small picture has pixels of its color alone
        line.set_linewidth(8)
    save_all({"chart": figure}, tmp_path)
    chart = (tmp_path / "chart.svg").read_bytes()
    run = run_with(tmp_path, {"chart.svg": chart, "photo.png": picture(np.random.default_rng(0), 40)})
    with opened(tmp_path, [run], width=width) as found:
        image = found.locator(".pictures img.drawing")
        for theme in ("light", "dark", "light"):
            assert found.locator("html").get_attribute("data-theme") == theme
            found.wait_for_function(
                "[...document.images].every((image) => image.complete && image.naturalWidth)"
            )
            colors = found.evaluate(COLORS)
            shot = pixels(image.screenshot()).reshape(-1, 3)
            shares = {name: (np.abs(shot - color).max(1) <= 3).mean() for name, color in colors.items()}
            assert shares["--raised"] > 0.7
            assert all(shares[name] > 1e-4 for name in ("--ink", "--c0", "--c1"))
            assert (shot.mean() > 128) == (theme == "light")
            # The name of the second line is darker than the line on light paper, and like the line on dark paper.
            label = (np.abs(shot - (0xB3, 0x4F, 0x00)).max(1) <= 3).any()
            assert label == (theme == "light")
            assert image.evaluate("(image) => getComputedStyle(image).filter") == "none"
            found.click("#theme")
        # In dark mode, enlarged by the keyboard, it is dark, too.
        found.locator(".enlarge:has(.drawing)").focus()
        found.keyboard.press("Enter")
        large = found.locator("#large img")
        assert pixels(large.screenshot()).mean() < 80
        found.keyboard.press("Escape")
        assert not found.locator("#large").is_visible()
        note = found.locator(".inverted")
        assert note.is_visible()
        assert image.get_attribute("alt") == "After 8 steps: training loss 1.41, validation loss 1.9"


@pytest.mark.slow
@needs_browser
def test_a_hostile_drawing_does_nothing_even_where_the_page_shows_it(tmp_path, monkeypatch):
    """No check of the file is made here: the page alone has to withstand it."""
    content = (
        "<script>document.title = 'bad'; top.document.title = 'bad'; fetch('http://localhost/')</script>"
        '<image href="http://localhost/a.png" width="9" height="9"/><style>@import "http://localhost/a.css";</style>'
        '<foreignObject width="9" height="9"><iframe xmlns="http://www.w3.org/1999/xhtml" src="http://localhost/"/>'
        "</foreignObject><rect width='50' height='50' style='fill: url(http://localhost/#a)' onclick='top.title = 1'/>"
    )
    hostile = [
        drawing(content, PLAIN[:-1] + " onload=\"top.document.title = 'bad'\">"),
        drawing("<text>&b;</text>", before=ENTITIES),
        drawing('" onload="top.document.title = 1"><img src=x onerror="top.document.title = 2">'),
    ]
    monkeypatch.setattr(
        "gradfn.pages.page.read_picture", lambda data: Picture(data, "svg+xml", 300, 144, "'\"><b>title</b>")
    )
    run = run_with(tmp_path, {f"bad-{i}.svg": data for i, data in enumerate(hostile)})
    with opened(tmp_path, [run]) as found:
        title = found.title()
        for _ in range(2):
            for button in found.locator(".enlarge").all():
                button.click()
                found.keyboard.press("Escape")
            found.click("#theme")
        found.wait_for_timeout(200)
        assert found.title() == title
        assert "bad" not in title
        assert found.locator(".pictures img.drawing").count() == 3
        assert found.locator("b", has_text="title").count() == 0
