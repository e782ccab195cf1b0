"""`path_patch`: against formulas for a two-layer attention model, hand-runs of a GPT, and sums over paths."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.circuits import patch_sweep, path_patch


def attention_only(params, tokens):
    """Two layers of attention without norms and biases, and the unembedding."""
    x = params["embed"][tokens]
    for i, p in enumerate(params["layers"]):
        query, key, value = (
            gf.tap(jnp.einsum("td,dhs->ths", x, p[name]), f"{i}/{name}") for name in ("q", "k", "v")
        )
        scores = jnp.einsum("ths,uhs->htu", query, key)
        mask = jnp.tril(jnp.ones(scores.shape[1:], bool))
        pattern = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1)
        mixed = gf.tap(jnp.einsum("htu,uhs->ths", pattern, value), f"{i}/mixed")
        x = x + jnp.einsum("ths,hsd->td", mixed, p["o"])
    return gf.tap(x @ params["unembed"], "logits")


def model(heads=3, width=6, size=4, vocab=7):
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def draw(*shape):
        return jax.random.normal(next(keys), shape) / np.sqrt(shape[-2])

    layers = [
        {
            name: draw(*shape)
            for name, shape in zip("qkvo", [(width, heads, size)] * 3 + [(heads, size, width)], strict=True)
        }
        for _ in range(2)
    ]
    params = {"embed": draw(vocab, width), "layers": layers, "unembed": draw(width, vocab)}
    return params, jnp.array([1, 4, 2, 6, 3]), jnp.array([5, 4, 0, 6, 3])


def metric(logits):
    return logits[-1, 3] - logits[-1, 5]


@pytest.mark.parametrize("end", ["q", "k", "v"])
def test_a_path_between_heads_is_the_product_of_their_matrices(end):
    with jax.enable_x64(True):
        params, clean, corrupt = model()
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        receiver = 1
        paths = path_patch(
            attention_only,
            (params, clean),
            (params, corrupt),
            metric,
            receivers={f"1/{end}": {"head": receiver}},
        )
        values_of = {
            name: {
                site: np.asarray(value)
                for site, value in gf.capture(attention_only, keep=None)(params, x).values.items()
            }
            for name, x in (("clean", clean), ("corrupt", corrupt))
        }
        base, (first, second) = values_of["corrupt"], params["layers"]
        for head in range(3):
            # [T, size], through W_O and W_Q.
            change = values_of["clean"]["0/mixed"][:, head] - base["0/mixed"][:, head]
            read = change @ np.asarray(first["o"][head] @ second[end][:, receiver])
            query, key, value = (
                base[f"1/{name}"][:, receiver] + (read if name == end else 0) for name in "qkv"
            )
            scores = np.where(np.tri(5, dtype=bool), query @ key.T, -np.inf)
            pattern = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = pattern / pattern.sum(-1, keepdims=True) @ value
            written = (mixed - base["1/mixed"][:, receiver]) @ np.asarray(
                second["o"][receiver] @ params["unembed"]
            )
            np.testing.assert_allclose(paths.metric[0, head], metric(base["logits"] + written), rtol=1e-10)
        # Heads of the second layer come after the receivers.
        np.testing.assert_allclose(paths.effect[1], 0, atol=1e-14)
        assert np.all(np.abs(paths.effect[0]) > 1e-6)


def test_the_direct_effect_on_the_logits_is_what_a_head_writes():
    params, clean, corrupt = model()
    paths = path_patch(attention_only, (params, clean), (params, corrupt), metric, receivers="logits")
    runs = [gf.capture(attention_only, keep=["*/mixed", "logits"])(params, x) for x in (clean, corrupt)]
    for layer, head in itertools.product(range(2), range(3)):
        change = jnp.subtract(*[run[f"{layer}/mixed"].value[:, head] for run in runs])
        written = change @ params["layers"][layer]["o"][head] @ params["unembed"]
        np.testing.assert_allclose(
            paths.metric[layer, head], metric(runs[1].output + written), rtol=1e-5, atol=1e-5
        )


def linear(params, x):
    """Three linear layers that read and write one stream."""
    for i in range(3):
        x = x + gf.tap(x @ params[i], f"n{i}")
    return gf.tap(x @ params[3], "out")


def test_in_a_linear_model_the_total_effect_is_the_sum_over_paths():
    params = list(jax.random.normal(jax.random.key(0), (4, 5, 5)) / 2)
    clean, corrupt = jax.random.normal(jax.random.key(1), (2, 5))
    args = linear, (params, clean), (params, corrupt), lambda out: out[2]
    total = patch_sweep(*args, over="layer", sites="n0").effect

    def path(receiver, frozen=("n0", "n1", "n2")):
        return path_patch(*args, sender="n0", receivers=receiver, over="layer", frozen=frozen).effect

    parts = [path(receiver) for receiver in ("n1", "n2", "out")]
    np.testing.assert_allclose(sum(parts), total, rtol=1e-4, atol=1e-5)
    # What is not frozen is part of the path.
    through = path("out", frozen=["n0", "n1"])
    via = path_patch(*args, sender="n0", receivers="n2", over="layer", frozen=["n0", "n1"]).effect
    np.testing.assert_allclose(through, parts[2] + via, rtol=1e-4, atol=1e-5)
    # Behind the sender, nothing is reached.
    back = path_patch(*args, sender="n2", receivers="n1", over="layer", frozen=["n0", "n1", "n2"])
    np.testing.assert_allclose(back.effect, 0, atol=1e-6)


def gpt(scan):
    config = dict(vocab=11, context=8, n_layers=3, n_heads=2, width=8)
    net, unrolled = (gf.gpt(gf.GPTConfig(**config, scan=s)) for s in (scan, False))
    params = jax.tree.map(lambda x: 10 * x if x.ndim == 2 else x, unrolled.init(jax.random.key(0)))
    clean, corrupt = jax.random.randint(jax.random.key(1), (2, 5), 0, 11)
    return net, gf.stack_blocks(params) if scan else params, clean, corrupt


def test_a_path_in_a_gpt_is_three_runs_by_hand_and_the_same_under_a_scan():
    net, params, clean, corrupt = gpt(scan=False)
    receiver = "blocks/2/attention/keys"
    args = (params, clean), (params, corrupt), metric
    paths = path_patch(
        net.apply, *args, receivers={receiver: {"head": 1}}, over="position x layer x head", batch_size=7
    )
    assert paths.metric.shape == (5, 3, 2)
    sites = ["*mixed", "*feed_out"]
    old, new = (gf.capture(net.apply, keep=sites)(params, x).values for x in (corrupt, clean))
    for position, layer, head in [(0, 0, 1), (2, 1, 0), (4, 1, 1)]:
        name = f"blocks/{layer}/attention/mixed"
        frozen = dict(old) | {name: old[name].at[position, head].set(new[name][position, head])}
        read = gf.capture(gf.patch(net.apply, frozen), keep=receiver)(params, corrupt)[receiver].value
        edit = {receiver: lambda keys, read=read: keys.at[:, 1].set(read[:, 1])}
        expected = metric(gf.patch(net.apply, edit)(params, corrupt))
        np.testing.assert_allclose(paths.metric[position, layer, head], expected, rtol=1e-4, atol=1e-5)

    scanned, stacked, *_ = gpt(scan=True)
    same = path_patch(
        scanned.apply,
        (stacked, clean),
        (stacked, corrupt),
        metric,
        receivers={"*keys": {"layer": 2, "head": 1}},
        over="position x layer x head",
    )
    np.testing.assert_allclose(same.metric, paths.metric, rtol=1e-4, atol=1e-5)
    assert "blocks/2/attention/keys head 1" in paths.title


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"receivers": "1/quries"}, "there is no site '1/quries'"),
        ({"receivers": {"1/q": {"head": 3}}}, "receiver '1/q' has head 0 to 2, got 3"),
        (
            {"receivers": {"1/q": {"layer": 1}}},
            "'layer' selects an iteration, and the receiver '1/q' is inside 0",
        ),
        ({"receivers": {"1/q": {"neuron": 1}}}, "'neuron', and axes does not say"),
        ({"receivers": {"1/q": {}, "1/?": {}}}, "names site '1/q' twice"),
        ({"receivers": "1/q", "sender": "*mxed"}, "there is no site"),
        ({"receivers": "1/q", "frozen": "nothing"}, "there is no site 'nothing'"),
        ({"receivers": "1/q", "into": "both"}, 'into must be "corrupt" or "clean"'),
    ],
)
def test_what_is_no_path_is_refused(change, message):
    params, clean, corrupt = model()
    with pytest.raises(ValueError, match=f"path_patch: .*{message}"):
        path_patch(attention_only, (params, clean), (params, corrupt), metric, **change)


def test_a_model_without_known_summands_must_say_what_is_frozen():
    params = [jnp.eye(2)] * 4
    with pytest.raises(ValueError, match=r"no sites \*mixed or \*feed_out. Pass frozen="):
        path_patch(
            linear,
            (params, jnp.ones(2)),
            (params, jnp.ones(2)),
            jnp.sum,
            sender="n0",
            receivers="out",
            over="layer",
        )
