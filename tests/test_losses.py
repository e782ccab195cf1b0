import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

x = jax.random.normal(jax.random.key(0), [5, 3])
labels = jnp.array([0, 1, 2, 3, 0])
net = gf.mlp([3, 4])
params = net.init(jax.random.key(1)) | {"b1": jnp.arange(4.0)}
z = np.asarray(x @ params["W1"].T + params["b1"].reshape(1, 4), np.float64)


def test_classification_loss_is_the_negative_log_probability():
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    expected = -np.log(p[np.arange(5), labels])
    got = [gf.classification_loss(net)(params, example) for example in zip(x, labels)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    got = gf.batch_mean(gf.classification_loss(net))(params, (x, labels))
    np.testing.assert_allclose(got, expected.mean(), rtol=1e-5)


def test_columns_serve_as_well():
    got = gf.batch_mean(gf.classification_loss(net))(params, (x.reshape(5, 3, 1), labels))
    np.testing.assert_allclose(
        got, gf.batch_mean(gf.classification_loss(net))(params, (x, labels)), rtol=1e-6
    )


def test_regression_loss_is_the_mean_square():
    y = jnp.ones([5, 4])
    got = gf.batch_mean(gf.regression_loss(net))(params, (x, y))
    np.testing.assert_allclose(got, ((z - 1) ** 2).mean(), rtol=1e-5)


def test_regression_of_one_output_takes_scalars():
    one = gf.mlp([3, 1])
    start = one.init(jax.random.key(0))
    loss = gf.batch_mean(gf.regression_loss(one))
    assert loss(start, (x, jnp.ones(5))) == loss(start, (x, jnp.ones([5, 1])))


def test_quadratic_loss_of_labels_and_of_vectors():
    loss = gf.batch_mean(gf.quadratic_loss(net))
    expected = 0.5 * ((z - np.eye(4)[labels]) ** 2).sum(-1).mean()
    np.testing.assert_allclose(loss(params, (x, labels)), expected, rtol=1e-5)
    np.testing.assert_allclose(loss(params, (x, jnp.eye(4)[labels])), expected, rtol=1e-5)


def test_a_target_of_another_size_is_refused():
    with pytest.raises(
        ValueError, match=r"expected a target of 4 values, like the net's output \[4\], got \[3\]"
    ):
        gf.regression_loss(net)(params, (x[0], jnp.ones(3)))


def test_accuracy_counts_the_largest():
    assert gf.accuracy(net)(params, (x, jnp.asarray(z.argmax(-1)))) == 1
    np.testing.assert_allclose(gf.accuracy(net)(params, (x, labels)), (z.argmax(-1) == labels).mean())


def test_noise_is_each_examples_own():
    noisy = gf.serial(drop=gf.layers.dropout(0.5), out=gf.layers.dense(3, 1, bias=False))
    start = {"out": {"W": jnp.ones([1, 3])}}
    loss = gf.classification_loss(noisy)
    shapes = []
    gf.batch_mean(lambda params, example, key: shapes.append(key.shape) or jnp.zeros([]))(
        start, (x, labels), key=jax.random.key(0)
    )
    assert shapes == [()]
    values = jax.vmap(
        lambda key: gf.batch_mean(gf.regression_loss(noisy))(
            start, (jnp.ones([64, 3]), jnp.ones(64)), key=key
        )
    )(jax.random.split(jax.random.key(0), 3))
    assert len(set(values.tolist())) == 3
    assert "key" in inspect.signature(loss).parameters


def test_aux_is_meant_too():
    loss = gf.batch_mean(lambda params, example: (example.sum(), {"first": example[0]}))
    value, aux = loss(None, x)
    np.testing.assert_allclose(value, x.sum(1).mean(), rtol=1e-5)
    np.testing.assert_allclose(aux["first"], x[:, 0].mean(), rtol=1e-5)
