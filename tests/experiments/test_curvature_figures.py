"""Pictures of curvature: their panels and titles."""

import numpy as np
import pytest
from gradfn.experiments.curvature import edge_of_stability, landscape, late_sharpness, spectrum


def history(end):
    return [{"step": 10 * i, "sharpness": 3.0 if i < 3 else end, "loss": 1.0 / (1 + i)} for i in range(12)]


def test_edge_of_stability_names_the_rates_that_end_at_their_limit():
    figure = edge_of_stability({0.1: history(12.0), 0.4: history(4.8)})
    assert figure.get_suptitle().endswith("sharpness 4.8 of 2 / 0.4 = 5")
    upper, lower = figure.axes
    lines = {tuple(line.get_ydata()) for line in upper.lines}
    assert (20.0, 20.0) in lines  # the limit of rate 0.1
    assert (5.0, 5.0) in lines
    assert len(lower.lines) == 2
    assert "No sharpness" in edge_of_stability({0.1: history(12.0)}).get_suptitle()
    with pytest.raises(ValueError, match="rows for each"):
        edge_of_stability({0.1: []})
    assert late_sharpness(history(4.8)) == 4.8


def test_spectrum_says_how_many_are_above_a_tenth_of_the_largest():
    grid = np.linspace(-2, 12, 1401)
    density = np.where(np.abs(grid) < 0.5, 0.99, 0.0) + np.where(np.abs(grid - 10) < 0.5, 0.01, 0.0)
    figure = spectrum({"in the end": (grid, density)}, 1000, [9.0, 10.0], 10.2, limit=5.0)
    assert figure.get_suptitle().startswith("In the end, about 10 of 1,000 directions")
    assert figure.axes[0].get_yscale() == "log"
    assert any(list(line.get_xdata()) == [10.0, 9.0] for line in figure.axes[0].lines)


def test_landscape_compares_the_sharpest_direction_with_a_random_one():
    x = np.linspace(-1, 1, 11)
    plane = 1 + x[:, None] ** 2 + 3 * x[None, :] ** 2
    figure = landscape(x, plane, {"sharp": (x, 1 + 8 * x**2), "random": (x, 1 + x**2)}, 16.0)
    assert "8 times as much" in figure.get_suptitle()
    parabola = figure.axes[0].lines[-1]
    np.testing.assert_allclose(parabola.get_ydata(), 1 + 8 * x**2)
