"""The search over widths: the candidates, the choice, and the outcome."""

import numpy as np
import pytest
from gradfn.experiments.width import Config, Tried

import gradfn as gf
from gradfn.experiments import width


def test_every_shape_that_is_not_too_large_is_tried_and_the_base_case():
    assert width.shapes(Config(widths=(4, 8), depths=(1, 2)), 397) == [
        (4, 1),
        (8, 1),
        (397, 1),
        (4, 2),
        (8, 2),
    ]
    assert width.shapes(Config(widths=(4, 64), depths=(1,), most=10_000), 397) == [(4, 1), (397, 1)]
    everything = width.shapes(Config(), gf.hidden_width(784, 10))
    assert len(everything) == 22
    assert (397, 1) in everything


BASE = Tried(397, 1, 300_000, 1.0, np.array([0.95, 0.97]), np.array([0.95, 0.96]))
BEST = Tried(794, 1, 600_000, 2.0, np.array([0.98, 0.98]), np.array([0.955, 0.965]))
SMALL = Tried(16, 1, 12_000, 0.1, np.array([0.94, 0.94]), np.array([0.94, 0.95]))


def test_the_smallest_is_the_cheapest_that_is_nearly_as_good():
    assert width.smallest([BASE, BEST, SMALL], BEST, 0.016) is SMALL
    assert width.smallest([BASE, BEST, SMALL], BEST, 0.01) is BASE


def test_the_outcome():
    tried = [BASE, BEST, SMALL]
    assert width.judge(Config(seed=2), tried, BASE, BEST).state == "reached"
    better = BEST._replace(test=np.array([0.96, 0.98]))
    assert width.judge(Config(), [BASE, better, SMALL], BASE, better).state == "missed"
    assert width.judge(Config(), [BASE, BEST], BASE, BEST).state == "missed"
    assert width.judge(Config(epochs=1), tried, BASE, BEST).state == "open"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (4, 0)}, "widths must be an integer >= 1"),
        ({"depths": (0,)}, "depths must be an integer >= 1"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


@pytest.mark.slow
def test_a_run_tries_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(gf, "hidden_width", lambda n_in, n_out: 3)
    options = {"widths": (2,), "depths": (1,), "seeds": 2, "epochs": 3, "batch": 64}
    result = width.run(Config(**options, folder=str(tmp_path / "run")))
    assert [(one.width, one.depth, one.parameters) for one in result.tried] == [(2, 1, 1600), (3, 1, 2395)]
    assert result.base.width == 3
    assert result.best.validation.mean() == max(one.validation.mean() for one in result.tried)
    assert all(one.test.shape == (2,) and 0 <= one.test.min() <= one.test.max() <= 1 for one in result.tried)
    assert result.tried[0].test[0] != result.tried[0].test[1]  # seeds differ
    assert {"trade.png", "map.png", "result.json"} <= {file.name for file in result.folder.iterdir()}
