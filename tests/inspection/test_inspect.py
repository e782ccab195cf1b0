"""`inspect` against plain `value_and_grad`, and against functions split by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from gradfn.inspection import inspect


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def mlp(params, x, y):
    h = checkpoint_name(jax.nn.sigmoid(x @ params["W1"] + params["b1"]), "a1")
    out = h @ params["W2"] + params["b2"]
    return jnp.mean((out - y) ** 2)


@pytest.fixture
def mlp_args():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "W1": jax.random.normal(keys[0], (4, 8)),
        "b1": jnp.full((8,), 0.1),
        "W2": jax.random.normal(keys[1], (8, 2)),
        "b2": jnp.zeros(2),
    }
    return params, jax.random.normal(keys[2], (16, 4)), jax.random.normal(keys[3], (16, 2))


# rank promotion is an error in the tests; the functions here broadcast biases as users' code does
@pytest.fixture(autouse=True)
def as_users_write():
    with jax.numpy_rank_promotion("allow"):
        yield


def test_gradients_are_those_of_value_and_grad_bit_for_bit(mlp_args):
    inspection = jax.jit(inspect(mlp, keep=None))(*mlp_args)
    value, grads = jax.jit(jax.value_and_grad(mlp, argnums=(0, 1, 2)))(*mlp_args)
    assert_same((inspection.value, inspection.grads, *inspection.input_grads), (value, *grads))
    assert inspection.aux is None


@pytest.mark.slow
def test_activation_gradients_are_those_of_the_function_split_by_hand(mlp_args):
    params, x, y = mlp_args
    inspection = inspect(mlp, keep=["a1", "b1"])(*mlp_args)

    def tail(a1):
        return jnp.mean((a1 @ params["W2"] + params["b2"] - y) ** 2)

    z1 = x @ params["W1"] + params["b1"]
    np.testing.assert_allclose(inspection["b1"].value, z1, rtol=1e-6)
    np.testing.assert_allclose(inspection["a1"].value, jax.nn.sigmoid(z1), rtol=1e-6)
    np.testing.assert_allclose(inspection["a1"].grad, jax.grad(tail)(jax.nn.sigmoid(z1)), rtol=1e-6)
    np.testing.assert_allclose(
        inspection["b1"].grad, jax.grad(lambda z: tail(jax.nn.sigmoid(z)))(z1), rtol=1e-5, atol=1e-8
    )
    g = np.asarray(inspection["a1"].grad)
    stats = inspection.grad_stats["a1"]
    np.testing.assert_allclose(stats.rms, np.sqrt(np.mean(g**2)), rtol=1e-6)
    np.testing.assert_allclose(stats.mean, np.mean(g), rtol=1e-5)
    np.testing.assert_allclose(stats.max, np.max(np.abs(g)), rtol=1e-6)
    assert float(stats.count) == g.size


def test_unknown_names_raise_and_list_near_ones(mlp_args):
    with pytest.raises(ValueError, match=r"no site 'a2'.*Did you mean .*a1"):
        inspect(mlp, sites=["a2"])(*mlp_args)
    with pytest.raises(ValueError, match="no statistic 'median'"):
        inspect(mlp, stats=["median"])
    with pytest.raises(TypeError, match="floating scalar"):
        inspect(lambda p, x: x)(*mlp_args[:2])


def test_results_are_accessed_by_name(mlp_args):
    inspection = inspect(mlp, keep="a1")(*mlp_args)
    assert list(inspection) == [site.name for site in inspection.sites]
    assert "a1" in inspection
    assert "a2" not in inspection
    a1 = inspection["a1"]
    assert a1.site.name == "a1"
    assert a1.value.shape == a1.grad.shape == a1.site.shape
    assert (a1.stats, a1.grad_stats) == (inspection.stats["a1"], inspection.grad_stats["a1"])
    with pytest.raises(KeyError, match=r"inspection: there is no site 'a2'. Did you mean .*a1"):
        inspection["a2"]
    with pytest.raises(AttributeError, match="the value of site 'W1' was not kept: pass keep='W1'"):
        inspection["W1"].value  # noqa: B018
    with pytest.raises(AttributeError, match="the gradient of site 'W1' was not kept: pass keep='W1'"):
        inspection["W1"].grad  # noqa: B018


def test_an_observation_is_returned_from_jit(mlp_args):
    kept = jax.jit(lambda *args: inspect(mlp, keep="a1")(*args)["a1"])(*mlp_args)
    np.testing.assert_allclose(
        kept.value, jax.nn.sigmoid(mlp_args[1] @ mlp_args[0]["W1"] + mlp_args[0]["b1"]), rtol=1e-6
    )
