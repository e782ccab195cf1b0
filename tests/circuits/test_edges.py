"""Attribution to edges: sums over edges, integrals, and the same network written in PyTorch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

CONFIG = dict(vocab=11, context=6, n_layers=2, n_heads=2, width=8)
CLEAN, CORRUPT = np.array([3, 1, 4, 1, 5]), np.array([2, 7, 4, 8, 2])


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def model(**config):
    net = gf.gpt(gf.GPTConfig(**(CONFIG | config)))
    start = net.init(jax.random.key(0))
    # Larger than GPT-2's start, so that every part matters.
    return net, jax.tree.map(lambda x: np.asarray(10 * x if x.ndim == 2 else x, np.float64), start)


def metric(logits):
    return logits[-1, 2] - logits[-1, 5]


@functools.cache
def edges(steps=None, into="corrupt", **config):
    net, params = model(**config)
    pair = (params, CLEAN), (params, CORRUPT)
    return gf.circuits.edge_attribution_patch(net.apply, *pair, metric, steps=steps, into=into)


def out_of(result, sender):
    return result.scores[result.senders.index(sender)].sum()


@pytest.mark.parametrize("steps", [None, 3])
def test_the_edges_out_of_a_part_add_up_to_the_score_of_the_part(steps):
    result, (net, params) = edges(steps), model()
    parts = gf.circuits.attribution_patch(
        *(net.apply, (params, CLEAN), (params, CORRUPT), metric),
        sites=["embedded", "*mixed", "*feed_out"],
        over="layer",
        **({} if steps is None else {"method": "ig_inputs", "steps": steps}),
    )
    sums = [out_of(result, "embedded")]
    for layer in range(2):
        sums += [out_of(result, f"a{layer}.h0") + out_of(result, f"a{layer}.h1"), out_of(result, f"m{layer}")]
    np.testing.assert_allclose(parts.scores, np.array(sums), rtol=1e-9)
    assert result.unexplained < 1e-12


def test_integrated_over_the_inputs_the_edges_out_of_the_embedding_add_up_to_the_difference():
    result = edges(64)
    np.testing.assert_allclose(out_of(result, "embedded"), result.clean - result.corrupt, rtol=2e-3)


def test_layers_in_a_scan_have_the_edges_of_unrolled_ones():
    net, (_, params) = gf.gpt(gf.GPTConfig(**CONFIG, scan=True)), model()
    stacked = gf.stack_blocks(params)
    result = gf.circuits.edge_attribution_patch(net.apply, (stacked, CLEAN), (stacked, CORRUPT), metric)
    np.testing.assert_allclose(result.scores, edges().scores, rtol=1e-9, atol=1e-13)
    assert result.edges[0] == ("embedded", "a0.h0.q", float(result.scores[0, 0]))


def attention_alone(net):
    """The same network without its MLPs."""
    norm, attention = gf.layers.layer_norm(8), gf.layers.attention(8, 2, causal=True)

    def apply(params, tokens):
        x = gf.tap(params["embed"]["W"][tokens] + params["positions"]["W"][: len(tokens)], "embedded")
        for i in ("0", "1"):
            own = params["blocks"][i]
            y = attention.apply(own["attention"], norm.apply(own["attention_norm"], x))
            x = gf.tap(x + gf.tap(y, "attention_out"), "residual")
        return norm.apply(params["final_norm"], x) @ params["embed"]["W"].T

    return apply


def test_without_mlps_the_edges_are_those_of_mlps_that_write_nothing():
    net, params = model()
    off = jax.tree.map(lambda x: x, params)
    for block in off["blocks"].values():
        block["feed"] = block["feed"] | {"down": jax.tree.map(np.zeros_like, block["feed"]["down"])}
    with_mlps = gf.circuits.edge_attribution_patch(net.apply, (off, CLEAN), (off, CORRUPT), metric)
    pair = attention_alone(net), (off, CLEAN), (off, CORRUPT), metric
    alone = gf.circuits.edge_attribution_patch(*pair)
    assert alone.senders == ("embedded", "a0.h0", "a0.h1", "a1.h0", "a1.h1")
    for i, sender in enumerate(alone.senders):
        for j, receiver in enumerate(alone.receivers):
            expected = with_mlps.scores[with_mlps.senders.index(sender), with_mlps.receivers.index(receiver)]
            np.testing.assert_allclose(alone.scores[i, j], expected, atol=1e-12)
    curve = gf.circuits.faithfulness(*pair, alone, counts=(0, alone.exists.sum()))
    np.testing.assert_allclose(curve.normalized[-1], 1, rtol=1e-9)


def test_half_precision():
    net, params = model()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    result = gf.circuits.edge_attribution_patch(net.apply, (half, CLEAN), (half, CORRUPT), metric)
    assert result.scores.dtype == jnp.float32
    assert np.corrcoef(np.ravel(result.scores), np.ravel(edges().scores))[0, 1] > 0.99


def test_there_are_edges_only_forward():
    result = edges()
    # embedded: 2 x 7 + final; heads of layer 0: m0, 7 of layer 1, final; m0; heads of layer 1: m1, final; m1.
    assert len(result.edges) == 15 + 2 * 9 + 8 + 2 * 2 + 1
    assert not np.any(np.asarray(result.scores)[~result.exists])
    largest = result.top(5)
    assert abs(largest[0].score) == np.abs(result.scores).max()
    assert [abs(edge.score) for edge in largest] == sorted(
        [abs(edge.score) for edge in largest], reverse=True
    )
    assert str(result).splitlines()[3].split()[:2] == list(largest[0][:2])


def test_shared_key_heads_and_rotated_queries():
    config = dict(n_kv_heads=1, positions="rope", norm="rms", feed="swiglu", bias=False)
    result = edges(**config)
    assert result.unexplained < 1e-12
    assert [name for name in result.receivers if name.startswith("a1")] == [
        "a1.h0.q",
        "a1.h1.q",
        "a1.h0.k",
        "a1.h0.v",
    ]
    # Two tokens' embeddings differ at every position, so that all of the gradient there is through the edges.
    net, params = model(**config)
    start, stop = (
        gf.capture(net.apply, keep="embedded")(params, x)["embedded"].value for x in (CORRUPT, CLEAN)
    )
    moved = lambda e: metric(gf.patch(net.apply, {"embedded": e})(params, CORRUPT))  # noqa: E731
    slope = jax.jvp(moved, (start,), (stop - start,))[1]
    np.testing.assert_allclose(out_of(result, "embedded"), slope, rtol=1e-9)


def test_the_same_network_in_torch_with_a_copy_of_the_stream_for_every_receiver():
    torch = pytest.importorskip("torch")
    _, params = model()
    weights = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), params)
    result = edges()

    def dense(p, x):
        return x @ p["W"].T + p["b"]

    def norm(p, x):
        centered = x - x.mean(-1, keepdim=True)
        return centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + 1e-5) * p["gain"] + p["b"]

    def run(tokens):
        """Return the metric, what each sender writes, and the copy of the stream that each receiver reads."""
        x = weights["embed"]["W"][tokens] + weights["positions"]["W"][: len(tokens)]
        written, read = {"embedded": x}, {}

        def copy(name):
            read[name] = sum(written.values()).clone()
            return read[name]

        mask = torch.tril(torch.ones(len(tokens), len(tokens), dtype=bool))
        for layer in range(2):
            p = weights["blocks"][str(layer)]
            attention, outs = p["attention"], {}
            for h in range(2):
                rows = slice(4 * h, 4 * h + 4)
                query, key, value = (
                    dense(attention[name], norm(p["attention_norm"], copy(f"a{layer}.h{h}.{name[0]}")))[
                        :, rows
                    ]
                    for name in ("query", "key", "value")
                )
                scores = (query @ key.T / math.sqrt(4)).masked_fill(~mask, -math.inf)
                outs[f"a{layer}.h{h}"] = torch.softmax(scores, -1) @ value @ attention["out"]["W"][:, rows].T
            written |= outs
            # The bias belongs to none of the heads, and does not change.
            written[f"bias{layer}"] = attention["out"]["b"].expand_as(x)
            feed = p["feed"]
            hidden = dense(feed["up"], norm(p["feed_norm"], copy(f"m{layer}")))
            hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
            written[f"m{layer}"] = dense(feed["down"], hidden)
        final = norm(weights["final_norm"], copy("final"))
        return metric(final @ weights["embed"]["W"].T), written, read

    for leaf in jax.tree.leaves(weights):
        leaf.requires_grad_()
    clean, of_clean, _ = run(torch.tensor(CLEAN))
    corrupt, of_corrupt, read = run(torch.tensor(CORRUPT))
    np.testing.assert_allclose([result.clean, result.corrupt], [clean.item(), corrupt.item()], rtol=1e-9)
    grads = dict(zip(read, torch.autograd.grad(corrupt, list(read.values())), strict=True))
    assert set(grads) == set(result.receivers)
    for edge in result.edges:
        change = of_clean[edge.sender] - of_corrupt[edge.sender]
        expected = (change * grads[edge.receiver]).sum().item()
        np.testing.assert_allclose(edge.score, expected, rtol=1e-7, atol=1e-11)


def test_a_model_without_the_names_or_without_a_residual_stream_is_refused():
    net = gf.mlp([3, 2, 1])
    weights = net.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"no site named 'embedded', 'queries'.*gf.tap\(x, 'embedded'\)"):
        gf.circuits.edge_attribution_patch(
            net.apply, (weights, np.ones(3, np.float32)), (weights, np.zeros(3, np.float32)), jnp.sum
        )

    def f(w, x):
        x = gf.tap(x * w, "embedded")
        heads = x[:, None]
        mixed = gf.tap(gf.tap(heads, "queries") * gf.tap(heads, "keys") * gf.tap(heads, "values"), "mixed")
        mid = gf.tap(x + gf.tap(mixed[:, 0], "attention_out"), "residual_mid")
        # Halved: the stream is not a sum.
        return gf.tap(0.5 * (mid + gf.tap(jnp.tanh(mid), "feed_out")), "residual")

    pair = (2.0, jnp.ones([3, 4])), (2.0, jnp.zeros([3, 4]) + 0.5)
    with pytest.raises(
        ValueError, match="of what flows from the embedding to the output is not due to edges"
    ):
        gf.circuits.edge_attribution_patch(f, *pair, jnp.sum)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(steps=0), "steps must be an integer >= 1 or None, got 0"),
        (dict(into="x"), "into must be"),
        (dict(axes={"position": 0}), "axes must be the axis of heads alone"),
    ],
)
def test_errors(settings, message):
    net, params = model()
    with pytest.raises(ValueError, match=message):
        gf.circuits.edge_attribution_patch(net.apply, (params, CLEAN), (params, CORRUPT), metric, **settings)
