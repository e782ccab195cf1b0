"""The convolutional network and the vision transformer: reduced runs, pictures, verdicts."""

import numpy as np
import pytest
from gradfn.experiments._common import judge_classifier as judge

from gradfn.experiments import cnn, vit


@pytest.mark.parametrize("experiment", [cnn, vit])
def test_the_outcome_is_judged_for_the_default_options_alone(experiment):
    for data, expected in zip(("digits", "mnist"), experiment.EXPECTED, strict=True):
        config = experiment.Config(data=data, seed=3, data_path="somewhere")
        assert judge(config, experiment.EXPECTED, expected.at_least).state == "reached"
        assert judge(config, experiment.EXPECTED, expected.at_least - 0.001).state == "missed"
        assert judge(experiment.Config(data=data, epochs=1), experiment.EXPECTED, 1.0).state == "open"


@pytest.mark.parametrize(
    ("experiment", "options", "message"),
    [
        (cnn, {"channels": (8, 0)}, "channels must be an integer >= 1, got 0"),
        (cnn, {"rate": -1.0}, "rate must be a finite number > 0"),
        (vit, {"patch": 5}, "patch must divide 28, got 5"),
        (vit, {"heads": 3}, "heads must divide the width of 64, got 3"),
    ],
)
def test_options_out_of_range_are_named(experiment, options, message):
    with pytest.raises(ValueError, match=message):
        experiment.Config(**options)


def test_the_title_of_the_attention_says_whether_it_goes_to_ink():
    images = np.zeros([3, 28, 28])
    images[:, :14] = 1  # half of the 16 patches
    even = np.full([3, 2, 16, 16], 1 / 16)
    on_ink = np.zeros([3, 2, 16, 16])
    on_ink[..., :8] = 1 / 8
    figure = vit.attention(images, {"block 0": even, "block 1": even, "block 2": on_ink})
    assert figure.get_suptitle() == (
        "In block 2 the attention goes to ink: patches with ink, 50 % of all, get 50 % of the attention in block 0, "
        "100 % in block 2"
    )
    assert len(figure.axes) == 6
    assert [panel.get_ylabel() for panel in figure.axes[::3]] == ["block 0", "block 2"]
    title = vit.attention(images, {"block 0": even, "block 1": even}).get_suptitle()
    assert title.startswith(
        "No block prefers ink: patches with ink, 50 % of all, get 50 % of the attention in block 0, 50 %"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "options", "pictures"),
    [
        (
            cnn,
            {"channels": (4, 4), "hidden": 16, "epochs": 2},
            {"filters.png", "maps.png", "cnn_net.safetensors"},
        ),
        (vit, {"layers": 1, "width": 16, "hidden": 16, "epochs": 2}, {"attention.png"}),
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
