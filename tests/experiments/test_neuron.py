"""One node by hand: its weights, its bias, and the outcome."""

import jax.numpy as jnp
import numpy as np
import pytest

from gradfn.experiments import neuron


def test_the_ring_cancels_the_region():
    weights = neuron.node(neuron.Config(top=10, left=8, height=2, width=3, ring=1))
    assert weights.sum() == pytest.approx(0, abs=1e-5)
    np.testing.assert_array_equal(weights[10:12, 8:11], 1)
    around = weights[9:13, 7:12].copy()
    around[1:3, 1:4] = -1
    assert (around < 0).all()
    assert np.count_nonzero(weights) == 4 * 5  # pixels far away have no weight


def test_without_a_ring_only_the_region_has_weights():
    weights = neuron.node(neuron.Config(ring=0))
    assert set(np.unique(weights)) == {0.0, 1.0}
    assert weights.sum() == 5 * 16


def test_a_bias_is_how_much_the_weighted_sum_has_to_be():
    W = jnp.ones([1, 784])
    images = jnp.zeros([2, 784]).at[0, :9].set(1.0).at[1, :11].set(1.0)  # they sum to 9 and 11
    activations = np.asarray(neuron.activation(W, images))
    assert activations.shape == (21, 2)
    np.testing.assert_allclose(activations[10], 1 / (1 + np.exp([10 - 9, 10 - 11])), rtol=1e-5)
    assert (activations[0] > 0.5).all()
    np.testing.assert_array_equal(activations[10] > 0.5, [False, True])


def test_the_outcome():
    labels = np.array([5] * 10 + [0] * 190)
    fires = np.zeros([21, 200], bool)
    fires[0] = True
    fires[10, :8] = True
    assert neuron.judge(neuron.Config(), labels, fires).state == "reached"
    others = fires.copy()
    others[10, 10:20] = True  # fires for as many others
    assert neuron.judge(neuron.Config(), labels, others).state == "missed"
    assert neuron.judge(neuron.Config(), labels, np.zeros_like(fires)).state == "missed"
    assert neuron.judge(neuron.Config(top=3), labels, fires).state == "open"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 28}, "top must be an integer from 0 to 27, got 28"),
        ({"top": 20, "height": 9}, "height must be an integer from 1 to 8, got 9"),
        ({"bias": 3}, "bias must be an integer from -20 to -1, got 3"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        neuron.Config(**options)


@pytest.mark.slow
def test_the_defaults_meet_their_expectation(tmp_path):
    result = neuron.run(neuron.Config(folder=str(tmp_path / "run")))
    assert result.outcome.state == "reached"
    assert result.rates.shape == (21, 10)
    assert (np.diff(result.rates, axis=0) <= 0).all()  # the more inactive, the less it fires
    assert {"node.png", "firing.png", "result.json"} <= {file.name for file in result.folder.iterdir()}
