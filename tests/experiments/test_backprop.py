"""One gradient in four ways: they agree, and a disagreement is reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.experiments import backprop


def test_finite_differences_are_those_of_every_parameter(x64):
    params = {"W": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.array([5.0])}

    def loss(params, example):  # whose gradient is example times 3 W^2, and cos b
        return example * jnp.sum(params["W"] ** 3) + jnp.sum(jnp.sin(params["b"]))

    found = backprop.finite_differences(loss, params, 2.0)
    np.testing.assert_allclose(found["W"], 6 * params["W"] ** 2, rtol=1e-8)
    np.testing.assert_allclose(found["b"], jnp.cos(params["b"]), rtol=1e-7)


def test_an_error_is_a_share_of_the_largest_gradient():
    by_hand = {"W1": np.array([[1.0, -4.0]]), "b1": np.zeros(2)}
    found = {"W1": np.array([[1.5, -4.0]]), "b1": np.zeros(2)}
    assert backprop.errors_against(by_hand, found) == {"W1": 0.125, "b1": 0.0}


def test_the_outcome():
    bounds = {each.name.removeprefix("error of "): each.at_most for each in backprop.EXPECTED}
    good = {way: {"W1": bound / 2, "b1": 0.0} for way, bound in bounds.items()}
    assert backprop.judge(good).state == "reached"
    for way, bound in bounds.items():
        for wrong in (bound * 2, float("nan")):
            assert backprop.judge(good | {way: {"W1": 0.0, "b1": wrong}}).state == "missed"


def test_an_example_out_of_range_does_not_start_a_run(tmp_path):
    with pytest.raises(ValueError, match="example: there are 1,257 training digits, got number 1257"):
        backprop.run(backprop.Config(example=1257, folder=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_agrees_with_float32_gradients_and_draws(tmp_path):
    result = backprop.run(backprop.Config(hidden=2, example=7, seed=3, folder=str(tmp_path / "run")))
    assert result.outcome.state == "reached"
    files = {file.name for file in result.folder.iterdir()}
    assert {"equations.png", "agree.png", "gradients.png", "steps.txt", "result.json"} <= files
    net = gf.mlp([784, 2, 10])
    images, labels = gf.data.digits().train
    plain = jax.grad(gf.classification_loss(net))(net.init(jax.random.key(3)), (images[7], labels[7]))
    for found in result.grads.values():
        assert set(found) == set(plain)
        np.testing.assert_allclose(found["W1"], plain["W1"], rtol=1e-3, atol=1e-6)
