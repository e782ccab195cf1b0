"""The randomization tests must distinguish a map of what was learned from a map of the input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn.attribution.randomize import rank_correlation


def edges(params, x):
    """An edge detector: its map depends on the image alone."""
    image = x.reshape(8, 8)
    return jnp.hypot(*jnp.gradient(image)).reshape(-1)


NET = gf.mlp([64, 24, 10])


@functools.cache
def trained(labels, seed):
    data = gf.data.digits(size=8).train[0][:150], np.array(labels)  # as much as it can memorize
    fitted = gf.fit(
        gf.batch_mean(gf.classification_loss(NET)),
        NET.init(jax.random.key(seed)),
        data,
        optax.adam(0.01),
        400,
        batch_size=64,
        progress=False,
    )
    return fitted.params


def train(data, key):
    return trained(tuple(data[1].tolist()), int(jax.random.bits(key, dtype="uint16")))


@pytest.mark.slow
def test_both_tests_separate_saliency_from_an_edge_detector():
    data = gf.data.digits(size=8)
    part, x = tuple(half[:150] for half in data.train), jnp.asarray(data.test[0][:10])
    saliency, key = gf.attribution.saliency(NET.apply, target=3), jax.random.key(1)
    of_labels = gf.attribution.randomize_labels(saliency, train)(part, x, key=key)
    assert of_labels.passed
    assert not gf.attribution.randomize_labels(edges, train)(part, x, key=key).passed

    params = train(part, jax.random.split(key)[0])
    of_weights = gf.attribution.randomize_weights(saliency, NET.init)(params, x, key=key)
    assert of_weights.passed
    assert of_weights.names == ("W2, b2", "+ W1, b1")
    assert of_weights.maps.shape == (3, 10, 64)
    np.testing.assert_allclose(of_weights.maps[0], of_labels.maps[0], rtol=1e-5)
    detector = gf.attribution.randomize_weights(edges, NET.init)(params, x, key=key)
    assert not detector.passed
    np.testing.assert_allclose(detector.rank, 1.0)
    assert "FAILED" in str(detector)


def test_layers_are_randomized_in_reverse_order_of_use():
    net = gf.serial(
        z=gf.layers.dense(4, 3), squash=jnp.tanh, m=gf.layers.dense(3, 3), a=gf.layers.dense(3, 2)
    )
    saliency = jax.jit(gf.attribution.saliency(net.apply, 0))
    params, x, key = net.init(jax.random.key(0)), jnp.ones((1, 4)), jax.random.key(1)
    result = gf.attribution.randomize_weights(saliency, net.init)(params, x, key=key)
    assert result.names == ("a/W, a/b", "+ m/W, m/b", "+ z/W, z/b")
    np.testing.assert_allclose(result.maps[-1, 0], saliency(net.init(key), x[0]), rtol=1e-5)
    mixed = net.init(key) | {"z": params["z"]}
    np.testing.assert_allclose(result.maps[-2, 0], saliency(mixed, x[0]), rtol=1e-5)


def test_layers_by_name():
    f = lambda params, x: params["a"] * x + params["b"]  # noqa: E731
    init = lambda key: {"a": jnp.array(2.0), "b": jnp.array(3.0)}  # noqa: E731
    params, x = {"a": jnp.array(1.0), "b": jnp.array(0.0)}, jnp.ones((1, 2))
    result = gf.attribution.randomize_weights(f, init, layers=["b", ["a"]])(params, x, key=jax.random.key(0))
    np.testing.assert_array_equal(result.maps[:, 0, 0], [1.0, 4.0, 5.0])
    assert not result.passed  # constant maps have no rank correlation
    with pytest.raises(ValueError, match=r"expected names of parameters \(a, b\), got 'c'"):
        gf.attribution.randomize_weights(f, init, layers=["c"])(params, x, key=jax.random.key(0))
    with pytest.raises(ValueError, match="layers must name every parameter; missing: b"):
        gf.attribution.randomize_weights(f, init, layers=["a"])(params, x, key=jax.random.key(0))
    with pytest.raises(ValueError, match="got others in number or shape"):
        gf.attribution.randomize_weights(f, lambda key: {"a": jnp.ones(2), "b": jnp.ones(2)})(
            params, x, key=jax.random.key(0)
        )


def test_constant_inputs_do_not_make_maps_alike():
    inputs = np.random.default_rng(0).normal(size=[40, 6])
    inputs[:, 3:] = 0.0  # nothing can be learned from these, so all networks are alike there
    train = lambda data, key: jnp.linalg.lstsq(*map(jnp.asarray, data))[0]  # noqa: E731
    slopes = np.array([1.0, -2.0, 3.0, 0.0, 0.0, 0.0])
    method = lambda w, x: w  # noqa: E731
    result = gf.attribution.randomize_labels(method, train)(
        (inputs, inputs @ slopes), inputs[:1], key=jax.random.key(3)
    )
    true, shuffled = result.maps[:, 0]
    np.testing.assert_allclose(result.rank[0], rank_correlation(true[:3], shuffled[:3]))
    assert abs(rank_correlation(abs(true), abs(shuffled))) > 0.5


def test_ranks_are_those_of_scipy():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a = rng.integers(0, 5, 50).astype(float)  # with ties
    b = a + rng.normal(size=50)
    np.testing.assert_allclose(rank_correlation(a, b), spearmanr(a, b).statistic, rtol=1e-6)
    assert np.isnan(rank_correlation(a, np.ones(50)))
