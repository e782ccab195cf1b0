"""The regression: its predictions, their gradients, and the outcome."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.experiments import regress


def test_r2_is_1_for_the_truth_and_0_for_the_mean():
    truth = np.array([1.0, 2.0, 6.0])
    assert regress.r2(truth, truth) == 1
    assert regress.r2(truth, np.full(3, 3.0)) == 0
    assert regress.r2(truth, np.full(3, 4.0)) < 0


def test_the_outcome():
    config = regress.Config(seed=1)
    assert regress.judge(config, {"network": 0.35, "linear regression": 0.37}).state == "reached"
    assert regress.judge(config, {"network": 0.35, "linear regression": 0.39}).state == "missed"
    assert regress.judge(config, {"network": 0.29, "linear regression": 0.2}).state == "missed"
    others = {"network": 0.5, "linear regression": 0.1}
    assert regress.judge(regress.Config(nets=2), others).state == "open"


@pytest.mark.slow
def test_what_it_predicts_and_its_slopes(tmp_path):
    result = regress.run(regress.Config(nets=2, steps=60, rate=0.05, folder=str(tmp_path / "run")))
    assert {"predictions.png", "slopes.png", "curves.png"} <= {file.name for file in result.folder.iterdir()}
    data, net = gf.data.diabetes(), gf.mlp([10, 5, 1])
    x, _ = data.test
    # [nets, patients, 1]
    predictions = jax.vmap(jax.vmap(net.apply, (None, 0)), (0, None))(result.params, jnp.asarray(x))
    expected = np.asarray(predictions).mean((0, 2)) * data.target_std + data.target_mean
    np.testing.assert_allclose(result.predictions["network"], expected, rtol=1e-4)
    assert result.r2["network"] > 0.1  # it has learned

    def of_third(value):  # of the first patient
        changed = jnp.asarray(x[0]).at[2].set(value)
        return jnp.mean(jax.vmap(net.apply, (0, None))(result.params, changed)) * data.target_std

    step = 1e-2
    slope = (of_third(x[0, 2] + step) - of_third(x[0, 2] - step)) / (2 * step)
    assert result.slopes[0, 2] == pytest.approx(float(slope), rel=1e-2)
