"""The convolutional network in the page: Chromium computes the same values as JAX, and every control works."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.pages.live._cnn import described
from gradfn.pages.live.arrays import as_json
from gradfn.runs.cnn_net import ACTIVATIONS, CnnNet, flat_params
from gradfn.runs.kept import Kept
from tests.report.browser import HELPERS, in_page, needs_browser, opened

pytestmark = [pytest.mark.slow, needs_browser]

# Image, channels, hidden layers, classes, window, activation. 28 -> 14 -> 7 -> 3 drops a row and a column.
NETS = {
    "digits": ((28, 28, 1), (3, 4), (6,), 10, 5, "relu"),
    "three": ((28, 28, 1), (2, 3, 2), (5, 4), 10, 3, "sigmoid"),
    "even": ((9, 12, 1), (3,), (), 4, 4, "tanh"),
    "color": ((13, 10, 3), (2, 3), (5,), 3, 2, "gelu"),
    "wide": ((4, 4, 2), (2,), (3,), 2, 5, "silu"),
}


@functools.cache
def untrained(name, n_samples=3):
    """Return what the page keeps of an untrained network with some samples, its parameters and its loss."""
    image, channels, hidden, classes, window, activation = NETS[name]
    net = gf.cnn(image, channels, hidden, classes, window, activation)
    rng = np.random.default_rng(0)
    # Biases, too, are not zero; all values are of the size of those of a trained network.
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
        net.init(jax.random.key(0)),
    )
    samples = rng.uniform(size=[n_samples, int(np.prod(image))]).astype(np.float32)
    about = {"activation": activation, "image": list(image), "data": "noise"}
    labels = np.arange(n_samples, dtype=np.int32) % classes
    kept = CnnNet(flat_params(params), samples, labels, None, about)
    return kept, params, gf.classification_loss(net)


def kept_run(folder, net):
    (folder / "config.json").write_text("{}")
    return Kept(folder, "toy", {"seed": 0}, {}, {"verdict": "done"}, {}, {}, None, cnn=net)


@functools.cache
def compiled(loss):
    """Return a compiled function: the inspection of a loss, and its gradients at the parameters and the input."""
    look = gf.inspect(loss, keep="*")
    grad = jax.grad(lambda params, x, label: loss(params, (x, label)), (0, 1))
    return jax.jit(lambda params, x, label: (look(params, (x, label)), grad(params, x, label)))


def by_jax(params, loss, x, label):
    """Return the values and the gradients by the names of the page, with channels first, and the loss."""
    inspection, (grads, grad_x) = compiled(loss)(params, jnp.asarray(x, jnp.float32), label)
    values = {name: value for name, value in inspection.values.items() if name[0] in "zap"}
    gradients = {name: inspection[name].grad for name in values} | {"x": grad_x}
    n_convs = sum(name.startswith("conv") for name in params)
    for layer, arrays in grads.items():
        number = int(layer[-1]) + (n_convs if layer.startswith("dense") else 0)
        gradients |= {f"{kind}{number}": array for kind, array in arrays.items()}
    return values, gradients, inspection.value


def planar(value, name):
    """Return `[height, width, channels]` as `[channels, height, width]`; parameters as they are."""
    value = np.asarray(value)
    return np.moveaxis(value, -1, 0) if value.ndim == 3 and name[0] in "zapx" else value


def assert_agree(actual, params, loss, x, label, close=2e-5):
    """Assert that `{"values", "gradients", "loss"}` of the page are those of JAX."""
    values, gradients, value = by_jax(params, loss, x, label)
    np.testing.assert_allclose(actual["loss"], value, atol=close, rtol=close)
    assert set(actual["values"]) == {*values, "x"}
    assert set(actual["gradients"]) == set(gradients)
    for kind, expected in (("values", values), ("gradients", gradients)):
        for name, each in expected.items():
            array = planar(each, name)
            found = np.reshape(actual[kind][name], array.shape)
            np.testing.assert_allclose(found, array, atol=close, rtol=close, err_msg=f"{kind} {name}")


NUMBERS = """
const numbers = ({ pass, loss, probabilities, gradients }) =>
  plain({ values: pass.values, loss, probabilities, gradients });
