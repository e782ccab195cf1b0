"""The learning-rate range test: where a quadratic diverges is known, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf

X = np.random.default_rng(0).normal(size=[256, 4]).astype("float32")


def loss(params, x):
    """A quadratic that is not 0 anywhere: an exact fit would not diverge."""
    return jnp.square(x @ params - x.sum(1) - jnp.sin(9 * x[:, 0])).mean()


def test_the_suggestion_is_below_where_descent_diverges():
    found = gf.train.lr_range(loss, jnp.zeros(4), X, optax.sgd, low=1e-4, high=10, steps=100, batch_size=256)
    # Gradient descent on a quadratic converges below 2 over the largest eigenvalue of the Hessian.
    limit = 2 / np.linalg.eigvalsh(2 * X.T @ X / 256).max()
    assert found.diverged
    assert len(found.rates) < 100
    assert limit / 100 < found.suggested < limit / 3
    assert limit < found.rates[-1] < 10 * limit
    # The losses are those of the steps: here of the first two.
    first = float(loss(jnp.zeros(4), X))
    after = -found.rates[0] * jax.grad(loss)(jnp.zeros(4), X)
    np.testing.assert_allclose(found.losses[:2], [first, float(loss(after, X))], rtol=1e-5)
    np.testing.assert_allclose(found.rates[1] / found.rates[0], 1e5 ** (1 / 99), rtol=1e-6)
    assert f"suggested learning rate {found.suggested:.2g}" in str(found)
    assert len(found.table(5).rows) == 5
    assert len(found.table(None).rows) == len(found.rates)


def test_a_test_that_does_not_reach_the_limit_says_so():
    found = gf.train.lr_range(loss, jnp.zeros(4), X, optax.sgd, low=1e-5, high=1e-3, steps=50)
    assert not found.diverged
    assert "did not diverge up to a rate of 0.001: raise high" in str(found)
    solved = gf.train.lr_range(lambda p, x: jnp.square(p - 1).sum(), jnp.zeros(4), X, optax.sgd)
    assert 0.01 < solved.suggested < 0.3
    constant = gf.train.lr_range(lambda p, x: (0 * p).sum() + 1, jnp.zeros(4), X, optax.sgd, steps=20)
    assert constant.suggested is None
    assert "does not fall clearly" in str(constant)


def test_a_loss_that_is_not_finite_ends_the_test():
    found = gf.train.lr_range(
        lambda p, x: jnp.log(1 - p).mean(), jnp.zeros(2), X, optax.sgd, low=0.1, high=100
    )
    assert found.diverged
    assert not np.isfinite(found.losses[-1])
    assert np.isfinite(found.losses[:-1]).all()
    text = str(found)
    assert "diverged" in text


@pytest.mark.slow
def test_a_batch_of_the_test_is_that_of_fit_and_adapters_can_be_tested():
    net = gf.mlp([4, 5, 3])
    lora = gf.train.lora(net.init(jax.random.key(0)), 1, where="W1")
    data = X, np.arange(256) % 3
    own = lora.loss(gf.batch_mean(gf.classification_loss(net)))
    found = gf.train.lr_range(own, lora.adapters, data, low=1e-6, high=1e-5, steps=12, batch_size=64, seed=3)
    rows = [gf.data.epoch_order(256, 64, 3, i // 4)[i % 4] for i in (0, 5)]
    expected = [float(own(lora.adapters, jax.tree.map(lambda part, r=r: part[r], data))) for r in rows]
    np.testing.assert_allclose(found.losses[[0, 5]], expected, rtol=1e-3)


def test_batches_may_come_from_the_host():
    def rows(step):
        return X[32 * step % 256 :][:32]

    options = {"low": 1e-4, "high": 0.1, "steps": 70}
    expected = [rows(step) for step in range(8)]
    made = [
        gf.train.lr_range(loss, jnp.zeros(4), data, optax.sgd, **options)
        for data in (gf.train.from_host(rows), gf.train.from_loader(expected))
    ]
    assert len(made[0].losses) == 70  # more than one group
    np.testing.assert_array_equal(made[0].losses, made[1].losses)
    weights = jnp.zeros(4)
    for i in range(70):
        value, grad = jax.value_and_grad(loss)(weights, rows(i))
        np.testing.assert_allclose(made[0].losses[i], value, rtol=1e-4)
        weights = weights - made[0].rates[i] * grad
    once = gf.train.from_loader(lambda epoch: [] if epoch else expected)
    with pytest.raises(ValueError, match="the data ended after 8 batches, but steps is 70"):
        gf.train.lr_range(loss, jnp.zeros(4), once, optax.sgd, **options)


def test_wrong_arguments_are_refused():
    test = gf.train.lr_range
    with pytest.raises(TypeError, match="must be a function of the learning rate, got an optimizer"):
        test(loss, jnp.zeros(4), X, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"0 < low < high, got low 1 and high 0\.1"):
        test(loss, jnp.zeros(4), X, low=1, high=0.1)
    with pytest.raises(ValueError, match="steps must be an integer >= 10, got 3"):
        test(loss, jnp.zeros(4), X, steps=3)
    on_mesh = jax.device_put(jnp.zeros(4), jax.NamedSharding(jax.make_mesh((1,), ("data",)), jax.P()))
    with pytest.raises(ValueError, match="must be on one device"):
        test(loss, on_mesh, X)


def test_the_figure_shows_the_suggestion():
    pytest.importorskip("matplotlib")
    rates = np.geomspace(0.1, 1, 20)
    result = gf.train.RateRange(rates, rates, rates, 0.2, True)
    (panel,) = result.plot().axes
    assert [text.get_text() for text in panel.get_legend().get_texts()][-1] == "suggested: 0.2"
