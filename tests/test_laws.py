"""Laws that every layer and net obeys. A new one is added to CASES and is tested with the rest."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import gradfn as gf
from gradfn.core.axes import AXES

tower = gf.serial(
    start=gf.layers.dense(3, 4),
    blocks=gf.repeat(
        gf.residual(gf.serial(norm=gf.layers.layer_norm(4), mix=gf.layers.dense(4, 4), squash=jnp.tanh)), 3
    ),
    out=gf.layers.dense(4, 2, bias=False),
)


def on_tokens(net, vocab, n=5):
    """Return a net of floats from a net of tokens: its output for fixed tokens, times the floats."""
    tokens = np.arange(n) * 3 % vocab
    apply = lambda params, x: net.apply(params, tokens).astype(x.dtype) * x  # noqa: E731
    return gf.Net(net.spec, apply, description=net.description)


GPT = {"vocab": 7, "context": 6, "n_layers": 2, "n_heads": 2, "width": 4}
LLAMA = {
    **GPT,
    "positions": "rope",
    "norm": "rms",
    "feed": "swiglu",
    "n_kv_heads": 1,
    "hidden": 6,
    "bias": False,
}
QWEN = {
    "head_size": 4,
    "attention_bias": "qkv",
    "qk_norm": True,
    "rope_scaling": gf.RopeScaling("yarn", 2.0, 4),
}
# Layers with and without a window, norms after the layers, bounds of scores and logits. With the usual epsilon, norms
# of such small outputs are too steep for finite differences.
GEMMA = LLAMA | {
    "n_layers": 3, "norm": "rms_unit_offset", "feed": "geglu", "norms_after": True, "qk_norm": True, "window": 2,
    "global_layers": (1,), "rope_base_local": 20.0, "score_cap": 1.5, "logit_cap": 2.0, "attention_scale": 0.8,
    "embed_scale": 2.0, "norm_epsilon": 0.1,
}  # fmt: skip
PYTHIA = {
    **GPT, "head_size": 4, "positions": "rope", "rope_fraction": 0.5, "parallel": True, "tied": False,
    "feed": "gelu_exact",
}  # fmt: skip
# name: (net, shape of one example)
CASES = {
    "dense": (gf.layers.dense(3, 2), (3,)),
    "dense over time": (gf.layers.dense(3, 2), (5, 3)),
    "dense without bias": (gf.layers.dense(3, 2, bias=False), (3,)),
    "layer_norm": (gf.layers.layer_norm(4), (4,)),
    "layer_norm without bias, over time": (gf.layers.layer_norm(4, bias=False), (5, 4)),
    "rms_norm": (gf.layers.rms_norm(4), (4,)),
    "dropout": (gf.layers.dropout(0.5), (4,)),
    "embed": (on_tokens(gf.layers.embed(3, 4), 3), (5, 4)),
    "conv": (gf.layers.conv(2, 3, [3]), (5, 2)),
    "conv of images, grouped, strided": (
        gf.layers.conv(4, 2, [3, 2], stride=2, padding="VALID", groups=2, dilation=2),
        (8, 7, 4),
    ),
    "max_pool": (gf.layers.max_pool([2, 2]), (4, 5, 2)),
    "avg_pool": (gf.layers.avg_pool([3], stride=1), (5, 2)),
    "group_norm": (gf.layers.group_norm(4, 2), (2, 3, 4)),
    "vanilla_rnn": (gf.layers.vanilla_rnn(3, 4), (5, 3)),
    "gru": (gf.layers.gru(3, 4), (5, 3)),
    "lstm": (gf.layers.lstm(3, 4), (5, 3)),
    "attention": (gf.layers.attention(4, 2), (5, 4)),
    "causal attention, grouped, with rope": (
        gf.layers.attention(8, 4, n_kv_heads=2, head_size=4, causal=True, bias=False, rope_base=100.0),
        (5, 8),
    ),
    "feed_forward": (gf.layers.feed_forward(3, 5), (3,)),
    "rms_norm with an offset, over time": (gf.layers.rms_norm(4, unit_offset=True), (5, 4)),
    "attention in a window, capped, partly rotated": (
        gf.layers.attention(
            8,
            2,
            head_size=4,
            causal=True,
            rope_base=9.0,
            rope_fraction=0.5,
            window=2,
            score_cap=1.0,
            scale=0.9,
        ),
        (5, 8),
    ),
    "swiglu over time": (gf.layers.swiglu(3, 4), (2, 3)),
    "geglu over time": (gf.layers.geglu(3, 4), (2, 3)),
    "mlp": (gf.mlp([3, 4, 2]), (3,)),
    "mlp of columns": (gf.mlp([3, 4, 2], "tanh"), (3, 1)),
    "deep mlp with output activation": (gf.mlp([3, 5, 4, 2], "gelu", output="sigmoid"), (3,)),
    "serial, residual, repeat": (tower, (3,)),
    "gpt": (on_tokens(gf.gpt(gf.GPTConfig(**GPT)), 7), (5, 7)),
    "gpt scanned, with remat": (on_tokens(gf.gpt(gf.GPTConfig(**GPT, scan=True, remat=True)), 7), (5, 7)),
    "llama": (on_tokens(gf.gpt(gf.GPTConfig(**LLAMA, tied=False)), 7), (5, 7)),
    "llama with biases and norms of queries and keys, rotated as in YaRN": (
        on_tokens(gf.gpt(gf.GPTConfig(**LLAMA, **QWEN)), 7),
        (5, 7),
    ),
    "gpt like mistral": (on_tokens(gf.gpt(gf.GPTConfig(**LLAMA, window=2, tied=False)), 7), (5, 7)),
    "gpt like gemma": (on_tokens(gf.gpt(gf.GPTConfig(**GEMMA)), 7), (5, 7)),
    "gpt like gemma, scanned": (on_tokens(gf.gpt(gf.GPTConfig(**GEMMA, scan=True)), 7), (5, 7)),
    "gpt like pythia": (on_tokens(gf.gpt(gf.GPTConfig(**PYTHIA)), 7), (5, 7)),
    "cnn": (gf.cnn([4, 6, 1], [2, 3], [4], 3, activation="tanh"), (24,)),
    "rnn": (on_tokens(gf.rnn(7, 4, "lstm", 2), 7), (5, 7)),
    "vit": (gf.vit(gf.ViTConfig((4, 6, 1), 2, 3, n_layers=1, n_heads=2, width=4, pool="class")), (4, 6)),
    "vit with mean pooling, scanned": (gf.vit(gf.ViTConfig((4, 6, 1), 2, 3, 1, 2, 4, scan=True)), (24,)),
    "noisy tower": (gf.repeat(gf.serial(mix=gf.layers.dense(4, 4), drop=gf.layers.dropout(0.5)), 2), (4,)),
}

WHOLE = ("mlp", "gpt", "llama", "cnn", "rnn", "vit")  # names of whole networks start with these
MAKE = {
    "mlp": gf.mlp,
    "cnn": gf.cnn,
    "rnn": lambda **settings: on_tokens(gf.rnn(**settings), 7),
    "gpt": lambda **settings: on_tokens(gf.gpt(gf.GPTConfig(**settings)), 7),
    "vit": lambda **settings: gf.vit(gf.ViTConfig(**settings)),
}
QUICK = {"dense", "rms_norm", "mlp", "serial, residual, repeat"}  # one of each kind; all others are slow
pytestmark = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)


@functools.cache
def case(name):
    net, shape = CASES[name]
    params = jax.jit(net.init)(jax.random.key(1))
    # Not the symmetric initial values: biases that are not zero, gains that are not one.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), max(len(leaves), 1))
    leaves = [leaf + 0.3 * jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, key in zip(leaves, keys)]
    return (
        net,
        jax.tree.unflatten(tree, leaves),
        jax.random.normal(jax.random.key(3), (6, *shape), jnp.float32),
    )


def test_parameters_have_the_declared_shapes_and_dtypes(name):
    net, params, _ = case(name)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, net.spec)
    assert gf.count(params) == gf.count(net.spec)


def test_every_axis_has_a_name_of_the_vocabulary(name):
    """An axis is named or never split; that of a stack of layers is in front."""
    net, _ = CASES[name]
    stacked = []
    for param in jax.tree.leaves(net.spec):
        names = [axis[0] if isinstance(axis, tuple) else axis for axis in param.axes]
        assert set(names) <= {*AXES, None}
        assert "layers" not in names[1:]
        stacked.append(names[:1] == ["layers"])
    assert any(stacked) == any(word in name for word in ("scanned", "repeat", "noisy tower"))


def test_a_spec_can_replace_parameters_in_eval_shape(name):
    net, params, xs = case(name)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(net.apply, net.spec, xs[0]), net.apply(params, xs[0])
    )


def test_vmap_equals_single_examples(name):
    net, params, xs = case(name)
    batched = jax.vmap(net.apply, (None, 0))(params, xs)
    apply = jax.jit(net.apply)
    one_by_one = np.stack([apply(params, x) for x in xs])
    np.testing.assert_allclose(batched, one_by_one, rtol=1e-5, atol=1e-6)


def test_jit_changes_nothing(name):
    net, params, xs = case(name)
    np.testing.assert_allclose(
        jax.jit(net.apply)(params, xs[0]), net.apply(params, xs[0]), rtol=1e-5, atol=1e-6
    )


def test_gradients_equal_finite_differences(name, x64):
    net, params, xs = case(name)
    params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, xs[0]))
    check_grads(
        jax.jit(net.apply), (params, x), order=1, modes=["rev", "fwd"], rtol=1e-5, atol=1e-8, eps=1e-6
    )


@pytest.mark.optimized
def test_inspected_gradients_equal_value_and_grad(name):
    """Compiled, XLA may fuse operations differently, within the documented bound; uncompiled they are equal."""
    net, params, xs = case(name)

    def loss(params, xs):
        return jnp.mean(jnp.square(jax.vmap(net.apply, (None, 0))(params, xs)))

    inspected, plain = gf.inspect(loss), jax.value_and_grad(loss, argnums=(0, 1))
    for wrap, bound in ((jax.jit, 1e-5), *[(lambda f: f, 0)] * (name in QUICK)):
        inspection, expected = wrap(inspected)(params, xs), wrap(plain)(params, xs)
        actual = inspection.value, (inspection.grads, inspection.input_grads[0])
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
        chex.assert_trees_all_close(actual, expected, rtol=0, atol=bound * float(largest))


def test_every_parameter_is_used(name):
    net, params, xs = case(name)
    if not params:
        pytest.skip("has no parameters")
    jacobian = jax.jit(jax.jacrev(lambda params: net.apply(params, xs[0])))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(jacobian):
        assert (leaf != 0).any(), f"{jax.tree_util.keystr(path)} has no effect"


def test_parameters_may_be_numpy_arrays(name):
    net, params, xs = case(name)
    by_hand = jax.tree.map(np.asarray, params)
    np.testing.assert_array_equal(net.apply(by_hand, np.asarray(xs[0])), net.apply(params, xs[0]))


def test_it_runs_in_bfloat16_if_all_arrays_are_cast(name):
    net, params, xs = case(name)
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    output = net.apply(cast, xs[0].astype(jnp.bfloat16))
    chex.assert_type(output, jnp.bfloat16)
    np.testing.assert_allclose(output.astype(jnp.float32), net.apply(params, xs[0]), rtol=0.1, atol=0.1)


def test_a_wrong_shape_of_any_parameter_raises_with_its_path(name):
    net, params, xs = case(name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        wrong = jax.tree_util.tree_map_with_path(
            lambda here, other, path=path: jnp.zeros([*other.shape, 7]) if here == path else other, params
        )
        with pytest.raises(gf.ParameterError) as error:
            net.apply(wrong, xs[0])
        name = "/".join(entry.key for entry in path)
        assert str(error.value).startswith(f"{name}: expected {list(leaf.shape)}")
        assert str([*leaf.shape, 7]) in str(error.value)


def test_a_whole_net_is_made_again_from_its_description(name):
    net, params, xs = case(name)
    if not name.startswith(WHOLE) and "deep mlp" not in name:
        assert net.description is None
        return
    description = json.loads(json.dumps(net.description))
    again = MAKE[description["net"]](**description["settings"])
    assert again.description == net.description
    assert again.spec.keys() == net.spec.keys()
    chex.assert_trees_all_equal_shapes_and_dtypes(again.spec, net.spec)
    np.testing.assert_array_equal(jax.jit(again.apply)(params, xs[0]), jax.jit(net.apply)(params, xs[0]))
