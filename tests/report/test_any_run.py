"""The page of any run of `gf.fit`: the networks in it compute the same as JAX, and it names what is absent."""

import functools
import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn.pages.live import live_parts
from gradfn.pages.live._mlp import DenseNet, described, live_mlp
from gradfn.pages.live.arrays import as_json
from gradfn.pages.page import LIMIT
from gradfn.runs.described_net import load_described_net
from gradfn.runs.folder import RunError
from gradfn.runs.kept import read_run
from tests.report.browser import HELPERS, needs_browser, opened

RNG = np.random.default_rng(0)
X2, X5 = RNG.normal(size=[40, 2]).astype(np.float32), RNG.normal(size=[40, 5]).astype(np.float32)
LABELS = (X2[:, 0] * X2[:, 1] > 0).astype(np.int32)
Y5 = np.stack([np.sin(X5[:, 0]), X5[:, 1]], 1).astype(np.float32)
IMAGES, TOKENS = RNG.uniform(size=[12, 8, 8, 1]).astype(np.float32), RNG.integers(0, 11, size=[12, 8])
NETS = {
    "two": gf.mlp([2, 6, 5, 2], "tanh"),
    "five": gf.mlp([5, 7, 2], "gelu_exact", output="softplus"),
    "digits": gf.mlp([784, 6, 10], "relu"),
    "cnn": gf.cnn([8, 8, 1], [2, 3], [4], 3, activation="tanh"),
    "gpt": gf.gpt(gf.GPTConfig(vocab=11, context=8, n_layers=2, n_heads=2, width=8)),
}
DATA = {
    "two": (X2, LABELS),
    "five": (X5, Y5),
    "digits": (RNG.uniform(size=[12, 784]).astype(np.float32), np.arange(12) % 10),
    "cnn": (IMAGES, np.arange(12) % 3),
    "gpt": (TOKENS, (TOKENS + 1) % 11),
}
LOSSES = {"five": gf.regression_loss, "gpt": gf.next_token_loss}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def loss_of(name):
    return LOSSES.get(name, gf.classification_loss)(NETS[name])


@functools.cache
def initial(name):
    """Return initial parameters whose biases are not zero."""
    return jax.tree.map(lambda leaf: 2 * leaf + 0.1, jax.jit(NETS[name].init)(jax.random.key(0)))


def fit(folder, name, steps=3, **options):
    loss, options = gf.batch_mean(loss_of(name)), {"batch_size": 4, "progress": False} | options
    return gf.fit(loss, initial(name), DATA[name], optax.adam(0.01), steps, folder=folder, **options).params


def own(folder, **options):
    """Train a function of a user's own, whose parameters are not in the order of their names."""

    def loss(params, example):
        x, y = example
        return jnp.square(jnp.tanh(x @ params["z_in"]["w"]) @ params["a_out"]["w"] - y).mean()

    params = {"z_in": {"w": jnp.ones([5, 3])}, "a_out": {"w": jnp.ones([3, 2])}}
    options = {"batch_size": 8, "progress": False, "eval_every": 2} | options
    return gf.fit(gf.batch_mean(loss), params, (X5, Y5), optax.sgd(0.1), 6, folder=folder, **options)


def by_jax(name, params, x, y):
    """Return the values and gradients by name, and the loss."""

    def both(params, x):
        loss = loss_of(name)
        grads = jax.grad(lambda params, x: loss(params, (x, y)), (0, 1))(params, x)
        return gf.inspect(loss, keep="*")(params, (x, y)), grads

    inspection, (grads, grad_x) = jax.jit(both)(params, jnp.asarray(x))
    values = {site: value for site, value in inspection.values.items() if re.fullmatch(r"[az]\d+", site)}
    return values, {site: inspection[site].grad for site in values} | grads | {"x": grad_x}, inspection.value


NUMBERS = """() => {
  const { pass, loss, steps } = gradfn.now();
  const list = (values) => Array.from(values);
  const grads = Object.entries(gradfn.gradients(steps)).map(([name, values]) => [name, list(values)]);
  return { x: list(pass.x), z: pass.z.map(list), a: pass.a.map(list), loss, grads: Object.fromEntries(grads) };
}"""


