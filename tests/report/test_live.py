"""The network in the page: Chromium computes the same values as JAX, and every control works."""

import functools
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.data._digits import enlarge, spline
from gradfn.pages.figures import curves
from gradfn.pages.live._digits import described
from gradfn.pages.live.arrays import as_json
from gradfn.runs.curve import Curve
from gradfn.runs.digit_net import DigitNet
from gradfn.runs.kept import Kept, Part
from gradfn.runs.rows import Inspections, Spikes, inspections, metrics
from tests.report.browser import in_page as in_plain_page
from tests.report.browser import needs_browser

NETS = {
    "sigmoid": ([784, 6, 10], "sigmoid", None, "cross-entropy"),
    "nielsen": ([784, 5, 10], "sigmoid", "sigmoid", "quadratic"),
    "relu": ([784, 7, 10], "relu", None, "cross-entropy"),
    "deep": ([784, 4, 3, 10], "gelu", "tanh", "quadratic"),
}
# Helpers for the scripts that run in the page; each script defines a function `result`.
HELPERS = """
const at = (target, type, x, y) => {
  target.scrollIntoView();
  const box = target.getBoundingClientRect();
  const where = { clientX: box.left + x * box.width, clientY: box.top + y * box.height };
  target.dispatchEvent(new PointerEvent(type, { bubbles: true, cancelable: true, pointerId: 7, ...where }));
};
const drag = (target, ...points) => {
  at(target, "pointerdown", ...points[0]);
  points.slice(1).forEach((point) => at(target, "pointermove", ...point));
  at(target, "pointerup", ...points[points.length - 1]);
};
const press = (target, key, more = {}) =>
  target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...more }));
const numbers = ({ pass, loss, probabilities, steps }) =>
  plain({ z: pass.z, a: pass.a, loss, probabilities, grads: gradfn.gradients(steps) });
"""

pytestmark = [
    pytest.mark.slow,
    needs_browser,
]


def digit_net(name, seed=0):
    """Return an untrained network with two samples, its parameters and its loss."""
    sizes, activation, output, loss_name = NETS[name]
    net = gf.mlp(sizes, activation, output)
    params = jax.tree.map(
        lambda leaf: 0.3 * jax.random.normal(jax.random.key(seed), leaf.shape), net.init(jax.random.key(seed))
    )
    samples = np.asarray(jax.random.uniform(jax.random.key(1), [2, 784]))
    about = {"activation": activation, "output": output, "loss": loss_name, "data": "noise"}
    kept = DigitNet(jax.tree.map(np.asarray, params), samples, np.array([3, 8]), None, about)
    loss = gf.classification_loss(net) if loss_name == "cross-entropy" else gf.quadratic_loss(net)
    return kept, params, loss


def kept_run(tmp_path, net=None, pictures=None):
    (tmp_path / "config.json").write_text("{}")
    return Kept(tmp_path, "toy", {"seed": 0}, {}, {"verdict": "done"}, {}, pictures or {}, net)


def in_page(tmp_path, kept, script, **inputs):
    return in_plain_page(tmp_path, kept, HELPERS + script, **inputs)


@functools.cache
def compiled(loss):
    """Return a compiled function: the inspection of a loss, and its gradients at the parameters and the input."""
    look, grad = (
        gf.inspect(loss, keep="*"),
        jax.grad(lambda params, x, label: loss(params, (x, label)), (0, 1)),
    )
    return jax.jit(lambda params, x, label: (look(params, (x, label)), grad(params, x, label)))


def by_jax(params, loss, x, label):
    """Return the values and gradients by name, and the loss."""
    inspection, (grads, grad_x) = compiled(loss)(params, x, label)
    values = {name: value for name, value in inspection.values.items() if name[0] in "az"}
    return values, {name: inspection[name].grad for name in values} | grads | {"x": grad_x}, inspection.value


def agree(actual, params, loss, x, label):
    values, grads, value = by_jax(params, loss, x, label)
    close = {"atol": 1e-5, "rtol": 1e-5}
    np.testing.assert_allclose(actual["loss"], value, **close)
    for name, expected in values.items():
        np.testing.assert_allclose(actual[name[0]][int(name[1:]) - 1], expected, err_msg=name, **close)
    assert set(actual["grads"]) == set(grads)
    for name, expected in grads.items():
        np.testing.assert_allclose(
            np.reshape(actual["grads"][name], expected.shape), expected, err_msg=name, **close
        )


