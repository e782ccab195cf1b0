"""Figures of attribution maps: their panels, titles and color scales."""

import numpy as np
import pytest
from gradfn.experiments.reconstruct import image_rows
from gradfn.experiments.regions import heat_over_images, remains
from gradfn.experiments.saliency import influences, randomized_maps, signed_maps

RNG = np.random.default_rng(0)
IMAGES = RNG.random([3, 8, 8])


def shown(panel):
    return np.asarray(panel.images[0].get_array())


def test_each_map_is_on_its_own_diverging_scale_around_zero():
    maps = RNG.normal(size=[3, 4, 4])
    figure = signed_maps(IMAGES, {"a": maps, "b": 100 * maps}, "Three", ["x", "y", "z"])
    panels = figure.axes[:9]
    assert [panel.get_title() for panel in panels[:3]] == ["image", "a", "b"]
    assert [panel.get_ylabel() for panel in panels[::3]] == ["x", "y", "z"]
    for panel in [*panels[1::3], *panels[2::3]]:
        assert (panel.images[0].get_clim(), panel.images[0].cmap.name) == ((-1, 1), "RdBu_r")
        assert tuple(panel.images[0].get_extent()) == (-0.5, 7.5, 7.5, -0.5)  # stretched over the image
    np.testing.assert_allclose(shown(panels[1]), shown(panels[2]))
    np.testing.assert_array_equal(np.sign(shown(panels[4])), np.sign(maps[1]))
    with pytest.raises(ValueError, match="b: one per image, 3, got 2"):
        signed_maps(IMAGES, {"b": maps[:2]}, "Three")
    with pytest.raises(ValueError, match="names: one per image, 3, got 1"):
        signed_maps(IMAGES, {"b": maps}, "Three", ["x"])


def test_heat_is_on_one_scale_for_all():
    heat = np.array([[[1.0, -2.0]], [[0.0, 0.5]], [[0.0, 0.0]]])
    figure = heat_over_images(IMAGES, heat, "abc", "Three", "fall (points)", columns=2)
    assert {panel.images[0].get_clim() for panel in figure.axes[:3]} == {(-2.0, 2.0)}
    np.testing.assert_array_equal(shown(figure.axes[1]), heat[1])
    assert not figure.axes[3].axison
    assert figure.axes[-1].get_ylabel() == "fall (points)"
    with pytest.raises(ValueError, match="got 3 images, 2 maps, 3 names"):
        heat_over_images(IMAGES, heat[:2], "abc", "Three", "fall")


def test_rows_of_images_and_of_randomized_maps():
    figure = image_rows({"mean": IMAGES, "drawn": 1 - IMAGES}, "012", "Six", {"drawn": ["p", "q", "r"]})
    assert [panel.get_xlabel() for panel in figure.axes] == ["", "", "", "p", "q", "r"]
    np.testing.assert_array_equal(shown(figure.axes[4]), 1 - IMAGES[1])
    with pytest.raises(ValueError, match="mean: one image per column, 2, got 3"):
        image_rows({"mean": IMAGES}, "01", "Six")
    figure = randomized_maps(IMAGES[0], {"m": IMAGES[:2]}, ["trained", "random"], {"m": ["", "0.5"]}, "Two")
    assert [panel.get_xlabel() for panel in figure.axes[:2]] == ["", "0.5"]


def test_what_remains_is_framed_by_whether_it_is_right():
    masks = {"all": np.ones([8, 8], bool), "none": np.zeros([8, 8], bool)}
    figure = remains(IMAGES[:2], masks, [[1, 2], [1, 1]], [[0.9, 0.5], [0.4, 0.3]], [1, 1], [1.0, 0.5], "Two")
    colors = [panel.spines["left"].get_edgecolor() for panel in figure.axes]
    assert colors[0] == colors[2] == colors[3] != colors[1]
    assert figure.axes[1].get_title() == "none\n50 % right"
    assert figure.axes[1].get_xlabel() == "2 (50 %)"
    np.testing.assert_array_equal(shown(figure.axes[0]), IMAGES[0])
    assert len(np.unique(shown(figure.axes[1]))) == 1


def test_influences_are_in_the_order_of_their_scores():
    scores = np.array([[3.0, -1.0, 2.0], [0.0, 5.0, -4.0]])
    figure = influences(IMAGES[:2], ["a", "b"], IMAGES, [7, 8, 9], scores, "Two", n_best=2)
    texts = [panel.get_xlabel() for panel in figure.axes]
    assert texts[:5] == ["a", "7 (+3)", "9 (+2)", "8 (-1)", "9 (+2)"]
    assert texts[5:] == ["b", "8 (+5)", "7 (+0)", "9 (-4)", "7 (+0)"]
    np.testing.assert_array_equal(shown(figure.axes[8]), IMAGES[2])