def agree(name, params, found, y):
    values, grads, loss = by_jax(name, params, np.asarray(found["x"], np.float32), y)
    np.testing.assert_allclose(found["loss"], loss, **CLOSE)
    for site, value in values.items():
        np.testing.assert_allclose(found[site[0]][int(site[1:]) - 1], value, err_msg=site, **CLOSE)
    assert set(found["grads"]) == set(grads)
    for site, grad in grads.items():
        np.testing.assert_allclose(np.reshape(found["grads"][site], grad.shape), grad, err_msg=site, **CLOSE)


def text_of(page, selector):
    return re.sub(r"\s+", " ", page.locator(selector).inner_text()).strip()


@pytest.mark.slow
@needs_browser
def test_a_net_of_two_inputs_is_a_plane_to_click_on(tmp_path):
    params = fit(tmp_path / "run", "two")
    gf.report(tmp_path / "run", examples=(X2[:6], LABELS[:6]))
    html = (tmp_path / "run/report.html").read_text()
    with opened(tmp_path, None, html=html) as page:
        agree("two", params, page.evaluate(NUMBERS), int(LABELS[0]))
        np.testing.assert_allclose(page.evaluate(NUMBERS)["x"], X2[0])
        # Click in the plane.
        plane = page.locator("#live-0-plane")
        plane.scroll_into_view_if_needed()
        box = plane.bounding_box()
        page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"])
        found = page.evaluate(NUMBERS)
        low, high = X2[:6].min(0), X2[:6].max(0)
        low, high = low - 0.1 * (high - low), high + 0.1 * (high - low)
        expected = low + np.array([0.25, 0.75]) * (high - low)
        np.testing.assert_allclose(found["x"], expected, atol=0.02 * (high - low).max())
        agree("two", params, found, int(LABELS[0]))
        assert page.locator("#live-0-examples").input_value() == ""
        # By keys: an example, an input, a label, a node.
        page.locator("#live-0-examples").select_option("2")
        np.testing.assert_allclose(page.evaluate(NUMBERS)["x"], X2[2])
        page.get_by_label("Input 1", exact=True).focus()
        page.keyboard.press("Control+A")
        page.keyboard.type("-0.75")
        assert page.evaluate(NUMBERS)["x"][1] == -0.75
        other = 1 - int(LABELS[2])
        page.locator("#live-0-target select").select_option(str(other))
        agree("two", params, page.evaluate(NUMBERS), other)
        page.locator("#live-0-nodes button").first.focus()
        page.keyboard.press("ArrowRight")
        assert text_of(page, "#live-0-node-title") == "Node 1 of hidden layer 1"
        z = page.evaluate(NUMBERS)["z"][0][1]
        assert f"{abs(z):.3f}" in text_of(page, "#live-0-node-z")
        # Every step, and every number of a gradient.
        page.locator("#live-0-every").click()
        page.locator("#live-0-steps details").nth(1).locator("summary").click()
        page.locator("#live-0-steps td").first.wait_for()
        cells = page.locator("#live-0-steps details").nth(1).locator("td").all_inner_texts()
        assert len(cells) == 2 * 5 + 2
        assert page.locator("#live-0-steps .unknown").count() == 0
        address = page.evaluate("new Promise((done) => setTimeout(() => done(location.hash), 400))")
        before = page.evaluate(NUMBERS)
    with opened(tmp_path, None, html=html, hash_=address, width=390, touch=True, dark=True) as page:
        assert page.evaluate(NUMBERS) == before
        assert text_of(page, "#live-0-node-title") == "Node 1 of hidden layer 1"
        page.locator("#live-0-plane").tap()
        np.testing.assert_allclose(page.evaluate(NUMBERS)["x"], (low + high) / 2, atol=0.03)
        assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.slow
