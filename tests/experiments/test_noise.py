"""The noise experiment: a reduced run, and its outcome."""

import json

import numpy as np
import pytest
from gradfn.experiments.noise import Config, judge, run, scale


@pytest.mark.slow
def test_a_reduced_run(tmp_path, capsys):
    result = run(Config(hidden=4, epochs=2, batch=128, every=3, folder=str(tmp_path / "run")))
    files = {file.name for file in result.folder.iterdir()}
    assert {"noise.png", "largest.png", "agreement.png", "noise.jsonl", "result.json"} <= files
    assert [row["step"] for row in result.noise] == list(range(0, 18, 3))
    stored = json.loads((result.folder / "result.json").read_text())
    np.testing.assert_allclose(stored["second"], result.second)
    assert result.outcome.state == "open"
    assert str(result.outcome) in capsys.readouterr().out


def test_verdict():
    assert judge(Config(), 10.0, 25.0, 20.0).state == "reached"
    assert judge(Config(seed=7), 10.0, 25.0, 20.0).state == "reached"
    for first, second, estimate in [(10.0, 15.0, 15.0), (10.0, 30.0, 70.0), (10.0, 30.0, float("nan"))]:
        assert judge(Config(), first, second, estimate).state == "missed"
    assert judge(Config(epochs=3), 10.0, 25.0, 20.0).state == "open"


def test_scale_is_a_ratio_of_sums():
    rows = [{"gradient_square": 1.0, "variance": 8.0}, {"gradient_square": 3.0, "variance": 0.0}]
    assert scale(rows) == 2.0
    assert np.isnan(scale([{"gradient_square": -1.0, "variance": 8.0}]))


def test_options_out_of_range_are_named():
    with pytest.raises(ValueError, match="batch must be an integer >= 2, got 1"):
        Config(batch=1)
    with pytest.raises(ValueError, match="rate must be a finite number > 0"):
        Config(rate=0.0)
