"""The convolutional network and the vision transformer: reduced runs, pictures, verdicts."""

import numpy as np
import pytest

from experiments import cnn, vit


@pytest.mark.parametrize("experiment", [cnn, vit])
def test_the_verdict_holds_for_what_was_promised_alone(experiment):
    for data, promised in experiment.PROMISED.items():
        config = experiment.Config(data=data, seed=3, data_path="somewhere")
        assert experiment.judge(config, promised).endswith("%: reached")
        assert experiment.judge(config, promised - 0.001).endswith("NOT reached")
        assert "nothing was promised" in experiment.judge(experiment.Config(data=data, epochs=1), 1.0)


@pytest.mark.parametrize(
    ("experiment", "options", "message"),
    [
        (cnn, {"channels": (8, 0)}, "channels must be an integer >= 1, got 0"),
        (cnn, {"rate": -1.0}, "rate must be a finite number > 0"),
        (vit, {"patch": 5}, "patch: a number that divides 28, came 5"),
        (vit, {"heads": 3}, "heads: a number that divides the width of 64, came 3"),
    ],
)
def test_options_out_of_range_are_named(experiment, options, message):
    with pytest.raises(ValueError, match=message):
        experiment.Config(**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "options", "pictures"),
    [
        (cnn, {"channels": (4, 4), "hidden": 16, "epochs": 2}, {"filters.png", "maps.png"}),
        (vit, {"layers": 1, "width": 16, "hidden": 16, "epochs": 2}, {"patches.png", "attention.png"}),
    ],
)
def test_a_run_learns_and_draws(experiment, options, pictures, tmp_path):
    result = experiment.run(experiment.Config(**options, folder=str(tmp_path / "run")))
    files = {file.name for file in result.folder.iterdir()}
    assert pictures | {"curves.png", "confusion.png", "mistakes.png", "result.json"} <= files
    assert len(result.history) == 2
    assert result.history[1]["loss"] < result.history[0]["loss"]
    assert 0.1 < result.test_accuracy <= 1
    assert np.isfinite(result.test_accuracy)
