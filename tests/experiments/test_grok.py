"""Grokking: the task, the measurements, and the outcome."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradfn.experiments import grok


def test_every_sum_is_either_trained_on_or_not():
    train, test = grok.sums(5, 0.4, seed=3)
    assert len(train[1]) == 10
    pairs = np.concatenate([train[0], test[0]])
    assert {tuple(pair) for pair in pairs.tolist()} == {(a, b) for a in range(5) for b in range(5)}
    np.testing.assert_array_equal(np.concatenate([train[1], test[1]]), pairs.sum(1) % 5)


def test_waves_are_waves():
    numbers = np.arange(7)
    pure = np.stack([3 * np.cos(2 * np.pi * k * numbers / 7 + k) + 5 for k in (1, 2, 3)], 1)
    assert grok.wave_share(jnp.asarray(pure, jnp.float32)) == pytest.approx(1)
    two = pure[:, :1] + pure[:, 1:2]
    assert grok.wave_share(jnp.asarray(two, jnp.float32)) == pytest.approx(0.5)


def test_waves_add_modulo():
    """The network can represent the sum by cosines of frequency k in A, B and W, as Gromov shows."""
    modulus, rng = 7, np.random.default_rng(0)
    k, phase, other = rng.integers(1, 4, 3000), *rng.uniform(0, 2 * np.pi, [2, 3000])
    angles = 2 * np.pi * k * np.arange(modulus)[:, None] / modulus  # [numbers, nodes]
    params = {"A": np.cos(angles + phase), "B": np.cos(angles + other), "W": np.cos(angles + phase + other)}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    everything, _ = grok.sums(modulus, 0.99, 0)
    net = grok.adder(modulus, 3000)
    predictions = jax.vmap(net.apply, (None, 0))(params, everything[0]).argmax(-1)
    np.testing.assert_array_equal(predictions, everything[1])


def test_the_first_step_at_a_level():
    history = [{"step": 10, "x": 0.5}, {"step": 20, "x": 0.99}, {"step": 30, "x": 1.0}]
    assert grok.first(history, "x", 0.99) == 20
    assert grok.first(history[:1], "x", 0.99) is None


def test_the_outcome():
    config = grok.Config(seed=9)
    assert grok.judge(config, 100, 1000, 0.02).state == "reached"
    assert grok.judge(config, 100, 999, 0.02).state == "missed"
    assert grok.judge(config, 100, None, 0.02).state == "missed"
    assert grok.judge(config, None, None, 0.02).state == "missed"
    assert grok.judge(config, 100, 1000, 0.2).state == "missed"
    assert grok.judge(grok.Config(steps=100), 100, 1000, 0.02).state == "open"


@pytest.mark.slow
def test_a_run_resumes_and_draws(tmp_path):
    config = grok.Config(modulus=7, hidden=16, steps=200, folder=str(tmp_path / "run"))
    result = grok.run(config)
    assert {"grok.png", "waves.png", "result.json"} <= {file.name for file in result.folder.iterdir()}
    assert result.memorized is not None
    last = {name: history[-1] for name, history in result.histories.items()}
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in result.params["decay"].values()))
    assert last["decay"]["weight_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert last["decay"]["weight_norm"] < last["no decay"]["weight_norm"]
    again = grok.run(grok.Config(resume=True, folder=str(tmp_path / "run")))
    assert again.histories == result.histories
