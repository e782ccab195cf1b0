"""The GPT in the page: Chromium computes the same values, gradients and distributions as JAX."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.core.params import named_leaves
from gradfn.experiments import induction
from gradfn.files import FileError
from gradfn.pages.live import _gpt_numpy as forward
from gradfn.pages.live._gpt import described, gpt
from gradfn.pages.live._gpt_checkpoints import coded, pack
from gradfn.pages.live.arrays import as_json
from gradfn.runs import language_net as language_net_module
from gradfn.runs import sample
from gradfn.runs.kept import Kept, read_run
from gradfn.runs.language_net import Architecture, LanguageNet, load_language_net, load_params
from gradfn.runs.live_net import ACTIVATIONS
from gradfn.train import checkpoint, restore
from tests.report.browser import needs_browser, opened

# Together they have each option of gf.GPTConfig, in small sizes.
SIZES = {"vocab": 7, "context": 6, "n_heads": 2, "width": 8, "hidden": 12}
CONFIGS = {
    "gpt2": {"n_layers": 2},
    "llama": {
        "n_layers": 2,
        "positions": "rope",
        "norm": "rms",
        "feed": "swiglu",
        "bias": False,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_size": 4,
        "tied": False,
        "norm_epsilon": 1e-3,
        "rope_base": 100.0,
    },
    "one block": {"n_layers": 1, "n_kv_heads": 1, "positions": "sinusoidal", "feed": "softmax"},
    "scanned": {"n_layers": 3, "scan": True, "feed": "gelu_exact", "norm": "rms", "positions": "rope"},
    "gated": {"n_layers": 1, "feed": "swiglu", "tied": False},
}
TOKENS = np.array([3, 0, 6, 6, 1], np.int32)
WEIGHTS = np.array([1.0, 0.0, 2.0, -0.5], np.float32)  # of the losses at the first positions
SYMBOLS = "\n abcde"
TOKENIZER = {"name": "characters", "symbols": SYMBOLS}
MODULES = (
    *("model", "forward", "backward", "edits", "loss", "sampling", "lens", "tokenizer", "checkpoints"),
    *("activations", "matrix", "write"),
)
HELPERS = """
const plain = (value) =>
  ArrayBuffer.isView(value) ? Array.from(value)
  : Array.isArray(value) ? value.map(plain)
  : value && typeof value === "object" ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, plain(v)]))
  : value;
