"""AttnLRP of whole transformers against the same rules written with `detach` in PyTorch, on the same weights."""

import jax
import numpy as np
import pytest

import gradfn as gf

torch = pytest.importorskip("torch")

TOKENS, TARGET = np.array([3, 1, 4, 1, 5]), (-1, 7)
GPT2 = gf.GPTConfig(vocab=11, context=6, n_layers=2, n_heads=2, width=6, hidden=8)
LLAMA = gf.GPTConfig(
    vocab=11, context=6, n_layers=1, n_heads=2, n_kv_heads=1, width=6, hidden=8, positions="sinusoidal", norm="rms",
    feed="swiglu", bias=False, tied=False, norm_epsilon=1e-3,
)  # fmt: skip


def half(y):
    """Half of the gradient for each of two factors."""
    return y / 2 + (y / 2).detach()


def identity(x, y):
    """All of the relevance of y to x."""
    return x * (y / x).detach()


def norm(p, x, config):
    if config.norm == "rms":
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_epsilon).sqrt().detach() * p["gain"]
    centered = x - x.mean(-1, keepdim=True)
    scale = (centered.pow(2).mean(-1, keepdim=True) + config.norm_epsilon).sqrt()
    return centered / scale.detach() * p["gain"] + p["b"]


def dense(p, x):
    y = x @ p["W"].T
    return y + p["b"] if "b" in p else y


def attention(p, x, config):
    size = config.width // config.n_heads
    q, k, v = (
        dense(p[name], x).reshape(len(x), -1, size).transpose(0, 1) for name in ("query", "key", "value")
    )
    k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
    scores = half(q @ k.transpose(1, 2)) / size**0.5
    later = torch.ones(len(x), len(x)).triu(1).bool()
    p_attend = scores.masked_fill(later, -torch.inf).softmax(-1)
    mixed = half(p_attend @ v)
    return dense(p["out"], mixed.transpose(0, 1).reshape(len(x), -1))


def feed(p, x, config):
    if config.feed == "swiglu":
        gate = dense(p["gate"], x)
        return dense(p["down"], half(identity(gate, torch.nn.functional.silu(gate)) * dense(p["up"], x)))
    z = dense(p["up"], x)
    return dense(p["down"], identity(z, torch.nn.functional.gelu(z, approximate="tanh")))


def relevance_in_torch(params, embedded, config):
    p = jax.tree.map(torch.tensor, params)
    x = start = torch.tensor(embedded, requires_grad=True)
    for i in range(config.n_layers):
        block = p["blocks"][str(i)]
        x = x + attention(block["attention"], norm(block["attention_norm"], x, config), config)
        x = x + feed(block["feed"], norm(block["feed_norm"], x, config), config)
    logits = norm(p["final_norm"], x, config) @ (p["embed"] if config.tied else p["head"])["W"].T
    logits[TARGET].backward()
    return float(logits[TARGET].detach()), (start * start.grad).detach().numpy()


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_the_rules_for_attention_are_those_in_torch(x64, config):
    net, rng = gf.gpt(config), np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    params = jax.tree.map(lambda shape: rng.normal(0.1, 0.5, shape.shape), shapes)
    embedded = gf.capture(net.apply, sites="embedded", keep="embedded")(params, TOKENS)["embedded"].value
    score, expected = relevance_in_torch(params, np.array(embedded), config)
    result = gf.attribution.lrp(net.apply, TARGET, "embedded", epsilon=0.0)(params, TOKENS)
    np.testing.assert_allclose(result.score, score, rtol=1e-9)
    np.testing.assert_allclose(result.attributions, expected, rtol=1e-8, atol=1e-10)
