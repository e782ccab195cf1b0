"""The page as a whole, and its digit network by keys, by touch and by links."""

import functools
import re
from html import unescape

import numpy as np
import pytest

from gradfn.pages.charts import heat_map
from gradfn.pages.page import charts, page
from gradfn.runs.curve import Curve
from gradfn.runs.digit_net import DigitNet
from gradfn.runs.kept import Kept, Part
from gradfn.runs.outcome import Expectation, judge
from gradfn.runs.rows import Spikes, inspections, metrics
from tests.report.browser import HELPERS, needs_browser, opened, until

HIDDEN, SAMPLES, STEPS = 16, 12, 10


@functools.cache
def digit_net():
    """Return an untrained network whose last two samples stand for misclassified ones."""
    rng = np.random.default_rng(0)

    def normal(scale, *shape):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    params = {
        "W1": normal(0.1, HIDDEN, 784),
        "b1": normal(0.1, HIDDEN),
        "W2": normal(1, 10, HIDDEN),
        "b2": normal(0.1, 10),
    }
    samples = rng.uniform(size=[SAMPLES, 784]).astype(np.float32)
    about = {"activation": "sigmoid", "output": None, "loss": "cross-entropy", "data": "noise"}
    return DigitNet(params, samples, np.arange(SAMPLES, dtype=np.int32) % 10, None, about)


def digit_run(folder):
    (folder / "config.json").write_text("{}")
    return Kept(folder, "toy", {"seed": 0}, {}, {"verdict": "done"}, {}, {}, digit_net())


def evaluate(found, script):
    """Evaluate an expression in a page, with the helpers of `browser`."""
    return found.evaluate(f"() => {{ {HELPERS} return plain({script}); }}")


BOXES = """Object.fromEntries(Object.entries({
  pad: "#live-0-pad", seen: "#live-0-seen", samples: "#live-0-samples", tiles: ".tiles", outputs: ".outputs",
  node: "#live-0-node", panel: ".lesson-panel" }).map(([name, selector]) => {
    const { left, right, top, bottom } = find(selector).getBoundingClientRect();
    return [name, { left, right, top, bottom }];
  }))"""


def together(boxes, names, low, high, width):
    """Assert that boxes do not overlap and are all between two heights of the window."""
    for name in names:
        box = boxes[name]
        assert low <= box["top"] < box["bottom"] <= high, (name, box, high)
        assert 0 <= box["left"] < box["right"] <= width, (name, box)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            a, b = boxes[one], boxes[other]
            beside = a["right"] <= b["left"] or b["right"] <= a["left"]
            assert beside or a["bottom"] <= b["top"] or b["bottom"] <= a["top"], (one, other)


@pytest.mark.parametrize(
    ("width", "height", "names"),
    [
        (390, 844, ["pad", "seen", "outputs"]),
        (1280, 900, ["pad", "seen", "samples", "tiles", "outputs"]),
        (1600, 900, ["pad", "seen", "samples", "tiles", "outputs", "node"]),
    ],
)
@pytest.mark.slow
@needs_browser
def test_what_is_drawn_and_what_is_predicted_are_in_one_view(tmp_path, width, height, names):
    for dark in (False, True):
        with opened(tmp_path, [digit_run(tmp_path)], width=width, dark=dark, touch=width < 640) as found:
            evaluate(found, 'find(".stage").scrollIntoView()')
            together(evaluate(found, BOXES), names, 0, height, width)
            assert evaluate(found, "document.documentElement.scrollWidth") == width
            assert evaluate(found, 'getComputedStyle(find(".tiles button")).transitionDuration') == "0s"
            # The lesson covers nothing of that at its first step.
            evaluate(found, 'find(".lesson-open").click()')
            boxes = evaluate(found, BOXES)
            together(boxes, ["pad", "outputs"], 0, boxes["panel"]["top"], width)
            assert boxes["panel"]["bottom"] == height
            assert evaluate(found, "document.documentElement.scrollWidth") == width


