import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf


def test_repeat_equals_the_composition():
    block = gf.residual(gf.serial(mix=gf.layers.dense(4, 4), squash=jnp.tanh))
    deep = gf.repeat(block, 3)
    params = deep.init(jax.random.key(0))
    x = jnp.arange(4.0)
    expected = x
    for i in range(3):
        expected = block.apply(jax.tree.map(lambda leaf, i=i: leaf[i], params), expected)
    np.testing.assert_allclose(deep.apply(params, x), expected, rtol=1e-6)
    assert not (params["mix"]["W"][0] == params["mix"]["W"][1]).any()  # each layer has its own initial values


def test_repeat_traces_its_net_once_for_any_depth():
    traced = []
    net = gf.Net({"w": gf.Param([2])}, lambda params, x: traced.append(0) or x * params["w"])
    deep = gf.repeat(net, 50)
    jax.make_jaxpr(deep.apply)(deep.init(jax.random.key(0)), jnp.ones(2))
    assert len(traced) == 1


def test_repeat_needs_at_least_one_copy():
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        gf.repeat(gf.layers.dense(2, 2), 0)


def test_errors_name_the_whole_path():
    net = gf.serial(first=gf.layers.dense(2, 2), second=gf.serial(inner=gf.layers.dense(3, 2)))
    params = net.init(jax.random.key(0))
    with pytest.raises(
        gf.ParameterError,
        match=r"second/inner/W: W is \[2, 3\], expected an input of \[\.\.\., 3\], got \[2\]",
    ):
        net.apply(params, jnp.ones(2))


def test_scopes_carry_the_names():
    net = gf.serial(first=gf.layers.dense(2, 2), second=gf.layers.dense(2, 2))
    jaxpr = jax.make_jaxpr(net.apply)(net.init(jax.random.key(0)), jnp.ones(2))
    assert {str(eqn.source_info.name_stack) for eqn in jaxpr.eqns} == {"first", "second"}


def test_dropout_needs_a_key_and_differs_between_layers_and_keys():
    net = gf.serial(
        a=gf.layers.dropout(0.5),
        b=gf.layers.dropout(0.5),
        deep=gf.repeat(gf.serial(drop=gf.layers.dropout(0.5)), 2),
    )
    x = jnp.ones(1000)
    params = net.init(jax.random.key(0))
    np.testing.assert_array_equal(net.apply(params, x), x)
    one, other = (net.apply(params, x, key=jax.random.key(i)) for i in range(2))
    assert (one != other).any()
    # Four layers with one mask would keep half of the nodes; with independent masks they keep a sixteenth.
    assert 0.03 < (one != 0).mean() < 0.1
    np.testing.assert_allclose(one.mean(), 1, atol=0.3)


def test_dropout_keeps_the_mean_and_checks_its_rate():
    x = jnp.ones(10_000)
    y = gf.layers.dropout(0.25).apply({}, x, key=jax.random.key(0))
    np.testing.assert_allclose((y == 0).mean(), 0.25, atol=0.02)
    np.testing.assert_allclose(y[y != 0], 4 / 3, rtol=1e-6)
    with pytest.raises(ValueError, match="in \\[0, 1\\), got 1"):
        gf.layers.dropout(1)


def test_a_custom_net():
    net = gf.Net({"w": gf.Param([3])}, lambda params, x: params["w"] @ x)
    ours = gf.serial(mine=net)
    params = {"mine": {"w": np.array([1, 2, 3], np.float32)}}
    assert ours.apply(params, jnp.ones(3)) == 6


def test_mlp_maps_columns_to_columns():
    net = gf.mlp([784, 16, 10])
    params = net.init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), [784])
    assert net.apply(params, x).shape == (10,)
    np.testing.assert_array_equal(net.apply(params, x.reshape(784, 1)), net.apply(params, x).reshape(10, 1))


def test_mlp_equals_the_formula():
    net = gf.mlp([3, 4, 2], output="sigmoid")
    params = net.init(jax.random.key(0)) | {"b1": jnp.arange(4.0), "b2": jnp.arange(2.0)}
    x = np.array([0.1, -2, 3], np.float32)
    W1, b1, W2, b2 = (np.asarray(params[name], np.float64) for name in ("W1", "b1", "W2", "b2"))
    a1 = 1 / (1 + np.exp(-(W1 @ x + b1)))
    a2 = 1 / (1 + np.exp(-(W2 @ a1 + b2)))
    np.testing.assert_allclose(net.apply(params, x), a2, rtol=1e-6)


def test_mlp_names_its_values():
    net = gf.mlp([3, 4, 2], output="sigmoid")
    jaxpr = jax.make_jaxpr(net.apply)(net.init(jax.random.key(0)), jnp.ones(3))
    assert [eqn.params["name"] for eqn in jaxpr.eqns if eqn.primitive.name == "name"] == [
        "z1",
        "a1",
        "z2",
        "a2",
    ]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros(64), "got [64]. For inputs of that size: gf.mlp([64, 16, ...])"),
        (np.zeros([28, 28]), "got [28, 28]. Flatten it: x.reshape(784)"),
        (np.zeros([5, 784]), "got [5, 784]. For a batch: jax.vmap(net.apply, (None, 0))(params, x)"),
        (np.zeros([5, 3]), "got [5, 3]"),
        (np.zeros(784, np.uint8), "expected an input of float32, got uint8. Cast it: x.astype(jnp.float32) / 255"),
    ],
)  # fmt: skip
def test_a_wrong_input_raises_with_the_expected_shape(x, message):
    net = gf.mlp([784, 16, 10])
    with pytest.raises(gf.ParameterError) as error:
        jax.jit(net.apply)(net.init(jax.random.key(0)), x)
    assert str(error.value).startswith("W1: ")
    assert str(error.value).endswith(message)
    assert x.dtype == np.uint8 or "W1 is [16, 784]" in str(error.value)


@pytest.mark.parametrize("sizes", [[], [3], [3, 0], [3, -1, 2]])
def test_mlp_checks_its_sizes(sizes):
    with pytest.raises(ValueError, match="sizes must be two or more integers >= 1"):
        gf.mlp(sizes)


def test_an_unknown_activation_suggests_the_closest_name():
    with pytest.raises(ValueError, match=r"got 'sigmoids'\. Did you mean 'sigmoid'\?"):
        gf.mlp([2, 2], "sigmoids")


def test_hidden_width_is_the_mean():
    assert gf.hidden_width(784, 10) == 397
    assert gf.hidden_width(728, 10) == 369
