"""`gf.batch_mean` is an object that shows the loss of one example, and is called like a loss of a batch."""

import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

W = jnp.array([1.0, -2.0])
X = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])


def squared(params, example, key=None, scale=1.0):
    noise = 0.0 if key is None else jax.random.normal(key)
    return scale * (params @ example + noise) ** 2


def test_it_shows_the_loss_of_one_example():
    mean = gf.batch_mean(squared)
    assert isinstance(mean, gf.BatchMean)
    assert mean.example is squared
    assert mean == gf.batch_mean(squared)
    assert list(inspect.signature(mean).parameters) == ["params", "example", "key", "scale"]
    assert pickle.loads(pickle.dumps(mean)).example is squared


def test_it_is_the_mean_and_splits_a_key():
    mean = gf.batch_mean(squared)
    np.testing.assert_allclose(mean(W, X, scale=2.0), 2 * (1 + 4 + 4) / 3)
    key = jax.random.key(3)
    noise = np.array([float(jax.random.normal(one)) for one in jax.random.split(key, 3)])
    np.testing.assert_allclose(mean(W, X, key=key), ((X @ W + noise) ** 2).mean(), rtol=1e-6)


def test_an_example_of_several_arguments():
    def of_one(params, x, y, key=None):
        return squared(params, x, key) * y

    mean = gf.batch_mean(of_one)
    y = jnp.array([1.0, 0.5, 2.0])
    np.testing.assert_allclose(mean(W, X, y), (1 + 2 + 8) / 3)
    key = jax.random.key(3)
    noise = np.array([float(jax.random.normal(one)) for one in jax.random.split(key, 3)])
    np.testing.assert_allclose(mean(W, X, y, key=key), ((X @ W + noise) ** 2 * y).mean(), rtol=1e-6)
    grads = jax.grad(mean)(W, X, y)
    np.testing.assert_allclose(gf.inspect(mean)(W, X, y).grads, grads, rtol=1e-6)
    np.testing.assert_allclose(gf.per_example.norms(mean)(W, X, y).grads, grads, rtol=1e-6)


@pytest.mark.parametrize("through", [jax.jit, jax.grad, lambda f: jax.jit(jax.value_and_grad(f))])
def test_transforms_of_jax_take_it(through):
    expected = through(lambda params, x: jnp.square(x @ params).mean())(W, X)
    got = through(gf.batch_mean(squared))(W, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


def test_a_function_around_it_is_a_plain_loss():
    around = functools.wraps(gf.batch_mean(squared))(lambda params, batch: jnp.float32(0))
    assert not hasattr(around, "example")