"""


def test_every_value_and_gradient_is_that_of_jax(tmp_path):
    nets = {name: untrained(name) for name in NETS}
    cases = {
        name: {"net": as_json(described(kept)), "x": planar(_image(kept, 1), "x").ravel().tolist()}
        for name, (kept, *_) in nets.items()
    }
    script = """const result = () => Object.fromEntries(Object.entries(inputs.cases).map(([name, { net, x }]) =>
        [name, numbers(gradfn.compute(gradfn.build(JSON.parse(net)).net, x, 1))]));"""
    run = kept_run(tmp_path, nets["digits"][0])
    result = in_page(tmp_path, [run], NUMBERS + script, cases=cases)
    for name, (kept, params, loss) in nets.items():
        assert_agree(result[name], params, loss, _image(kept, 1), 1)


def test_every_activation_and_its_slope_is_that_of_jax(tmp_path, x64):
    # In float64, as the page computes: how far float32 is from it depends on XLA's approximations.
    z = np.concatenate([np.linspace(-12, 12, 97), [0.0, 1e-3, -1e-3]])
    script = """const result = async () => {
      const { activations } = await import("gradfn/core/activations.js");
      return inputs.names.map((name) => inputs.z.map((z) => {
        const { of, slope } = activations[name];
        return [of(z), slope(z, of(z))];
      }));
    };"""
    run = kept_run(tmp_path, untrained("even")[0])
    result = in_page(tmp_path, [run], script, names=ACTIVATIONS, z=z.tolist())
    for name, found in zip(ACTIVATIONS, result, strict=True):
        function = gf.layers.activations[name]
        expected = jax.vmap(jax.value_and_grad(function))(jnp.asarray(z))
        np.testing.assert_allclose(found, np.stack(expected, -1), atol=3e-6, rtol=3e-6, err_msg=name)


NOW = f"() => {{ {HELPERS}{NUMBERS} const {{ x, label, off }} = gradfn.state;"
NOW += "return { ...numbers(gradfn.now()), x: plain(x), label, off: [...off], hash: location.hash }; }"
DEFAULT = "digits"


def now(shown):
    """Return what the page computes now, and for which image and label."""
    shown.wait_for_timeout(350)  # the address follows after a pause
    return shown.evaluate(NOW)


def switched_off(loss, off):
    """Return the loss with some filters' activations 0; `off` are `"layer.filter"`, both from 0."""
    edits = {}
    for layer in sorted({name.split(".")[0] for name in off}):
        filters = jnp.array([int(name.split(".")[1]) for name in off if name.startswith(f"{layer}.")])
        edits[f"a{int(layer) + 1}"] = lambda a, filters=filters: a.at[..., filters].set(0.0)
    return gf.patch(loss, edits)


def assert_shown(state, params, loss):
    """Assert that all numbers of the page are those of JAX, also where filters are off."""
    x = np.moveaxis(np.reshape(state["x"], (-1, 28, 28)), 0, -1).astype(np.float32)
    if not state["off"]:
        assert_agree(state, params, loss, x, state["label"])
        return
    patched = switched_off(loss, state["off"])
    value, (grads, of_x) = jax.value_and_grad(lambda p, x: patched(p, (x, state["label"])), (0, 1))(
        params, jnp.asarray(x)
    )
    close = {"atol": 2e-5, "rtol": 2e-5}
    np.testing.assert_allclose(state["loss"], value, **close)
    np.testing.assert_allclose(state["gradients"]["x"], planar(of_x, "x").ravel(), **close)
    for name, path in (("W1", "conv1"), ("W2", "conv2"), ("W3", "dense1"), ("W4", "dense2")):
        number = name[1:]
        np.testing.assert_allclose(state["gradients"][name], grads[path]["W"].ravel(), err_msg=name, **close)
        np.testing.assert_allclose(state["gradients"][f"b{number}"], grads[path]["b"], **close)


def until(shown, expression, seconds=5):
    """Wait until an expression is true; return whether it is."""
    for _ in range(20 * seconds):
        if shown.evaluate(expression):
            return True
        shown.wait_for_timeout(50)
    return False


