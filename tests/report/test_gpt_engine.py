"""The GPT in the page: Chromium computes the same values, gradients and distributions as JAX."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.core.params import named_leaves
from gradfn.pages.live._gpt import described
from gradfn.pages.live._gpt_numpy import FUNCTIONS
from gradfn.pages.live.arrays import as_json
from gradfn.runs import language_net as language_net_module
from gradfn.runs.kept import Kept
from gradfn.runs.language_net import Architecture, LanguageNet
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
    *("activations", "matrix"),
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
    scale = max(np.abs(expected).max(initial=0), 1e-3)
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
    assert names == sorted(language_net_module.ACTIVATIONS)
    inputs = {"z": z.ravel().tolist(), "gradient": gradient.ravel().tolist(), "names": names}
    result = compute(script, **inputs)
    for name in names:
        values, back = jax.vjp(gf.layers.activation(name), z)
        close(result[name][0], values, name)
        close(result[name][1], back(gradient)[0], f"gradient of {name}")
        close(FUNCTIONS[name](z), values, f"{name} in numpy")