def test_every_value_and_gradient_is_that_of_jax(tmp_path):
    nets = {name: digit_net(name) for name in NETS}
    x, label = np.linspace(-1, 1, 784, dtype=np.float32), 4
    script = """const result = () => Object.fromEntries(Object.entries(inputs.nets).map(([name, net]) =>
        [name, numbers(gradfn.compute(gradfn.build(JSON.parse(net)).net, inputs.x, inputs.label))]));"""
    page_nets = {name: as_json(described(kept)) for name, (kept, *_) in nets.items()}
    result = in_page(
        tmp_path, [kept_run(tmp_path, nets["sigmoid"][0])], script, nets=page_nets, x=x.tolist(), label=label
    )
    for name, (_, params, loss) in nets.items():
        agree(result[name], params, loss, x, label)


CONTROLS = """
const result = () => {
  const out = {};
  const see = (name) => (out[name] = { ...numbers(gradfn.now()), label: gradfn.state.label, x: plain(gradfn.state.x) });
  see("first");
  find("#live-0-samples button:nth-child(2)").click();
  see("second");
  find('#live-0-labels input[value="5"]').click();
  see("label 5");
  const tiles = document.querySelectorAll(".tiles button");
  tiles[2].click();
  out.node = text("#live-0-node-title");
  press(tiles[2], "ArrowRight");
  out.next = [text("#live-0-node-title"), document.activeElement === tiles[3]];
  drag(find("#live-0-node-weights"), [0.26, 0.01], [0.3, 0.3], [0.49, 0.99]);
  see("region");
  out.caption = text("figcaption");
  press(find("#live-0-node-weights"), "ArrowRight");
  out.moved = gradfn.net.layers[0].W.slice(3 * 784, 3 * 784 + 28).findIndex((weight) => weight !== 0);
  at(find("#live-0-node-weights"), "pointerdown", 0.9, 0.9);
  at(find("#live-0-node-weights"), "pointerup", 0.9, 0.9);
  const slider = find("#live-0-bias");
  slider.value = -7.5;
  slider.dispatchEvent(new Event("input"));
  see("bias");
  out.fires = text("#live-0-node-fires");
  find("#live-0-undo").click();
  see("as trained");
  out.steps = [document.querySelectorAll("#live-0-steps .view").length];
  for (let i = 0; i < 9; i++) find("#live-0-next").click();
  out.steps.push(document.querySelectorAll("#live-0-steps .view").length, find("#live-0-next").disabled);
  const headings = [...document.querySelectorAll("#live-0-steps h3")];
  out.headings = headings.map((each) => each.textContent.replace(/\\s+/g, ""));
  find("#live-0-previous").click();
  out.steps.push(document.querySelectorAll("#live-0-steps .view").length);
  drag(find("#live-0-pad"), [0.5, 0.1], [0.5, 0.5], [0.5, 0.9]);
  see("drawn");
  find("#live-0-clear").click();
  see("cleared");
  find("#theme").click();
  out.scheme = document.documentElement.style.colorScheme;
  find("#theme").click();
  out.scheme += ` ${document.documentElement.style.colorScheme}`;
  const labeled = (each) => each.ariaLabel || each.getAttribute("aria-labelledby") || each.labels?.length;
  const all = [...document.querySelectorAll("button, input, [role=img]")];
  out.unnamed = all.filter((each) => !labeled(each) && !each.innerText.trim()).map((each) => each.outerHTML);
  out.wide = document.documentElement.scrollWidth > innerWidth;
  return out;
};
"""