def tap(shown, locator, expression, **options):
    """Tap an element, until what the tap does has happened: Chromium ignores a tap that soon follows a stroke."""
    assert not shown.evaluate(expression)
    for _ in range(3):
        locator.tap(**options)
        if until(shown, expression, 2):
            return
    raise AssertionError(f"{expression} has not become true")


def text(shown, name):
    return " ".join(shown.locator(f"#live-0-{name}").inner_text().split())


def printed(value):
    """Return a number as the page prints it."""
    size = abs(value)
    if not size:
        return "0"
    plain = f"{value:.{3 if size < 10 else 1}f}" if 0.01 <= size < 1000 else None
    if plain is None:
        digits, exponent = f"{value:.1e}".split("e")
        plain = f"{digits}e{int(exponent)}"
    return plain.replace("-", "−")


def test_every_control_works_with_the_mouse(tmp_path):
    kept, params, loss = untrained(DEFAULT)
    with opened(tmp_path, [kept_run(tmp_path, kept)]) as shown:
        first = now(shown)
        assert_shown(first, params, loss)
        np.testing.assert_allclose(first["x"], kept.samples[0])
        assert first["hash"] == ""  # until something is changed

        # A stroke on the pad.
        box = shown.locator("#live-0-pad").bounding_box()
        at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])  # noqa: E731
        shown.mouse.move(*at(0.5, 0.15))
        shown.mouse.down()
        for y in (0.3, 0.5, 0.7, 0.9):
            shown.mouse.move(*at(0.5, y))
        shown.mouse.up()
        sketch = now(shown)
        assert_shown(sketch, params, loss)
        assert np.sum(sketch["x"]) > 20
        assert sketch["label"] == np.argmax(sketch["probabilities"])
        best = shown.locator("#live-0-outputs .best b").inner_text()
        assert best == str(sketch["label"])

        # A filter, a kind of map, a pixel.
        shown.locator(".maps-row button").nth(3 + 2).click()
        assert text(shown, "filter-title") == "Filter 2 of convolution 2"
        assert shown.locator('.maps-row [aria-pressed="true"]').count() == 1
        shown.locator('#live-0-kinds input[value="p"]').locator("xpath=following-sibling::span").click()
        widths = shown.locator(".maps-row canvas").evaluate_all("all => all.map(({ width }) => width)")
        assert widths == [14] * 3 + [7] * 4
        z = shown.locator("#live-0-z canvas")
        z.scroll_into_view_if_needed()
        box = z.bounding_box()
        # Convolution 2 has 14x14 pixels: row 3, column 12.
        shown.mouse.move(*at(12.5 / 14, 3.5 / 14))
        assert text(shown, "place") == "Row 3, column 12 of z2[2]"
        values = {name: np.reshape(value, SHAPES[name]) for name, value in sketch["values"].items()}
        W, b = np.asarray(params["conv2"]["W"])[2], float(params["conv2"]["b"][2])
        padded = np.pad(values["p1"], ((0, 0), (2, 2), (2, 2)))[:, 3:8, 12:17]
        parts = (W * padded).sum((1, 2))
        assert text(shown, "sum") == (
            f"Sum of 3 inputs {printed(parts.sum())}, bias {'−' if b < 0 else '+'} {printed(abs(b))}: "
            f"z = {printed(values['z2'][2, 3, 12])}; a = relu(z) = {printed(values['a2'][2, 3, 12])}"
        )
        listed = shown.locator("#live-0-contributions small").all_inner_texts()
        assert listed == [printed(part) for part in parts]
        shown.locator("#live-0-contributions button").nth(1).click()
        cells = shown.locator("#live-0-cells b").all_inner_texts()
        as_numbers = [float(cell.replace("−", "-")) for cell in cells]
        np.testing.assert_allclose(as_numbers, (W * padded)[1].ravel(), atol=0.0051)
        # The window is outlined on the input: 5 of 14 pixels wide, from row 1, column 10.
        style = shown.locator("#live-0-window").evaluate(
            "({ style }) => [style.top, style.left, style.width]"
        )
        np.testing.assert_allclose(
            [float(part.rstrip("%")) for part in style], np.array([1, 10, 5]) / 0.14, atol=1e-3
        )

        # Two filters off, and on again.
        before = shown.locator("#live-0-outputs .best small").inner_text()
        shown.locator("#live-0-off").click()
        shown.locator(".maps-row button").nth(0).click()
        shown.locator("#live-0-off").click()
        off = now(shown)
        assert sorted(off["off"]) == ["0.0", "1.2"]
        assert_shown(off, params, loss)
        assert off["loss"] != sketch["loss"]
        assert not np.any(np.reshape(off["values"]["a2"], (4, 14, 14))[2])
        assert text(shown, "change").startswith("2 filters are off: the probability of")
        assert shown.locator(".maps-row .is-off").count() == 2
        hash_ = off["hash"]
        shown.locator("#live-0-off").click()
        assert now(shown)["off"] == ["1.2"]
        shown.locator("#live-0-restore").click()
        again = now(shown)
        assert again["off"] == []
        assert again["loss"] == sketch["loss"]
        assert shown.locator("#live-0-outputs .best small").inner_text() == before

        # The correct label, and the steps.
        shown.locator('#live-0-labels input[value="7"]').locator("xpath=following-sibling::span").click()
        labeled = now(shown)
        assert labeled["label"] == 7
        assert_shown(labeled, params, loss)
        assert f"= {printed(labeled['loss'])} nats" in text(shown, "loss")
        steps = shown.locator("#live-0-steps .picture")
        counts = [steps.count()]
        for _ in range(3):
            shown.locator("#live-0-next").click()
        counts.append(steps.count())
        shown.locator("#live-0-previous").click()
        counts.append(steps.count())
        shown.locator("#live-0-every").click()
        counts.append(steps.count())
        assert counts == [1, 4, 3, 14]
        names = shown.locator("#live-0-steps h3").all_inner_texts()
        order = ("z4", "W4", "a3", "z3", "W3", "p2", "a2", "z2", "W2", "p1", "a1", "z1", "W1", "x")
        assert ["".join(name.split()) for name in names] == [
            f"{i}∂L/∂{name}" for i, name in enumerate(order, 1)
        ]
        shown.locator("#live-0-samples button").nth(1).click()
        np.testing.assert_allclose(now(shown)["x"], kept.samples[1])
        shown.locator("#live-0-clear").click()
        assert not np.any(now(shown)["x"])

    # The address brings everything back: the drawing, the filters that are off, the open filter.
    with opened(tmp_path, [kept_run(tmp_path, kept)], hash_=hash_) as shown:
        back = now(shown)
        assert (back["x"], back["loss"]) == (off["x"], off["loss"])
        assert sorted(back["off"]) == ["0.0", "1.2"]
        assert text(shown, "filter-title") == "Filter 0 of convolution 1, switched off"
        assert shown.evaluate("gradfn.state.kind") == "p"


