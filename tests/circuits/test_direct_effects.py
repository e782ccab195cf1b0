"""Direct effects: they add up, and are the products of weights that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

from .test_lenses import SIZES, TOKENS, gpt, normalized, streams_of


def logit_difference(logits):
    return logits[-1, 5] - logits[-1, 3]


def loss(logits):
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 7])


def total(found):
    return found.constant + found.parts.sum() + found.rest + found.remainder


LLAMA = {"norm": "rms", "bias": False, "n_kv_heads": 1, "positions": "rope"}


@pytest.mark.parametrize(("metric", "changes"), [(logit_difference, LLAMA), (loss, {})])
def test_they_add_up_to_the_metric(metric, changes):
    net, params = gpt(**changes)
    found = gf.circuits.direct_effects(net.apply, metric)(params, TOKENS)
    np.testing.assert_allclose(found.value, metric(net.apply(params, TOKENS)), rtol=1e-5)
    np.testing.assert_allclose(total(found), found.value, atol=1e-5)
    assert abs(found.remainder) < 1e-5
    assert abs(found.rest) < 1e-5
    assert found.unexplained < 1e-5
    for index, heads, bias in zip(found.with_heads, found.heads, found.biases, strict=True):
        np.testing.assert_allclose(heads.sum() + bias, found.parts[index], atol=1e-5)
    assert found.names[found.with_heads[1]] == "blocks/1/attention_out"
    shown = sum(effect for _, effect in found.rows())
    np.testing.assert_allclose(shown, found.value, atol=1e-5)


def test_heads_and_layers_are_products_of_weights():
    net, params = gpt()
    found = gf.circuits.direct_effects(net.apply, logit_difference)(params, TOKENS)
    names = ["blocks/1/residual", "blocks/0/attention/mixed", "blocks/1/feed_out"]
    end, mixed, feed = streams_of(net.apply, params, TOKENS, names)
    W = params["embed"]["W"]

    def effect(x):
        return logit_difference(normalized(params, x, end) @ W.T)

    np.testing.assert_allclose(found.parts[4], effect(feed), rtol=1e-4)
    out = params["blocks"]["0"]["attention"]["out"]
    per_head = out["W"].reshape(8, 2, 4)  # [width, heads * size] -> [width, heads, size]
    for h in range(2):
        expected = effect(mixed[:, h] @ per_head[:, h].T)
        np.testing.assert_allclose(found.heads[0, h], expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.biases[0], effect(jnp.tile(out["b"], [6, 1])), rtol=1e-3, atol=1e-5)
    constant = logit_difference(jnp.tile(params["final_norm"]["b"], [6, 1]) @ W.T)
    np.testing.assert_allclose(found.constant, constant, rtol=1e-4)


def test_scanned_blocks_have_the_same_effects():
    net, params = gpt()
    scanned = gf.gpt(gf.GPTConfig(**SIZES, scan=True))
    theirs = gf.circuits.direct_effects(net.apply, logit_difference)(params, TOKENS)
    ours = jax.jit(gf.circuits.direct_effects(scanned.apply, logit_difference))(
        gf.stack_blocks(params), TOKENS
    )
    for name in ("value", "constant", "parts", "heads", "biases"):
        np.testing.assert_allclose(
            getattr(ours, name), getattr(theirs, name), rtol=1e-3, atol=1e-5, err_msg=name
        )
    assert ours.names[-1] == "feed_out[1]"
    assert "attention_out[1], head 1" in str(ours.table(rows=None))


def test_a_metric_that_is_not_affine_is_integrated_along_a_line(x64):
    net, params = gpt(n_layers=1)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    coarse, fine = (
        gf.circuits.direct_effects(net.apply, loss, steps=steps)(params, TOKENS) for steps in (1, 16)
    )
    assert abs(coarse.remainder) > 1e-4
    assert abs(fine.remainder) < 1e-9
    np.testing.assert_allclose(total(coarse), coarse.value, atol=1e-12)


def test_missing_parts_are_reported_as_the_rest():
    net, params = gpt()
    found = gf.circuits.direct_effects(net.apply, logit_difference, parts="*_out", heads=())(params, TOKENS)
    whole = gf.circuits.direct_effects(net.apply, logit_difference)(params, TOKENS)
    np.testing.assert_allclose(found.rest, whole.parts[0], rtol=1e-4)
    np.testing.assert_allclose(total(found), found.value, atol=1e-5)
    assert found.unexplained > 0.1
    assert "do not add up to the stream" in str(found)
    assert found.heads.shape == (0, 0)


def test_effects_inside_vmap():
    net, params = gpt(n_layers=1)
    effects = gf.circuits.direct_effects(net.apply, logit_difference)
    several = jax.vmap(effects, (None, 0))(params, jnp.stack([TOKENS[::-1], TOKENS]))
    np.testing.assert_allclose(several.heads[1], effects(params, TOKENS).heads, rtol=1e-3, atol=1e-5)


def test_errors_say_what_to_type():
    net, params = gpt()
    effects = gf.circuits.direct_effects
    with pytest.raises(TypeError, match=r"metric must return one floating number, got float32\[17\]"):
        effects(net.apply, lambda logits: logits[-1])(params, TOKENS)
    with pytest.raises(ValueError, match=r"steps must be an integer >= 1, got 0"):
        effects(net.apply, loss, steps=0)
    with pytest.raises(ValueError, match=r"do not enter the parts behind them, .*linearly"):
        effects(net.apply, loss, heads="*queries")(params, TOKENS)
    with pytest.raises(ValueError, match=r"one part behind each of the heads' sites"):
        effects(net.apply, loss, heads=["*mixed", "*values"])(params, TOKENS)
    with pytest.raises(ValueError, match=r"no sites named attention_out and feed_out"):
        effects(lambda w, x: gf.tap(w * x, "residual"), jnp.sum)(jnp.ones(3), jnp.ones(3))
