"""Weight decay: the parameters that decay in plain trees, stacked layers and other frameworks, and by how much."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import tree_leaves_with_path

import gradfn as gf
from gradfn.core.params import path_name
from gradfn.train import adamw_warmup_cosine, weight_decay_mask, weight_decay_table


def decayed(params):
    """Return the paths that decay."""
    return {path_name(path) for path, decays in tree_leaves_with_path(weight_decay_mask(params)) if decays}


def f(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


TREES = {
    "flax": (
        {"Dense_0": {"kernel": f(3, 4), "bias": f(4)}, "LayerNorm_0": {"scale": f(4)}},
        {"Dense_0/kernel"},
    ),
    "lower case": ({"w": f(3, 4), "b": f(4), "weight": f(4, 4)}, {"w", "weight"}),
    "lists": ([[f(4, 3), f(4)], [f(2, 4), f(2)]], {"0/0", "1/0"}),
    "tuple": ((f(4, 3), f(4)), {"0"}),
    "columns as biases": ({"W1": f(16, 784), "b1": f(16, 1), "W2": f(1, 16), "b2": f(1, 1)}, {"W1", "W2"}),
    "haiku": ({"mlp/~/linear_0": {"w": f(3, 4), "b": f(4)}}, {"mlp/~/linear_0/w"}),
    "attention of flax": (
        {"query": {"kernel": f(8, 2, 4), "bias": f(2, 4)}, "out": {"kernel": f(2, 4, 8), "bias": f(8)}},
        {"query/kernel", "out/kernel"},
    ),
    "convolution of equinox": ({"weight": f(6, 3, 5, 5), "bias": f(6, 1, 1)}, {"weight"}),
    "embeddings": (
        {"wte": {"embedding": f(65, 8)}, "wpe": {"embedding": f(16, 8)}},
        {"wte/embedding", "wpe/embedding"},
    ),
    "stacked": ({"W": f(24, 8, 8), "b": f(24, 8), "alpha": f(24, 8)}, {"W"}),
    "stacked beside others": (
        {
            "in": {"W": f(8, 3)},
            "layers": {"lin": {"kernel": f(6, 8, 8)}, "norm": {"weight": f(6, 8)}, "t": f(6, 2)},
        },
        {"in/W", "layers/lin/kernel"},
    ),
    "stacked twice": ({"w": f(2, 3, 8, 8), "bias": f(2, 3, 8), "mix": f(2, 3, 8)}, {"w"}),
    "torch": ({"ln_1": {"weight": f(8)}, "c_attn": {"weight": f(8, 24), "bias": f(24)}}, {"c_attn/weight"}),
    "not floating": ({"table": jax.ShapeDtypeStruct((3, 4), jnp.int32), "w": f(3, 4)}, {"w"}),
    "one array": (f(32, 32), {""}),
    "square without biases": ({"first": f(16, 16), "second": f(16, 16)}, {"first", "second"}),
}


@pytest.mark.parametrize("name", TREES)
def test_decay_goes_by_rank(name):
    tree, expected = TREES[name]
    assert decayed(tree) == expected


OURS = {
    "mlp": gf.mlp([6, 4, 2]),
    "cnn": gf.cnn((8, 8, 1), (2, 3), (4,), 3),
    "gpt": gf.gpt(gf.GPTConfig(13, 8, 2, 2, 8)),
    "gpt, stacked": gf.gpt(gf.GPTConfig(13, 8, 2, 2, 8, scan=True)),
    "llama, stacked": gf.gpt(
        gf.GPTConfig(
            13, 8, 3, 2, 8, scan=True, positions="rope", norm="rms", feed="swiglu", bias=False, tied=False
        )
    ),
    "vit": gf.vit(gf.ViTConfig((8, 8, 1), 4, 3, 2, 2, 8, pool="class")),
    "vanilla": gf.rnn(5, 4, "vanilla"),
    "gru": gf.rnn(5, 4, "gru", 2),
    "lstm": gf.rnn(5, 4, "lstm", 2),
    "repeat": gf.repeat(gf.layers.dense(8, 8), 3),
    "norms": gf.serial(a=gf.layers.layer_norm(4), b=gf.layers.dense(4, 4), c=gf.layers.rms_norm(4)),
}


@pytest.mark.parametrize("name", OURS)
def test_the_decayed_parameters_of_our_nets_are_their_matrices(name):
    spec = OURS[name].spec
    arrays = jax.tree.map(lambda param: f(*param.shape), spec)
    names = {path_name(path): leaf for path, leaf in tree_leaves_with_path(arrays)}
    matrices = {
        name for name, leaf in names.items() if name.split("/")[-1].startswith("W") and len(leaf.shape) > 1
    }
    assert decayed(arrays) == decayed(spec) == matrices  # the experiments were trained with these


def test_a_spec_distinguishes_what_arrays_do_not():
    odd = gf.Net(
        {"alpha": gf.Param([8]), "M": gf.Param([8, 8])}, lambda params, x: params["M"] @ (params["alpha"] * x)
    )
    spec = gf.repeat(gf.repeat(odd, 3), 2).spec
    assert decayed(spec) == {"M"}
    assert decayed(odd.spec) == {"M"}
    assert gf.repeat(odd, 3).spec["M"].axes == ("layers", None, None)


def test_decay_of_a_flax_model():
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x = linen.Embed(7, 8)(tokens)
            x = linen.MultiHeadDotProductAttention(2)(linen.LayerNorm()(x))
            return linen.Dense(3)(linen.RMSNorm()(x))

    params = jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros([4], int))["params"]
    kernels = {
        path_name(path)
        for path, _ in tree_leaves_with_path(params)
        if path[-1].key in ("kernel", "embedding")
    }
    assert decayed(params) == kernels
    assert len(kernels) == 6


def test_decay_of_an_equinox_model_as_it_is_and_stacked():
    eqx = pytest.importorskip("equinox")

    def make(key):
        return {"mlp": eqx.nn.MLP(4, 4, 8, 1, key=key), "norm": eqx.nn.RMSNorm(4, use_bias=False)}

    keys = jax.random.split(jax.random.key(0), 3)
    weights = {"mlp/layers/0/weight", "mlp/layers/1/weight"}
    assert decayed(eqx.filter(make(keys[0]), eqx.is_array)) == weights
    assert decayed(eqx.filter(eqx.filter_vmap(make)(keys), eqx.is_array)) == weights


def test_an_update_without_a_gradient_is_the_decay():
    params = {"kernel": jnp.full([2, 3], 2.0), "bias": jnp.ones(3), "layers": [jnp.ones([3, 3]), jnp.ones(3)]}
    optimizer = adamw_warmup_cosine(10, rate=0.1, warmup=0, decay=0.5)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(optimizer.update)(
            jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
        )
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_allclose(updates["layers"][0], -0.05, rtol=1e-6)
    assert not updates["bias"].any()
    assert not updates["layers"][1].any()
    plain = optax.adamw(0.1, weight_decay=0.5, mask=weight_decay_mask(params))  # a tree, for optax's own
    plain.init(params)


def test_the_table_shows_what_decays():
    spec = gf.repeat(gf.serial(norm=gf.layers.layer_norm(8), lin=gf.layers.dense(8, 8)), 3).spec
    lines = {line.split()[0]: " ".join(line.split()) for line in str(weight_decay_table(spec)).splitlines()}
    assert lines["lin/W"] == "lin/W [3, 8, 8] yes rank 2 in stacked layers"
    assert lines["lin/b"] == "lin/b [3, 8] no bias or norm"
    assert lines["norm/gain"] == "norm/gain [3, 8] no bias or norm"
    assert "t [4] no rank 1" in " ".join(str(weight_decay_table({"t": jnp.ones(4)})).split())