SHAPES = {
    **{"x": (1, 28, 28), "z1": (3, 28, 28), "a1": (3, 28, 28), "p1": (3, 14, 14)},
    **{"z2": (4, 14, 14), "a2": (4, 14, 14), "p2": (4, 7, 7), "z3": (6,), "a3": (6,), "z4": (10,)},
}


def test_every_control_works_by_touch_on_a_phone(tmp_path):
    kept, params, loss = untrained(DEFAULT)
    with opened(tmp_path, [kept_run(tmp_path, kept)], width=390, dark=True, touch=True) as shown:
        assert not shown.evaluate("document.documentElement.scrollWidth > innerWidth")
        # A stroke with a finger.
        pad = shown.locator("#live-0-pad")
        pad.scroll_into_view_if_needed()
        box = pad.bounding_box()
        finger = shown.context.new_cdp_session(shown)
        for i, y in enumerate((0.2, 0.4, 0.6, 0.8)):
            point = {"x": box["x"] + 0.5 * box["width"], "y": box["y"] + y * box["height"]}
            kind = "touchMove" if i else "touchStart"
            finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
        finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        sketch = now(shown)
        assert np.sum(sketch["x"]) > 20
        assert_shown(sketch, params, loss)

        tap(shown, shown.locator(".maps-row button").nth(1), "gradfn.state.filter === 1")
        assert text(shown, "filter-title") == "Filter 1 of convolution 1"
        z = shown.locator("#live-0-z")
        box = shown.locator("#live-0-filter").bounding_box()
        assert -50 < box["y"] < 0.6 * 844  # the filter that was tapped is in the window
        size = z.bounding_box()["width"]
        tap(
            shown,
            z,
            "gradfn.state.at[0] === 20",
            position={"x": (5 + 0.5) / 28 * size, "y": (20 + 0.5) / 28 * size},
        )
        assert text(shown, "place") == "Row 20, column 5 of z1[1]"
        tap(shown, shown.locator("#live-0-off"), "gradfn.state.off.size === 1")
        off = now(shown)
        assert off["off"] == ["0.1"]
        assert_shown(off, params, loss)
        tap(shown, shown.locator("#live-0-restore"), "gradfn.state.off.size === 0")
        assert now(shown)["loss"] == sketch["loss"]
        tap(
            shown,
            shown.locator("#live-0-every"),
            "document.querySelectorAll('#live-0-steps .picture').length > 1",
        )
        assert shown.locator("#live-0-steps .picture").count() == 14
        assert not shown.evaluate("document.documentElement.scrollWidth > innerWidth")