@needs_browser
def test_a_net_of_five_inputs_has_sliders_and_a_target_of_values(tmp_path):
    params = fit(tmp_path / "run", "five")
    gf.report(tmp_path / "run")
    html = (tmp_path / "run/report.html").read_text()
    for touch in (False, True):
        with opened(tmp_path, None, html=html, width=390 if touch else 1280, touch=touch) as page:
            assert page.evaluate(NUMBERS)["x"] == [0] * 5
            sliders = page.locator("#live-0-inputs input[type=range]")
            assert sliders.count() == 5
            if touch:
                sliders.nth(3).tap(position={"x": 10, "y": 5})
                assert page.evaluate(NUMBERS)["x"][3] < -2
            else:
                sliders.nth(3).focus()
                for _ in range(3):
                    page.keyboard.press("ArrowLeft")
                assert page.evaluate(NUMBERS)["x"][3] < 0
            page.get_by_label("Input 0", exact=True).fill("1.5")
            page.get_by_label("Target of output 1").fill("-2")
            agree("five", params, page.evaluate(NUMBERS), np.array([0.0, -2.0], np.float32))
            shown = text_of(page, "#live-0-loss")
            np.testing.assert_allclose(
                float(shown.split("= ")[1]), page.evaluate("gradfn.now().loss"), rtol=2e-3
            )
            assert "nats" not in shown


@pytest.mark.slow
@needs_browser
def test_the_lesson_of_a_net_can_be_done_to_its_end(tmp_path):
    fit(tmp_path / "run", "two")
    acts = [
        "gradfn.change({ x: Float64Array.of(0.5, 1) })",
        "gradfn.select(0, 2)",
        "gradfn.change({ x: Float64Array.of(-0.5, 1) })",
        "gradfn.select(2, 1)",
        "gradfn.setTarget(1 - gradfn.state.target)",
        "document.getElementById('live-0-next').click()",
        "document.getElementById('live-0-every').click()",
        "gradfn.setTarget(1 - gradfn.state.target)",
    ]
    with opened(tmp_path, [read_run(tmp_path / "run")]) as page:
        page.locator(".lesson-open").click()
        for i, act in enumerate(acts):
            assert f"Step {i + 1} of {len(acts)}" in text_of(page, ".lesson-place")
            if i == len(acts) - 1:  # the loss has to decrease
                page.evaluate("gradfn.now().loss < Math.log(2) && gradfn.setTarget(1 - gradfn.state.target)")
                page.locator(".lesson-panel button", has_text="Back").click()
                page.locator(".lesson-panel button", has_text="Next").click()
            assert page.locator(".lesson-panel.done").count() == 0
            if "target" in text_of(page, ".lesson-see"):
                loss = text_of(page, "#live-0-loss").split("=")[-1].split()[0]
                assert f"It is {loss} nats" in text_of(page, ".lesson-see")
            page.evaluate(act)
            assert page.locator(".lesson-panel.done").count() == 1
            assert text_of(page, ".lesson-happened")
            page.locator(".lesson-next").click()
        assert page.locator(".lesson-panel").is_hidden()


@pytest.mark.slow
@needs_browser
def test_a_digit_network_without_samples_is_drawn_on(tmp_path):
    params = fit(tmp_path / "run", "digits")
    with opened(tmp_path, [read_run(tmp_path / "run")]) as page:
        assert page.locator(".picking").count() == 0
        page.locator("#live-0-pad").scroll_into_view_if_needed()
        box = page.locator("#live-0-pad").bounding_box()
        page.mouse.move(box["x"] + 60, box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + 150, box["y"] + 120, steps=4)
        page.mouse.up()
        found = page.evaluate(NUMBERS)
        assert sum(found["x"]) > 10
        agree("digits", params, found, page.evaluate("gradfn.state.label"))
        page.locator("#live-0-clear").click()
        assert sum(page.evaluate(NUMBERS)["x"]) == 0
    gf.report(tmp_path / "run", examples=DATA["digits"])
    with opened(tmp_path, None, html=(tmp_path / "run/report.html").read_text()) as page:
        page.locator(".samples button").nth(4).click()
        found = page.evaluate(NUMBERS)
        np.testing.assert_allclose(found["x"], DATA["digits"][0][4])
        agree("digits", params, found, 4)


