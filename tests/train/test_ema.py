"""The average of weights against numpy, what is evaluated during training, and gradient accumulation."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf

X = np.random.default_rng(0).normal(1.0, 1.0, [32, 3]).astype("float32")


def loss(params, x):
    return jnp.square(x @ params["w"] - 1).mean()


def start():
    return {"w": jnp.array([3.0, -2.0, 1.0])}


def weights_of(steps):
    """The parameters before each step of `fit` on X with batches of 8, and after the last."""
    weights = [start()["w"]]
    for step in range(steps):
        batch = X[gf.data.epoch_order(32, 8, 0, step // 4)[step % 4]]
        weights.append(weights[-1] - 0.1 * jax.grad(loss)({"w": weights[-1]}, batch)["w"])
    return np.array(weights)


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_the_average_is_that_of_the_weights_after_each_step(decay):
    optimizer = optax.chain(optax.sgd(0.1), gf.train.ema_weights(decay))
    options = {"batch_size": 8, "progress": False, "eval_every": 5}
    evaluated = []

    def evaluate(params):
        evaluated.append(np.array(params["w"]))
        return {}

    fitted = gf.fit(
        loss, start(), X, optimizer, 10, evaluate=evaluate, eval_params=gf.train.averaged_weights, **options
    )
    weights = weights_of(10)
    np.testing.assert_allclose(fitted.params["w"], weights[-1], rtol=1e-4)
    for n, average in zip((5, 10), evaluated, strict=True):
        expected = np.average(weights[1 : n + 1], axis=0, weights=decay ** np.arange(n - 1, -1, -1.0))
        np.testing.assert_allclose(average, expected, rtol=1e-4)
    averaged = gf.train.averaged_weights(fitted.state.opt_state, fitted.params)
    np.testing.assert_array_equal(averaged["w"], evaluated[-1])


@pytest.mark.parametrize("decay", [0.9999, 0.9999999, 1 - 1e-9])
def test_a_decay_close_to_1_averages_the_first_weights_alike(decay):
    transformation, params = gf.train.ema_weights(decay), jnp.float32(8.0)
    state = transformation.init(params)
    # The means of 6, of 6 and 4, and of 6, 4 and 2.
    for step, expected in ((-2.0, 6.0), (-4.0, 5.0), (-6.0, 4.0)):
        _, state = transformation.update(jnp.float32(step), state, params)
        np.testing.assert_allclose(gf.train.averaged_weights(state, params), expected, rtol=1e-4)


def test_parameters_without_an_average_stay_as_they_are():
    params = {"body": jnp.array(8.0), "head": jnp.array(8.0)}
    averaged = optax.chain(optax.sgd(1.0), gf.train.ema_weights(0.5))
    optimizer = optax.partition(
        {"train": averaged, "freeze": optax.set_to_zero()}, {"body": "freeze", "head": "train"}
    )
    state = optimizer.init(params)
    _, state = optimizer.update({"body": jnp.array(4.0), "head": jnp.array(4.0)}, state, params)
    assert gf.train.averaged_weights(state, params) == {"body": 8.0, "head": 4.0}


def test_an_average_of_narrow_weights_is_wide():
    optimizer = gf.train.ema_weights(0.999)
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    state = optimizer.init(params)
    assert state.average["w"].dtype == jnp.float32
    _, state = optimizer.update({"w": jnp.zeros(2, jnp.bfloat16)}, state, params)
    assert gf.train.averaged_weights(state, params)["w"].dtype == jnp.bfloat16


def test_wrong_averages_are_refused():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1.0"):
        gf.train.ema_weights(1.0)
    with pytest.raises(ValueError, match=r"expected one gf\.train.ema_weights in the optimizer, got 0"):
        gf.train.averaged_weights(optax.adam(0.1).init(start()), start())
    optimizer = gf.train.ema_weights(0.9)
    with pytest.raises(ValueError, match="must be given the parameters"):
        optimizer.update(start(), optimizer.init(start()))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_average_of_an_equinox_model_is_evaluated():
    pytest.importorskip("equinox")
    eqx = importlib.import_module("equinox")
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
        optimizer = optax.chain(optax.sgd(0.1), gf.train.ema_weights(0.5))
        fitted = gf.fit(
            lambda model, x: jnp.square(jax.vmap(model)(x) - 1).mean(),
            model,
            X,
            optimizer,
            2,
            evaluate=lambda model: {"output": model(jnp.ones(3))[0]},
            eval_params=gf.train.averaged_weights,
            progress=False,
        )
        averaged = gf.train.averaged_weights(fitted.state.opt_state, fitted.params)
        assert averaged(jnp.ones(3))[0] == pytest.approx(fitted.history[-1]["output"], rel=1e-5)
        assert averaged(jnp.ones(3))[0] != pytest.approx(float(fitted.params(jnp.ones(3))[0]), rel=1e-5)


def test_accumulated_gradients_are_those_of_a_large_batch():
    options = {"progress": False, "eval_every": 2}
    accumulated = optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation()
    small = gf.fit(loss, start(), X, accumulated, 8, batch_size=4, **options)
    large = gf.fit(loss, start(), X, optax.sgd(0.1), 2, batch_size=16, **options)
    np.testing.assert_allclose(small.params["w"], large.params["w"], rtol=1e-5)
    assert not np.array_equal(small.params["w"], start()["w"])


def test_the_average_is_of_parameters_as_they_are_stored():
    params = {"w": jnp.full([3], 256.0, jnp.bfloat16)}
    wide = optax.stateless(lambda updates, params: {"w": jnp.full([3], 1.003, jnp.float32)})
    optimizer = optax.chain(wide, gf.train.ema_weights(0.5))
    updates, state = optimizer.update(params, optimizer.init(params), params)
    with jax.numpy_dtype_promotion("standard"):
        stored = optax.apply_updates(params, updates)
    # Added in float32 and rounded once: 257.003 is 258 in bfloat16, but 256 + bfloat16(1.003) is 256.
    assert float(stored["w"][0]) == 258
    np.testing.assert_array_equal(gf.train.averaged_weights(state, params)["w"], stored["w"])