class Keys:
    """A page that is used by the keyboard alone."""

    def __init__(self, found):
        self.found = found

    def press(self, *keys):
        for key in keys:
            self.found.keyboard.press(key)

    def at(self, selector):
        return evaluate(self.found, f"document.activeElement.matches({selector!r})")

    def to(self, selector, key="Tab", most=60):
        """Press a key until the focus is at an element."""
        for _ in range(most):
            if self.at(selector):
                return
            self.press(key)
        raise AssertionError(f"{key} does not lead to {selector}")


def lesson(found):
    return evaluate(
        found,
        """{ place: text(".lesson-place"), act: text(".lesson-act"), happened: text(".lesson-happened"),
             done: find(".lesson-panel").classList.contains("done"), target: !!find(".lesson-target") }""",
    )


def finish(found, i, go_on):
    """Assert that a step of the lesson is done, with the actual numbers, and go to the next one."""
    now = lesson(found)
    assert now["place"] == f"Step {i} of {STEPS}"
    assert now["done"], now
    assert any(letter.isdigit() for letter in now["happened"]), now
    assert now["target"]
    go_on()


def undone(found, i):
    now = lesson(found)
    assert (now["place"], now["done"], now["happened"]) == (f"Step {i} of {STEPS}", False, ""), now


@pytest.mark.slow
@needs_browser
def test_the_lesson_by_keys_alone(tmp_path):
    with opened(tmp_path, [digit_run(tmp_path)]) as found:
        keys = Keys(found)
        keys.to(".lesson-open")
        keys.press("Enter")
        assert keys.at(".lesson-place")

        def go_on():
            keys.press("F6")
            assert keys.at(".lesson-next")
            keys.press("Enter")

        undone(found, 1)
        keys.to("#live-0-samples button:nth-child(3)")
        keys.press("Enter")
        assert evaluate(found, "gradfn.state.sample") == 2
        finish(found, 1, go_on)
        undone(found, 2)
        keys.press("F6")  # to what is outlined: the sample that is pressed
        assert keys.at("#live-0-samples button:nth-child(3)")
        keys.to("#live-0-samples button:nth-child(12)")
        keys.press("Space")
        finish(found, 2, go_on)
        undone(found, 3)
        keys.press("F6", "ArrowRight")
        finish(found, 3, go_on)
        undone(found, 4)
        keys.press("F6")
        keys.press("ArrowDown" if evaluate(found, "gradfn.state.node") < HIDDEN // 2 else "ArrowUp")
        finish(found, 4, go_on)
        undone(found, 5)
        keys.press("F6")
        keys.to("#live-0-node-weights")
        keys.press("Enter", "ArrowRight", "Shift+ArrowDown")
        node = evaluate(found, "gradfn.state.node")
        assert evaluate(found, "gradfn.address().region") == f"{node}:10-9-19-19"
        weights = evaluate(found, f"gradfn.net.layers[0].W.slice(784 * {node}, 784 * {node + 1})")
        inside = np.zeros([28, 28])
        inside[9:20, 10:20] = digit_net().params["W1"][node].reshape(28, 28)[9:20, 10:20]
        np.testing.assert_array_equal(np.reshape(weights, [28, 28]), inside.astype(np.float32))
        finish(found, 5, go_on)
        undone(found, 6)
        keys.to("#live-0-bias")
        keys.press("Home")
        assert evaluate(found, f"gradfn.net.layers[0].b[{node}]") == -10
        finish(found, 6, go_on)
        undone(found, 7)
        keys.to("#live-0-undo", "Shift+Tab")
        keys.press("Enter")
        assert keys.at("#live-0-bias")  # the button is gone, the focus is not
        finish(found, 7, go_on)
        undone(found, 8)
        keys.press("F6")
        assert keys.at("#live-0-next")
        keys.press("Enter")
        finish(found, 8, go_on)
        undone(found, 9)
        keys.to("#live-0-every")
        keys.press("Enter")
        assert keys.at("#live-0-previous")  # there are no more steps, so the other buttons are disabled
        finish(found, 9, go_on)
        undone(found, 10)
        best = evaluate(found, "gradfn.now().probabilities.indexOf(Math.max(...gradfn.now().probabilities))")
        keys.to(".outputs button", "Shift+Tab")
        keys.press(*["ArrowDown"] * best, "Enter")
        assert evaluate(found, "[gradfn.state.layer, gradfn.state.node]") == [1, best]
        keys.to("#live-0-bias")
        keys.press("Home")
        finish(found, 10, go_on)
        assert keys.at(".lesson-open")
        assert evaluate(found, 'find(".lesson-panel").hidden')

        # Steps can be skipped and seen again; Escape closes.
        keys.press("Enter")
        keys.to(".lesson-buttons :first-child")
        assert lesson(found)["place"] == f"Step {STEPS} of {STEPS}"
        keys.press("Enter")
        assert lesson(found)["place"] == f"Step {STEPS - 1} of {STEPS}"
        keys.press("Escape")
        assert keys.at(".lesson-open")


def draw(found, points):
    """Draw with a finger on the pad, through points that are shares of its width and height."""
    box = found.locator("#live-0-pad").bounding_box()
    touch = found.context.new_cdp_session(found)
    kinds = ["touchStart", *["touchMove"] * (len(points) - 1)]
    for kind, (x, y) in zip(kinds, points, strict=True):
        place = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [place]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def tap(found, selector, condition):
    """Tap an element until a condition holds: while the page still scrolls, the browser makes no click of a tap."""
    for _ in range(5):
        found.locator(selector).tap()
        for _ in range(20):
            if evaluate(found, condition):
                return
            found.wait_for_timeout(50)
    raise AssertionError(f"tapping {selector} does not lead to {condition}")


NOW = "{ x: gradfn.state.x, label: gradfn.state.label, loss: gradfn.now().loss, address: gradfn.address() }"


@pytest.mark.slow
@needs_browser
def test_what_was_drawn_and_changed_by_touch_is_a_link(tmp_path):
    run = digit_run(tmp_path)
    with opened(tmp_path, [run], width=390, touch=True) as found:
        found.locator("#live-0-pad").scroll_into_view_if_needed()
        draw(found, [(0.2, 0.2), (0.8, 0.25), (0.5, 0.5), (0.45, 0.85)])
        sketch = evaluate(found, NOW)
        assert np.sum(sketch["x"]) > 10
        assert sketch["address"]["ink"].isalnum()
        tap(found, ".tiles button:nth-child(6)", "gradfn.state.node === 5")
        assert evaluate(found, 'text("#live-0-node-title")') == "Hidden node 5"
        tap(found, "#live-0-labels label:nth-of-type(8)", "gradfn.state.label === 7")
        tap(found, "#live-0-next", "gradfn.address().steps === 2")
        evaluate(found, "gradfn.setBias(0, 5, -1.234)")
        evaluate(found, "gradfn.setRegion(3, { left: 2, right: 9, top: 1, bottom: 20 })")
        last = evaluate(found, NOW)
        assert (last["label"], last["address"]["bias"], last["address"]["region"]) == (
            7,
            "0.5:-1.234",
            "3:2-1-9-20",
        )
        until(found, "location.hash.includes('region')")
        link = evaluate(found, "location.hash")

        # A meaning by touch.
        shown = '!!document.querySelector(".meaning-of:popover-open")'
        tap(found, ".sums p:first-child dfn", shown)
        assert evaluate(found, 'find(".meaning-of b").innerText') == "weighted sum"
        box = evaluate(found, 'find(".meaning-of").getBoundingClientRect().toJSON()')
        assert 0 <= box["left"] < box["right"] <= 390
        tap(found, "#live-0-node-title", f"!({shown})")
    with opened(tmp_path, [run], hash_=link) as found:
        again = evaluate(found, NOW)
        assert again == last
        assert evaluate(found, 'text("#live-0-node-title")') == "Hidden node 5"
        assert evaluate(found, 'document.querySelectorAll("#live-0-steps .view").length') == 2
        # A link to another state in the same page.
        evaluate(found, 'location.hash = "#live-0/sample=4&node=1.9"')
        until(found, "gradfn.state.sample === 4")
        assert evaluate(found, "gradfn.address()") == {
            "sample": 4, "ink": "", "label": None, "node": "1.9", "bias": "", "region": "", "steps": None,
        }  # fmt: skip
        assert evaluate(found, "gradfn.net.layers[0].W") == digit_net().params["W1"].ravel().tolist()


HOSTILE = [
    "sample=99&node=9.9&label=77&steps=-1",
    "sample=-1&node=0.16&label=1e9",
    "bias=0.0:1e999,9.0:1,0.99:2,0.1:NaN,0.2:&region=0:5-5-1-1,99:0-0-1-1,0:0-0-28-28,x",
    "ink=%3Cimg%20src=x%20onerror=window.hurt=1%3E",
    "ink=" + "zz" * 40000,
    "%E0%A4%A&&&=&==&node=%00.%00",
    "sample=%3Cscript%3Ewindow.hurt%3D1%3C/script%3E&constructor=1&__proto__=2",
]


@pytest.mark.slow
@needs_browser
def test_hostile_links_change_nothing(tmp_path):
    run = digit_run(tmp_path)
    with opened(tmp_path, [run]) as found:
        first = evaluate(found, NOW)
        assert set(first["address"].values()) == {None, ""}
        for text in HOSTILE:
            evaluate(found, f"location.hash = {'#live-0/' + text!r}")
            found.wait_for_timeout(50)
            assert evaluate(found, NOW) == first, text[:80]
        assert evaluate(found, "[window.hurt === undefined, document.images.length]") == [True, 0]
    with opened(tmp_path, [run], hash_="#live-0/" + HOSTILE[3] + "&" + HOSTILE[2]) as found:
        assert evaluate(found, NOW) == first
    with opened(tmp_path, [run], hash_="#<svg/onload=window.hurt=1>") as found:
        assert evaluate(found, NOW) == first


@pytest.mark.slow
@needs_browser
def test_terms_say_what_they_mean_with_the_numbers_of_the_open_node(tmp_path):
    with opened(tmp_path, [digit_run(tmp_path)]) as found:
        sum_ = found.locator(".sums dfn").first
        sum_.hover()
        x, params = evaluate(found, "gradfn.state.x"), digit_net().params
        shown = found.locator(".meaning-of").inner_text()
        node = evaluate(found, "gradfn.state.node")
        expected = float(params["W1"][node].astype(float) @ np.asarray(x))
        assert f"{expected:.3f}".replace("-", "−") in shown
        assert "784 terms" in shown
        found.keyboard.press("Escape")
        open_ = 'find(".meaning-of").matches(":popover-open")'
        assert not evaluate(found, open_)
        # By keys; screen readers get it as the description.
        found.locator(".loss dfn").last.focus()
        assert evaluate(found, open_)
        described = evaluate(
            found,
            "document.getElementById(document.activeElement.getAttribute('aria-describedby')).textContent",
        )
        assert "−log p" in described
        assert evaluate(found, "gradfn.now().loss.toFixed(3)") in described
        found.keyboard.press("Tab")
        assert not evaluate(found, open_)
        # All terms of the page have a description.
        missing = """[...document.querySelectorAll("[data-term]")].filter((each) =>
          !document.getElementById(each.getAttribute("aria-describedby"))?.textContent).map((each) => each.outerHTML)"""
        assert evaluate(found, missing) == []


@pytest.mark.slow
@needs_browser
def test_an_unknown_term_is_an_error_of_the_page(tmp_path):
    errors = []

    def add_term():
        with opened(tmp_path, [digit_run(tmp_path)]) as found:
            found.on("pageerror", lambda error: errors.append(str(error)))
            term = '<dfn data-term="lost">lost</dfn>'
            evaluate(found, f"document.body.insertAdjacentHTML('beforeend', `{term}`)")
            found.wait_for_timeout(100)

    with pytest.raises(AssertionError):
        add_term()
    assert errors == ['The term "lost" is not defined']


def flagged_run(folder, at_least):
    """Return a run whose inspections have a flag, and which reached 0.9 of an expectation."""
    (folder / "config.json").write_text("{}")
    row = {
        "step": 0,
        "sites": {"a1": {"rms": 1.0}},
        "site_grads": {"a1": {"rms": 0.1}},
        "grads": {"W1": {"rms": 0.1}},
    }
    looks = inspections([row | {"flags": {"a1": ["saturated", "dead"]}}], {"W1": (2, 2)})
    history = metrics(
        [[{"step": 1, "loss": 2.0, "validation_loss": 1.0}, {"step": 2, "loss": 1.5, "validation_loss": 1.0}]]
    )
    part = Part(history, looks, {"W1": (2, 2)}, Curve(), Spikes(), "classification_loss")
    outcome = judge([Expectation("accuracy", at_least=at_least)], {"accuracy": 0.9})
    return Kept(folder, "toy", {"dropout": 0.1}, {}, {"outcome": outcome}, {"": part}, {}, None)


def test_flags_are_explained_and_do_not_question_a_result_that_was_reached(tmp_path):
    reached, missed = page([flagged_run(tmp_path, 0.8)]), page([flagged_run(tmp_path, 0.95)])
    for html in (reached, missed):
        assert "<b>saturated</b> a1" in html
        assert "Saturated: more than half of the values" in html
        assert "Dead: more than half of the relu nodes" in html
        assert "Vanishing" not in html
    sentence = "the run reached what was expected all the same"
    assert sentence in reached
    assert sentence not in missed


def test_a_flag_of_many_sites_is_one_line_with_the_sites_in_details(tmp_path):
    run = flagged_run(tmp_path, 0.8)
    stats = {f"blocks/{i}/residual": {"rms": 0.1} for i in range(5)}
    row = {"sites": stats, "site_grads": stats, "grads": {"W1": {"rms": 0.1}}}
    rows = [
        row | {"step": 0, "flags": {site: ["vanishing"] for site in stats}},
        row | {"step": 1, "flags": {"blocks/0/residual": ["vanishing"], "blocks/4/residual": ["non-finite"]}},
    ]
    part = run.parts[""]
    html = page([run._replace(parts={"": part._replace(inspections=inspections(rows, part.shapes))})])
    text = " ".join(unescape(re.sub(r"<[^>]*>", " ", html[html.index('class="flags"') :])).split())
    first = "blocks/0/residual, blocks/1/residual, blocks/2/residual, …"
    assert f"vanishing at 5 sites, in 1 to 2 of 2 inspections: {first} All 5 sites" in text
    assert "non-finite blocks/4/residual, in 1 of 2 inspections" in text
    assert html.count("<b>vanishing</b>") == 1
    for i in range(5):
        assert f"<li>blocks/{i}/residual, in {2 if i == 0 else 1}</li>" in html


def test_charts_have_units_and_say_why_losses_differ(tmp_path):
    run = flagged_run(tmp_path, 0.8)
    [chart] = charts([run])
    assert '<figcaption>Loss <span class="unit">(nats)</span>' in chart
    assert (
        "mean over the steps since the one before, while the network was still changing, and with dropout"
        in chart
    )
    other = run._replace(options={}, parts={"": run.parts[""]._replace(loss="regression_loss")})
    [chart] = charts([other])
    assert '<span class="unit">' not in chart
    assert "dropout" not in chart
    unnamed = run._replace(parts={"": run.parts[""]._replace(loss="")})
    assert '<span class="unit">' not in charts([unnamed])[0]
    assert "(nats)" in charts([unnamed._replace(cnn=object())])[0]
    noisy = run._replace(parts={"": run.parts[""]._replace(noise=Curve([(0, 20.0), (1, 30.0)]))})
    scale = charts([noisy])[-1]
    assert 'Noise scale of the gradient <span class="unit">(examples)</span>' in scale
    assert "The batch size at which" in scale


def test_cells_that_are_hatched_are_explained():
    curves = {"W1": Curve([(0, 0.1), (1, 0.2)])}
    assert "hatched" not in heat_map("rms", curves, (0.1, 1.0))
    assert "hatched: NaN or infinite" in heat_map(
        "rms", curves | {"b1": Curve([(0, 0.1), (1, None)])}, (0.1, 1.0)
    )


def test_details_without_content_are_left_out(tmp_path):
    run = flagged_run(tmp_path, 0.8)
    assert "Gradient at intermediate values" in page([run])
    part = run.parts[""]
    row = {"step": 0, "sites": {}, "site_grads": {}, "grads": {"W1": {"rms": 0.1}}}
    bare = run._replace(parts={"": part._replace(inspections=inspections([row], part.shapes))})
    assert "Gradient at intermediate values" not in page([bare])
    assert "Gradient of each parameter" in page([bare])
