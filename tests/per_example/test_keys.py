"""A random key for the transforms of `gf.per_example`: each example gets its own, the one it has in `gf.batch_mean`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

PARAMS = {"W": jax.random.normal(jax.random.key(1), [4, 8]) / 3}
X = jax.random.normal(jax.random.key(2), [6, 8])
KEYS = [jax.random.key(3), jax.random.PRNGKey(3)]


def loss(params, x, key):
    kept = jax.random.bernoulli(key, 0.5, x.shape)
    return jnp.sum(jnp.tanh(params["W"] @ jnp.where(kept, x, 0)))


def gradients(key):
    """The gradient of each example, by vmap(grad) with keys that are split by hand."""
    return jax.vmap(jax.grad(loss), (None, 0, 0))(PARAMS, X, jax.random.split(key, 6))["W"]


@pytest.mark.parametrize("key", KEYS, ids=["key", "PRNGKey"])
@pytest.mark.parametrize("wrap", [lambda f: f, gf.batch_mean], ids=["of one example", "batch_mean"])
def test_a_key_is_split_as_in_batch_mean(key, wrap):
    own = gradients(key)
    norms = np.linalg.norm(own.reshape(6, -1), axis=1)
    found = jax.jit(gf.per_example.norms(wrap(loss)))(PARAMS, X, key=key)
    np.testing.assert_allclose(found.total, norms, rtol=1e-5)
    mean = jax.grad(gf.batch_mean(loss))(PARAMS, X, key=key)
    np.testing.assert_allclose(found.grads["W"], mean["W"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gf.per_example.grads(wrap(loss))(PARAMS, X, key=key)["W"], own, rtol=1e-6)
    clipped = gf.per_example.clipped_grads(wrap(loss), 1.0)(PARAMS, X, key=key)
    by_hand = jnp.mean(own * jnp.minimum(1, 1 / norms)[:, None, None], 0)
    np.testing.assert_allclose(clipped.grads["W"], by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", KEYS, ids=["key", "PRNGKey"])
def test_noise_and_cosines_with_a_key(key):
    own = np.asarray(gradients(key), np.float64).reshape(6, -1)
    noise = gf.per_example.noise_scale(loss)(PARAMS, X, key=key)
    np.testing.assert_allclose(noise.variance, own.var(0, ddof=1).sum(), rtol=1e-4)
    test = gf.per_example.norm_test(loss)(PARAMS, X, key=key)
    ratio = np.sqrt(own.var(0, ddof=1).sum() / 6) / np.linalg.norm(own.mean(0))
    np.testing.assert_allclose(test.ratio, ratio, rtol=1e-4)
    unit = own / np.linalg.norm(own, axis=1, keepdims=True)
    cosines = gf.per_example.grad_cosines(loss)(PARAMS, X, key=key)
    np.testing.assert_allclose(cosines.total, unit @ unit.T, atol=1e-5)
    groups = np.array([0, 1, 0, 1, 1, 0])
    means = np.stack([own[groups == i].mean(0) for i in range(2)])
    expected = means[0] @ means[1] / np.prod(np.linalg.norm(means, axis=1))
    found = gf.per_example.grad_cosines(loss)(PARAMS, X, by=groups, key=key)
    np.testing.assert_allclose(found.total[0, 1], expected, atol=1e-5)


def test_a_key_for_a_loss_without_noise_is_an_error():
    with pytest.raises(TypeError, match="key"):
        gf.per_example.norms(lambda params, x: jnp.sum(params["W"] @ x))(PARAMS, X, key=KEYS[0])
