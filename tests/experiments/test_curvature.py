"""The experiment curvature: a short run writes its pictures, and the default one keeps its promise."""

import numpy as np
import pytest
from gradfn.experiments.curvature import Config, judge, run

from gradfn.runs.outcome import read_result


@pytest.mark.slow
def test_a_short_run_draws_and_finds_the_largest_eigenvalue(tmp_path):
    result = run(Config(hidden=2, rates=(0.1,), steps=20, every=10, folder=str(tmp_path / "run")))
    files = {file.name for file in result.folder.iterdir()}
    assert {"sharpness.png", "spectrum.png", "landscape.png", "config.json", "result.json"} <= files
    assert [row["step"] for row in result.histories[0.1]] == [0, 10, 20]
    # The last sharpness of the history and the first of the ten eigenvalues are one number, found twice.
    np.testing.assert_allclose(result.eigenvalues[0], result.histories[0.1][-1]["sharpness"], rtol=1e-4)
    assert read_result(result.folder)["outcome"] == result.outcome
    assert result.outcome.state == "open"


@pytest.mark.parametrize(
    ("ends", "accuracy", "state"),
    [
        ((14.0, 9.8, 5.1), 0.95, "reached"),
        ((14.0, 7.0, 5.1), 0.95, "missed"),
        ((21.0, 9.8, 5.1), 0.95, "missed"),
        ((14.0, 9.8, 5.1), 0.5, "missed"),
    ],
)
def test_the_outcome_needs_all_expectations(ends, accuracy, state):
    histories = {
        rate: [{"step": 0, "sharpness": end}] for rate, end in zip((0.1, 0.2, 0.4), ends, strict=True)
    }
    assert judge(Config(), histories, dict.fromkeys(histories, accuracy)).state == state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": ()}, "rates must have at least one number"),
        ({"rates": (0.1, -1.0)}, "rates must be a finite number > 0"),
        ({"every": 0}, "every"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)
