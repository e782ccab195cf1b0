"""Learning rates: trainings in parallel equal single ones, how rates are compared, and the outcome."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.experiments import rates


def test_stuck_learning_and_broken():
    ends = [2.3, 2.2, 0.5, 0.1, 2.0, 50.0, np.nan, np.inf]
    losses = np.broadcast_to(np.array(ends)[:, None, None], [8, 3, 20])
    expected = ["stuck", "stuck", "learning", "learning", "broken", "broken", "broken", "broken"]
    assert rates.states_of(losses) == expected
    assert rates.states_of(np.full([2, 1, 5], 2.3)) == ["stuck", "broken"]
    assert rates.states_of(np.full([2, 1, 5], np.nan)) == ["broken", "broken"]
    assert rates.states_of(np.full([1, 1, 5], 9.0)) == ["broken"]


def test_the_end_is_the_last_tenth():
    losses = np.concatenate([np.full([2, 90], 7.0), np.full([2, 10], 1.0)], 1)
    np.testing.assert_array_equal(rates.final(losses), [1.0, 1.0])


def test_the_outcome():
    config, values = rates.Config(seed=3), np.array([0.001, 1.0, 100.0])
    accuracies, states = np.array([[0.1], [0.95], [0.1]]), ["stuck", "learning", "broken"]
    assert rates.judge(config, values, accuracies, states).state == "reached"
    assert rates.judge(config, values, accuracies - 0.1, states).state == "missed"
    assert rates.judge(config, values, accuracies, ["learning", "learning", "broken"]).state == "missed"
    assert rates.judge(config, values, accuracies, ["stuck", "learning", "learning"]).state == "missed"
    assert rates.judge(rates.Config(steps=9), values, accuracies, states).state == "open"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rates": 1}, "rates must be an integer >= 2"), ({"low": 1.0, "high": 0.5}, "low must be < high")],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        rates.Config(**options)


@pytest.mark.slow
def test_parallel_trainings_equal_single_ones(tmp_path):
    config = rates.Config(rates=3, seeds=2, hidden=3, steps=4, folder=str(tmp_path / "run"))
    result = rates.run(config)
    assert result.losses.shape == (3, 2, 4)
    assert {"fan.png", "valley.png", "result.json"} <= {file.name for file in result.folder.iterdir()}

    # One of them, step by step as anyone would write it.
    data, net = gf.data.digits(), gf.mlp([784, 3, 10])
    params = net.init(jax.random.split(jax.random.key(0), 2)[1])
    step = jax.jit(jax.value_and_grad(gf.batch_mean(gf.classification_loss(net))))
    alone = []
    for x, y in list(gf.data.batches(data.train, 32, seed=0))[:4]:
        loss, grads = step(params, (jnp.asarray(x), jnp.asarray(y)))
        params = jax.tree.map(lambda p, g: p - float(result.rates[1]) * g, params, grads)
        alone.append(float(loss))
    np.testing.assert_allclose(result.losses[1, 1], alone, rtol=1e-4)
