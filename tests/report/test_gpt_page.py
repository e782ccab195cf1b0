"""The page of a GPT in Chromium: each control by mouse, touch and keyboard, and numbers that are those of JAX."""

import dataclasses
import re
from typing import NamedTuple
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn.pages.live._gpt import described, rounded
from gradfn.runs import sample
from gradfn.runs.kept import Kept
from gradfn.runs.language_net import LanguageNet, load_language_net, load_params
from tests.report.browser import needs_browser, opened, until

TEXT = "the cat sat on the mat. <b>a & b</b>\n" * 8
CONTEXT = 20
HERE = "on the mat. <b>a"  # 16 tokens
STEPS = (10, 20, 30)

pytestmark = [pytest.mark.slow, needs_browser]


class Trained(NamedTuple):
    run: Kept
    net: gf.Net
    params: dict  # by step, as the page has them
    tokenizer: gf.data.Tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a GPT that was trained for 30 steps, of which three checkpoints were kept, and its run."""
    folder = tmp_path_factory.mktemp("gpt")
    tokenizer = gf.data.characters(TEXT)
    sizes = {"context": CONTEXT, "n_layers": 2, "n_heads": 2, "width": 16}
    config = gf.GPTConfig(vocab=tokenizer.size, positions="rope", bias=False, **sizes)
    net = gf.gpt(config)
    sample.save_model(folder, "gpt", dataclasses.asdict(config), tokenizer, False)
    windows = gf.data.windows(jnp.asarray(tokenizer.encode(TEXT), jnp.int32), CONTEXT, 8)
    options = {"batch_size": 8, "folder": folder, "keep_every": 10, "progress": False}
    params = net.init(jax.random.key(0))
    gf.fit(gf.batch_mean(gf.next_token_loss(net)), params, windows, optax.adam(0.02), 30, **options)
    found = load_language_net(folder)
    assert isinstance(found, LanguageNet)
    found = found._replace(samples=["the cat sat", "mat. "])
    dtype = described(found)["dtype"]
    by_step = {
        step: as_tree(rounded(load_params(file, found.architecture), dtype))
        for step, file in found.kept.items()
    }
    assert tuple(by_step) == STEPS
    return Trained(kept(folder, found), net, by_step, tokenizer)


def kept(folder, net):
    """Return a run with a language model."""
    return Kept(
        folder=folder,
        experiment="",
        options={},
        versions={},
        result=None,
        parts={},
        pictures={},
        net=None,
        language_net=net,
    )


def as_tree(arrays):
    """Return arrays by path as a nested dict."""
    tree = {}
    for path, array in arrays.items():
        *parts, last = path.split("/")
        branch = tree
        for part in parts:
            branch = branch.setdefault(part, {})
        branch[last] = jnp.asarray(array)
    return tree


class Expected:
    """What JAX computes for a text."""

    def __init__(self, trained, text, params=None):
        self.tokens = np.asarray(trained.tokenizer.encode(text))[-CONTEXT:].astype(np.int32)
        self.tokenizer = trained.tokenizer
        params = trained.params[30] if params is None else params
        captured = gf.capture(trained.net.apply, keep="*probabilities")(params, self.tokens)
        self.attention = [np.asarray(captured[f"blocks/{i}/attention/probabilities"].value) for i in range(2)]
        self.logits = np.asarray(captured.output)
        self.probabilities = np.asarray(jax.nn.softmax(self.logits))
        log_p = np.asarray(jax.nn.log_softmax(self.logits))
        self.losses = -log_p[np.arange(len(self.tokens) - 1), self.tokens[1:]]
        self.lens = gf.circuits.logit_lens(
            trained.net.apply,
            sites=lambda site: site.name == "embedded" or site.name.endswith(("residual", "residual_mid")),
        )

    def top(self, position, k=10):
        """Return the most probable tokens after a position, as characters, with their probabilities in percent."""
        row = self.probabilities[position]
        order = sorted(range(len(row)), key=lambda token: (-row[token], token))[:k]
        return [(mark(self.tokenizer.symbols[token]), 100 * float(row[token])) for token in order]


def mark(character):
    return {" ": "␣", "\n": "↵"}.get(character, character)


def percent(text):
    """Return the number in a text such as `12.3 %`."""
    return float(re.search(r"([\d.]+) %", text)[1])


def candidates(page):
    """Return the rows of the next token: name and per cent."""
    rows = page.locator("#live-0-next .candidate:visible")
    return [
        (row.locator("b").inner_text(), row.locator(".value").inner_text(), row.locator("small").inner_text())
        for row in rows.all()
    ]


def tokens(page):
    return page.locator("#live-0-tokens .token")


def type_text(page, text):
    page.locator("#live-0-text").fill(text)


def state(page):
    names = "text, position, head, direction, checkpoint, temperature, topK, seed, written, total"
    return page.evaluate(
        f"() => {{ const {{ {names} }} = gradfn.state; return {{ {names}, tokens: [...gradfn.state.tokens] }}; }}"
    )


def agree(page, expected, position):
    """Assert that what the page shows at a position is what JAX computes."""
    rows = candidates(page)
    for (name, text, _), (wanted, share) in zip(rows, expected.top(position), strict=False):
        assert name == wanted
        assert abs(percent(text) - share) < 0.15
    following = position + 1 < len(expected.tokens)
    notes = [note for _, _, note in rows]
    assert notes.count("follows") == following
    if following:
        loss = expected.losses[position]
        assert (
            abs(
                float(re.search(r"loss ([\d.]+) nats", page.locator("#live-0-next-note").inner_text())[1])
                - loss
            )
            < 0.01
        )
    for i, label in enumerate(tokens(page).evaluate_all("all => all.map((each) => each.ariaLabel)")):
        found = re.search(r"loss ([\d.]+) nats", label)
        assert bool(found) == (i > 0)
        if found:
            assert abs(float(found[1]) - expected.losses[i - 1]) < 0.01 + 0.01 * expected.losses[i - 1]


def looks(page):
    """Return the bars of attention below the tokens, the highest of which is 1."""
    bars = tokens(page).evaluate_all("all => all.map((each) => +each.style.getPropertyValue('--look'))")
    return np.asarray(bars)


def test_what_it_shows_is_what_jax_computes_and_the_mouse_works(trained, tmp_path):
    with opened(tmp_path, [trained.run]) as page:
        # The first sample, read to its end.
        assert state(page)["text"] == "the cat sat"
        agree(page, Expected(trained, "the cat sat"), 10)
        type_text(page, HERE)
        expected = Expected(trained, HERE)
        agree(page, expected, 15)

        # A click on a token shows the prediction after it, the lens there, and the attention from it.
        tokens(page).nth(6).click()
        assert page.locator("#live-0-next-title").inner_text() == "Next token after ␣"
        agree(page, expected, 6)
        lens = expected.lens(trained.params[30], expected.tokens)
        shares = np.asarray(jax.nn.softmax(lens.logits[:, 6]))
        rows = page.locator("#live-0-lens tr").all()
        assert [row.locator("th").inner_text() for row in rows] == [
            "embedding",
            *(f"block {i} {part}" for i in range(2) for part in ("attention", "feed-forward")),
        ]
        for row, share in zip(rows, shares, strict=True):
            cells = row.locator("td").all_inner_texts()
            for cell, token in zip(cells, np.argsort(-share, kind="stable")[:3], strict=False):
                assert cell.split()[0] == mark(trained.tokenizer.symbols[token])
                assert abs(percent(cell) - 100 * share[token]) < 0.15
            assert abs(percent(cells[3]) - 100 * share[expected.tokens[7]]) < 0.15

        # Each head: the bars below the tokens, and the text beside its row.
        for head in range(4):
            page.locator("#live-0-heads .head").nth(head).click()
            weights = expected.attention[head // 2][head % 2, 6]
            np.testing.assert_allclose(looks(page), weights / weights.max(), atol=2e-3)
            row = page.locator("#live-0-rows .head-row").nth(head)
            assert row.get_attribute("aria-pressed") == "true"
            most = int(weights.argmax())
            assert f"to ‘{mark(HERE[most])}’ at {most}," in row.inner_text()
            assert abs(percent(row.inner_text()) - 100 * weights[most]) < 0.15
        page.get_by_text("to this token", exact=True).click()
        weights = expected.attention[1][1][:, 6]
        np.testing.assert_allclose(looks(page), weights / weights.max(), atol=2e-3)
        page.get_by_text("from this token", exact=True).click()

        # The pointer over a token shows its attention, and leaves the chosen one.
        tokens(page).nth(12).hover()
        weights = expected.attention[1][1][12]
        np.testing.assert_allclose(looks(page), weights / weights.max(), atol=2e-3)
        assert state(page)["position"] == 6
        page.mouse.move(5, 5)
        weights = expected.attention[1][1][6]
        np.testing.assert_allclose(looks(page), weights / weights.max(), atol=2e-3)

        # A click on a prediction continues the text there; undo brings back what it replaced.
        rows = candidates(page)
        page.locator("#live-0-next .candidate").nth(1).click()
        continued = HERE[:7] + rows[1][0].replace("␣", " ").replace("↵", "\n")
        assert page.locator("#live-0-text").input_value() == continued
        assert state(page)["position"] == 7
        page.get_by_role("button", name="Undo", exact=True).first.click()
        assert page.locator("#live-0-text").input_value() == HERE
        agree(page, expected, state(page)["position"])

        # Samples, and an empty text.
        page.get_by_role("button", name="mat.").click()
        assert page.locator("#live-0-text").input_value() == "mat. "
        page.get_by_role("button", name="Clear").click()
        assert (
            "The text is empty: the model reads ‘↵’ instead."
            in page.locator("#live-0-text-note").inner_text()
        )
        agree(page, Expected(trained, "\n"), 0)


def test_time_goes_back_to_the_checkpoints(trained, tmp_path):
    found = {}  # the loss by step

    def agree_at(page, step):
        # What is kept as differences is not exact; what is computed with it is.
        arrays = page.evaluate(
            "() => Object.entries(gradfn.model.params).map(([path, { shape, values }]) => [path, shape, [...values]])"
        )
        params = as_tree({path: np.float32(values).reshape(shape) for path, shape, values in arrays})
        at = Expected(trained, HERE, params)
        agree(page, at, 15)
        true = Expected(trained, HERE, trained.params[step])
        # The loss is kept within 1 % on the texts to start from; this is another text.
        assert at.losses.mean() == pytest.approx(true.losses.mean(), rel=0.05)
        found[step] = at.losses.mean()
        text = page.locator("#live-0-checkpoint-said").inner_text()
        assert text.startswith(f"Step {step} of 30.")
        own = float(re.search(r"Of this text: (\d+\.\d+)", text)[1])
        assert abs(own - at.losses.mean()) < 0.01

    with opened(tmp_path, [trained.run], width=390, touch=True) as page:
        type_text(page, HERE)
        slider = page.locator("#live-0-checkpoint")
        for step in STEPS:
            slider.fill(str(STEPS.index(step)))
            agree_at(page, step)
        # With reduced motion, time goes one checkpoint per tap.
        for name, step in (("From the start", 10), ("Next checkpoint", 20), ("Next checkpoint", 30)):
            page.get_by_role("button", name=name).tap()
            agree_at(page, step)
        slider.focus()
        for key, step in (("ArrowLeft", 20), ("Home", 10), ("End", 30)):
            page.keyboard.press(key)
            agree_at(page, step)
        # The line has the loss at each of them.
        until(page, "document.querySelectorAll('#live-0-time-line .dot').length === 3")
        for i, step in enumerate(STEPS):
            assert page.evaluate(f"gradfn.lossAt({i})") == pytest.approx(found[step], abs=1e-3)
        # It plays where motion is welcome, and stops at the end.
        page.emulate_media(reduced_motion="no-preference")
        page.get_by_role("button", name="Play").tap()
        assert state(page)["checkpoint"] == 0
        until(page, "gradfn.state.checkpoint === 2")
        until(page, "document.querySelector('#live-0-play').textContent === 'Play'")
        agree_at(page, 30)


def test_it_writes_as_generate_does(trained, tmp_path):
    prompt = trained.tokenizer.encode("the ")
    with opened(tmp_path, [trained.run]) as page:
        write = page.get_by_role("button", name="Write 1 token")
        type_text(page, "the ")
        page.locator("#live-0-temperature").fill("0")
        for _ in range(40):  # twice the context
            write.click()
        expected = gf.generate(trained.net, trained.params[30], prompt, 40, temperature=0)
        assert page.locator("#live-0-text").input_value() == "the " + trained.tokenizer.decode(expected)
        assert len(candidates(page)) == 10
        assert [text for _, text, _ in candidates(page)] == ["100 %"] + 9 * ["0 %"]

        # The same seed writes the same text; another one does not.
        def written(seed, top_k="", n=12):
            type_text(page, "the ")
            page.locator("#live-0-seed").fill(seed)
            page.locator("#live-0-top-k").fill(top_k)
            for _ in range(n):
                write.click()
            return page.locator("#live-0-text").input_value()

        page.locator("#live-0-temperature").fill("2")
        first = written("7")
        assert first == written("7")
        assert first != written("8")
        page.locator("#live-0-temperature").fill("1")
        greedy = trained.tokenizer.decode(expected[:12])
        assert written("5", "1") == "the " + greedy
        page.locator("#live-0-top-k").fill("3")
        page.locator("#live-0-temperature").fill("0.5")
        tokens(page).nth(3).click()
        logits = Expected(trained, "the " + greedy).logits[3].astype(np.float64)
        top = np.sort(logits)[::-1][:3] / 0.5
        shares = np.exp(top - top.max()) / np.exp(top - top.max()).sum()
        shown = [percent(text) for _, text, _ in candidates(page)]
        np.testing.assert_allclose(shown[:3], 100 * shares, atol=0.2)
        assert not any(shown[3:])

        # How often tokens are drawn is what their probabilities say.
        counts = page.evaluate(
            """async () => {
              const { distribution, sample } = await import("gradfn/gpt/sampling.js");
              const { uniform } = await import("gradfn/gpt/write.js");
              const row = Float32Array.of(0, 1, 2), counts = [0, 0, 0];
              for (let i = 0; i < 30000; i++) counts[sample(distribution(row), uniform(i % 100, i))] += 1;
              return counts;
            }"""
        )
        np.testing.assert_allclose(
            np.asarray(counts) / 30000, np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum(), atol=0.02
        )

        # It writes on until it is stopped.
        type_text(page, "the ")
        page.get_by_role("button", name="Write on").click()
        until(page, "gradfn.state.written >= 12")
        page.get_by_role("button", name="Stop").click()
        length = len(page.locator("#live-0-text").input_value())
        page.wait_for_timeout(100)
        assert len(page.locator("#live-0-text").input_value()) == length
        page.get_by_role("button", name="Undo", exact=True).first.click()
        assert page.locator("#live-0-text").input_value() == "the "


def test_it_works_by_touch_on_a_phone(trained, tmp_path):
    with opened(tmp_path, [trained.run], width=390, touch=True) as page:
        type_text(page, HERE)
        tokens(page).nth(4).tap()
        agree(page, Expected(trained, HERE), 4)
        text, last = (
            page.locator("#live-0-text-label").bounding_box(),
            page.locator("#live-0-next").bounding_box(),
        )
        # What is typed and what is predicted are in one view.
        assert last["y"] + last["height"] - text["y"] <= 844
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.locator("#live-0-next .candidate").first.tap()
        assert state(page)["position"] == 5
        page.get_by_role("button", name="Write 1 token").tap()
        assert state(page)["written"] == 2
        page.locator("#live-0-heads .head").nth(2).tap()
        page.get_by_text("to this token", exact=True).tap()
        assert (state(page)["head"], state(page)["direction"]) == (2, "to")
        page.locator("#live-0-write-on").tap()
        until(page, "gradfn.state.written >= 4")
        page.locator("#live-0-write-on").tap()
        small = "all => all.filter((each) => each.offsetHeight && each.offsetHeight < 24).map((each) => each.outerHTML)"
        assert page.locator("#live-0 .reading button:not(.head-row)").evaluate_all(small) == []


def test_it_works_by_keyboard_alone(trained, tmp_path):
    def focused():
        return page.evaluate("document.activeElement.id || document.activeElement.className")

    def tab_to(wanted, most=40):
        for _ in range(most):
            page.keyboard.press("Tab")
            if wanted in focused():
                return
        raise AssertionError(f"Tab does not reach {wanted}")

    with opened(tmp_path, [trained.run]) as page:
        tab_to("live-0-text")
        page.keyboard.press("Control+A")
        page.keyboard.type("the mat.")
        assert tokens(page).count() == 8
        tab_to("live-0-write")
        page.keyboard.press("Enter")
        assert state(page)["written"] == 1
        tab_to("live-0-temperature")
        page.keyboard.press("Home")
        assert state(page)["temperature"] == 0
        page.keyboard.press("PageUp")
        tab_to("token")
        for key, position in (
            ("Home", 0),
            ("ArrowRight", 1),
            ("ArrowRight", 2),
            ("ArrowLeft", 1),
            ("End", 8),
        ):
            page.keyboard.press(key)
            assert state(page)["position"] == position
            assert tokens(page).nth(position).evaluate("each => each === document.activeElement")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
        page.keyboard.press("Home")
        tab_to("head")
        for key, head in (("ArrowRight", 1), ("ArrowDown", 3), ("ArrowLeft", 2), ("ArrowUp", 0)):
            page.keyboard.press(key)
            assert state(page)["head"] == head
        tab_to("candidate")
        page.keyboard.press("Enter")
        assert (state(page)["position"], len(state(page)["tokens"])) == (1, 2)
        tab_to("live-0-from")
        page.keyboard.press("ArrowRight")
        assert state(page)["direction"] == "to"
        until(page, "document.querySelector('#live-0-status').textContent.startsWith('After')")
        unnamed = """all => all.filter((each) => !each.ariaLabel && !each.labels?.length && !each.textContent.trim()
          && !each.getAttribute("aria-labelledby")).map((each) => each.outerHTML)"""
        assert (
            page.locator("#live-0 .reading :is(button, input, textarea, [role=img]):visible").evaluate_all(
                unnamed
            )
            == []
        )


def test_a_link_restores_the_view_and_nonsense_does_not_break_it(trained, tmp_path):
    with opened(tmp_path, [trained.run]) as page:
        type_text(page, HERE + "\n a&b=c%41#+?")
        tokens(page).nth(5).click()
        page.locator("#live-0-heads .head").nth(3).click()
        page.locator("#live-0-checkpoint").fill("1")
        page.locator("#live-0-temperature").fill("0.7")
        page.locator("#live-0-top-k").fill("4")
        page.locator("#live-0-seed").fill("99")
        page.get_by_text("to this token", exact=True).click()
        page.evaluate("gradfn.change({ edits: [] })")
        until(page, "location.hash.includes('seed=99')")
        before, shown, hash_ = state(page), candidates(page), page.evaluate("location.hash")
    with opened(tmp_path, [trained.run], hash_=hash_) as page:
        after = state(page)
        assert after["tokens"] == before["tokens"]
        same = ("position", "head", "direction", "checkpoint", "temperature", "topK", "seed")
        assert (
            [after[name] for name in same] == [before[name] for name in same] == [5, 3, "to", 1, 0.7, 4, 99]
        )
        assert candidates(page) == shown
        # A link within the page.
        page.evaluate("location.hash = '#live-0/text=mat&at=1'")
        until(page, "gradfn.state.text === 'mat' && gradfn.state.position === 1")
        assert state(page)["temperature"] == 1
        agree(page, Expected(trained, "mat"), 1)
        nonsense = [
            "text=%E0%A4%A&at=-5&head=1e9&checkpoint=NaN&temperature=Infinity&topK=-1&seed=x&edits=%00*,h9.9*0,<b>&step=-3",
            "at=99999999999999999999&head=0.5&temperature=-1&topK=0&direction=%3Cimg%20src%3Dx%3E",
            "&&&===&text", "empty=1", "text=" + quote("<img src=x onerror=alert(1)>" * 400),
        ]  # fmt: skip
        for each in nonsense:
            page.evaluate("hash => (location.hash = hash)", f"#live-0/{each}")
            page.wait_for_timeout(400)
            found = state(page)
            assert 0 <= found["position"] < len(found["tokens"]) <= CONTEXT
            assert found["head"] in range(4)
            assert found["checkpoint"] in range(3)
            assert 0 <= found["temperature"] <= 2
            assert candidates(page)
        assert page.locator("#live-0 img").count() == 0


def test_hostile_texts_show_as_text(trained, tmp_path):
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;"
    with opened(tmp_path, [trained.run]) as page:
        note = page.locator("#live-0-text-note")
        type_text(page, markup)
        known = [c for c in markup if c in trained.tokenizer.symbols][-CONTEXT:]
        assert [mark(c) for c in known] == tokens(page).locator("span").all_inner_texts()
        assert page.locator("#live-0 img").count() == 0
        unknown = list(dict.fromkeys(c for c in markup if c not in trained.tokenizer.symbols))
        assert (
            "Left out, as the model does not have them: " + " ".join(f"‘{c}’" for c in unknown[:12])
            in note.inner_text()
        )
        page.locator("#live-0-text").fill("ab<" * 3334)
        assert "The model reads the last 20 of 10,002 tokens" in note.inner_text()
        assert tokens(page).count() == CONTEXT
        agree(page, Expected(trained, "ab<" * 3334), 19)
        page.locator("#live-0-text").fill("🙂👩‍👩‍👧 \u0000\u202e")
        assert tokens(page).locator("span").all_inner_texts() == ["␣"]
        assert "‘🙂’" in note.inner_text()
        page.locator("#live-0-text").fill("🙂")
        assert "The text is empty" in note.inner_text()
        page.get_by_role("button", name="Write 1 token").click()
        assert state(page)["total"] == 2
        # What is written while the pointer is over the tokens shows, too.
        tokens(page).first.hover()
        page.keyboard.press("Tab")
        page.locator("#live-0-text").fill("a")
        assert tokens(page).count() == 1


def test_models_of_lines_and_of_integers(trained, tmp_path):
    net = trained.run.language_net
    lines = net._replace(lines=True, samples=["the cat"])
    with opened(tmp_path, [kept(tmp_path, lines)]) as page:
        # Each line starts after the end of the one before; a text of several lines is read from its last one.
        assert tokens(page).locator("span").all_inner_texts() == ["↵", *map(mark, "the cat")]
        type_text(page, "the\ncat")
        assert tokens(page).locator("span").all_inner_texts() == ["↵", *"cat"]
        page.evaluate(
            "for (const token of gradfn.model.tokenizer.symbols) if (token === '\\n') gradfn.append(0)"
        )
        assert tokens(page).locator("span").all_inner_texts() == ["↵", *"cat", "↵"]
        page.get_by_role("button", name="Write 1 token").click()
        assert len(state(page)["tokens"]) == 2
    integers = net._replace(tokenizer=None, samples=["3 1 4"])
    with opened(tmp_path, [kept(tmp_path, integers)]) as page:
        assert tokens(page).locator("span").all_inner_texts() == ["3", "1", "4"]
        page.locator("#live-0-text").fill("5, 9 x 99 2")
        assert state(page)["tokens"] == [5, 9, 2]
        assert "‘x’ ‘99’" in page.locator("#live-0-text-note").inner_text()
        page.get_by_role("button", name="Write 1 token").click()
        found = state(page)
        assert len(found["tokens"]) == 4
        assert found["text"].split()[-1] == str(found["tokens"][-1])
        page.locator("#live-0-text").fill("")
        page.get_by_role("button", name="Write 1 token").click()
        assert state(page)["tokens"][0] == 0


def test_a_model_of_attention_alone(trained, tmp_path):
    net = trained.run.language_net
    params = {name: array for name, array in net.params.items() if "/feed" not in name}
    attention = net._replace(architecture=net.architecture._replace(feed=None), params=params, kept={})
    with opened(tmp_path, [kept(tmp_path, attention)]) as page:
        type_text(page, HERE)
        rows = page.locator("#live-0-lens th[scope=row]").all_inner_texts()
        assert rows == ["embedding", "block 0", "block 1"]
        page.locator("#live-0-heads .head").nth(2).click()
        page.get_by_role("button", name="Write 1 token").click()
        assert state(page)["written"] == 1
        assert not page.locator("#live-0-time").is_visible()  # there is one checkpoint only


def test_the_lesson_leads_through_the_page(trained, tmp_path):
    with opened(tmp_path, [trained.run]) as page:
        type_text(page, HERE)
        page.get_by_role("button", name=re.compile("^Lesson")).click()
        happened = page.locator("#live-0-lesson .lesson-happened")
        write = page.get_by_role("button", name="Write 1 token")

        def write_some(temperature):
            page.locator("#live-0-temperature").fill(temperature)
            for _ in range(3):
                write.click()

        losses = Expected(trained, HERE).losses
        acts = [
            (lambda: tokens(page).nth(4).click(), f"{losses[4]:.3f} nats"),
            (lambda: tokens(page).nth(int(losses.argmax()) + 1).click(), f"{losses.max():.3f} nats"),
            (lambda: write_some("0"), "It wrote 3 tokens"),
            (lambda: (page.locator("#live-0-undo").click(), write_some("1")), "seed 0"),
            (
                lambda: [page.locator("#live-0-heads .head").nth(i).click() for i in (1, 2, 3, 0)],
                "previous token",
            ),
            (lambda: page.get_by_text("to this token", exact=True).click(), ""),
            (lambda: tokens(page).nth(2).click(), "after the embedding it had"),
            (lambda: page.locator("#live-0-checkpoint").fill("0"), "At step 10"),
            (lambda: page.evaluate("gradfn.change({ step: gradfn.state.step + 3 })"), "Step"),
            (lambda: page.locator("#live-0-switches [data-part='h0.1']").click(), "nats"),
        ]
        assert page.locator("#live-0-lesson .lesson-place").inner_text() == f"Step 1 of {len(acts)}"
        for act, text in acts:
            assert happened.inner_text() == ""
            act()
            if "previous token" in text:
                # Whichever head it is, choosing each in turn finds it.
                for i in range(4):
                    page.locator("#live-0-heads .head").nth(i).click()
                    if happened.inner_text():
                        break
            assert text in happened.inner_text()
            assert happened.inner_text()
            page.locator("#live-0-lesson .lesson-next").click()
        terms = page.locator("#live-0 .reading dfn").evaluate_all(
            "all => all.map((each) => each.ariaDescribedByElements?.length ?? each.getAttribute('aria-describedby'))"
        )
        assert all(terms)