def test_every_control_works(tmp_path):
    kept, params, loss = digit_net("sigmoid")
    result = in_page(tmp_path, [kept_run(tmp_path, kept)], CONTROLS)
    first, second = kept.samples
    agree(result["first"], params, loss, first, 3)
    agree(result["second"], params, loss, second, 8)
    agree(result["label 5"], params, loss, second, 5)
    assert result["node"] == "Hidden node 2"
    assert result["next"] == ["Hidden node 3", True]

    region = np.zeros([28, 28])
    region[:, 7:14] = 1  # from 26 % to 49 % of the width
    inside = params | {"W1": params["W1"].at[3].multiply(jnp.asarray(region.ravel(), jnp.float32))}
    agree(result["region"], inside, loss, second, 5)
    assert result["caption"] == "Only this region; click for all"
    assert result["moved"] == 8
    agree(result["bias"], params | {"b1": params["b1"].at[3].set(-7.5)}, loss, second, 5)
    assert result["fires"] == "It fires where the weighted sum is over 7.500."
    agree(result["as trained"], params, loss, second, 5)

    assert result["steps"] == [1, 6, True, 5]
    steps = [f"{i + 1}∂L/∂{name}" for i, name in enumerate(("z2", "W2", "a1", "z1", "W1", "x"))]
    assert result["headings"] == steps

    image = np.reshape(result["drawn"]["x"], [28, 28])
    rows = np.flatnonzero(image.any(1))
    assert len(rows) == rows[-1] - rows[0] + 1 == 20  # pixels high, as MNIST's are
    for axis in (0, 1):
        center = (image.sum(axis) * np.arange(28)).sum() / image.sum()
        assert 13.5 - 1e-5 <= center <= 14.5
    agree(result["drawn"], params, loss, image.ravel().astype(np.float32), result["drawn"]["label"])
    assert result["drawn"]["label"] == np.argmax(result["drawn"]["probabilities"])  # until another is chosen
    assert not np.any(result["cleared"]["x"])
    assert result["scheme"] == "dark light"
    assert result["unnamed"] == []
    assert not result["wide"]


def test_what_is_drawn_is_prepared_as_the_training_images_were(tmp_path):
    kept, *_ = digit_net("sigmoid")
    rng = np.random.default_rng(0)
    script = "const result = () => plain(inputs.pads.map((pad) => gradfn.prepare(pad, inputs.side)));"
    # An image as MNIST has them: 20 pixels high, its center of mass in the middle; and nothing.
    image = np.zeros([28, 28])
    image[4:24, 9:20] = rng.uniform(0.1, 1, [20, 11])
    # The same on a pad with 5 to each pixel of the image, not in the middle.
    pad = np.roll(np.kron(image, np.ones([5, 5])), (11, -17), (0, 1))
    pads = [pad.ravel().tolist(), [0] * pad.size]
    result = in_page(tmp_path, [kept_run(tmp_path, kept)], script, pads=pads, side=len(pad))
    np.testing.assert_allclose(np.reshape(result[0], [28, 28]), image, atol=1e-9)
    assert result[1] is None

    # Digits of 8x8 pixels fill the height, three quarters of the width, in 17 levels.
    half = rng.integers(1, 17, [8, 3]) / 16
    small = np.pad(np.concatenate([half, half[:, ::-1]], 1), ((0, 0), (1, 1)))
    pad = np.roll(np.pad(np.kron(small, np.ones([15, 15])), 20), (11, -17), (0, 1))
    run = kept_run(tmp_path, kept._replace(spline=spline(8, 28)))
    result = in_page(tmp_path, [run], script, pads=[pad.ravel().tolist()], side=len(pad))
    np.testing.assert_allclose(np.reshape(result[0], [28, 28]), enlarge(small[None], 28)[0], atol=1e-6)


def test_pictures_grow_when_clicked_and_curves_show_their_values(tmp_path):
    out = io.BytesIO()
    curves([{"step": 1, "loss": 2.3}]).savefig(out, format="png")
    history = [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.5}, {"step": 30, "loss": 1.0}]
    run = kept_run(tmp_path, pictures={"weights": out.getvalue()})
    part = Part(metrics([history]), Inspections(), {}, Curve(), Spikes())
    runs = [run._replace(parts={"": part}), run]
    script = """const result = () => {
      const images = [...document.images].map((image) => image.naturalWidth > 100);
      find(".enlarge").click();
      const grown = find("#large").open && find("#large img").src === document.images[0].src;
      find("#large img").click();
      const legend = [text(".legend")];
      at(find(".chart svg"), "pointermove", 0.68, 0.5);
      legend.push(text(".legend"), text(".chart small"));
      find(".chart svg").dispatchEvent(new PointerEvent("pointerleave"));
      legend.push(text(".legend"));
      return { images, grown, open: find("#large").open, live: "gradfn" in window, legend }; };"""
    result = in_page(tmp_path, runs, script)
    assert result == {
        "images": [True, True],
        "grown": True,
        "open": False,
        "live": False,
        "legend": ["training loss 1", "training loss 1.5", "at step 20", "training loss 1"],
    }


