"""Faithfulness curves: against runs patched by hand."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

CONFIG = dict(vocab=11, context=6, n_layers=2, n_heads=2, width=8)
NET = gf.gpt(gf.GPTConfig(**CONFIG))
CLEAN, CORRUPT = jnp.array([3, 1, 4, 1, 5]), jnp.array([2, 7, 4, 8, 2])
PARAMS = jax.tree.map(lambda x: 10 * x if x.ndim == 2 else x, NET.init(jax.random.key(0)))
PAIR = (NET.apply, (PARAMS, CLEAN), (PARAMS, CORRUPT), lambda logits: logits[-1, 2] - logits[-1, 5])
HEADS = [f"blocks/{layer}/attention/mixed" for layer in range(2)]


@functools.cache
def scores():
    heads = gf.circuits.attribution_patch(*PAIR, over="head x layer")
    return heads, gf.circuits.attribution_patch(*PAIR, sites="*feed_out", over="layer x position")


@functools.cache
def edges():
    return gf.circuits.edge_attribution_patch(*PAIR)


@functools.cache
def corrupt_values():
    run = jax.jit(gf.capture(NET.apply, keep=["*mixed", "*feed_out"], stats=()))
    return run(PARAMS, CORRUPT).values


def ablated(parts):
    """The metric of the clean run with parts as in the corrupt one: `{name: indices}`."""

    def run():
        other = corrupt_values()
        edits = {
            name: lambda x, name=name, at=at: x.at[at].set(other[name][at]) for name, at in parts.items()
        }
        return PAIR[3](gf.patch(NET.apply, edits)(PARAMS, CLEAN))

    corrupt_values()
    return jax.jit(run)()


def test_the_largest_nodes_stay_intact_and_all_others_are_ablated():
    heads, feeds = scores()
    ranked = sorted(
        [(abs(score), ("head", *label)) for label, score in heads.top(4)]
        + [(abs(score), ("feed", *label)) for label, score in feeds.top(10)],
        reverse=True,
    )
    counts = (0, 3, 14)
    curve = gf.circuits.faithfulness(*PAIR, [heads, feeds], counts=counts)
    assert (curve.total, curve.kind, curve.metric.shape) == (14, "nodes", (3,))
    for k, found in zip(counts, curve.metric, strict=True):
        parts = {}
        for _, (kind, *label) in ranked[k:]:
            if kind == "head":
                head, name = label
                parts.setdefault(name, []).append((slice(None), int(head)))
            else:
                name, position = label
                parts.setdefault(name, []).append((int(position),))
        other = corrupt_values()

        def edit(x, name, parts=parts, other=other):
            for at in parts[name]:
                x = x.at[at].set(other[name][at])
            return x

        edits = {name: functools.partial(edit, name=name) for name in parts}
        expected = PAIR[3](jax.jit(gf.patch(NET.apply, edits))(PARAMS, CLEAN))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(curve.normalized[-1], 1.0, rtol=1e-4)
    shares, values = np.array(counts) / 14, np.asarray(curve.normalized)
    np.testing.assert_allclose(
        curve.area, np.sum(np.diff(shares) * (values[1:] + values[:-1]) / 2), rtol=1e-5
    )
    assert str(curve).splitlines()[0] == "Metric with the first k of 14 nodes intact"


def test_layers_in_a_scan_have_the_curve_of_unrolled_ones():
    net, stacked = gf.gpt(gf.GPTConfig(**CONFIG, scan=True)), gf.stack_blocks(PARAMS)
    pair = (net.apply, (stacked, CLEAN), (stacked, CORRUPT), PAIR[3])
    heads, _ = scores()
    here = replace(heads, sites=("mixed",), labels=(heads.labels[0], ("mixed[0]", "mixed[1]")))
    curves = [gf.circuits.faithfulness(*p, s) for p, s in ((PAIR, heads), (pair, here))]
    np.testing.assert_allclose(curves[0].metric, curves[1].metric, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"layers are in a lax.scan .*gf.unstack_blocks"):
        gf.circuits.faithfulness(*pair, edges())


@functools.cache
def run_of_scores():
    """Compiled once: the curve at the counts of these tests, as a function of the scores."""
    found = edges()
    counts = [0, 37, 42, 45, 46]
    return jax.jit(
        lambda scores: gf.circuits.faithfulness(*PAIR, replace(found, scores=scores), counts=counts)
    )


def with_intact(keeps):
    """The metric with the edges intact for which `keeps(sender, receiver)`."""
    found = edges()
    first = np.array([[keeps(s, r) for r in found.receivers] for s in found.senders])
    curve = run_of_scores()(jnp.array(first, jnp.float32))
    return curve.metric[curve.counts.index(int(np.sum(first[found.exists])))]


def test_all_edges_make_the_clean_run_and_no_edge_the_corrupt_one():
    curve = run_of_scores()(edges().scores)
    assert (curve.total, curve.kind) == (46, "edges")
    ends = curve.metric[jnp.array([0, -1])]
    np.testing.assert_allclose(ends, [curve.corrupt, curve.clean], rtol=1e-4, atol=1e-5)


def test_without_the_edges_out_of_a_part_that_part_is_ablated():
    without = with_intact(lambda sender, receiver: sender != "a0.h1")
    np.testing.assert_allclose(without, ablated({HEADS[0]: (slice(None), 1)}), rtol=1e-4, atol=1e-5)
    without = with_intact(lambda sender, receiver: sender != "m1")
    np.testing.assert_allclose(without, ablated({"blocks/1/feed_out": slice(None)}), rtol=1e-4, atol=1e-5)


def test_without_the_edges_into_the_queries_of_a_head_they_are_those_of_the_corrupt_run():
    name = "blocks/1/attention/queries"
    other = gf.capture(NET.apply, keep=name, stats=())(PARAMS, CORRUPT)[name].value
    expected = gf.patch(NET.apply, {name: lambda x: x.at[:, 0].set(other[:, 0])})(PARAMS, CLEAN)
    without = with_intact(lambda sender, receiver: receiver != "a1.h0.q")
    np.testing.assert_allclose(without, PAIR[3](expected), rtol=1e-4, atol=1e-5)


def test_errors():
    heads, _ = scores()
    run = functools.partial(gf.circuits.faithfulness, *PAIR)
    with pytest.raises(ValueError, match="counts must increase from 0 at least to 4 at most, got"):
        run(heads, counts=[1, 5])
    with pytest.raises(ValueError, match="mixed twice"):
        run([heads, heads])
    with pytest.raises(TypeError, match="got EdgeAttribution, NodeAttribution"):
        run([heads, edges()])
    with pytest.raises(TypeError, match="got ArrayImpl"):
        run(heads.scores)
    with pytest.raises(ValueError, match=r"scores of one pair of inputs, \[2, 2\], got \[1, 2, 2\]"):
        run(replace(heads, scores=heads.scores[None]))
    with pytest.raises(ValueError, match="the function has parts"):
        run(replace(heads, labels=(("0",), heads.labels[1]), scores=heads.scores[:1]))
