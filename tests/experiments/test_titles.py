"""The numbers in pictures' titles are those of the outcome; see conftest.py, which checks every run of these tests."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from gradfn import cli, runs
from gradfn.experiments import backprop, curvature, noise, rnn
from gradfn.pages.figures import curves, save
from gradfn.runs.about import read_about

# Titles without a number of the outcome, or that the tests below compare.
OTHERS = {"backprop", "curvature", "neuron", "saliency"}


@pytest.fixture
def check(request):
    """Return the check that conftest.py applies to every run, and its table."""
    plugins = request.config.pluginmanager.get_plugins()
    return next(each for each in plugins if hasattr(each, "figures_that_differ"))


def test_every_experiment_is_checked(check):
    assert set(check.SHARED) | OTHERS >= set(cli.experiments())


def test_a_title_with_other_figures_than_the_outcome_is_found(check, tmp_path):
    rows = [{"step": s, "scale": 66.0, "running_scale": 66.0} for s in range(9)]
    outcome = noise.judge(noise.Config(), 38.0, 177.0, 164.0)
    for scales, differ in {
        (66.0, 135.0): [("noise", "66", 38.0), ("noise", "135", 177.0)],
        (38.0, 177.0): [],
    }.items():
        save(noise.noise_over_training(rows, 32, (), scales), tmp_path / "noise.png")
        assert check.figures_that_differ("noise", tmp_path, outcome) == differ
    figure = Figure()
    figure.suptitle("97 % of 360 test digits right")
    save(figure, tmp_path / "confusion.png")
    for accuracy, differ in {0.974: [], 0.964: [("confusion", "97", 0.964)]}.items():
        outcome = runs.Outcome({"test accuracy": accuracy})
        assert check.figures_that_differ("digits", tmp_path, outcome) == differ


def test_curves_report_what_was_measured_at_the_end():
    history = [{"step": 60, "loss": 2.0, "validation_loss": 2.54}]
    title = curves(history, ends={"validation_loss": 2.559, "else": 1.0}).get_suptitle()
    assert title == "After 60 steps: training loss 2, validation loss 2.56"


def test_sharpness_in_the_title_over_its_limit_is_that_of_the_outcome():
    rows = lambda late: [{"step": s, "sharpness": late, "loss": 1.0} for s in range(4)]  # noqa: E731
    histories = {0.1: rows(12.0), 0.2: rows(9.87), 0.4: rows(5.1)}
    outcome = curvature.judge(curvature.Config(), histories, dict.fromkeys(histories, 0.9))
    title = curvature.edge_of_stability(histories).get_suptitle()
    for rate in (0.2, 0.4):
        late = histories[rate][0]["sharpness"]
        assert f"{late:.3g} of 2 / {rate:g}" in title
        assert outcome.measured[f"sharpness * rate / 2 at rate {rate:g}"] == late * rate / 2


def test_gradients_in_the_title_have_the_ratio_of_the_outcome():
    sizes = {"vanilla": np.geomspace(2e-3, 1.0, 50), "lstm": np.geomspace(0.5, 1.0, 50)}
    title = rnn.gradient_through_time(sizes).get_suptitle()
    assert title == "49 steps back from the last step: lstm keeps 50 % of the gradient, vanilla 1/500"
    data = type("data", (), {"sha256": ""})
    outcome = rnn.judge(rnn.Config(steps=9), data, dict.fromkeys(sizes, 2.0), sizes)
    assert outcome.measured["LSTM gradient / vanilla gradient"] == pytest.approx(250)


def test_the_worst_difference_in_the_title_is_the_largest_of_the_outcome():
    errors = {
        way: {"W1": 2e-13 * 10**i, "W2": 0.0}
        for i, way in enumerate(["jax.grad", "gf.backprop", "finite differences"])
    }
    grads = {way: {"W1": np.ones([2, 4]), "W2": np.ones([3, 2])} for way in ("by hand", *errors)}
    assert backprop.agreement(grads, errors, 0, (2, 2)).get_suptitle().endswith("agree to 2e-11")
    assert backprop.judge(errors).measured["error of finite differences"] == pytest.approx(2e-11)


def test_the_table_in_the_readme_has_the_expectations_of_each_experiment():
    page = Path(cli.__file__).parents[1] / "experiments" / "README.md"
    cells = [
        line.split(" | ") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    ]
    expected = {row[0].strip("| `"): row[2] for row in cells}
    assert expected == {
        name: runs.listed(read_about(file).expected) for name, file in cli.experiments().items()
    }
