"""Every public transform, given a loss of one example and a loss of a batch: docs/losses.md says which takes which.

Where a transform gets the kind that it does not take, the error says what to pass.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf

KEY = jax.random.key(0)
X = jax.random.normal(KEY, [8, 3])
BATCH = X, X @ jnp.array([1.0, -2.0, 0.5])
EXAMPLE = X[0], BATCH[1][0]
PARAMS = {"W": jnp.array([0.5, 0.1, -0.3])}
STEP = jax.tree.map(jnp.ones_like, PARAMS)


def of_example(params, example):
    x, y = example
    return jnp.square(jnp.vdot(params["W"], x) - y)  # a batch does not fit: 3 numbers and 24


def of_example_too(params, example):
    x, y = example
    return jnp.square(x @ params["W"] - y)  # of a batch it is [8]


def of_batch(params, batch):
    x, y = batch
    return jnp.square(x @ params["W"] - y).mean(axis=0)  # one example has no axis left


ANY = {  # take any scalar function of (params, *args)
    "inspect": lambda loss, data: gf.inspect(loss)(PARAMS, data),
    "backprop": lambda loss, data: gf.backprop(loss)(PARAMS, data),
    "nan_origin": lambda loss, data: gf.nan_origin(loss)(PARAMS, data),
    "nan_guard": lambda loss, data: gf.nan_guard(loss)(PARAMS, data),
    "check_grads": lambda loss, data: gf.check_grads(loss)(PARAMS, data),
    "hvp": lambda loss, data: gf.curvature.hvp(loss)(PARAMS, STEP, data),
    "hessian_eigs": lambda loss, data: gf.curvature.hessian_eigs(loss, k=1)(PARAMS, data),
    "sharpness": lambda loss, data: gf.curvature.sharpness(loss, 0.1)(PARAMS, data),
    "hessian_trace": lambda loss, data: gf.curvature.hessian_trace(loss, 2)(PARAMS, data, key=KEY),
    "hessian_diagonal": lambda loss, data: gf.curvature.hessian_diagonal(loss, 2)(PARAMS, data, key=KEY),
    "hessian_spectrum": lambda loss, data: gf.curvature.hessian_spectrum(loss, 2, 3)(PARAMS, data, key=KEY),
    "loss_landscape": lambda loss, data: gf.curvature.loss_landscape(loss, points=3)(PARAMS, data, key=KEY),
}
TRAINING = {  # take the loss of a batch
    "fit": lambda loss: gf.fit(loss, PARAMS, BATCH, optax.sgd(0.1), 1, batch_size=8, progress=False),
    "train_step": lambda loss: gf.train_step(loss, optax.sgd(0.1))(
        gf.train_state(PARAMS, optax.sgd(0.1), KEY), BATCH
    ),
}
PER_EXAMPLE = {  # take the loss of one example, or its batch_mean
    "grads": lambda loss: gf.per_example.grads(loss)(PARAMS, BATCH),
    "norms": lambda loss: gf.per_example.norms(loss)(PARAMS, BATCH),
    "clipped_grads": lambda loss: gf.per_example.clipped_grads(loss, 1.0)(PARAMS, BATCH),
    "noise_scale": lambda loss: gf.per_example.noise_scale(loss)(PARAMS, BATCH),
    "norm_test": lambda loss: gf.per_example.norm_test(loss)(PARAMS, BATCH),
    "grad_cosines": lambda loss: gf.per_example.grad_cosines(loss)(PARAMS, BATCH),
    "fisher_vp": lambda loss: gf.curvature.fisher_vp(loss)(PARAMS, STEP, BATCH),
    "kfac": lambda loss: gf.curvature.kfac(loss)(PARAMS, BATCH),
    "ekfac": lambda loss: gf.curvature.ekfac(loss)(PARAMS, BATCH),
    "influence": lambda loss: gf.attribution.influence(loss)(PARAMS, BATCH, BATCH),
    "tracin": lambda loss: gf.attribution.tracin(loss)([PARAMS], BATCH, BATCH, 0.1),
}


def message(raised):
    return "\n".join([str(raised.value), *getattr(raised.value, "__notes__", ())])


@pytest.mark.parametrize("name", ANY)
def test_any_scalar_function_is_taken_as_it_is(name):
    ANY[name](of_example, EXAMPLE)
    ANY[name](of_batch, BATCH)
    ANY[name](gf.batch_mean(of_example), BATCH)


@pytest.mark.parametrize("loss", [of_example, of_example_too])
@pytest.mark.parametrize("name", ANY)
def test_a_loss_of_one_example_that_meets_a_batch(name, loss):
    with pytest.raises((TypeError, ValueError, IndexError)) as raised:
        ANY[name](loss, BATCH)
    assert "gf.batch_mean(loss)" in message(raised)


@pytest.mark.parametrize("make", [gf.classification_loss, gf.regression_loss, gf.quadratic_loss])
def test_a_loss_of_a_net_that_meets_a_batch(make):
    net = gf.mlp([3, 2])
    batch = X, jnp.arange(8) % 2 if make is gf.classification_loss else jnp.ones([8, 2])
    with pytest.raises(ValueError, match="W1: ") as raised:
        gf.inspect(make(net))(net.init(KEY), batch)
    assert message(raised).count("gf.batch_mean(loss)") == 1


def test_wrong_parameters_are_not_taken_for_a_batch():
    with pytest.raises(gf.ParameterError) as raised:
        gf.inspect(gf.regression_loss(gf.mlp([3, 1])))({"W1": jnp.ones([1, 3])}, EXAMPLE)
    assert "batch_mean" not in message(raised)


@pytest.mark.parametrize("name", TRAINING)
def test_training_takes_the_loss_of_a_batch(name):
    TRAINING[name](of_batch)
    TRAINING[name](gf.batch_mean(of_example))
    net_loss = gf.regression_loss(gf.mlp([3, 1]))
    for loss in (of_example, of_example_too, net_loss, gf.batch_mean(of_example).example):
        with pytest.raises((TypeError, ValueError, IndexError)) as raised:
            TRAINING[name](loss)
        assert "gf.batch_mean(loss)" in message(raised)


@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_per_example_transforms_take_either_form_of_the_loss_of_one_example(name):
    results = [jax.tree.leaves(PER_EXAMPLE[name](loss)) for loss in (of_example, gf.batch_mean(of_example))]
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_a_loss_of_a_batch_that_meets_one_example(name):
    for loss in (of_batch, gf.batch_mean(of_batch)):
        with pytest.raises((TypeError, ValueError, IndexError)) as raised:
            PER_EXAMPLE[name](loss)
        assert "loss of one example" in message(raised)


def test_a_mistake_that_has_nothing_to_do_with_batches_is_left_alone():
    def broken(params, batch):
        return params["V"].sum()

    for call in (*TRAINING.values(), lambda loss: ANY["inspect"](loss, BATCH)):
        with pytest.raises(KeyError) as raised:
            call(broken)
        assert "batch_mean" not in message(raised)


def test_noise_needs_the_loss_of_one_example():
    options = {"batch_size": 8, "progress": False, "noise_every": 1}
    with pytest.raises(ValueError, match=r"Pass gf.batch_mean\(loss\)"):
        gf.fit(of_batch, PARAMS, BATCH, optax.sgd(0.1), 1, **options)
    assert len(gf.fit(gf.batch_mean(of_example), PARAMS, BATCH, optax.sgd(0.1), 1, **options).noise) == 1


def test_a_function_around_a_loss_means_what_it_says():
    """Doubled, the loss is trained on doubled; a loss that was `batch_mean` has no loss of one example any more."""
    mean = gf.batch_mean(of_example)
    step = gf.train_step(lambda params, batch: 2 * mean(params, batch), optax.sgd(0.1))
    state = gf.train_state(PARAMS, optax.sgd(0.1), KEY)
    after, metrics = step(state, BATCH)
    np.testing.assert_allclose(metrics["loss"], 2 * mean(PARAMS, BATCH), rtol=1e-6)
    expected = PARAMS["W"] - 0.2 * jax.grad(mean)(PARAMS, BATCH)["W"]
    np.testing.assert_allclose(after.params["W"], expected, rtol=1e-5)