const g = Object.assign({}, ...(await Promise.all(inputs.modules.map((name) => import(`gradfn/gpt/${name}.js`)))));
"""

pytestmark = [pytest.mark.slow, needs_browser]


@functools.cache
def made(**options):
    """Return a config, its net, and random parameters of it."""
    config = gf.GPTConfig(**(SIZES | options))
    net = gf.gpt(config)
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: random.normal(0.3, 0.5, leaf.shape).astype(np.float32), shapes)
    if config.scan:
        config = dataclasses.replace(config, scan=False)
        params = gf.unstack_blocks(params)
        net = gf.gpt(config)
    return config, net, params


def language_net(config, params, **options):
    """Return what the page gets of a config and its parameters."""
    size = config.head_size or config.width // config.n_heads
    architecture = Architecture(
        **{name: getattr(config, name) for name in Architecture._fields}
        | {"head_size": size, "n_kv_heads": config.n_kv_heads or config.n_heads}
    )
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(params)}
    samples = ["bad cab"[: config.context], "abcde"]
    net = LanguageNet(architecture, TOKENIZER, False, None, samples, arrays, 100, {})
    return net._replace(**options)


def loss_of(net):
    """Return the function of parameters and tokens that the tests differentiate: a weighted sum of losses."""

    def loss(params, tokens):
        z = net.apply(params, tokens)[: len(WEIGHTS)]
        log_p = jax.nn.log_softmax(z)
        return -(jnp.asarray(WEIGHTS) * log_p[jnp.arange(len(WEIGHTS)), tokens[1:]]).sum()

    return loss


@pytest.fixture(scope="module")
def compute(tmp_path_factory):
    """Return a function that runs a script in the page of a GPT, where `g` has what the modules export."""
    folder = tmp_path_factory.mktemp("gpt")
    (folder / "config.json").write_text("{}")
    config, _, params = made(**CONFIGS["gpt2"])
    run = Kept(folder, "gpt", {}, {}, None, {}, {}, None, language_net=language_net(config, params))
    with opened(folder, [run]) as page:

        def compute(script, **inputs):
            inputs |= {"modules": MODULES}
            return page.evaluate(f"async (inputs) => {{ {HELPERS}{script} }}", inputs)

        yield compute


def close(actual, expected, name, tolerance=1e-4):
    """Assert that an array is another one, to a part of its scale."""
    expected = np.asarray(expected)
    assert np.size(actual) == expected.size, name
    # What is zero in exact arithmetic, as the gradient of the keys' biases, consists of rounding errors.
    scale = max(np.abs(expected).max(initial=0), 1e-2)
    error = np.abs(np.reshape(actual, expected.shape) - expected).max(initial=0) / scale
    assert error < tolerance, f"{name}: {error:.2g}"


def content(config, params, **options):
    return as_json(described(language_net(config, params, **options), "float32"))


BOTH = """
const model = g.build(JSON.parse(inputs.content));
const pass = g.forward(model, Int32Array.from(inputs.tokens), inputs.edits ?? []);
const targets = g.targets(model, pass.tokens);
const weights = Float32Array.from({ length: pass.tokens.length }, (_, t) => inputs.weights[t] ?? 0);
const back = g.backward(model, pass, targets, weights, { params: true });
return plain({ names: model.sites, sites: pass.sites, losses: g.losses(pass, targets), back });
"""


@pytest.mark.parametrize("name", CONFIGS)
def test_every_value_and_gradient_is_that_of_jax(compute, name):
    config, net, params = made(**CONFIGS[name])
    inspection = jax.jit(gf.inspect(loss_of(net), keep=None, stats=("rms",)))(params, TOKENS)
    result = compute(BOTH, content=content(config, params), tokens=TOKENS.tolist(), weights=WEIGHTS.tolist())
    computed = [site.name for site in inspection.sites]
    assert result["names"] == [site for site in computed if site in result["names"]]
    assert len(result["names"]) == 12 * config.n_layers + 3
    for site, actual in result["sites"].items():
        assert tuple(actual["shape"]) == inspection.values[site].shape
        close(actual["values"], inspection.values[site], site)
    for site, actual in result["back"]["sites"].items():
        close(actual["values"], inspection.value_grads[site], f"gradient at {site}")
    assert result["back"]["sites"].keys() == result["sites"].keys()
    grads = dict(named_leaves(inspection.grads))
    assert grads.keys() == result["back"]["params"].keys()
    for path, expected in grads.items():
        close(result["back"]["params"][path]["values"], expected, path)
    close(result["back"]["loss"], inspection.value, "loss")
    losses = -jax.nn.log_softmax(net.apply(params, TOKENS))[jnp.arange(4), TOKENS[1:]]
    close(result["losses"][:4], losses, "losses")
    assert np.isnan(result["losses"][4])


def test_every_activation_of_feed_forward_layers_is_that_of_jax(compute):
    z = np.random.default_rng(0).normal(0, 2, [3, 8]).astype(np.float32)
    gradient = np.random.default_rng(1).normal(0, 1, [3, 8]).astype(np.float32)
    script = """
    const [z, gradient] = [inputs.z, inputs.gradient].map((values) => Float32Array.from(values));
    return plain(Object.fromEntries(inputs.names.map((name) =>
      [name, [g.activate(name, z, 8), g.activationBack(name, z, gradient, 8)]])));"""
    names = sorted(gf.layers.activations)
    assert names == sorted([*ACTIVATIONS, "softmax"])
    inputs = {"z": z.ravel().tolist(), "gradient": gradient.ravel().tolist(), "names": names}
    result = compute(script, **inputs)
    for name in names:
        values, back = jax.vjp(gf.layers.activation(name), z)
        close(result[name][0], values, name)
        close(result[name][1], back(gradient)[0], f"gradient of {name}")
        close(forward.FUNCTIONS[name](z), values, f"{name} in numpy")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_edits_are_those_of_patch(compute, name):
    config, net, params = made(**CONFIGS[name])
    other = np.random.default_rng(3).normal(0, 1, [len(TOKENS), config.width]).astype(np.float32)
    names = [site.name for site in gf.sites(net.apply)(params, TOKENS)]
    found = {end: [site for site in names if site.endswith(f"/{end}")] for end in ("mixed", "probabilities")}
    mixed, probabilities = found["mixed"][0], found["probabilities"][0]

    def loss(params, tokens, head, mlp, rows, replacement):
        edits = {
            mixed: lambda value: value.at[:, 1].multiply(head),
            # Of the grouped probabilities [kv_heads, group, T, T], head 1 is the second of the first group.
            probabilities: lambda value: value.at[(0, 1) if value.ndim == 4 else 1].multiply(head),
            "blocks/1/feed_out": lambda value: value * mlp,
            "blocks/0/residual": lambda value: jnp.where(rows[:, None], replacement, value),
        }
        return loss_of(gf.Net(net.spec, gf.patch(net.apply, edits)))(params, tokens)

    inspect = jax.jit(gf.inspect(loss, keep=None, stats=("rms",), input_grads=False))
    page = content(config, params)
    one = jnp.float32(1)
    nowhere, some = np.zeros(5, bool), np.array([False, True, False, True, False])
    cases = [
        ((0.3, 1.0, nowhere), [{"site": site, "head": 1, "scale": 0.3} for site in (mixed, probabilities)]),
        ((1.0, 0.0, nowhere), [{"site": "blocks/1/feed_out", "scale": 0.0}]),
        ((1.0, 1.0, some), [{"site": "blocks/0/residual", "positions": [1, 3], "values": other}]),
    ]
    script = "for (const edit of inputs.edits) if (edit.values) edit.values = Float32Array.from(edit.values);"
    unedited = inspect(params, TOKENS, one, one, nowhere, other).value
    for (head, mlp, rows), edits in cases:
        inspection = inspect(params, TOKENS, jnp.float32(head), jnp.float32(mlp), rows, other)
        assert abs(inspection.value - unedited) > 1e-3
        edits = [
            edit | {"values": edit["values"].ravel().tolist()} if "values" in edit else edit for edit in edits
        ]
        inputs = {"content": page, "tokens": TOKENS.tolist(), "weights": WEIGHTS.tolist(), "edits": edits}
        result = compute(script + BOTH, **inputs)
        close(result["back"]["loss"], inspection.value, "loss")
        for site, actual in result["sites"].items():
            close(actual["values"], inspection.values[site], site)
            close(
                result["back"]["sites"][site]["values"], inspection.value_grads[site], f"gradient at {site}"
            )
        for path, expected in named_leaves(inspection.grads):
            close(result["back"]["params"][path]["values"], expected, path)


def test_edits_that_do_not_fit_are_refused(compute):
    config, _, params = made(**CONFIGS["gpt2"])
    script = """
    const model = g.build(JSON.parse(inputs.content));
    const refused = (edit) => {
      try { g.forward(model, Int32Array.of(1, 2), [edit]); return ""; } catch (error) { return error.message; }
    };
    const long = () => {
      try { g.forward(model, new Int32Array(7)); return ""; } catch (error) { return error.message; }
    };
    return [
      refused({ site: "blocks/0/missing", scale: 0 }),
      refused({ site: "blocks/0/residual", values: new Float32Array(3) }),
      refused({ site: "blocks/0/attention/mixed", head: 2, scale: 0 }),
      refused({ site: "blocks/0/attention/mixed", head: 1, positions: [0, 9], scale: 0 }),
      long(),
      g.forward(model, new Int32Array(0)).logits.length,
    ];"""
    assert compute(script, content=content(config, params)) == [
        "no site blocks/0/missing",
        "blocks/0/residual has 16 values, [2, 8]; got 3",
        "blocks/0/attention/mixed has 2 heads; got head 2",
        "",
        "at most 6 tokens, got 7",
        0,
    ]


def test_the_lens_is_the_logit_lens(compute):
    config, net, params = made(**CONFIGS["gpt2"])
    script = """
    const model = g.build(JSON.parse(inputs.content));
    return plain(g.logitLens(model, g.forward(model, Int32Array.from(inputs.tokens)), 2));"""
    result = compute(script, content=content(config, params), tokens=TOKENS.tolist())
    streams = ["embedded", *(f"blocks/{i}/{part}" for i in (0, 1) for part in ("residual_mid", "residual"))]
    assert [each["site"] for each in result] == streams
    found = gf.circuits.logit_lens(net.apply, sites=streams)(params, TOKENS)
    assert list(found.layers) == streams
    for each, logits in zip(result, found.logits, strict=True):
        close(each["probabilities"], jax.nn.softmax(logits[2]), each["site"])


def test_the_distribution_is_that_of_generate(compute):
    z = np.random.default_rng(0).normal(0, 2, 9).astype(np.float32)
    z[4] = z.max()  # of equals, the smaller token comes first
    options = [{}, {"temperature": 0.5}, {"topK": 3}, {"temperature": 2.0, "topK": 1}, {"temperature": 0}]
    script = """
    const z = Float32Array.from(inputs.z), all = inputs.options.map((options) => g.distribution(z, options));
    const uniform = Array.from({ length: 1000 }, (_, i) => g.sample(all[2], i / 1000));
    return { all: plain(all), uniform, end: g.sample(all[0], 0.9999999999) };"""
    result = compute(script, z=z.tolist(), options=options)
    for each, actual in zip(options, result["all"], strict=True):
        order = np.argsort(-z, kind="stable")
        kept = order[: 1 if each.get("temperature") == 0 else each.get("topK", len(z))]
        powers = np.zeros(len(z))
        powers[kept] = np.exp((z[kept] - z.max()) / (each.get("temperature", 1.0) or 1.0))
        close(actual, powers / powers.sum(), each, 1e-6)
    counts = np.bincount(result["uniform"], minlength=len(z)) / 1000
    np.testing.assert_allclose(counts, result["all"][2], atol=2e-3)
    assert result["end"] == max(np.flatnonzero(result["all"][0]))


TEXTS = ["", "abc", "hé 😀\n", "\ufeffa\u0000b", "<b>&amp;", "🏳️‍🌈" * 3, "a" * 10_000]


def test_tokens_are_those_of_the_tokenizers_of_gradfn(compute):
    config, _, params = made(**CONFIGS["gpt2"])
    page = content(config, params)
    script = """
    const model = { ...g.build(JSON.parse(inputs.content)), tokenizer: inputs.tokenizer, lines: inputs.lines };
    model.config = { ...model.config, vocab: inputs.vocab };
    return plain(inputs.texts.map((text) => {
      const { tokens, unknown } = g.encode(model, text);
      const read = g.readBy(model, tokens);
      return { tokens, unknown, text: g.decode(model, tokens), names: g.names(model, tokens), read };
    }));"""

    def of(tokenizer, texts, lines=False, vocab=256):
        return compute(script, content=page, tokenizer=tokenizer, texts=texts, lines=lines, vocab=vocab)

    letters = gf.data.characters("\nabcé 😀")
    for text, result in zip(TEXTS, of(letters.to_dict(), TEXTS), strict=True):
        known = "".join(symbol for symbol in text if symbol in letters.symbols)
        assert result["tokens"] == (letters.encode(known).tolist() if known else [])
        assert result["text"] == known == "".join(result["names"]).replace("↵", "\n")
        assert result["unknown"] == list(dict.fromkeys(symbol for symbol in text if symbol not in known))
        assert result["read"] == result["tokens"][-6:]
    utf8 = gf.data.utf8_bytes()
    for text, result in zip(TEXTS, of(utf8.to_dict(), TEXTS), strict=True):
        assert (result["tokens"], result["text"], result["unknown"]) == (utf8.encode(text).tolist(), text, [])
    [result] = of(utf8.to_dict(), ["é\n"])
    assert result["names"] == ["\\xC3", "\\xA9", "↵"]

    # A line starts with the end of the line before.
    results = of(letters.to_dict(), ["ab", "\nab", "ab\nc", ""], lines=True)
    assert [result["text"] for result in results] == ["\nab", "\nab", "\nab\nc", "\n"]
    assert letters.decode(results[2]["read"]) == "\nc"

    [result] = of(None, ["3, 14\n x 7 1e3 -1 7.5 99999999999"], vocab=14)
    assert (result["tokens"], result["text"], result["names"]) == ([3, 7], "3 7", ["3", "7"])
    assert result["unknown"] == ["14", "x", "1e3", "-1", "7.5", "99999999999"]


def test_targets_leave_out_what_the_model_was_not_trained_to_predict(compute):
    script = """return plain(inputs.cases.map(([quiet, tokens]) => g.targets({ quiet }, Int32Array.from(tokens))));"""
    cases = [
        (None, [5, 6, 7]),
        (None, []),
        ({"until": 9}, [1, 2, 9, 2, 1]),
        ({"until": 9}, [1, 2]),
        ({"repeats": True}, [1, 2, 3, 1, 2, 3, 1]),
        ({"repeats": True}, [1, 2, 3]),
    ]
    expected = [[6, 7, -1], [], [-1, -1, 2, 1, -1], [-1, -1], [-1, -1, -1, 2, 3, 1, -1], [-1, -1, -1]]
    assert compute(script, cases=cases) == expected
    for (quiet, tokens), wanted in zip(cases, expected, strict=True):
        if tokens:
            assert forward.targets(np.array(tokens), quiet).tolist() == wanted


def write_run(folder, config, params, tokenizer, kept=()):
    """Write what a run of that GPT leaves in its folder; `kept` are pairs of a step and parameters."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 100, "loss": 1.0}\n', encoding="utf-8")
    model = {"net": "gpt", "settings": dataclasses.asdict(config), "tokenizer": tokenizer, "lines": False}
    (folder / "model.json").write_text(json.dumps(model), encoding="utf-8")
    checkpoint.save(folder / "checkpoint.safetensors", {"params": params, "step": np.int32(100)}, {})
    (folder / "kept").mkdir()
    for step, each in kept:
        restore.keep(folder, step, each)


