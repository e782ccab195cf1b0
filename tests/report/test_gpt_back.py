"""The backward pass and the interventions of a GPT's page: the numbers of JAX, and every control works."""

import dataclasses
import functools
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn.data._tokenizer import characters
from gradfn.experiments import induction
from gradfn.pages.live import _gpt
from gradfn.runs import sample
from gradfn.runs.kept import Kept
from gradfn.runs.language_net import Quiet, load_language_net
from tests.report.browser import HELPERS, needs_browser, opened, until

TEXT, OTHER = "the cat sat on the mat", "the dog sat in the bag"
POSITION = 13  # of a loss: after "the cat sat on"
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
CONFIGS = {
    "two blocks": {"n_layers": 2, "n_heads": 3, "width": 12, "positions": "rope", "bias": False},
    "one block": {
        **{"n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "width": 8, "positions": "learned"},
        **{"norm": "rms", "feed": "swiglu", "bias": False, "tied": False},
    },
    "attention only": {"n_layers": 2, "n_heads": 2, "width": 8},
}

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = [pytest.mark.slow, needs_browser]


class Trained(NamedTuple):
    """A language model after a few steps of training.

    Attributes:
        folder: of its run.
        net: the model.
        params: its parameters.
        tokenizer: of its texts.
        text: that the page starts with.
        first: the first position with a loss.
    """

    folder: Path
    net: gf.Net
    params: Any
    tokenizer: Any
    text: str
    first: int

    @property
    def loss(self):
        return gf.next_token_loss(self.net)

    def batch(self, position=None, text=None):
        """Return tokens and targets: of all positions with a loss, or of one."""
        tokens = np.asarray(self.tokenizer.encode(self.text if text is None else text))
        at = np.arange(len(tokens))
        counts = at >= self.first if position is None else at == position
        return jnp.asarray(tokens), jnp.asarray(np.where(counts, np.append(tokens[1:], -1), -1))

    def logs(self, edits):
        """Return the logs of the probabilities of the next token, with some edits, [T, vocab]."""
        return jax.nn.log_softmax(gf.patch(self.net.apply, edits)(self.params, self.batch()[0]))

    def patched(self, edits, position=None):
        """Return the loss with some edits."""
        return float(gf.patch(self.loss, edits)(self.params, self.batch(position)))


@pytest.fixture(autouse=True)
def exact_parameters(monkeypatch):
    """Keep the page's parameters in float32, so that they are those of the folder."""
    monkeypatch.setattr(_gpt, "DTYPES", ("float32",))


@functools.cache
def trained(name):
    """Return a language model after a few steps."""
    settings, folder, quiet = CONFIGS[name], Path(tempfile.mkdtemp()), None
    text, first, tokenizer = TEXT, 0, characters(TEXT + OTHER)
    if name == "attention only":
        text, first, tokenizer = 2 * "ABC012DEFGH", 11, characters(induction.SYMBOLS)
        net = induction.attention_only(settings["width"], settings["n_heads"])
        settings |= {"vocab": tokenizer.size, "context": induction.LENGTH}
        quiet = Quiet(repeats=True)
    else:
        config = gf.GPTConfig(vocab=tokenizer.size, context=32, **settings)
        net, settings = gf.gpt(config), dataclasses.asdict(config)
    kind = "attention" if quiet else "gpt"
    sample.save_model(folder, kind, settings, tokenizer, lines=False, samples=[text], quiet=quiet)
    # Large parameters, so that all parts of the network matter.
    start = jax.tree.map(lambda leaf: 8 * leaf if leaf.ndim > 1 else leaf, net.init(jax.random.key(0)))
    tokens = np.asarray([tokenizer.encode(text)])
    batch, loss = (tokens[:, :-1], tokens[:, 1:]), gf.batch_mean(gf.next_token_loss(net))
    options = {"batch_size": 1, "folder": folder, "progress": False}
    fitted = gf.fit(loss, start, batch, optax.adam(1e-2), 2, keep_every=1, **options)
    return Trained(folder, net, fitted.params, tokenizer, text, first)


def kept_run(name):
    folder = trained(name).folder
    return Kept(folder, "toy", {"seed": 0}, {}, {}, {}, {}, None, language_net=load_language_net(folder))


@functools.cache
def inspection_of(name):
    return jax.jit(gf.inspect(trained(name).loss, keep="*"))


@functools.cache
def inspected(name, position=None):
    return inspection_of(name)(trained(name).params, trained(name).batch(position))


@functools.cache
def logs_before(name):
    return trained(name).logs({})


def site_of(name, block, part):
    return part.split("/")[-1] if CONFIGS[name]["n_layers"] == 1 else f"blocks/{block}/{part}"


def head_off(head, scale=0.0):
    return gf.circuits.at((slice(None), head), lambda value: scale * value)


@functools.cache
def expected_shares(name, position):
    """Return by part the norm of its gradient, the first-order estimate and the exact change without it."""
    sites, shares = inspected(name, position), {}
    for block in range(CONFIGS[name]["n_layers"]):
        mixed, feed = site_of(name, block, "attention/mixed"), site_of(name, block, "feed_out")
        parts = {
            f"h{block}.{head}": (mixed, head_off(head), head) for head in range(CONFIGS[name]["n_heads"])
        }
        if feed in sites.values:
            parts[f"m{block}"] = (feed, gf.circuits.zero, slice(None))
        for part, (site, edit, index) in parts.items():
            grad, value = sites[site].grad[:, index], sites.values[site][:, index]
            exact = trained(name).patched({site: edit}, position) - float(sites.value)
            shares[part] = (jnp.linalg.norm(grad), -jnp.sum(grad * value), exact)
    return shares


def in_page(found, script, **inputs):
    return found.evaluate(f"async (inputs) => {{ {HELPERS}{script} }}", inputs)


def numbers(text):
    """Return the numbers in a text of the page."""
    found = re.findall(r"[+\-−]?\d+(?:\.\d+)?(?:e[−-]?\d+)?", text)
    return [float(each.replace("−", "-")) for each in found]


# The gradients of a loss with the modules that the page uses, whatever it shows.
GRADIENTS = """
const { backward } = await import("gradfn/gpt/backward.js");
const blame = await import("gradfn/gpt/blame.js");
const { forward } = await import("gradfn/gpt/forward.js");
const { losses } = await import("gradfn/gpt/loss.js");
const { scaled } = await import("gradfn/gpt/parts.js");
const { model } = gradfn, { pass, targets, losses: own } = gradfn.now();
const weights = blame.weightsOf(targets, inputs.position);
const gradients = backward(model, pass, targets, weights, { params: false });
const sites = blame.steps(model).map(({ site }) => site);
const loss = blame.weighted(own, weights);
const off = (part) => losses(forward(model, pass.tokens, scaled(model, part, 0)), targets);
const exact = (part) => blame.weighted(off(part), weights) - loss;
return plain({
  loss,
  sites,
  norms: sites.map((site) => blame.norms(gradients.sites[site])),
  products: blame.products(gradients.sites.embedded, pass.sites.embedded),
  shares: blame.shares(model, pass, gradients).map((each) => ({ ...each, exact: exact(each.part) })),
});
"""


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_blame_and_effects_are_those_of_jax(tmp_path, name):
    with opened(tmp_path, [kept_run(name)]) as found:
        for position in (None, POSITION):
            actual = in_page(found, GRADIENTS, position=position)
            sites = inspected(name, position)
            np.testing.assert_allclose(actual["loss"], sites.value, **CLOSE)
            layers = reversed(range(CONFIGS[name]["n_layers"]))
            parts = ["residual"] if name == "attention only" else ["residual", "residual_mid"]
            stream = [site_of(name, i, part) for i in layers for part in parts]
            assert actual["sites"] == ["logits", "final_norm", *stream, "embedded"]
            for site, norms in zip(actual["sites"], actual["norms"], strict=True):
                np.testing.assert_allclose(
                    norms, jnp.linalg.norm(sites[site].grad, axis=-1), err_msg=site, **CLOSE
                )
            products = jnp.sum(sites["embedded"].grad * sites.values["embedded"], -1)
            np.testing.assert_allclose(actual["products"], products, **CLOSE)
            expected = expected_shares(name, position)
            assert {each["part"] for each in actual["shares"]} == set(expected)
            for each in actual["shares"]:
                values = [each["norm"], each["estimate"], each["exact"]]
                np.testing.assert_allclose(values, expected[each["part"]], err_msg=each["part"], **CLOSE)


def each_of(locator, expression):
    """Return the value of a script's expression of `each` element."""
    return locator.evaluate_all(f"all => all.map((each) => {expression})")


def near(found, part):
    """Scroll to a part of the page, and wait until what it computes there is shown."""
    found.locator(f"#live-0-{part}").scroll_into_view_if_needed()
    if part == "back":
        until(found, "document.querySelector('#live-0-back-step').textContent")


def test_the_backward_pass_is_stepped_by_mouse_and_keyboard_and_shows_the_numbers_of_jax(tmp_path):
    name = "two blocks"
    with opened(tmp_path, [kept_run(name)]) as found:
        near(found, "back")
        get = lambda part: found.locator(f"#live-0-{part}")  # noqa: E731
        assert get("back-value").inner_text() == f"L = {float(inspected(name).value):.3f} nats per token"
        get("back-loss").select_option(str(POSITION))
        sites = inspected(name, POSITION)
        assert get("back-value").inner_text() == f"L = {float(sites.value):.3f} nats"
        assert get("back-step").inner_text() == "Step 1 of 7: the loss to the logits"
        assert get("back-previous").is_disabled()
        order = ["logits", "final_norm", "blocks/1/residual", "blocks/1/residual_mid", "blocks/0/residual"]
        order += ["blocks/0/residual_mid", "embedded"]
        get("back-next").focus()
        for i, site in enumerate(order):
            norms = np.asarray(jnp.linalg.norm(sites[site].grad, axis=-1))
            titles = each_of(get("back-bars").locator("button"), "each.title")
            np.testing.assert_allclose([numbers(title)[0] for title in titles], norms, rtol=0.06, atol=6e-4)
            heights = each_of(get("back-bars").locator("i"), "Number(each.style.getPropertyValue('--level'))")
            np.testing.assert_allclose(heights, norms / norms.max(), atol=1e-4)
            reached = int(np.sum(norms > 0))
            assert f"Gradient at {site}: norm" in get("back-sizes").inner_text()
            assert f"It has reached {reached} of {len(TEXT)} positions" in get("back-sizes").inner_text()
            known = get("back-map").locator("i:not(.unknown)").count()
            assert known == (i + 1) * len(TEXT)
            if i < len(order) - 1:
                found.keyboard.press("Enter")
        # Without attention, only the position of the loss has a gradient; before the last attention, all earlier ones.
        assert reached == POSITION + 1
        assert get("back-next").is_disabled()
        get("back-previous").click()
        assert get("back-step").inner_text() == "Step 6 of 7: through the feed-forward layer of block 0"
        assert found.evaluate("gradfn.state.step") == 6
        get("back-map").locator("button").nth(0).focus()
        found.keyboard.press("ArrowDown")
        found.keyboard.press("ArrowDown")
        found.keyboard.press("Enter")
        assert get("back-step").inner_text() == "Step 5 of 7: through the attention of block 1"
        get("back-all").click()

        norms = np.asarray(jnp.linalg.norm(sites["embedded"].grad, axis=-1))
        top = np.argsort(-norms)[:3]
        blamed = get("back-blamed").inner_text()
        assert [numbers(each)[0] for each in blamed.split("at position ")[1:]] == top.tolist()
        assert blamed.startswith(f"The loss of ‘␣’ after position {POSITION} depends most on ")
        get("back-signed").focus()
        found.keyboard.press("Space")
        products = np.asarray(jnp.sum(sites["embedded"].grad * sites.values["embedded"], -1))
        titles = each_of(get("back-blame").locator("button"), "each.title")
        np.testing.assert_allclose([numbers(title)[0] for title in titles], products, rtol=0.06, atol=6e-4)
        shares = each_of(
            get("back-blame").locator("button"),
            "[each.style.getPropertyValue('--color'), each.style.getPropertyValue('--share')]",
        )
        most = np.abs(products).max()
        assert [float(share.rstrip("%")) for _, share in shares] == pytest.approx(
            45 * np.abs(products) / most, abs=0.51
        )
        assert [color for color, _ in shares] == [
            f"var(--{'less' if each < 0 else 'more'})" for each in products
        ]

        # The list of parts: sorted by the estimate, with the exact change beside it.
        expected = expected_shares(name, POSITION)
        assert get("back-more").is_hidden()  # 8 parts
        until(found, "!document.querySelector('#live-0-back-shares').textContent.includes('…')")
        rows = get("back-shares").locator("li")
        parts = each_of(rows.locator("button"), "each.dataset.part")
        assert parts == sorted(expected, key=lambda part: -abs(expected[part][1]))
        for part, text in zip(parts, rows.locator(".both").all_inner_texts(), strict=True):
            np.testing.assert_allclose(numbers(text), expected[part][1:], rtol=6e-3, atol=6e-4)
        get("back").locator("[data-term='first-order estimate']").focus()
        estimate, exact = numbers(found.locator(".meaning-of .formula").inner_text().split("=")[1])
        np.testing.assert_allclose([estimate, exact], expected[parts[0]][1:], rtol=6e-3, atol=6e-4)
        # Switched off by keyboard: the part stays on top, with the focus, and is switched on again.
        button = rows.locator("button").nth(2)
        part = parts[2]
        button.focus()
        found.keyboard.press("Enter")
        assert found.evaluate("gradfn.state.edits.map(({ part, scale }) => [part, scale])") == [[part, 0]]
        assert rows.locator("button").nth(0).get_attribute("data-part") == part
        assert found.evaluate("document.activeElement.dataset.part") == part
        assert rows.locator("button").nth(0).get_attribute("aria-pressed") == "true"
        off = float(sites.value) + expected[part][2]
        assert numbers(get("back-value").inner_text())[0] == pytest.approx(off, abs=6e-4)
        found.keyboard.press("Space")
        assert found.evaluate("gradfn.state.edits.length") == 0

        # The last position has no next token.
        get("tokens").locator("button").last.click()
        near(found, "back")
        expect(get("back-none")).to_contain_text("so this is the loss of the whole text")
        get("text").fill("t")
        expect(get("back-none")).to_contain_text("There is no loss yet")
        expect(get("back-parts")).to_be_hidden()
        get("text").fill("")
        get("text").fill("<img src=x onerror=alert(1)> 🙂" + "the " * 2500)
        expect(get("back-parts")).to_be_visible()
        expect(get("back-bars").locator("button")).to_have_count(32)  # the context


def run_shown(found, name):
    """Execute the lines of Python that the page shows; return their result and the number that it shows."""
    setup, line, text = (
        found.locator(f"#live-0-{part}").text_content() for part in ("setup", "python", "python-value")
    )
    lines = f"{setup}\n{line}".replace("FOLDER", str(trained(name).folder), 1)
    before, last = lines.split("\ngf.patch(")
    scope = {}
    exec(before, scope)
    return float(eval(f"gf.patch({last}", scope)), numbers(text)[-1]


def after_edits(found, name, edits):
    """Assert that the page's losses and probabilities are those of `gf.patch`, and so are those that it shows.

    Returns:
        The result of the Python that the page shows.
    """
    of = trained(name)
    tokens, _ = of.batch()
    actual = found.evaluate(
        "() => ({ logits: [...gradfn.now().pass.sites.logits.values], position: gradfn.state.position })"
    )
    before, after = logs_before(name), of.logs(edits)
    logits = np.reshape(actual["logits"], after.shape)
    np.testing.assert_allclose(jax.nn.softmax(logits), jnp.exp(after), **CLOSE)
    # The loss of each token is that of the position before it.
    losses = [-jnp.take_along_axis(each[:-1], tokens[1:, None], 1)[:, 0] for each in (before, after)]
    was, now = (float(each[of.first :].mean()) for each in losses)
    text = found.locator("#live-0-effect").inner_text()
    np.testing.assert_allclose(numbers(text), [was, now, now - was], rtol=6e-3, atol=6e-4)
    changes = np.asarray(losses[1] - losses[0]) * (np.arange(len(tokens) - 1) >= of.first)
    shares = each_of(
        found.locator("#live-0-worse button"), "parseFloat(each.style.getPropertyValue('--share'))"
    )
    np.testing.assert_allclose(shares[1:], 45 * np.abs(changes) / np.abs(changes).max(), atol=0.51)
    position = actual["position"]
    shown = each_of(
        found.locator("#live-0-probabilities li"),
        "[each.querySelector('b').textContent.replace('␣', ' '), each.querySelector('.value').textContent]",
    )
    for symbol, value in shown:
        [token] = of.tokenizer.encode(symbol)
        expected = [100 * float(jnp.exp(each[position, token])) for each in (before, after)]
        np.testing.assert_allclose(numbers(value), expected, atol=0.1 if "<" in value else 0.051)
    assert of.tokenizer.decode([int(jnp.argmax(after[position]))]) in [symbol for symbol, _ in shown]
    result, number = run_shown(found, name)
    assert number == pytest.approx(result, abs=1e-5)
    return result


def test_interventions_are_those_of_patch_and_the_shown_python_gives_the_shown_number(tmp_path):
    name = "two blocks"
    with opened(tmp_path, [kept_run(name)]) as found:
        get = lambda part: found.locator(f"#live-0-{part}")  # noqa: E731
        cell = lambda part: found.locator(f"#live-0-switches [data-part='{part}']")  # noqa: E731
        get("tokens").locator("button").nth(POSITION).click()
        near(found, "intervene")
        assert get("undo-all").is_disabled()
        cell("h0.1").click()
        edits = {"blocks/0/attention/mixed": head_off(1)}
        assert after_edits(found, name, edits) == pytest.approx(trained(name).patched(edits), abs=1e-4)
        assert "blocks/0/attention/mixed[:, 1]" in get("changes").inner_text()
        assert cell("h0.1").get_attribute("aria-pressed") == "true"
        # Its factor, by keyboard: ten steps of 0.05 up.
        get("factor").focus()
        for _ in range(10):
            found.keyboard.press("ArrowRight")
        assert cell("h0.1").inner_text() == "×0.5"
        after_edits(found, name, {"blocks/0/attention/mixed": head_off(1, 0.5)})
        # Another head of the same block, and a whole block, by keyboard.
        cell("h0.1").focus()
        found.keyboard.press("ArrowRight")
        assert found.evaluate("document.activeElement.dataset.part") == "h0.2"
        found.keyboard.press("Enter")
        for _ in range(3):
            found.keyboard.press("ArrowRight")
        found.keyboard.press("ArrowDown")
        assert found.evaluate("document.activeElement.dataset.part") == "b1"
        found.keyboard.press("Space")
        both = {
            "blocks/0/attention/mixed": lambda mixed: mixed * jnp.array([1, 0.5, 0])[None, :, None],
            "blocks/1/attention_out": 0.0,
            "blocks/1/feed_out": 0.0,
        }
        after_edits(found, name, both)
        # The loss of one position.
        found.evaluate("gradfn.change({ whole: false })")
        assert after_edits(found, name, both) == pytest.approx(
            trained(name).patched(both, POSITION), abs=1e-4
        )
        found.evaluate("gradfn.change({ whole: true })")
        # A feed-forward layer twice: its own factor and that of the block.
        cell("m1").click()
        get("factor").fill("1.5")
        after_edits(found, name, both)
        get("changes").locator("button").first.click()
        get("undo-all").click()
        assert found.evaluate("gradfn.state.edits.length") == 0
        assert get("effect").inner_text() == "Nothing is changed yet: switch off a part."
        assert run_shown(found, name)[0] == pytest.approx(trained(name).patched({}), abs=1e-5)

        # From another text, at some positions of a head and of the stream.
        of = trained(name)
        other = gf.capture(of.loss, keep="*")(of.params, of.batch(text=OTHER))
        get("other").locator("summary").focus()
        found.keyboard.press("Enter")
        expect(get("other-text")).to_have_value(TEXT)
        get("other-text").fill(OTHER[:-3])
        assert (
            get("other-note").inner_text().startswith(f"It has {len(OTHER) - 3} tokens; it needs {len(TEXT)}")
        )
        assert get("take").is_disabled()
        get("other-text").fill(OTHER)
        differ = sum(a != b for a, b in zip(TEXT, OTHER, strict=True))
        assert get("other-note").inner_text() == f"It has 22 tokens, of which {differ} differ from this text."
        get("other-part").select_option("r0")
        get("other-positions").fill("4-6, 20, 99")
        assert get("take").is_disabled()
        get("other-positions").fill("4-6, 20")
        get("take").click()
        where = jnp.array([4, 5, 6, 20])
        taken = {"blocks/0/residual": gf.circuits.at(where, other["blocks/0/residual"].value[where])}
        after_edits(found, name, taken)
        get("other-part").select_option("h1.0")
        get("other-positions").fill("")
        get("other-positions").press("Enter")
        mixed = "blocks/1/attention/mixed"
        taken[mixed] = gf.circuits.at((slice(None), 0), other[mixed].value[:, 0])
        after_edits(found, name, taken)
        cell("h1.2").click()
        taken[mixed] = lambda value: value.at[:, 0].set(other[mixed].value[:, 0]).at[:, 2].set(0)
        after_edits(found, name, taken)
        # The address has all of it, and gives the same page again.
        until(found, "location.hash.includes('h1.2')")
        address = found.evaluate("location.hash")
        # A text of another length: values that do not fit are not applied, and the page says so.
        get("text").fill(TEXT + "s")
        assert "Not applied: it has 22 tokens, and the text has 23" in get("changes").inner_text()
        get("text").fill("")
        get("text").fill(TEXT)
    with opened(tmp_path, [kept_run(name)], hash_=address) as found:
        assert found.evaluate("gradfn.state.edits.map(({ part }) => part)") == ["r0", "h1.0", "h1.2"]
        assert after_edits(found, name, taken) == pytest.approx(trained(name).patched(taken), abs=1e-4)
        # Parameters that training kept along the way: the page has them in 8 bits per difference.
        found.evaluate("gradfn.change({ checkpoint: 0 })")
        assert "kept/0000000001.safetensors" in found.locator("#live-0-setup").text_content()
        at_start, number = run_shown(found, name)
        assert number == pytest.approx(at_start, rel=0.01)
        assert abs(at_start - trained(name).patched(taken)) > 0.02 * at_start


ADDRESSES = """
const { editsFromText, editsToText } = await import("gradfn/gpt/intervene.js");
const { model } = gradfn;
const again = (text) => editsToText(editsFromText(text, model), model);
return { kept: inputs.kept.map(again), garbage: inputs.garbage.map(again) };
"""
GARBAGE = [
    *(
        "",
        ",,,",
        "*",
        "h",
        "h0",
        "h0.3*0",
        "h2.0*0",
        "m2*0",
        "b9*1",
        "h0.1*-1",
        "h0.1*3",
        "h0.1*NaN",
        "h0.1*1",
    ),
    *(
        "x0*0",
        "r0*0",
        "e*0",
        "h0.1*0x1",
        "h0.1*1e0",
        "<script>",
        "h0.1<",
        "h0.1<xyz@0",
        "h0.1<the%@0",
        "r0<the@0-9",
    ),
    *(
        "r0<the@2-1",
        "r0<the@0.,0",
        "constructor*0",
        "h00.1*0",
        "h0.01*0",
        "h0.1*0 ",
        "é*0",
        "h0.1*" + "9" * 4000,
    ),
    *("r0<" + "a" * 6000 + "@0", "h0.1*0*0"),
]


def test_edits_survive_the_address_and_garbage_is_left_out(tmp_path):
    kept = ["h0.1*0", "h0.2*0.25,a0*2,m1*0.5,b1*0", "r0<the%20c%2Ct@0-2.5,h1.0<the@0-2,e<the@1,d1<cat@2"]
    kept[2] = kept[2].replace("%2C", "a")
    with opened(tmp_path, [kept_run("two blocks")]) as found:
        result = in_page(found, ADDRESSES, kept=kept, garbage=GARBAGE)
        assert result["kept"] == kept
        assert dict(zip(GARBAGE, result["garbage"], strict=True)) == dict.fromkeys(GARBAGE, "")
        again = in_page(found, ADDRESSES, kept=["h0.1*0,h0.1*0.5,%%%,m0*0", None], garbage=[])
        assert again["kept"] == ["h0.1*0,m0*0", ""]
    with opened(
        tmp_path, [kept_run("two blocks")], hash_="#live-0/edits=%3Cb%3E*0,h0.0*0,r0%3C%25@0&step=-7"
    ) as found:
        assert found.evaluate("gradfn.state.edits.map(({ part }) => part)") == ["h0.0"]


def test_one_block_with_shared_values_by_touch_on_a_phone_in_the_dark(tmp_path):
    name = "one block"
    with opened(tmp_path, [kept_run(name)], width=390, dark=True, touch=True) as found:
        get = lambda part: found.locator(f"#live-0-{part}")  # noqa: E731
        near(found, "back")
        get("back-bars").locator("button").nth(POSITION).tap()
        assert found.evaluate("[gradfn.state.position, gradfn.state.whole]") == [POSITION, False]
        for _ in range(4):
            get("back-next").tap()
        assert get("back-step").inner_text() == "Step 5 of 5: through the attention of block 0"
        assert "J" in get("back-formula").inner_text()
        get("back-blame").locator("button").nth(3).tap()
        assert found.evaluate("gradfn.state.position") == 3
        near(found, "intervene")
        found.locator("#live-0-switches [data-part='h0.1']").tap()
        edits = {"mixed": head_off(1)}
        assert after_edits(found, name, edits) == pytest.approx(trained(name).patched(edits, 3), abs=1e-4)
        found.locator("#live-0-switches [data-part='b0']").tap()
        edits |= {"attention_out": 0.0, "feed_out": 0.0}
        after_edits(found, name, edits)
        box = get("factor").bounding_box()
        found.touchscreen.tap(box["x"] + 0.75 * box["width"], box["y"] + box["height"] / 2)
        scale = found.evaluate("gradfn.state.edits.at(-1).scale")
        assert 1.3 < scale < 1.7
        edits |= dict.fromkeys(("attention_out", "feed_out"), lambda value: scale * value)
        after_edits(found, name, edits)
        assert found.evaluate("document.documentElement.scrollWidth") <= 390
        unnamed = found.evaluate(
            """() => [...document.querySelectorAll("#live-0-back, #live-0-intervene")].flatMap((part) =>
              [...part.querySelectorAll("button, input, select, [role=region], [role=group]")].filter((each) =>
                !each.ariaLabel && !each.hasAttribute("aria-labelledby") && !each.labels?.length && !each.textContent
              ).map((each) => each.outerHTML))"""
        )
        assert unnamed == []
        small = found.evaluate(
            """() => [...document.querySelectorAll("#live-0-switches button, #live-0-back .stepper button")]
              .filter((each) => each.getBoundingClientRect().height < 24).length"""
        )
        assert small == 0
