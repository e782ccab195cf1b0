"""Training in the page: the steps of JAX and optax, every control, and what the page says when training fails."""

import functools
import itertools
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn.data._digits import enlarge, spline
from gradfn.files import FileError
from gradfn.pages.live._train import described, train
from gradfn.pages.live.arrays import as_json
from gradfn.runs.kept import Kept, read_run
from gradfn.runs.training_set import TrainingSet, keep_training_set, load_training_set
from tests.report.browser import in_page, needs_browser, opened

STEPS = 20
OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": optax.adam,
}


def about(**more):
    return {
        "inputs": "plane",
        "data": "two moons",
        "activation": "tanh",
        "rate": 0.03,
        "batch": 0,
        "steps": 300,
        "seed": 3,
        "examples": 60,
        "levels": 1,
    } | more


@functools.cache
def plane(sizes=(2, 6, 2), activation="tanh"):
    """Return a training set of two moons of 60 points, and 40 for testing."""
    from sklearn.datasets import make_moons

    x, y = make_moons(100, noise=0.15, random_state=0)
    x, y = x.astype(np.float32), y.astype(np.int32)
    params = jax.tree.map(np.asarray, gf.mlp(sizes).init(jax.random.key(3)))
    return TrainingSet(params, (x[:60], y[:60]), (x[60:], y[60:]), None, about(activation=activation))


@functools.cache
def images(sizes=(784, 4, 10)):
    """Return a training set of 40 real digits of 8x8 pixels, and 20 for testing."""
    data = gf.data.digits(size=8)
    parts = [
        (np.round(16 * x[:n]).astype(np.uint8), y[:n]) for (x, y), n in ((data.train, 40), (data.test, 20))
    ]
    params = jax.tree.map(np.asarray, gf.mlp(sizes).init(jax.random.key(3)))
    settings = about(inputs="image", data="digits", activation="sigmoid", rate=0.003, batch=8, levels=16)
    return TrainingSet(params, *parts, spline(8, 28), settings | {"examples": 40})


def kept_run(tmp_path, training_set):
    (tmp_path / "config.json").write_text("{}")
    result = {"verdict": "done"}
    return Kept(tmp_path, "toy", {"seed": 0}, {}, result, {}, {}, None, training_set=training_set)


def inputs_of(training_set):
    x, y = training_set.train
    if training_set.spline is not None:
        x = enlarge(x.reshape(-1, 8, 8) / 16, 28).reshape(len(x), -1)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y)


def by_jax(training_set, activation, start, optimizer, batches):
    """Return the losses, gradient norms, shares of units and parameters of a training with JAX and optax."""
    x, y = inputs_of(training_set)
    n_layers = len(start) // 2
    net = gf.mlp([start["W1"].shape[1], *(len(start[f"b{i + 1}"]) for i in range(n_layers))], activation)
    loss = gf.batch_mean(gf.classification_loss(net))
    look = gf.inspect(loss, keep=[f"z{i + 1}" for i in range(n_layers)])

    @jax.jit
    def step(params, state, batch):
        found = look(params, batch)
        updates, state = optimizer.update(found.grads, state, params)
        return optax.apply_updates(params, updates), state, found, updates

    params = {name: jnp.asarray(array) for name, array in start.items()}
    state, records = optimizer.init(params), []
    for indices in batches:
        batch = (x, y) if indices is None else (x[np.array(indices)], y[np.array(indices)])
        before = params
        params, state, found, updates = step(params, state, batch)
        sites = found.stats
        shares = [sites[f"a{i}"].saturated for i in range(1, n_layers)]
        if activation == "relu":
            shares = [sites[f"a{i}"].dead for i in range(1, n_layers)]
        length = jnp.linalg.norm
        records.append(
            {
                "loss": float(found.value),
                "norms": [float(length(found[f"z{i + 1}"].grad)) for i in range(n_layers)],
                "ratios": [
                    float(length(updates[f"W{i + 1}"]) / length(before[f"W{i + 1}"])) for i in range(n_layers)
                ],
                "units": None if activation in ("gelu", "identity") else [float(share) for share in shares],
            }
        )
    return records, {name: np.asarray(array) for name, array in params.items()}