def test_every_control_works_by_keyboard_alone(tmp_path):
    kept, params, loss = untrained(DEFAULT)
    with opened(tmp_path, [kept_run(tmp_path, kept)]) as shown:

        def tab_to(selector, most=60):
            """Press Tab until an element has the focus."""
            for _ in range(most):
                if shown.evaluate("selector => document.activeElement.matches(selector)", selector):
                    return
                shown.keyboard.press("Tab")
            raise AssertionError(f"{selector} is not reached by Tab")

        tab_to("#live-0-samples button:nth-child(3)")
        shown.keyboard.press("Enter")
        np.testing.assert_allclose(now(shown)["x"], kept.samples[2])
        tab_to("#live-0-kinds input")
        shown.keyboard.press("ArrowRight")
        assert shown.evaluate("gradfn.state.kind") == "p"
        tab_to(".maps-row button")
        shown.keyboard.press("ArrowDown")
        shown.keyboard.press("ArrowRight")
        assert text(shown, "filter-title") == "Filter 1 of convolution 2"
        tab_to("#live-0-off")
        shown.keyboard.press("Space")
        off = now(shown)
        assert off["off"] == ["1.1"]
        assert_shown(off, params, loss)
        tab_to("#live-0-z")
        row, column = shown.evaluate("gradfn.state.at")
        vertical, horizontal = ("Up", -1) if row else ("Down", 1), ("Left", -1) if column else ("Right", 1)
        shown.keyboard.press(f"Arrow{vertical[0]}")
        shown.keyboard.press(f"Arrow{horizontal[0]}")
        assert shown.evaluate("gradfn.state.at") == [row + vertical[1], column + horizontal[1]]
        shown.keyboard.press("Enter")  # has no position
        assert shown.evaluate("gradfn.state.at") == [row + vertical[1], column + horizontal[1]]
        tab_to("#live-0-contributions button:nth-child(2)")
        shown.keyboard.press("Enter")
        assert shown.evaluate("[gradfn.state.channel, document.activeElement.ariaPressed]") == [1, "true"]
        label = now(shown)["label"]
        tab_to("#live-0-labels input")
        shown.keyboard.press("ArrowRight")
        assert now(shown)["label"] == (label + 1) % 10
        tab_to("#live-0-next")
        shown.keyboard.press("Enter")
        assert shown.locator("#live-0-steps .picture").count() == 2


