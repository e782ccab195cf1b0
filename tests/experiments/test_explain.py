"""Explanations of a net: the experiments saliency, reconstruct and regions; reduced runs, pictures, verdicts."""

import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.attribution import Randomized
from gradfn.experiments import reconstruct, regions, saliency
from gradfn.runs.outcome import read_result


def both_tests(rank):
    return (Randomized(("W",), np.array([0.0]), np.array([rank]), np.zeros([2, 1, 4])),) * 2


def test_the_outcome_of_saliency_needs_all_three():
    good = {"saliency": both_tests(0.1), "edge detector": both_tests(1.0)}
    judge, config = saliency.judge, saliency.Config(seed=7)
    assert judge(config, 0.001, good).state == "reached"
    assert judge(config, 0.02, good).state == "missed"
    assert judge(config, 0.001, good | {"saliency": both_tests(0.6)}).state == "missed"
    assert judge(config, 0.001, good | {"edge detector": both_tests(0.1)}).state == "missed"
    assert (
        judge(config, 0.001, good | {"saliency": (*both_tests(0.1)[:1], both_tests(0.9)[0])}).state
        == "missed"
    )
    assert judge(saliency.Config(steps=3), 0.0, good).state == "open"


def test_the_outcomes_of_reconstruct_and_regions():
    assert reconstruct.judge(reconstruct.Config(data="mnist"), 9).state == "reached"
    assert reconstruct.judge(reconstruct.Config(), 8).state == "missed"
    assert reconstruct.judge(reconstruct.Config(climb=2), 10).state == "open"
    shares = {"top half": 0.2, "left half": 0.4, "region 3": 0.3}
    judge = regions.judge
    assert judge(regions.Config(), shares, 1e-7).state == "reached"
    assert judge(regions.Config(), shares | {"left half": 0.3}, 1e-7).state == "missed"
    assert judge(regions.Config(), shares | {"region 0": 0.4}, 1e-7).state == "missed"
    assert judge(regions.Config(), shares, 1e-3).state == "missed"
    assert judge(regions.Config(epochs=1), shares, 1e-7).state == "open"


@pytest.mark.parametrize(
    ("experiment", "options", "message"),
    [
        (saliency, {"path": 0}, "path must be an integer >= 1, got 0"),
        (reconstruct, {"noise": -1.0}, "noise must be a finite number >= 0, got -1.0"),
        (regions, {"hidden": 0}, "hidden must be an integer >= 1, got 0"),
    ],
)
def test_options_out_of_range_are_named(experiment, options, message):
    with pytest.raises(ValueError, match=message):
        experiment.Config(**options)


def test_falls_are_means_over_the_digits_of_a_class():
    labels = jnp.array([0, 1, 1])
    everything = jnp.zeros((3, 10)).at[jnp.arange(3), labels].set(0.9)
    without = jnp.full((3, 4, 10), 0.5).at[1, 2, 1].set(0.1).at[:, :, 5].set(7.0)
    falls = regions.class_falls(everything, without, labels, classes=2)
    np.testing.assert_allclose(falls, [[[0.4, 0.4], [0.4, 0.4]], [[0.4, 0.4], [0.6, 0.4]]], rtol=1e-5)


def test_correlations_do_not_depend_on_the_amount_of_ink():
    a = np.array([[0.0, 1.0, 2.0, 5.0], [1.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(reconstruct.correlations(a, 0.1 * a + 3), np.corrcoef(a), rtol=1e-6)


@pytest.mark.slow
def test_reduced_runs_learn_and_draw(tmp_path, monkeypatch):
    monkeypatch.setattr(saliency, "STEPS_MEMORIZED", 200)
    few, methods = ("saliency", "gradient x input", "edge detector"), saliency.explanations
    monkeypatch.setattr(saliency, "explanations", lambda *args: {name: methods(*args)[name] for name in few})
    small = gf.mlp([784, 8, 10])  # convolutions take long to compile, and are climbed in test_maximize
    monkeypatch.setattr(reconstruct.gf, "cnn", lambda *args: small)
    made = {
        saliency: ({"steps": 100, "path": 4}, {"maps.png", "tests.png", "influence.png", "kept"}),
        reconstruct: ({"steps": 60, "climb": 4}, {"wanted.png"}),
        regions: ({"epochs": 2}, {"remains.png", "deciding.png", "sums.png"}),
    }
    for experiment, (options, pictures) in made.items():
        folder = tmp_path / experiment.__name__
        result = experiment.run(experiment.Config(**options, folder=str(folder)))
        assert pictures | {"result.json", "metrics.jsonl"} <= {file.name for file in folder.iterdir()}
        assert 0.3 < result.test_accuracy <= 1
        assert read_result(folder)["outcome"] == result.outcome
        assert result.outcome.state == "open"
        if experiment is saliency:
            assert result.gap < 1
            assert not result.tests["edge detector"][0].passed
            assert 0 <= result.same_label <= 1
        if experiment is regions:
            assert result.error < 1e-5
            assert result.right_from["all"] == pytest.approx(result.test_accuracy)