TRAIN = """
const result = () => inputs.cases.map(({ content, settings, steps }) => {
  const data = gradfn.build(JSON.parse(content));
  const trainer = gradfn.makeTrainer(data, settings);
  const copy = () => Object.fromEntries(trainer.net.layers.flatMap(({ W, b, nIn }, l) =>
    [[`W${l + 1}`, { values: W.slice(), nIn }], [`b${l + 1}`, { values: b.slice() }]]));
  const start = copy(), records = [], batches = [];
  for (let i = 0; i < steps; i++) {
    records.push(trainer.advance());
    batches.push(trainer.last().indices && trainer.last().indices.slice());
  }
  return { start, records, batches, end: copy(), x: data.train.x };
});
"""


def arrays(found):
    return {
        name: np.reshape(np.array(each["values"], np.float32), [-1, each["nIn"]] if "nIn" in each else [-1])
        for name, each in found.items()
    }


@pytest.mark.slow
@needs_browser
def test_twenty_steps_are_those_of_jax_and_optax(tmp_path):
    def case(training_set, **settings):
        *hidden, _ = map(len, biases(training_set.params))
        base = {"depth": len(hidden), "width": hidden[0], "batch": training_set.about["batch"], "seed": 3}
        base |= {
            "activation": training_set.about["activation"],
            "rate": 0.03,
            "scale": 1,
            "optimizer": "adam",
        }
        return training_set, base | settings

    cases = [
        case(plane()),
        case(plane(), optimizer="sgd", rate=0.5),
        case(plane(), optimizer="momentum", rate=0.1, batch=16),
        case(plane(), activation="relu", depth=3, width=8),
        case(plane(), activation="gelu", depth=2, width=4, scale=3, seed=11),
        case(plane(), activation="sigmoid", depth=10, width=7),
        case(plane(), activation="identity", depth=0),
        case(plane((2, 6, 3, 2)), optimizer="momentum", rate=0.1, batch=16),
        case(images(), rate=0.003),
        case(images(), optimizer="momentum", rate=0.05, batch=0),
        case(images(), activation="relu", depth=2, width=9, batch=16, optimizer="sgd", rate=0.1),
    ]
    content = [
        {"content": as_json(described(one)), "settings": settings, "steps": STEPS} for one, settings in cases
    ]
    found = in_page(tmp_path, [kept_run(tmp_path, plane())], TRAIN, cases=content)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4)
    for (training_set, settings), actual in zip(cases, found, strict=True):
        start = arrays(actual["start"])
        x, _ = inputs_of(training_set)
        close(np.reshape(actual["x"], x.shape), x, atol=1e-6)
        own = settings["depth"] == len(training_set.params) // 2 - 1 and settings["seed"] == 3
        if own and settings["width"] == len(training_set.params["b1"]) and settings["scale"] == 1:
            for name, array in training_set.params.items():
                np.testing.assert_array_equal(start[name], array)
        optimizer = OPTIMIZERS[settings["optimizer"]](settings["rate"])
        with jax.numpy_dtype_promotion("standard"):  # optax divides integers by floats
            records, end = by_jax(training_set, settings["activation"], start, optimizer, actual["batches"])
        for record, expected in zip(actual["records"], records, strict=True):
            at = str((settings, record["step"]))
            close(record["loss"], expected["loss"], err_msg=at)
            close(record["norms"], expected["norms"], err_msg=at)
            close(record["ratios"], expected["ratios"], err_msg=at)
            if expected["units"] is None:
                assert record["units"] is None
            else:
                # A value may lie on the threshold.
                close(record["units"], expected["units"], atol=0.01, err_msg=at)
        for name, array in end.items():
            close(arrays(actual["end"])[name], array, atol=1e-4 * np.abs(array).max(), err_msg=str(settings))
        check_batches(actual["batches"], settings["batch"], len(training_set.train[1]))
    assert sum(any(share > 0 for share in record["units"]) for record in found[0]["records"]) > 0


