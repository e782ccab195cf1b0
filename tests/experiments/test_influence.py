"""The experiment influence: its score, its verdict, and a reduced run."""

import jax
import numpy as np
import pytest

from gradfn.experiments import influence
from gradfn.runs.outcome import read_result


def test_the_datamodeling_score_is_a_rank_correlation():
    rng = np.random.default_rng(0)
    subsets = (rng.random([40, 12]) < 0.5).astype(float)
    scores = rng.normal(size=[3, 12])
    exact = -subsets @ scores.T
    score = influence.linear_datamodeling_score
    assert score(scores, subsets, exact) == pytest.approx(1)
    assert score(scores, subsets, np.exp(exact)) == pytest.approx(1)
    assert score(-scores, subsets, exact) == pytest.approx(-1)
    mixed = np.stack([exact[:, 0], -exact[:, 1], exact[:, 2]], 1)
    assert score(scores, subsets, mixed) == pytest.approx(1 / 3)


def test_masks_remove_the_digits_that_helped_most():
    scores = {"a": np.arange(8 * 30.0).reshape(8, 30), "b": -np.ones([8, 1]) * np.arange(30)}
    masks, names = influence.masks_without(scores, 30, influence.Config())
    assert names == ["a", "b", "random"]
    assert masks.shape == (25, 30)
    np.testing.assert_array_equal(masks.sum(1), [30, *[20] * 24])
    np.testing.assert_array_equal(masks[1], [1] * 20 + [0] * 10)
    np.testing.assert_array_equal(masks[9], [0] * 10 + [1] * 20)


def test_the_outcome_needs_scores_and_training_again():
    losses, scores = np.full(8, 0.1), {"gradients": 0.4, "EK-FAC": 0.7, "conjugate gradients": 0.8}
    without = {"EK-FAC": np.full(8, 0.9), "random": np.full(8, 0.12)}
    judge, config = influence.judge, influence.Config(seed=3)
    assert judge(config, scores, losses, without).state == "reached"
    assert judge(config, scores | {"EK-FAC": 0.5}, losses, without).state == "missed"
    assert judge(config, scores, losses, without | {"EK-FAC": np.full(8, 0.12)}).state == "missed"
    assert judge(influence.Config(nets=1), scores, losses, without).state == "open"


@pytest.mark.slow
def test_a_reduced_run(tmp_path):
    config = influence.Config(examples=64, subsets=4, nets=1, steps=40, folder=str(tmp_path))
    # optax's Adam multiplies floats and integers.
    with jax.numpy_dtype_promotion("standard"):
        result = influence.run(config)
    assert {"influence.png", "agreement.png", "result.json"} <= {file.name for file in tmp_path.iterdir()}
    assert result.scores["EK-FAC"].shape == (50, 64)
    assert all(np.isfinite(scores).all() for scores in result.scores.values())
    assert -1 <= result.datamodeling["EK-FAC"] <= 1
    assert read_result(tmp_path)["outcome"] == result.outcome
