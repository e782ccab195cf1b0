"""Lenses and direct effects of pretrained weights and other frameworks' models, held against those tools."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

from .test_direct_effects import total

TOKENS = np.array([3, 1, 4, 1, 5, 9])


def difference(logits):
    return logits[-1, 5] - logits[-1, 3]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A small GPT-2 of transformers with random weights, its outputs, and the same as a net of ours."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=17, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    config, params = gf.load_pretrained(folder)
    return model, gf.gpt(config), params, str(folder)


@pytest.mark.slow
def test_pretrained_gpt2_has_the_hidden_states_and_heads_of_pytorch(gpt2):
    import torch

    model, net, params, _ = gpt2
    read, written = {}, {}
    for i, block in enumerate(model.transformer.h):
        block.attn.c_proj.register_forward_hook(lambda _, args, out, i=i: read.update({i: args[0][0]}))
        block.mlp.register_forward_hook(lambda _, args, out, i=i: written.update({i: out[0]}))
    tail, ends = model.transformer.ln_f, []
    tail.register_forward_hook(lambda _, args, out: ends.append(args[0][0]))
    with torch.no_grad():
        out = model(torch.tensor(TOKENS)[None], output_hidden_states=True)
        end = ends[0][-1]
        # The last of them is already normalized.
        expected = [model.lm_head(tail(x))[0] for x in out.hidden_states[:-1]]
        W = model.lm_head.weight
        direction = (W[5] - W[3]) * tail.weight / torch.sqrt(end.var(correction=0) + tail.eps)

        def effect(added):
            """What a vector added to the last position's stream adds to the difference of logits."""
            return float((added - added.mean()) @ direction)

        # [width, width] -> [heads, size, width]
        by_head = [block.attn.c_proj.weight.reshape(2, 4, 8) for block in model.transformer.h]
        heads = [[effect(read[i][-1].reshape(2, 4)[h] @ by_head[i][h]) for h in range(2)] for i in range(2)]
        feeds = [effect(written[i][-1]) for i in range(2)]
        embedded = effect(out.hidden_states[0][0, -1])
        constant = float((W[5] - W[3]) @ tail.bias)
    lens = gf.circuits.logit_lens(net.apply)(params, jnp.asarray(TOKENS))
    for ours, theirs in zip(lens.logits, [*expected, out.logits[0]], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    found = gf.circuits.direct_effects(net.apply, difference)(params, jnp.asarray(TOKENS))
    np.testing.assert_allclose(found.heads, heads, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.parts[jnp.array([0, 2, 4])], [embedded, *feeds], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.constant, constant, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lenses_and_heads_equal_those_of_transformer_lens(gpt2, monkeypatch):
    pytest.importorskip("transformer_lens")
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools import analysis

    theirs, net, params, folder = gpt2
    bridge = TransformerBridge.boot_transformers(folder, hf_model=theirs, device="cpu")
    tokens = torch.tensor(TOKENS)[None]
    expected = analysis.logit_lens(bridge, tokens, positions=None, vocab=list(range(17))).values[:, 0]
    lens = gf.circuits.logit_lens(net.apply)(params, jnp.asarray(TOKENS))
    np.testing.assert_allclose(lens.logits, expected.detach(), rtol=1e-4, atol=1e-5)

    # Without a tokenizer; they leave out the last position, on which the others do not depend.
    monkeypatch.setattr(bridge, "to_tokens", lambda prompt: tokens)
    fitted = analysis.JacobianLens.fit(bridge, ["a"], corpus="a", skip_first_positions=1, show_progress=False)
    jacobians = gf.circuits.jacobian_lens(net.apply, skip=1)(params, jnp.asarray(TOKENS)[None, :-1]).jacobians
    np.testing.assert_allclose(jacobians[1], fitted.jacobians[0], rtol=1e-4, atol=1e-5)


def test_an_unchanged_model_of_linen_by_the_names_of_its_modules():
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = nn.make_causal_mask(x[..., 0])
            x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x), mask=mask)
            return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(nn.LayerNorm()(x))))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(17, 8, name="embed")(tokens)
            for i in range(2):
                x = Block(name=f"block{i}")(x)
            return nn.Dense(17, name="head")(nn.LayerNorm(name="norm")(x))

    model, tokens = Model(), jnp.asarray(TOKENS)
    params = model.init(jax.random.key(0), tokens)
    sites = ["Model/embed", "Model/block?"]
    check(model.apply, params, sites, ["Model/embed", "*/attention/out", "*/down"])
    lens = gf.circuits.logit_lens(model.apply, sites=sites)(params, tokens)
    x = nn.Embed(17, 8).apply({"params": params["params"]["embed"]}, tokens)
    x = nn.LayerNorm().apply({"params": params["params"]["norm"]}, x)
    expected = nn.Dense(17).apply({"params": params["params"]["head"]}, x)
    np.testing.assert_allclose(lens.logits[0], expected, rtol=1e-4, atol=1e-5)
    # The same of a batch at once, which the model takes too.
    batch = jnp.stack([tokens[::-1], tokens])
    together = gf.circuits.logit_lens(model.apply, sites=sites)(params, batch)
    np.testing.assert_allclose(together.logits[:, 1], lens.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_model_of_equinox_whose_stream_is_tapped():
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        blocks: list
        norms: list
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 6)
            self.embed = eqx.nn.Embedding(17, 8, key=keys[0])
            attention = [eqx.nn.MultiheadAttention(2, 8, key=key) for key in keys[1:3]]
            self.blocks = list(zip(attention, [eqx.nn.MLP(8, 8, 16, 1, key=key) for key in keys[3:5]]))
            self.norms = [eqx.nn.RMSNorm(8, use_bias=False) for _ in range(5)]
            self.head = eqx.nn.Linear(8, 17, key=keys[5])

        def __call__(self, tokens):
            x = gf.tap(jax.vmap(self.embed)(tokens), "embedded")
            mask = jnp.tril(jnp.ones([len(tokens), len(tokens)], bool))
            for i, (attention, mlp) in enumerate(self.blocks):
                h = jax.vmap(self.norms[2 * i])(x)
                x = x + attention(h, h, h, mask=mask)
                x = gf.tap(x + jax.vmap(mlp)(jax.vmap(self.norms[2 * i + 1])(x)), "residual")
            return jax.vmap(self.head)(jax.vmap(self.norms[4])(x))

    model = Model(jax.random.key(0))
    # Their functions add vectors to matrices.
    with jax.numpy_rank_promotion("allow"):
        check(
            Model.__call__, model, None, ["embedded", "eqx.nn.MultiheadAttention*", "blocks/*/layers/1/bias"]
        )


def check(f, params, sites, parts):
    """The last layer of the lens is the output, the first Jacobian differs from the last, the effects add up."""
    tokens = jnp.asarray(TOKENS)
    lens = gf.circuits.logit_lens(f, sites=sites)(params, tokens)
    np.testing.assert_allclose(lens.logits[-1], f(params, tokens), rtol=1e-4, atol=1e-5)
    jacobians = gf.circuits.jacobian_lens(f, sites=sites)(params, tokens[None]).jacobians
    assert jacobians.shape == (3, 8, 8)
    assert jnp.abs(jacobians[0] - jacobians[-1]).max() > 1e-3
    found = gf.circuits.direct_effects(f, difference, sites=sites, parts=parts)(params, tokens)
    assert found.unexplained < 1e-5
    assert abs(found.remainder) < 1e-5
    np.testing.assert_allclose(total(found), difference(f(params, tokens)), atol=1e-5)