def test_earlier_checkpoints_and_half_precision_keep_the_loss(tmp_path, compute):
    config, net, params = made(n_layers=2, width=32, hidden=64, context=16)
    random = np.random.default_rng(5)

    def earlier(scale):
        return jax.tree.map(
            lambda leaf: leaf + random.normal(0, scale, leaf.shape).astype(np.float32), params
        )

    kept = [(step, earlier(scale)) for step, scale in ((0, 0.5), (10, 0.3), (20, 0.2), (40, 0.1), (80, 0.02))]
    write_run(tmp_path / "run", config, params, TOKENIZER, [*kept, (100, params)])
    run = read_run(tmp_path / "run")
    live = gpt(run, 10**6)
    assert (live.about["shown"], live.about["kept"], live.about["dtype"]) == (5, 5, "float16")
    script = """
    const model = g.build(JSON.parse(inputs.content));
    const mean = (params) => {
      const all = model.samples.flatMap((text) => {
        const pass = g.forward({ ...model, params }, g.readBy(model, g.encode(model, text).tokens));
        return Array.from(g.losses(pass, g.targets(model, pass.tokens))).filter((loss) => !Number.isNaN(loss));
      });
      return all.reduce((sum, loss) => sum + loss, 0) / all.length;
    };
    const first = mean(g.paramsAt(model, 0));
    const losses = model.checkpoints.map((_, i) => mean(g.paramsAt(model, i)));
    return { first, losses, known: model.checkpoints, samples: model.samples };"""
    result = compute(script, content=live.content)
    assert [each["step"] for each in result["known"]] == [0, 10, 20, 40, 80, 100]
    letters = gf.data.tokenizer_from(TOKENIZER)
    for (_, each), actual, known in zip(
        [*kept, (100, params)], result["losses"], result["known"], strict=True
    ):
        tokens = np.stack([letters.encode(text) for text in result["samples"]]).astype(np.int32)
        expected = float(jax.vmap(loss_per_token(net), (None, 0))(each, tokens).mean())
        np.testing.assert_allclose(actual, expected, rtol=0.01)
        np.testing.assert_allclose(known["loss"], expected, rtol=1e-4 if known["step"] < 100 else 0.01)
    assert result["first"] == result["losses"][0]

    # With less room there are fewer of them, then no network.
    shown = []
    for room in (len(live.content) - 1, 60_000, 8 * 13_000 // 3, 20_000):
        part = gpt(run, room)
        shown.append(part if isinstance(part, str) else part.about["shown"])
        assert isinstance(part, str) or len(part.content) <= room
    assert 0 < shown[0] < 5
    assert shown[:2] == sorted(shown[:2], reverse=True)
    assert "too large to run in the page: " in shown[-1]


def test_codes_are_decoded(compute):
    random = np.random.default_rng(0)
    cases = [random.normal(128, spread, 3000).clip(1, 255).astype(int) for spread in (0.01, 0.4, 3, 40)]
    packed = [pack(case) for case in cases]
    script = (
        "return plain(inputs.cases.map(([lengths, bits]) => g.unpack(Uint8Array.from(lengths), bits, 3000)));"
    )
    result = compute(script, cases=[[lengths.tolist(), bits.tolist()] for lengths, bits in packed])
    for case, (_, bits), actual in zip(cases, packed, result, strict=True):
        assert actual == case.tolist()
        shares = np.unique(case, return_counts=True)[1] / len(case)
        entropy = -(shares * np.log2(shares)).sum()
        assert entropy <= 8 * len(bits) / len(case) <= max(entropy, 1) + 0.5


def test_what_differences_cannot_hold_is_there_in_half_precision(compute):
    config, _, params = made(**CONFIGS["gpt2"])
    net = language_net(config, params)
    earlier = {name: (2 * array).astype(np.float16).astype(np.float32) for name, array in net.params.items()}

    def is_exact(made):
        return all(np.array_equal(made[name], earlier[name]) for name in earlier)

    made_ = coded(earlier, net.params, is_exact)
    page = described(net, "float32") | {
        "checkpoints": [{"step": 1, "loss": 1.0, "arrays": made_.content}, {"step": 2, "loss": 1.0}]
    }
    script = "return plain(g.paramsAt(g.build(JSON.parse(inputs.content)), 0));"
    result = compute(script, content=as_json(page))
    assert result.keys() == earlier.keys()
    for name, array in earlier.items():
        np.testing.assert_array_equal(result[name]["values"], array.ravel())
    assert coded(earlier, net.params, lambda made: False) is None


def loss_per_token(net):
    """Return the function of parameters and tokens that is the mean loss of the next tokens."""

    def loss(params, tokens):
        log_p = jax.nn.log_softmax(net.apply(params, tokens)[:-1])
        return -log_p[jnp.arange(len(tokens) - 1), tokens[1:]].mean()

    return loss


@pytest.mark.parametrize("name", [*CONFIGS])
def test_a_folder_is_read_as_jax_reads_it(tmp_path, name):
    """The settings are those of the config, blocks are unstacked, and the forward pass in numpy is right."""
    config, net, params = made(**CONFIGS[name])
    stored, as_stored = params, config
    if CONFIGS[name].get("scan"):
        stored, as_stored = gf.stack_blocks(params), dataclasses.replace(config, scan=True)
    write_run(tmp_path / "run", as_stored, stored, TOKENIZER, [(50, stored)])
    found = load_language_net(tmp_path / "run")
    assert found.architecture == language_net(config, params).architecture
    assert (found.step, list(found.kept)) == (100, [50])
    for each in (found.params, load_params(found.kept[50], found.architecture)):
        leaves = dict(named_leaves(params))
        assert each.keys() == leaves.keys()
        for path, array in each.items():
            np.testing.assert_array_equal(array, leaves[path])
    logits = net.apply(params, TOKENS)
    close(forward.logits(found.architecture, found.params, TOKENS), logits, "logits")
    batch = np.stack([TOKENS[::-1], TOKENS])
    close(forward.logits(found.architecture, found.params, batch)[1], logits, "logits of a batch")


def test_the_defaults_of_settings_are_those_of_the_config(tmp_path):
    (tmp_path / "model.json").write_text('{"net": "gpt"}')
    checkpoint.save(tmp_path / "checkpoint.safetensors", {"params": {"w": np.ones(2, np.float32)}}, {})
    with pytest.raises(
        FileError, match=r"checkpoint.safetensors: embed/W: expected \[50257, 768\], got no such array"
    ):
        load_language_net(tmp_path)
    found = language_net_module._architecture(tmp_path, {"net": "gpt"})
    default = gf.GPTConfig()
    derived = {"n_kv_heads": default.n_heads, "head_size": 64, "hidden": 4 * default.width}
    assert found._asdict() == {name: getattr(default, name) for name in found._fields} | derived


def test_a_net_of_attention_layers_is_that_of_jax(tmp_path, compute):
    """The one of the experiment `induction`, with settings as it writes them."""
    net = induction.attention_only(8, 2)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: random.normal(0.3, 0.5, leaf.shape).astype(np.float32),
        jax.eval_shape(net.init, jax.random.key(0)),
    )
    (tmp_path / "run").mkdir()
    settings = {
        "vocab": induction.VOCAB,
        "context": induction.LENGTH,
        "n_layers": 2,
        "n_heads": 2,
        "width": 8,
    }
    letters = gf.data.characters(induction.SYMBOLS)
    quiet = {"repeats": True}
    sample.save_model(tmp_path / "run", "attention", settings, letters, False, ["0AB0AB0"], quiet)
    checkpoint.save(tmp_path / "run" / "checkpoint.safetensors", {"params": params}, {})
    found = load_language_net(tmp_path / "run")
    assert (found.samples, found.quiet) == (["0AB0AB0"], quiet)
    tokens = np.array([3, 31, 3, 31, 3], np.int32)
    weights = np.array([0, 0, 1, 2], np.float32)  # the tokens repeat after two

    def loss(params, tokens):
        log_p = jax.nn.log_softmax(net.apply(params, tokens)[:4])
        return -(weights * log_p[jnp.arange(4), tokens[1:]]).sum()

    inspection = jax.jit(gf.inspect(loss, keep=None, stats=("rms",)))(params, tokens)
    inputs = {"tokens": tokens.tolist(), "weights": [1, 1, 1, 2]}
    result = compute(BOTH, content=as_json(described(found, "float32")), **inputs)
    assert result["names"] == [site.name for site in inspection.sites if site.name in result["names"]]
    assert len(result["names"]) == 2 * 8 + 3
    for site, actual in result["sites"].items():
        close(actual["values"], inspection.values[site], site)
        close(result["back"]["sites"][site]["values"], inspection.value_grads[site], f"gradient at {site}")
    grads = dict(named_leaves(inspection.grads))
    assert grads.keys() == result["back"]["params"].keys()
    for path, expected in grads.items():
        close(result["back"]["params"][path]["values"], expected, path)
    close(forward.logits(found.architecture, found.params, tokens), net.apply(params, tokens), "logits")
    assert np.isfinite(result["losses"]).tolist() == [False, False, True, True, False]
