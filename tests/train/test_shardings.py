"""Shardings by rules: what is split, what is reported, what is refused; on 8 simulated devices."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gradfn as gf
from gradfn.core.axes import AXES

CONFIG = {"vocab": 64, "context": 8, "n_layers": 2, "n_heads": 4, "width": 16}


def mesh_of(**sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes))


def bytes_of_first_device(params):
    device = jax.devices()[0]
    shards = [shard for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


# Per block: 4 matrices of attention, 2 of the feed-forward layer; biases and gains.
W, B, D = 16, 64, 2
TOTAL = 4 * (64 * W + 8 * W + D * (4 * W * W + 2 * B * W + 9 * W + B) + 2 * W)
# FSDP does not split the biases that belong to heads and hidden nodes.
ROWS = 4 * D * (3 * W + B)
FEATURES = 4 * (8 * W + D * 6 * W + 2 * W)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("rules", "sizes", "expected"),
    [
        ("DATA_PARALLEL", {"data": 8}, TOTAL),
        ("FSDP", {"data": 8}, (TOTAL - ROWS) / 8 + ROWS),
        # Positions, gains, and the biases of the stream have no axis that is split.
        ("TENSOR_PARALLEL", {"model": 4}, (TOTAL - FEATURES) / 4 + FEATURES),
        (
            "FSDP_TENSOR_PARALLEL",
            {"data": 4, "model": 2},
            (TOTAL - ROWS - FEATURES) / 8 + ROWS / 2 + FEATURES / 4,
        ),
    ],
)
def test_bytes_of_a_device(rules, sizes, expected, scan):
    net = gf.gpt(gf.GPTConfig(**CONFIG, scan=scan))
    shardings = gf.train.shardings(net, mesh_of(**sizes), getattr(gf.train, rules))
    zeros = jax.tree.map(lambda param: np.zeros(param.shape, np.float32), net.spec)
    params = jax.device_put(zeros, shardings)
    assert gf.count(net) * 4 == TOTAL
    assert bytes_of_first_device(params) == expected
    assert f"{int(expected):,}" in str(gf.train.sharding_table(params))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_parameters_are_made_where_they_lie(kind):
    net = gf.gpt(gf.GPTConfig(**CONFIG | {"n_layers": 1}, scan=True))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    shardings = gf.train.shardings(net, mesh, gf.train.FSDP_TENSOR_PARALLEL)
    params = net.init(jax.random.key(3), shardings=shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        params,
        net.init(jax.random.key(3)),
    )


@pytest.mark.optimized
def test_no_device_makes_a_whole_array():
    """The compiled initializer of a matrix needs less memory on a device than half the matrix."""
    net = gf.layers.dense(1024, 1024, bias=False)
    shardings = gf.train.shardings(net, mesh_of(data=8), gf.train.FSDP)
    compiled = jax.jit(net.init, out_shardings=shardings).lower(jax.random.key(0)).compile()
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes == 4 * 1024 * 1024 / 8
    assert memory.temp_size_in_bytes < 4 * 1024 * 1024 / 2


def test_one_sharding_and_keys_of_old():
    mesh = mesh_of(data=8)
    spec = {"a": {"W": gf.Param([8, 2])}, "b": gf.Param([8])}
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        params = gf.init(spec, key, shardings=NamedSharding(mesh, P("data")))
        assert params["a"]["W"].sharding.spec == params["b"].sharding.spec == P("data")
        np.testing.assert_allclose(params["a"]["W"], gf.init(spec, key)["a"]["W"], rtol=1e-6)
    shapes = jax.eval_shape(lambda key: gf.init(spec, key, NamedSharding(mesh, P("data"))), jax.random.key(0))
    assert gf.shapes(shapes) == {"a": {"W": [8, 2]}, "b": [8]}
    with pytest.raises(ValueError, match="init: shardings must have the structure of the spec, or be one"):
        gf.init(spec, jax.random.key(0), shardings={"a": NamedSharding(mesh, P())})


def test_whole_heads_divide():
    """8 key heads of 4 features can be shared by 8 devices; 12 query heads cannot, though 48 features could."""
    layer = gf.layers.attention(48, 24, n_kv_heads=8, head_size=4)
    with pytest.warns(UserWarning, match="do not divide") as caught:
        shardings = gf.train.shardings(
            {"0": gf.layers.attention(48, 12, 4, head_size=4).spec, "1": layer.spec},
            mesh_of(model=8),
            gf.train.TENSOR_PARALLEL,
        )
    assert shardings["0"]["query"]["W"].spec == P(None, None)
    assert shardings["1"]["query"]["W"].spec == shardings["1"]["key"]["W"].spec == P("model", None)
    assert shardings["1"]["out"]["W"].spec == P(None, "model")
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "heads 12 by model=8: 16 would divide (*/out/W, */query/W, */query/b)" in message
    assert "kv_heads 4 by model=8: 8 would divide (*/key/W, */key/b, */value/W, */value/b)" in message
    assert caught[0].filename == __file__


def test_a_vocabulary_that_does_not_divide_is_reported():
    net = gf.gpt(gf.GPTConfig(**CONFIG | {"vocab": 65}, tied=False))
    with pytest.warns(UserWarning, match=r"vocab 65 by model=2: 66 would divide \(embed/W, head/W\)"):
        shardings = gf.train.shardings(net, mesh_of(data=4, model=2), gf.train.FSDP_TENSOR_PARALLEL)
    assert shardings["head"]["W"].spec == P(None, "data")


def test_rules_are_tried_in_order():
    mesh, net = mesh_of(data=4, model=2), gf.layers.dense(6, 8)
    for rules, expected in [
        ({"mlp": "model", "mlp_in": "data"}, None),
        ([("mlp_in", "data"), ("mlp", "data")], P("data", None)),  # 4 does not divide 6, so the second fits
        ([("mlp", ("data", "model"))], P(("data", "model"), None)),
        ([("mlp", None), ("mlp", "data"), ("mlp_in", "model")], P(None, "model")),
        # An axis of the mesh is used once.
        ({"mlp": "model", "mlp_in": "model"}, P("model", None)),
        ((), P(None, None)),
    ]:
        if expected is None:
            with pytest.warns(UserWarning, match=r"mlp_in 6 by data=4: 8 would divide \(W\)"):
                assert gf.train.shardings(net, mesh, rules)["W"].spec == P("model", None)
        else:
            assert gf.train.shardings(net, mesh, rules)["W"].spec == expected


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"mlp": "modle"},
            r"expected an axis of the mesh \(data, model\), got 'modle'. Did you mean 'model'?",
        ),
        ({"head": "model"}, r"expected a logical axis \(vocab, .*\), got 'head'. Did you mean 'heads'?"),
        ([("mlp", "model", "data")], "a rule must be a pair of names"),
        ({"W": P("dta")}, r"expected an axis of the mesh .*'dta'. Did you mean 'data'?"),
    ],
)
def test_unknown_names(rules, message):
    with pytest.raises(ValueError, match=message):
        gf.train.shardings(gf.layers.dense(6, 8, bias=False), mesh_of(data=4, model=2), rules)


def test_names_of_ones_own():
    spec = {"W": gf.Param([8, 6], axes=("genes", None)), "b": gf.Param([6])}
    shardings = gf.train.shardings(spec, mesh_of(data=8), {"genes": "data"})
    assert (shardings["W"].spec, shardings["b"].spec) == (P("data", None), P(None))
    with pytest.raises(ValueError, match="Did you mean 'genes'"):
        gf.train.shardings(spec, mesh_of(data=8), {"gene": "data"})


def test_a_dict_of_ones_own_with_partition_specs():
    mesh = mesh_of(data=4, model=2)
    params = {"layer": {"W": jnp.ones([8, 6]), "b": jnp.ones(8)}, "scale": jnp.ones([])}
    found = gf.train.shardings(params, mesh, {"layer": {"W": P("data", "model"), "b": P()}, "scale": P()})
    assert jax.tree.leaves(jax.device_put(params, found))[0].addressable_shards[0].data.shape == (2, 3)
    assert gf.train.shardings(params, mesh, {"layer": P("model"), "scale": P()})["layer"]["b"].spec == P(
        "model"
    )
    for specs, message in [
        ({"layer": P("data", "model"), "scale": P()}, r"layer/b has shape \[8\], too few axes for P"),
        (
            {"layer": {"W": P(None, "data"), "b": P()}, "scale": P()},
            r"splits its axis 1 by 4, which does not divide 6",
        ),
        ({"layer": P()}, "must have the structure of the parameters"),
        ({"layer": P(), "scale": None}, "PartitionSpec"),
    ]:
        with pytest.raises(ValueError, match=message):
            gf.train.shardings(params, mesh, specs)


def test_rules_need_names():
    with pytest.raises(ValueError, match=r"no parameter has any\. Pass the net or its spec"):
        gf.train.shardings({"W": jnp.ones([8, 6])}, mesh_of(data=8), gf.train.FSDP)
    with pytest.raises(ValueError, match="expected a net, a spec or arrays, got str 'text'"):
        gf.train.shardings({"f": "text"}, mesh_of(data=8), gf.train.FSDP)
    with pytest.raises(ValueError, match="expected a sharding for each array"):
        gf.train.sharding_table(gf.mlp([2, 1]))


def test_the_page_lists_every_name():
    page = (Path(gf.__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    section = page.partition("## Axes and rules")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(AXES)