@pytest.mark.slow
@needs_browser
def test_a_cnn_and_a_gpt_of_fit_run_in_their_pages(tmp_path):
    params = fit(tmp_path / "cnn", "cnn")
    x, label = IMAGES[1], 2
    expected = loss_of("cnn")(params, (x, label))
    with opened(tmp_path, [read_run(tmp_path / "cnn")]) as page:
        script = (
            "(x) => { const { loss } = gradfn.compute(gradfn.net, Float32Array.from(x), 2); return loss; }"
        )
        np.testing.assert_allclose(page.evaluate(script, x.ravel().tolist()), expected, **CLOSE)
    params = fit(tmp_path / "gpt", "gpt")
    tokens = [3, 1, 4, 1, 5, 9]
    logits = NETS["gpt"].apply(params, jnp.array(tokens))
    with opened(tmp_path, [read_run(tmp_path / "gpt")]) as page:
        page.locator("#live-0-text").fill(" ".join(map(str, tokens)))
        script = f"async () => {{ {HELPERS} return plain(gradfn.now().pass.logits); }}"
        page.wait_for_function("gradfn.now().pass.tokens.length === 6")
        found = np.reshape(page.evaluate(script), logits.shape)
    np.testing.assert_allclose(found, logits, atol=0.01 * float(np.abs(logits).max()))  # of half precision


@pytest.mark.slow
@needs_browser
def test_both_networks_of_two_runs_work_on_their_own(tmp_path):
    params = {name: fit(tmp_path / name, name) for name in ("two", "digits")}
    file = gf.report(tmp_path / "two", tmp_path / "digits")
    assert file.name == "against-digits.html"
    assert file.stat().st_size < LIMIT
    with opened(tmp_path, None, html=file.read_text()) as page:
        ids = page.evaluate("Array.from(document.querySelectorAll('[id]'), (each) => each.id)")
        assert len(ids) == len(set(ids))
        assert page.evaluate("gradfnAll.length") == 2
        second = NUMBERS.replace("gradfn.", "gradfnAll[1].")
        agree("two", params["two"], page.evaluate(NUMBERS), page.evaluate("gradfnAll[0].state.target"))
        before = page.evaluate(second)
        agree("digits", params["digits"], before, page.evaluate("gradfnAll[1].state.label"))
        page.get_by_label("Input 0", exact=True).fill("0.5")
        page.locator("#live-0-every").click()
        assert page.evaluate(second) == before
        assert page.locator("#live-1-steps .unknown").count() == 5
        mine = page.evaluate(NUMBERS)
        page.locator("#live-1-labels label").nth(7).click()
        assert page.evaluate("gradfnAll[1].state.label") == 7
        agree("digits", params["digits"], page.evaluate(second), 7)
        assert page.evaluate(NUMBERS) == mine


@pytest.mark.slow
@needs_browser
def test_the_same_network_twice_works_twice(tmp_path):
    for name in "ab":
        fit(tmp_path / name, "digits", steps=2 + (name == "b"))
    with opened(tmp_path, [read_run(tmp_path / name) for name in "ab"], width=390, touch=True) as page:
        losses = "gradfnAll.map((each) => each.now().loss)"
        before = page.evaluate(losses)
        assert before[0] != before[1]
        page.locator("#live-1-labels label").nth(2).tap()
        after = page.evaluate(losses)
        assert (after[0], after[1] != before[1]) == (before[0], True)
        assert page.locator("#live-0-labels input:checked").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.slow
@needs_browser
def test_a_function_of_ones_own_gets_a_page_with_what_it_recorded(tmp_path):
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    own(folder, inspect_every=1, noise_every=2)
    with opened(tmp_path, [read_run(folder)]) as page:
        text = text_of(page, "body")
        assert "<img src=x onerror=alert(1)>" in text
        assert "No network runs in this page" in text
        assert "Not recorded" not in text
        assert "Noise scale of the gradient" in text
        # From the inputs to the loss, which is not the order of the names.
        rows = page.locator("#flow .rows").first.locator("> span").all_inner_texts()
        assert [row for row in rows if row] == ["z_in/w", "a_out/w"]
    own(tmp_path / "plain")
    with opened(tmp_path, [read_run(tmp_path / "plain")]) as page:
        text = text_of(page, "#missing")
        assert "train with inspect_every=10" in text
        assert "train with noise_every=10" in text