LESSON = """async () => {
  const found = [];
  const click = (selector, i = 0) => document.querySelectorAll(selector)[i].click();
  const acts = [
    () => click("#live-0-samples button", 1),
    () => click(".maps-row button", gradfn.state.filter ? 0 : 1),
    () => {
      const key = gradfn.state.at[0] ? "ArrowUp" : "ArrowDown";
      document.getElementById("live-0-z").dispatchEvent(new KeyboardEvent("keydown", { key }));
    },
    () => click('#live-0-kinds input[value="p"]'),
    () => click(".maps-row:nth-of-type(2) button", 2),
    () => click("#live-0-off"),
    () => click("#live-0-restore"),
    () => click('#live-0-labels input[value="9"]'),
    () => [1, 2, 3, 4, 5, 6].forEach(() => click("#live-0-next")),
    () => click("#live-0-every"),
  ];
  gradfn.lesson.open();
  for (const act of acts) {
    const happened = document.querySelector(".lesson-happened");
    const before = happened.textContent;
    act();
    found.push([before, happened.textContent]);
    document.querySelector(".lesson-next").click();
    await new Promise(requestAnimationFrame);
  }
  return { found, closed: document.querySelector(".lesson-panel").hidden };
}"""


def test_the_lesson_says_what_happened_at_each_step(tmp_path):
    kept, *_ = untrained(DEFAULT)
    with opened(tmp_path, [kept_run(tmp_path, kept)]) as shown:
        lesson = shown.evaluate(LESSON)
        state = now(shown)
        terms = shown.evaluate("""() => [...document.querySelectorAll("dfn")].map((term) => {
            term.focus();
            return document.querySelector(".meaning-of").textContent;
        })""")
    assert [before for before, _ in lesson["found"]] == [""] * 10
    after = [happened for _, happened in lesson["found"]]
    assert all(after)
    assert lesson["closed"]
    assert "so z = " in after[2]
    assert "would cost" in after[7]
    assert f"{printed(state['loss'])} nats" in after[7]
    assert f"largest magnitude is {printed(np.abs(state['gradients']['x']).max())}" in after[9]
    assert len(terms) >= 4
    assert all(terms)


def test_other_images_have_no_pad_and_are_shown_in_color(tmp_path):
    kept, params, loss = untrained("color")
    with opened(tmp_path, [kept_run(tmp_path, kept)]) as shown:
        assert shown.locator("#live-0-pad").count() == 0
        names = shown.locator("#live-0-samples button").evaluate_all(
            "all => all.map((each) => each.ariaLabel)"
        )
        assert names == [
            "Test image, class 0",
            "Test image, class 1",
            "Test image, class 2",
            "Noise",
            "Blank",
        ]
        shown.locator("#live-0-samples button").nth(2).click()
        pixels = shown.evaluate("""() => {
            const { width, height, ...canvas } = document.getElementById("live-0-seen");
            const data = document.getElementById("live-0-seen").getContext("2d").getImageData(0, 0, width, height).data;
            return { width, height, data: [...data] };
        }""")
        assert (pixels["height"], pixels["width"]) == (13, 10)
        colors = np.reshape(pixels["data"], (13, 10, 4))[..., :3]
        np.testing.assert_allclose(colors, 255 * _image(kept, 2), atol=1)
        state = now(shown)
        assert_agree(state, params, loss, _image(kept, 2), state["label"])
        shown.locator("#live-0-samples button").nth(4).click()
        assert not np.any(now(shown)["x"])
        assert shown.locator("#live-0-contributions button").all_inner_texts()[0].startswith("red")


def test_a_network_without_samples_shows_noise_and_says_nothing_wrong_of_its_address(tmp_path):
    kept, params, loss = untrained("even")
    net = kept._replace(samples=kept.samples[:0], labels=kept.labels[:0])
    bad = "#live-0/sample=constructor&off=9.9,1.x,,1.2&filter=7.1&at=99.0&label=12&ink=zz&maps=q&steps=-3&channel=5"
    with opened(tmp_path, [kept_run(tmp_path, net)], hash_=bad) as shown:
        state = now(shown)
        assert state["off"] == ["0.2"]
        x = np.reshape(state["x"], (9, 12, 1)).astype(np.float32)
        assert x.std() > 0.2
        shown.locator("#live-0-restore").click()
        assert_agree(now(shown), params, loss, x, state["label"])
        shown.evaluate("location.hash = '#live-0/off=1.0'")
        assert until(shown, "gradfn.state.off.has('0.0')")


def _image(kept, i):
    return kept.samples[i].reshape(kept.about["image"])