def biases(params):
    return [params[f"b{i + 1}"] for i in range(len(params) // 2)]


def check_batches(batches, size, n):
    """Each epoch uses an example once at most, and all but those of the last partial batch."""
    if not size or size >= n:
        assert batches == [None] * STEPS
        return
    per_epoch = n // size
    starts = range(0, STEPS - per_epoch + 1, per_epoch)
    epochs = [list(itertools.chain(*batches[start : start + per_epoch])) for start in starts]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == per_epoch * size
        assert min(epoch) >= 0
        assert max(epoch) < n
    assert epochs[0] != epochs[1]


@pytest.mark.slow
@needs_browser
def test_the_page_of_moons_repeats_the_run_itself(tmp_path):
    from gradfn.experiments import moons

    result = moons.run(moons.Config(hidden=(3, 2), steps=40, points=30, folder=str(tmp_path / "run")))
    kept = read_run(result.folder)
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    with opened(tmp_path, [kept._replace(pictures={})]) as page:
        page.evaluate("gradfn.steps(40)")
        records = page.evaluate("gradfn.records()")
        assert len(rows) > 10
        for row in rows[:-1]:
            assert records[row["step"]]["loss"] == pytest.approx(row["loss"], rel=1e-4)
        shown = page.locator("#live-0-now").inner_text()
        assert f"Step 40 · epoch 40.0 · training loss {records[-1]['loss']:.3f}" in shown
        assert f"test accuracy {100 * result.test_accuracy:.1f} %" in shown
        weights = page.evaluate("gradfn.trainer().net.layers.map(({ W }) => Array.from(W))")
        for layer, found in enumerate(weights, 1):
            np.testing.assert_allclose(found, np.ravel(result.params[f"W{layer}"]), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@needs_browser
def test_small_and_unusual_runs_train_without_an_error(tmp_path):
    x, y = plane().train
    runs = {
        "no hidden layer": plane((2, 2)),
        "two points": plane()._replace(train=(x[:2], y[:2])),
        "images without a hidden layer": images((784, 10)),
        "an activation of its own": plane((2, 70, 5, 2), "selu"),
        "markup": plane()._replace(about=about(data="<img src=x onerror=alert(1)>")),
    }
    for name, training_set in runs.items():
        with opened(tmp_path, [kept_run(tmp_path, training_set)]) as page:
            page.evaluate("gradfn.steps(30)")
            assert page.evaluate("gradfn.trainer().step") == 30, name
            assert "the run's own initial parameters" in page.locator("#live-0-origin").inner_text()
            for preset in ("Ten sigmoid layers", "Overflow: linear, SGD, rate 100", "As in the run"):
                page.evaluate("(name) => { gradfn.choose(name); gradfn.pause(); gradfn.steps(3); }", preset)
            assert page.evaluate("gradfn.state.settings") == page.evaluate("gradfn.defaults"), name
            if name == "markup":
                assert "<img src=x onerror=alert(1)>" in page.locator("#live-0 .lead").inner_text()


@pytest.mark.slow
@needs_browser
def test_the_page_draws_initial_weights_as_gf_mlp_does(tmp_path):
    script = """const result = () => {
      gradfn.change({ depth: 2, width: 64, seed: 5 });
      const first = gradfn.trainer().net.layers.map(({ W, b }) => [W.slice(), b.slice()]);
      gradfn.change({ seed: 6 });
      const other = gradfn.trainer().net.layers.map(({ W, b }) => [W.slice(), b.slice()]);
      gradfn.change({ seed: 5 });
      const again = gradfn.trainer().net.layers.map(({ W, b }) => [W.slice(), b.slice()]);
      return { first, other, again, said: text("#live-0-origin") }; };"""
    found = in_page(tmp_path, [kept_run(tmp_path, plane())], script)
    assert found["first"] == found["again"]
    assert found["first"][1][0] != found["other"][1][0]
    weights = np.array(found["first"][1][0])  # 64 x 64, from 64 inputs
    expected = np.asarray(gf.mlp([2, 64, 64, 2]).init(jax.random.key(0))["W2"]).ravel()
    assert np.std(weights) == pytest.approx(1 / 8, rel=0.04)
    assert np.abs(weights).max() == pytest.approx(np.abs(expected).max(), rel=0.02)
    np.testing.assert_allclose(
        np.quantile(weights, [0.1, 0.3, 0.5, 0.7, 0.9]),
        np.quantile(expected, [0.1, 0.3, 0.5, 0.7, 0.9]),
        atol=0.015,
    )
    assert not np.any(found["first"][1][1])
    assert "the page draws them" in found["said"]


def until(page, expression):
    """Wait until an expression is true; the page's policy forbids what Playwright does for that."""
    deadline = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


def signs(page):
    return page.evaluate("gradfn.signs()")


@pytest.mark.slow
@needs_browser
def test_each_preset_breaks_the_training_and_the_page_says_what_showed_first(tmp_path):
    with opened(tmp_path, [kept_run(tmp_path, plane((2, 16, 2)))]) as page:
        board = page.locator("#live-0-signs")

        def press(name, steps):
            page.get_by_role("button", name=name, exact=True).click()
            until(page, f"gradfn.trainer().step >= {steps} || gradfn.trainer().fault")
            page.evaluate("gradfn.pause()")

        press("Ten sigmoid layers", 3)
        first, record = signs(page)[0], page.evaluate("gradfn.records()[0]")
        assert (first["kind"], first["step"]) == ("vanishing", 0)
        ratio = record["norms"][0] / record["norms"][-1]
        assert ratio < 1e-5
        assert "Step 0: The gradient vanishes: its norm at layer 1 is" in board.inner_text()
        shown = [float(number.replace("−", "-")) for number in re.findall(r"[\d.]+e−\d+", first["text"])]
        assert shown == pytest.approx([record["norms"][0], ratio], rel=0.06)

        press("Learning rate 100", 5)
        kinds = {each["kind"]: each["step"] for each in signs(page)}
        assert kinds["large"] == 0
        assert kinds["loss"] >= 1
        losses = [each["loss"] for each in page.evaluate("gradfn.records()")]
        assert max(losses) > 20 * losses[0]
        assert "The loss rises" in board.inner_text()
        assert board.locator("li").first.inner_text().startswith("Step 0: The update is too large")

        press("Learning rate 0.0001", 230)
        assert {"small", "stalled"} >= {each["kind"] for each in signs(page)} >= {"small"}
        assert max(max(each["ratios"]) for each in page.evaluate("gradfn.records()")[:21]) < 1e-3

        press("ReLU, SGD, rate 10: dead units", 60)
        assert max(page.evaluate("gradfn.last().units")) > 0.5
        assert "Units are dead" in board.inner_text()
        assert "Dead, % of the units" in page.locator("#live-0-units").inner_text()

        press("Overflow: linear, SGD, rate 100", 100)
        fault = page.evaluate("gradfn.trainer().fault")
        assert fault["step"] < 100
        assert "A number is not finite, and the training has stopped: " in board.inner_text()
        where = fault["first"]
        layer, name = where["layer"], where["name"]
        assert f"{name}{layer + 1}, " in signs(page)[-1]["text"]
        assert page.locator("#live-0-run").is_disabled()
        assert page.locator("#live-0-step").is_disabled()
        # The parameters are still those of before, and all of them are finite.
        weights = page.evaluate("gradfn.trainer().net.layers.map(({ W }) => Array.from(W))")
        assert all(np.isfinite(each).all() for each in map(np.array, weights))

        page.locator("#live-0-restart").click()
        assert page.locator("#live-0-run").is_enabled()
        assert "Nothing yet: press Start." in board.inner_text()

        page.get_by_role("button", name="As in the run", exact=True).click()
        assert page.evaluate("gradfn.state.settings") == page.evaluate("gradfn.defaults")
        page.locator("#live-0-run").click()
        until(page, "gradfn.trainer().step >= 250")
        page.evaluate("gradfn.pause()")
        assert page.evaluate("gradfn.last().loss") < 0.2
        assert [each["kind"] for each in signs(page) if not each["harmless"]] == []


def address(page):
    page.wait_for_timeout(400)  # it is written a moment after the last change
    return page.evaluate("location.hash")


def settings(page):
    return page.evaluate("gradfn.state.settings")


@pytest.mark.slow
@needs_browser
def test_every_control_by_mouse_and_keyboard(tmp_path):
    with opened(tmp_path, [kept_run(tmp_path, plane())]) as page:
        at = lambda name: page.locator(f"#live-0-{name}")  # noqa: E731
        step = lambda: page.evaluate("gradfn.trainer().step")  # noqa: E731

        # By mouse.
        at("step").click()
        at("step").click()
        assert step() == 2
        assert "Step 2 " in at("now").inner_text()
        at("run").click()
        until(page, "gradfn.trainer().step > 5")
        assert at("run").inner_text() == "Pause"
        at("run").click()
        paused = step()
        page.wait_for_timeout(150)
        assert step() == paused
        assert f"step={paused}" in address(page)
        at("restart").click()
        assert step() == 0
        assert "step=" not in address(page)
        box = at("depth").bounding_box()
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        assert settings(page)["depth"] == 5
        assert page.evaluate("gradfn.trainer().net.layers.length") == 6
        at("activation").select_option("relu")
        at("optimizer").select_option("momentum")
        at("scale").select_option("3")
        at("batch").select_option("8")
        assert settings(page) | {"rate": 0, "width": 0} == {
            **{"depth": 5, "width": 0, "activation": "relu", "optimizer": "momentum", "rate": 0},
            **{"batch": 8, "scale": 3, "seed": 3},
        }
        at("seed").fill("12")
        assert settings(page)["seed"] == 12
        at("rate").fill("0.25")
        assert settings(page)["rate"] == 0.25
        at("rate").fill("1000")  # larger than is allowed
        assert settings(page)["rate"] == 0.25
        assert at("rate").get_attribute("aria-invalid") == "true"
        at("seed").focus()
        assert at("rate").input_value() == "0.25"
        box = at("rate-slider").bounding_box()
        page.mouse.click(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
        assert 50 < settings(page)["rate"] <= 100
        at("speed").select_option("max")
        at("restart").click()
        at("rate").fill("0.01")
        at("run").click()
        until(page, "!gradfn.state.running")  # it pauses after as many steps as the run took
        assert step() == 300

        # A setting that does not change the parameters is used from the next step.
        at("optimizer").select_option("adam")
        assert step() == 300
        assert "step=" not in address(page)  # as this training cannot be repeated from the settings alone

        # By keyboard alone: Tab leads to each control.
        page.get_by_role("button", name="As in the run").click()
        at("run").focus()
        order = []
        for _ in range(40):
            name = page.evaluate("document.activeElement.id.replace('live-0-', '')")
            order.append(name)
            if name == "seed":
                break
            page.keyboard.press("Tab")
        wanted = [
            "run",
            "step",
            "restart",
            "speed",
            "depth",
            "width",
            "activation",
            "optimizer",
            "rate-slider",
        ]
        assert [name for name in order if name in [*wanted, "rate", "batch", "scale", "seed"]] == [
            *wanted,
            *("rate", "batch", "scale", "seed"),
        ]
        at("depth").focus()
        page.keyboard.press("ArrowRight")
        assert settings(page)["depth"] == 2
        at("width").focus()
        page.keyboard.press("End")
        assert settings(page)["width"] == 64
        at("activation").focus()
        page.keyboard.press("s")
        assert settings(page)["activation"] == "sigmoid"
        at("rate").focus()
        page.keyboard.press("Control+a")
        page.keyboard.type("1e-2")
        assert settings(page)["rate"] == 0.01
        at("step").focus()
        page.keyboard.press("Enter")
        assert step() == 1
        at("speed").select_option("10")
        page.get_by_role("button", name="Ten sigmoid layers").focus()
        page.keyboard.press("Space")
        until(page, "gradfn.trainer().step > 2")
        at("run").focus()
        page.keyboard.press("Space")
        assert not page.evaluate("gradfn.state.running")


@pytest.mark.slow
@needs_browser
def test_reduced_motion_redraws_once_a_second_and_the_page_responds_while_it_trains(tmp_path):
    watch = """async () => {
      const shown = document.getElementById("live-0-now"), gaps = [];
      let redrawn = 0, before = performance.now(), on = true;
      new MutationObserver(() => redrawn++).observe(shown, { childList: true });
      const frame = (now) => { gaps.push(now - before); before = now; if (on) requestAnimationFrame(frame); };
      gradfn.restart();
      gradfn.state.speed = "10";
      redrawn = 0;
      gradfn.run();
      requestAnimationFrame(frame);
      await new Promise((resolve) => setTimeout(resolve, 2500));
      on = false;
      gradfn.pause();
      return { redrawn, frames: gaps.length, step: gradfn.trainer().step };
    }"""
    with opened(tmp_path, [kept_run(tmp_path, plane())]) as page:
        calm = page.evaluate(watch)
        page.emulate_media(reduced_motion="no-preference")
        moving = page.evaluate(watch)
    for found in (calm, moving):
        assert 8 <= found["step"] <= 26  # 10 steps per second; fewer where the machine is busy
        assert found["frames"] > 15
    assert 3 <= calm["redrawn"] <= 5  # with that of the restart, of the start and of the pause
    assert moving["redrawn"] >= 8


def in_view(page, names, height):
    """Return whether all elements are in the window as it is scrolled."""
    boxes = [page.locator(f"#live-0-{name}").bounding_box() for name in names]
    return all(box["y"] >= 0 and box["y"] + box["height"] <= height for box in boxes)


@pytest.mark.slow
@needs_browser
def test_on_a_phone_boundary_start_and_loss_are_in_one_view(tmp_path):
    with opened(tmp_path, [kept_run(tmp_path, plane())], width=390, touch=True, dark=True) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.locator("#live-0-picture").evaluate("(each) => each.scrollIntoView()")
        assert in_view(page, ["picture", "run", "loss"], 844)
        page.locator("#live-0-step").tap()
        assert page.evaluate("gradfn.trainer().step") == 1
        page.locator("#live-0-run").tap()
        until(page, "gradfn.trainer().step > 10")
        page.locator("#live-0-run").tap()
        assert not page.evaluate("gradfn.state.running")
        page.get_by_role("button", name="Ten sigmoid layers").tap()
        until(page, "gradfn.signs().length > 0")
        page.locator("#live-0-run").tap()
        depth = page.locator("#live-0-depth")
        depth.scroll_into_view_if_needed()
        box = depth.bounding_box()
        page.touchscreen.tap(box["x"] + 1, box["y"] + box["height"] / 2)
        assert settings(page)["depth"] == 0
        assert page.locator("#live-0-width").is_disabled()
        assert "Without hidden layers" in page.locator("#live-0-no-units").inner_text()
        # The meaning of a term.
        page.locator("#live-0-rate-label").tap()
        assert "How far an update goes" in page.locator(".meaning-of").inner_text()


@pytest.mark.slow
@needs_browser
def test_on_a_wide_screen_controls_picture_and_loss_are_in_one_view(tmp_path):
    for found in (plane(), images()):
        with opened(tmp_path, [kept_run(tmp_path, found)]) as page:
            page.locator("#live-0-picture").evaluate("(each) => each.scrollIntoView()")
            names = ["picture", "run", "loss", "depth", "seed", "presets"]
            assert in_view(page, names, 900)
            assert page.evaluate("document.documentElement.scrollWidth") == 1280


@pytest.mark.slow
@needs_browser
def test_an_address_repeats_a_training_and_nonsense_in_it_is_ignored(tmp_path):
    run = kept_run(tmp_path, plane())
    with opened(
        tmp_path, [run], hash_="#live-0/depth=2&activation=relu&optimizer=sgd&rate=0.1&batch=16&step=37"
    ) as page:
        until(page, "gradfn.trainer().step === 37 && !gradfn.state.running")
        assert settings(page)["depth"] == 2
        replayed = page.evaluate("Array.from(gradfn.trainer().net.layers[0].W)")
        page.evaluate("gradfn.restart(); gradfn.steps(37)")
        assert page.evaluate("Array.from(gradfn.trainer().net.layers[0].W)") == replayed
        # A link on the page.
        page.evaluate("location.hash = '#live-0/rate=100'")
        until(page, "gradfn.state.settings.rate === 100")
        assert settings(page) | {"rate": 0.03} == page.evaluate("gradfn.defaults")
        pressed = page.locator("#live-0-presets [aria-pressed=true]")
        assert pressed.all_inner_texts() == ["Learning rate 100"]
    nonsense = (
        "#live-0/depth=99&width=-1&rate=NaN&seed=1e5&activation=%3Cb%3E&optimizer=__proto__&scale=7&batch=x"
        "&step=zz&toString=1"
    )
    with opened(tmp_path, [run], hash_=nonsense) as page:
        assert settings(page) == page.evaluate("gradfn.defaults")
        page.locator("#live-0-step").click()
        assert page.evaluate("gradfn.trainer().step") == 1


# What a visitor does in each step of the lesson.
LESSON = [
    ["#live-0-run"],
    ["#live-0-restart", *["#live-0-step"] * 3],
    ['button:has-text("Ten sigmoid layers")'],
    [],
    [],
    ['button:has-text("Learning rate 100")'],
    ['button:has-text("Learning rate 0.0001")'],
    ['button:has-text("ReLU, SGD")'],
    ['button:has-text("Overflow: linear")'],
    [],
]


@pytest.mark.slow
@needs_browser
def test_each_step_of_the_lesson_can_be_done_and_says_what_happened(tmp_path):
    for training_set, dark in ((plane((2, 16, 2)), False), (images(), True)):
        with opened(tmp_path, [kept_run(tmp_path, training_set)], dark=dark) as page:
            page.locator(".lesson-open").click()
            page.locator("#live-0-speed").select_option("max")
            for number, actions in enumerate(LESSON, 1):
                assert page.locator(".lesson-place").inner_text() == f"Step {number} of 10"
                for action in actions:
                    page.locator("#live-0").locator(action).first.click()
                if number == 4 and not page.evaluate("gradfn.state.running"):
                    page.locator("#live-0-run").click()
                if number == 5:
                    page.locator("#live-0-activation").select_option("tanh")
                    if not page.evaluate("gradfn.state.running"):
                        page.locator("#live-0-run").click()
                if number == 10:
                    page.locator("#live-0-presets").get_by_text("As in the run").click()
                    page.locator("#live-0-batch").select_option("8")
                    page.locator("#live-0-run").click()
                page.wait_for_selector(".lesson-panel.done")
                page.evaluate("gradfn.pause()")
                happened = page.locator(".lesson-happened").inner_text()
                assert re.search(r"\d", happened), (number, happened)
                assert "NaN" not in happened.replace("NaN,", ""), (number, happened)
                assert "undefined" not in happened
                page.locator(".lesson-next").click()
            assert page.locator(".lesson-panel").is_hidden()


@pytest.mark.slow
@needs_browser
def test_every_control_has_a_name_and_every_term_a_meaning(tmp_path):
    script = """const result = async () => {
      const labeled = (each) => each.ariaLabel || each.getAttribute("aria-labelledby") || each.labels?.length;
      const all = [...document.querySelectorAll("#live-0 button, #live-0 input, #live-0 select, #live-0 [role=img]")];
      gradfn.steps(30);
      const terms = [...document.querySelectorAll("#live-0 [data-term]")];
      terms.forEach((each) => each.click());
      return {
        unnamed: all.filter((each) => !labeled(each) && !each.innerText.trim()).map((each) => each.outerHTML),
        n: all.length,
        terms: terms.map((each) => document.getElementById(each.getAttribute("aria-describedby")).textContent),
        chart: find("#live-0-norms svg").getAttribute("aria-label"),
        last: gradfn.last().norms,
      }; };"""
    found = in_page(tmp_path, [kept_run(tmp_path, plane())], script)
    assert found["unnamed"] == []
    assert found["n"] > 20
    assert len(found["terms"]) >= 12
    assert all(len(meaning) > 30 for meaning in found["terms"])
    assert "Gradient norm of each layer. Now: layer 1 " in found["chart"]
    assert f"layer 1 {found['last'][0]:.3f}" in found["chart"]


def test_a_training_set_is_read_back_unchanged(tmp_path):
    for made in (plane(), images()):
        found = load_training_set(keep_training_set(tmp_path, made))
        assert found.about == made.about
        jax.tree.map(np.testing.assert_array_equal, found.train + found.test, made.train + made.test)
        jax.tree.map(np.testing.assert_array_equal, found.params, made.params)
        assert (found.spline is None) == (made.spline is None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found._replace(params={}), "expected the arrays W1"),
        (lambda found: found._replace(train=(found.train[0][:, :1], found.train[1])), "train_x: expected"),
        (lambda found: found._replace(test=(found.test[0], found.test[1] + 5)), "test_y: expected labels"),
        (lambda found: found._replace(test=(found.test[0] * np.nan, found.test[1])), "expected finite"),
        (lambda found: found._replace(about=found.about | {"rate": -1.0}), "expected a rate"),
        (lambda found: found._replace(about=found.about | {"inputs": "sound"}), "inputs"),
    ],
)
def test_a_damaged_training_set_is_named(tmp_path, change, message):
    file = keep_training_set(tmp_path, change(plane()))
    with pytest.raises(FileError, match=message):
        load_training_set(file)


def test_what_the_page_cannot_train_is_said(tmp_path):
    run = kept_run(tmp_path, plane())
    live = train(run, 5_000_000)
    assert (live.kind, live.title, live.about["sizes"]) == ("train", "Train it", "2-6-2")
    assert train(run._replace(training_set=None), 5_000_000) is None
    assert "too large" in train(run._replace(training_set=None, training_set_left_out=True), 5_000_000)
    assert "too large" in train(run, 1000)
    softmax = plane()._replace(about=about(activation="softmax"))
    assert "activation softmax" in train(run._replace(training_set=softmax), 5_000_000)
    assert "at most 10 hidden layers" in train(run._replace(training_set=plane((2, *[3] * 11, 2))), 5_000_000)


def test_the_digits_of_the_built_in_data_fit_in_the_page(tmp_path):
    data = gf.data.digits(size=8)
    parts = [(np.round(16 * x).astype(np.uint8), y) for x, y in (data.train, data.test)]
    whole = images()._replace(train=parts[0], test=parts[1])
    assert len(train(kept_run(tmp_path, whole), 5_000_000).content) < 250_000
