"""The figures in pictures' titles are those of the verdict; see conftest.py, which checks every run of these tests."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import backprop, curvature, noise, rnn
from gradfn import cli
from gradfn.report.backprop import agreement
from gradfn.report.curvature import edge_of_stability
from gradfn.report.figures import curves, save
from gradfn.report.noise import noise_over_training
from gradfn.report.sequences import gradient_through_time

# Titles without a figure that the verdict has, or that the tests below compare.
OTHERS = {"backprop", "curvature", "saliency", "__init__"}


@pytest.fixture
def check(request):
    """Return the check that conftest.py applies to every run, and its table."""
    plugins = request.config.pluginmanager.get_plugins()
    return next(each for each in plugins if hasattr(each, "figures_that_differ"))


def test_every_experiment_is_checked(check):
    assert set(check.SHARED) | OTHERS >= set(cli.experiments())


def test_a_title_with_other_figures_than_the_verdict_is_found(check, tmp_path):
    # As it was: medians of the running estimate in the title, exact measures in the verdict.
    rows = [{"step": s, "scale": 66.0, "running_scale": 66.0} for s in range(9)]
    verdict = noise.judge(noise.Config(), 38.0, 177.0, 164.0)
    for scales, differ in {
        (66.0, 135.0): [("noise", "66", "38"), ("noise", "135", "177")],
        (38.0, 177.0): [],
    }.items():
        save(noise_over_training(rows, 32, (), scales), tmp_path / "noise.png")
        assert check.figures_that_differ("noise", tmp_path, verdict) == differ
    figure = Figure()
    figure.suptitle("97 % of 360 test digits right")
    save(figure, tmp_path / "confusion.png")
    assert check.figures_that_differ("digits", tmp_path, "test accuracy 97.4 %") == []
    assert check.figures_that_differ("digits", tmp_path, "test accuracy 96.4 %") == [
        ("confusion", "97", "96.4")
    ]


def test_curves_report_what_was_measured_at_the_end():
    history = [{"step": 60, "loss": 2.0, "validation_loss": 2.54}]
    title = curves(history, ends={"validation_loss": 2.559, "else": 1.0}).get_suptitle()
    assert title == "After 60 steps: training loss 2, validation loss 2.56"


def test_sharpness_in_the_title_over_its_limit_is_that_of_the_verdict():
    rows = lambda late: [{"step": s, "sharpness": late, "loss": 1.0} for s in range(4)]  # noqa: E731
    histories = {0.1: rows(12.0), 0.2: rows(9.87), 0.4: rows(5.1)}
    verdict = curvature.judge(curvature.Config(), histories, dict.fromkeys(histories, 0.9))
    title = edge_of_stability(histories).get_suptitle()
    for rate in (0.2, 0.4):
        late = histories[rate][0]["sharpness"]
        assert f"{late:.3g} of 2 / {rate:g}" in title
        assert f"{late * rate / 2:.2f} for {rate:g}" in verdict


def test_gradients_in_the_title_have_the_ratio_of_the_verdict():
    sizes = {"vanilla": np.geomspace(2e-3, 1.0, 50), "lstm": np.geomspace(0.5, 1.0, 50)}
    title = gradient_through_time(sizes).get_suptitle()
    assert "vanilla 1/500, lstm 50 %" in title
    data = type("data", (), {"sha256": ""})
    assert "is 250 times" in rnn.judge(rnn.Config(steps=9), data, {}, sizes)


def test_the_worst_difference_in_the_title_is_the_largest_of_the_verdict():
    errors = {way: {"W1": 2e-13 * 10**i, "W2": 0.0} for i, way in enumerate(backprop.PROMISED)}
    grads = {way: {"W1": np.ones([2, 4]), "W2": np.ones([3, 2])} for way in ("by hand", *errors)}
    assert agreement(grads, errors, 0, (2, 2)).get_suptitle().endswith("agree to 2e-11")
    assert "finite differences 2e-11;" in backprop.judge(errors)
