"""TracIn: against dot products of gradients, and on planted copies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf

NET = gf.mlp([6, 5, 3])
LOSS = gf.classification_loss(NET)


def batch(key, n):
    return jax.random.normal(key, (n, 6)), jnp.arange(n) % 3


@pytest.mark.slow
def test_scores_are_products_of_per_example_gradients():
    train, test = batch(jax.random.key(0), 7), batch(jax.random.key(1), 5)
    checkpoints = [NET.init(jax.random.key(k)) for k in (2, 3)]
    flat = lambda tree: jnp.concatenate([g.reshape(len(g), -1) for g in jax.tree.leaves(tree)], 1)  # noqa: E731
    expected = 0.0
    for params, rate in zip(checkpoints, (0.5, 0.1)):
        of_train, of_test = (flat(jax.vmap(jax.grad(LOSS), (None, 0))(params, b)) for b in (train, test))
        expected += rate * of_test @ of_train.T
    # Batches of 3, 3, 1 and of 3, 2.
    result = gf.attribution.tracin(LOSS, batch_size=3)(checkpoints, train, test, [0.5, 0.1])
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-7)
    # With aux, and for a model that contains a function and an integer.
    with_aux = gf.attribution.tracin(lambda model, example: (model["loss"](model["params"], example), 1))
    models = [{"params": params, "loss": LOSS, "step": jnp.array(7)} for params in checkpoints]
    np.testing.assert_allclose(
        with_aux(models, train, test, np.array([0.5, 0.1])), expected, rtol=1e-5, atol=1e-7
    )


def test_each_checkpoint_needs_a_learning_rate():
    data = batch(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="got 2 checkpoints and 1 learning rates"):
        gf.attribution.tracin(LOSS)([{}, {}], data, data, [0.1])
    with pytest.raises(ValueError, match="got 0 checkpoints and 0 learning rates"):
        gf.attribution.tracin(LOSS)([], data, data, 0.1)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        gf.attribution.tracin(LOSS, batch_size=0)


@pytest.mark.slow
def test_planted_copies_are_found_over_saved_checkpoints(tmp_path):
    data = gf.data.digits(size=8)
    x, y = (part[:300].copy() for part in data.train)
    test = tuple(part[:6] for part in data.test)
    for i in range(6):  # each test digit is copied into the training data twice, once with a wrong label
        x[i], y[i] = test[0][i], test[1][i]
        x[100 + i], y[100 + i] = test[0][i], (test[1][i] + 1) % 10
    net = gf.mlp([64, 16, 10])
    loss = gf.classification_loss(net)
    params, options = net.init(jax.random.key(0)), {"keep_every": 300, "folder": tmp_path, "progress": False}
    gf.fit(gf.batch_mean(loss), params, (x, y), optax.sgd(0.5), 900, **options)
    checkpoints = list(gf.train.kept(tmp_path, like=params).values())
    plain, cosine = (
        np.asarray(gf.attribution.tracin(loss, normalize=n)(checkpoints, (x, y), test, 0.5))
        for n in (False, True)
    )
    assert plain.shape == (6, 300)
    own = np.arange(6)
    np.testing.assert_array_equal(cosine.argmax(1), own)
    np.testing.assert_allclose(cosine[own, own], 3 * 0.5, rtol=1e-5)
    # The number of examples that harmed more than the mislabeled copy.
    ranks = (plain[own, 100 + own][:, None] > plain).sum(1)
    assert ranks.max() <= 2
    # Examples with larger gradients may help more than the copy.
    assert (plain[own, own][:, None] < plain).sum(1).max() < 45
