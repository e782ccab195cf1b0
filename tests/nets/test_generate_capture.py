"""Captures of each generated token equal those of one forward pass over all tokens so far."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.nets._generate import _next

CONFIG = gf.GPTConfig(vocab=17, context=8, n_layers=2, n_heads=2, width=8)
PROMPT, N = [3, 1, 4], 4
NETS = {
    "unrolled": (gf.gpt(CONFIG), ["blocks/*/residual", "blocks/*/attention/probabilities", "logits"]),
    "scanned": (gf.gpt(dataclasses.replace(CONFIG, scan=True)), ["residual", "probabilities", "logits"]),
    "rnn": (gf.rnn(17, 8, "lstm", 2), ["layers/*/h", "layers/*/c", "logits"]),
}


def params_of(net):
    # Larger than at initialization, where every position has almost the same logits.
    return jax.tree.map(lambda p: 5 * p, net.init(jax.random.key(0)))


@pytest.mark.parametrize("kind", NETS)
def test_each_steps_values_are_those_of_a_whole_forward_pass(kind):
    net, names = NETS[kind]
    params = params_of(net)
    plain = list(gf.stream(net, params, PROMPT, N, seed=1))
    pairs = list(gf.stream(net, params, PROMPT, N, seed=1, capture=names))
    assert [token for token, _ in pairs] == plain
    whole = jax.jit(gf.capture(net.apply, sites=names, keep=names))(params, jnp.array([*PROMPT, *plain[:-1]]))
    position = 0
    for i, (_, captured) in enumerate(pairs):
        assert list(captured) == list(whole)
        end = len(PROMPT) + i
        for name in whole:
            got, expected = np.asarray(captured[name].value), np.asarray(whole[name].value)
            if "probabilities" in name:
                # [..., new, context], [..., T, T]
                assert not got[..., end:].any()
                got, expected = got[..., :end], expected[..., position:end, :end]
            elif kind == "scanned" and name == "residual":
                expected = expected[:, position:end]
            else:
                expected = expected[position:end]
            np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-5)
        np.testing.assert_array_equal(captured.output, captured["logits"].value)
        position = end


def test_names_are_those_of_the_function_and_a_transform_is_compiled_once_per_shape():
    net, _ = NETS["unrolled"]
    params = params_of(net)
    named = gf.inspection.sites(net.apply)(params, jnp.array(PROMPT)).names
    before = _next._cache_size()
    for _ in range(2):
        transform = functools.partial(gf.capture, stats=["rms"])
        tokens, captures = gf.generate(net, params, PROMPT, 3, capture=transform)
    assert _next._cache_size() == before + 2
    np.testing.assert_array_equal(tokens, gf.generate(net, params, PROMPT, 3))
    # The cache itself is named after its scope, and not part of the forward pass.
    assert [name for name in captures[0] if name in named] == [n for n in named if n in captures[0]]
    missing = set(named) - set(captures[0])
    assert missing <= {"blocks/0/attention", "blocks/1/attention"}
    assert captures[0]["logits"].stats.names == ("count", "rms")
    assert len(captures) == 3


def test_generation_continues_where_the_context_is_full():
    net, _ = NETS["unrolled"]
    params = params_of(net)
    plain = list(gf.stream(net, params, PROMPT, 8, temperature=0))
    pairs = list(gf.stream(net, params, PROMPT, 8, temperature=0, capture="blocks/0/residual"))
    assert [token for token, _ in pairs] == plain
    assert [captured["blocks/0/residual"].value.shape[0] for _, captured in pairs] == [3, 1, 1, 1, 1, 1, 4, 1]


def test_unknown_sites_and_other_transforms_raise_at_the_call():
    net, _ = NETS["rnn"]
    params = params_of(net)
    with pytest.raises(ValueError, match=r"there is no site 'layers/9/h'. Did you mean .*layers/0/h"):
        gf.stream(net, params, PROMPT, N, capture="layers/9/h")
    with pytest.raises(TypeError, match=r"capture must be .*functools.partial\(gf.capture"):
        gf.generate(net, params, PROMPT, N, capture=lambda step: step)
