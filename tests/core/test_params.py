import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradfn as gf
from gradfn.core.params import check

names = st.text("abcWxyz_", min_size=1, max_size=3)
leaves = st.lists(st.integers(0, 3), max_size=3).map(gf.Param)
specs = st.dictionaries(
    names, st.recursive(leaves, lambda inner: st.dictionaries(names, inner, max_size=3)), max_size=4
)


@settings(max_examples=25, deadline=None)
@given(specs)
def test_init_matches_the_spec(spec):
    params = jax.eval_shape(lambda key: gf.init(spec, key), jax.random.key(0))
    assert gf.shapes(params) == gf.shapes(spec)
    assert gf.count(params) == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    check(spec, params)


@settings(max_examples=5, deadline=None)
@given(specs, names)
def test_adding_a_parameter_does_not_change_the_others(spec, name):
    before = gf.init(spec, jax.random.key(0))
    after = gf.init(spec | {f"new_{name}": gf.Param([2, 2])}, jax.random.key(0))
    after.pop(f"new_{name}")
    chex.assert_trees_all_equal(before, after)


def test_parameters_of_equal_shape_differ():
    params = gf.init({"a": {"W": gf.Param([4, 4])}, "b": {"W": gf.Param([4, 4])}}, jax.random.key(0))
    assert not (params["a"]["W"] == params["b"]["W"]).any()


@pytest.mark.slow
def test_default_init_by_rank():
    spec = {"b": gf.Param([5]), "s": gf.Param([]), "W": gf.Param([300, 400]), "K": gf.Param([64, 32, 5, 5])}
    params = gf.init(spec, jax.random.key(0))
    assert (params["b"] == 0).all()
    assert params["s"] == 0
    np.testing.assert_allclose(params["W"].std(), 400**-0.5, rtol=0.02)
    np.testing.assert_allclose(params["K"].std(), (32 * 25) ** -0.5, rtol=0.02)


def test_init_works_in_jit_with_custom_initializers_and_dtypes():
    ones = jax.nn.initializers.ones
    spec = {
        "w": gf.Param([3], ones, jnp.bfloat16),
        "n": gf.Param([2], lambda key, shape, dtype: jnp.ones(shape, dtype), jnp.int32),
    }
    params = jax.jit(lambda key: gf.init(spec, key))(jax.random.key(0))
    assert params["w"].dtype == jnp.bfloat16
    assert params["n"].dtype == jnp.int32
    check(spec, params)


def test_an_initializer_that_returns_another_shape_raises():
    with pytest.raises(gf.ParameterError, match=r"layer/w: expected shape \[3\] from its init, got \[2\]"):
        gf.init({"layer": {"w": gf.Param([3], lambda key, shape, dtype: jnp.ones(2))}}, jax.random.key(0))


def test_a_spec_leaf_that_is_not_a_param_raises():
    with pytest.raises(gf.ParameterError, match=r"layer/w: expected a gf\.Param in the spec, got int 3"):
        gf.init({"layer": {"w": 3}}, jax.random.key(0))


@pytest.mark.parametrize(
    ("sizes", "weights", "biases", "total"),
    [([784, 16, 10], "12,704", "26", 12_730), ([728, 16, 10], "11,808", "26", 11_834)],
)
def test_count_of_digit_networks(sizes, weights, biases, total):
    net = gf.mlp(sizes)
    assert gf.count(net.spec) == total
    assert f"{weights} weights + {biases} biases = {total:,} parameters" in str(gf.table(net.spec))


def test_table_is_ordered_and_has_totals():
    lines = str(gf.table(gf.mlp([2] * 12).spec)).splitlines()
    paths = [line.split()[0] for line in lines[2:-3]]
    assert paths == [f"{letter}{i}" for i in range(1, 12) for letter in "Wb"]
    assert lines[-2].split() == ["total", "22", "arrays", "66", "264"]


def test_table_of_parameters_equals_the_table_of_the_spec():
    net = gf.serial(a=gf.layers.dense(2, 3), b=gf.layers.layer_norm(3))
    assert str(gf.table(net.init(jax.random.key(0)))) == str(gf.table(net.spec))


SPEC = {"net": {"W1": gf.Param([16, 784]), "b1": gf.Param([16])}, "n": gf.Param([], dtype=jnp.int32)}
GOOD = {"net": {"W1": np.zeros([16, 784], np.float32), "b1": np.zeros(16, np.float32)}, "n": np.int32(1)}


def replaced(**changes):
    net = {name: value for name, value in (GOOD["net"] | changes).items() if value is not None}
    return GOOD | {"net": net}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            replaced(W1=np.zeros([784, 16], np.float32)),
            "net/W1: expected [16, 784] float32, got [784, 16] float32. "
            "Weights are [out, in]: pass its transpose",
        ),
        (
            replaced(b1=np.zeros([16, 1], np.float32)),
            "net/b1: expected [16] float32, got [16, 1] float32. Biases are vectors: pass its [:, 0]",
        ),
        (
            replaced(b1=np.zeros(16, np.int32)),
            "net/b1: expected [16] float32, got [16] int32. Cast it: .astype(jnp.float32)",
        ),
        (
            replaced(b1=np.zeros(16, np.float16)),
            "net/b1: expected [16] float32, got [16] float16, but net/W1 is float32. "
            "Cast the whole tree or none of it",
        ),
        (
            replaced(b1=[0.0] * 2),
            "net/b1: expected [16] float32, got list [0.0, 0.0]. Make it an array: jnp.asarray(..., jnp.float32)",
        ),
        (
            replaced(b1=None),
            "net/b1: missing. Expected W1, b1; got W1",
        ),
        (
            replaced(bb1=np.zeros(1)),
            "net/bb1: not declared. Expected W1, b1. Did you mean b1?",
        ),
        (
            GOOD | {"net": np.zeros(3)},
            "net: expected a dict with W1, b1, got [3] float64",
        ),
        (3, "parameters: expected a dict with net, n, got int 3"),
        (GOOD | {"n": np.float32(1)}, "n: expected [] int32, got [] float32. Cast it: .astype(jnp.int32)"),
    ],
)  # fmt: skip
def test_errors_name_the_parameter_the_expected_and_the_actual_value(params, message):
    check(SPEC, GOOD)
    with pytest.raises(gf.ParameterError) as error:
        check(SPEC, params)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gf.Param([-1]), "sizes must be >= 0, got shape [-1]"),
        (lambda: gf.Param([2, 3], axes=("out",)), "[2, 3] needs 2 axis names, got ('out',)"),
        (
            lambda: gf.Param([6, 4], axes=[("heads", 4), None]),
            "units of ('heads', 4) must divide the size of the axis, 6",
        ),
    ],
)
def test_param_checks_its_arguments(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_table_orders_blocks_by_number():
    leaf = gf.Param([2])
    text = str(gf.table({"blocks": {str(i): {"b": leaf} for i in (10, 2)}, "token": leaf}))
    assert text.index("token") < text.index("blocks/2/b") < text.index("blocks/10/b")