# The parameters of a GPT with one block in the order of use, written by hand.
GPT_DEPTH = [
    *("embed/W", "blocks/0/attention_norm/gain"),
    *(f"blocks/0/attention/{name}/W" for name in ("query", "key", "value", "out")),
    *("blocks/0/feed_norm/gain", "blocks/0/feed/up/W", "blocks/0/feed/down/W", "final_norm/gain"),
]


def gpt_run(tmp_path):
    """Return a run of a small GPT that was inspected twice, as `gf.fit` stores it."""
    net = gf.gpt(gf.GPTConfig(11, 8, n_layers=1, n_heads=2, width=8, positions="rope", bias=False))
    params, tokens = net.init(jax.random.key(0)), np.zeros([2, 8], int)
    look = gf.inspect(gf.batch_mean(gf.next_token_loss(net)), input_grads=False)
    row = json.loads(json.dumps(jax.jit(look)(params, (tokens, tokens)).to_dict()))
    shapes = {name: (8,) for name in row["grads"]}
    shapes |= {f"more/{i}": (8,) for i in range(9)}  # a table that is folded
    looks = inspections([row | {"step": step} for step in (0, 10)], shapes)
    part = Part(metrics([[{"step": 1, "loss": 2.0}]]), looks, shapes, Curve(), Spikes())
    return kept_run(tmp_path)._replace(parts={"": part}), list(row["sites"])


def test_every_details_opens_on_something_and_the_rows_of_heat_maps_are_in_depth_order(tmp_path):
    run, sites = gpt_run(tmp_path)
    script = """const result = () => {
      const maps = () => [...document.querySelectorAll(".heat .rows")].map((rows) =>
        [...rows.querySelectorAll(":scope > span")].map((row) => row.innerText.trim()).filter(Boolean));
      const folded = [...document.querySelectorAll("details")].map((each) => {
        each.open = false;
        const before = each.getBoundingClientRect().height;
        each.querySelector("summary").click();
        const inside = each.innerText.replace(each.querySelector("summary").innerText, "").trim();
        return { grown: each.getBoundingClientRect().height - before, inside: inside.length };
      });
      return { folded, maps: maps(), text: document.body.innerText }; };"""
    result = in_page(tmp_path, [run], script)
    assert len(result["folded"]) == 3
    assert all(each["grown"] > 100 and each["inside"] > 20 for each in result["folded"])
    assert result["maps"] == [GPT_DEPTH, sites]
    assert "method" not in result["text"]


def test_in_dark_mode_pictures_are_dark_and_every_variable_is_defined(tmp_path):
    white = io.BytesIO()
    curves([{"step": 1, "loss": 2.3}]).savefig(white, format="png")
    run = gpt_run(tmp_path)[0]._replace(pictures={"weights": white.getvalue()})
    script = """const result = () => {
      const look = () => [getComputedStyle(document.images[0]).filter, getComputedStyle(find(".inverted")).display];
      const out = [look()];
      find("#theme").click();
      out.push(look());
      const style = [...document.styleSheets[0].cssRules].map((rule) => rule.cssText).join(" ");
      const used = new Set([...style.matchAll(/var\\((--[\\w-]+)/g)].map((found) => found[1]));
      const all = document.documentElement.outerHTML + inputs.scripts;
      const undefined = [...used].filter((name) => !new RegExp(`${name}["]?[:,]`).test(all));
      return { out, undefined, used: used.size }; };"""
    # In the page the scripts are encoded.
    scripts = "".join(
        file.read_text() for file in (Path(gf.__file__).parent / "pages" / "assets").rglob("*.js")
    )
    result = in_page(tmp_path, [run], script, scripts=scripts)
    assert result["out"] == [["none", "none"], ["invert(0.92) hue-rotate(180deg)", "block"]]
    assert result["used"] > 20
    assert result["undefined"] == []