def test_options_name_the_network_and_its_loss(tmp_path):
    fit(tmp_path / "run", "two")
    options = read_run(tmp_path / "run").options
    assert options["network"] == "gf.mlp"
    assert options["sizes"] == [2, 6, 5, 2]
    assert (options["activation"], options["loss"], options["steps"]) == ("tanh", "gf.classification_loss", 3)


def test_examples_that_do_not_fit_are_refused(tmp_path):
    fit(tmp_path / "run", "two")
    for examples, message in (
        ((X5, LABELS), "expected examples of 2 inputs"),
        ((X2, LABELS[:3]), "expected one target per example"),
        ((X2, LABELS + 1), "expected labels from 0 to 1, got 1 to 2"),
        ((X2, X2[:, 0]), "expected an integer label per example"),
        ((X2 * np.nan, LABELS), "finite"),
        ((np.array(["a"]), LABELS[:1]), "must be numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            gf.report(tmp_path / "run", examples=examples)
    own(tmp_path / "own")
    with pytest.raises(ValueError, match="no such network"):
        gf.report(tmp_path / "own", examples=(X5, Y5))
    with pytest.raises(RunError, match="neither a run's folder nor"):
        gf.report(tmp_path / "nothing")


def test_a_network_that_cannot_run_in_a_page_is_left_out_with_a_reason(tmp_path):
    fit(tmp_path, "two")
    model = tmp_path / "model.json"
    content = model.read_text()
    for damaged, reason in (
        ("mine", "not a description that gradfn wrote"),
        (content.replace('"mlp"', '"vit"'), "this is gf.vit"),
        (content.replace('"tanh"', '"softmax"'), "this is 'softmax'"),
        (content.replace("classification_loss", "no_loss"), "this is 'no_loss'"),
        (content.replace('"mlp"', '"cnn"'), "its images have the shape None"),
    ):
        model.write_text(damaged)
        parts, reasons = live_parts(read_run(tmp_path), 4_000_000)
        assert parts == []
        assert len(reasons) == 1
        assert reason in reasons[0]
    model.write_text(content)
    assert live_parts(read_run(tmp_path), 100)[1] == [
        "The network is too large to run in the page: its 65 parameters take 0.0 MB, and there is room for 0.0 MB."
    ]


def test_weights_have_half_precision_only_where_they_must_and_may():
    rng = np.random.default_rng(0)
    sizes = [30, 100, 3]
    params = {}
    for i, (n_in, n_out) in enumerate(pairwise(sizes), 1):
        params[f"W{i}"] = rng.normal(size=[n_out, n_in]).astype(np.float32) / n_in**0.5
        params[f"b{i}"] = np.zeros(n_out, np.float32)
    x, y = rng.normal(size=[8, 30]).astype(np.float32), np.arange(8) % 3
    net = DenseNet(params, "tanh", None, "classification_loss", True, x, y)
    whole, half = (len(as_json(described(net, dtype))) for dtype in ("float32", "float16"))
    assert live_mlp(net, whole).about["half"] is False
    assert live_mlp(net, whole - 1).about["half"] is True
    assert "too large" in live_mlp(net, half - 1)
    large = DenseNet(params | {"W1": 1e6 * params["W1"]}, "identity", None, "classification_loss", True, x, y)
    assert "too large" in live_mlp(large, whole - 1)  # 16 bits cannot hold its weights


def test_what_is_loaded_are_the_parameters_in_float32(tmp_path):
    params = fit(tmp_path, "two")
    net = load_described_net(tmp_path)
    assert set(net.params) == set(params)
    for name, array in params.items():
        np.testing.assert_array_equal(net.params[name], array)
