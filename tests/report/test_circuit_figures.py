"""Figures of patches: what is drawn is the share of the difference between both runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradfn.circuits import PatchSweep
from gradfn.pages.circuits import path_picture, sweep_picture

SITES = ("embedded", "blocks/0/residual", "blocks/1/residual")


def sweep(into="corrupt"):
    metric = jnp.array([[1.0, 1.0], [2.0, 1.0], [1.0, 5.0]])
    return PatchSweep(
        metric, jnp.array(5.0), jnp.array(1.0), ("layer", "position"), (SITES, ("0", "1")), into, "Title"
    )


def test_a_sweep_is_one_heat_map_of_shares_with_short_labels():
    figure = sweep_picture(sweep(), ["a", " b"])
    panel = figure.axes[0]
    np.testing.assert_allclose(panel.images[0].get_array(), [[0, 0], [0.25, 0], [0, 1]])
    assert [text.get_text() for text in panel.get_yticklabels()] == ["embedded", "0", "1"]
    assert [text.get_text() for text in panel.get_xticklabels()] == ["a", "␣b"]
    assert "100 % of the difference, at blocks/1/residual, position ␣b" in figure.get_suptitle()


def test_noising_is_drawn_as_a_loss():
    shown = sweep_picture(sweep("clean")).axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, [[-1, -1], [-0.75, -1], [-1, 0]])


def test_three_axes_are_panels_and_one_axis_is_a_row():
    two = sweep()
    three = dataclasses.replace(
        two,
        metric=jnp.stack([two.metric] * 5, -1),
        words=(*two.words, "head"),
        labels=(*two.labels, tuple("01234")),
    )
    figure = sweep_picture(three)
    assert [axis.get_title() for axis in figure.axes if axis.images][:5] == [f"head {i}" for i in range(5)]
    one = dataclasses.replace(two, metric=two.metric[:, 0], words=("layer",), labels=(SITES,))
    assert sweep_picture(one).axes[0].images[0].get_array().shape == (1, 3)


def test_runs_with_the_same_metric_are_drawn_as_changes():
    same = dataclasses.replace(sweep(), clean=jnp.array(1.0))
    figure = sweep_picture(same)
    assert figure.axes[0].images[0].get_array().max() == 4
    assert figure.axes[-1].get_ylabel() == "change of the metric"


def test_paths_to_several_receivers_share_one_scale():
    figure = path_picture(
        {"queries": sweep(), "keys": dataclasses.replace(sweep(), metric=9 * sweep().metric)}
    )
    assert [axis.get_title() for axis in figure.axes[:2]] == ["to queries", "to keys"]
    limits = {axis.images[0].get_clim() for axis in figure.axes[:2]}
    assert limits == {(-11.0, 11.0)}
    assert "from blocks/1/residual, position 1 to keys, 1100 %" in figure.get_suptitle()


def test_what_cannot_be_drawn_is_refused():
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), sweep())
    with pytest.raises(ValueError, match="axes of a batch in front; average it first"):
        sweep_picture(batch)
    with pytest.raises(ValueError, match="expected 2 tokens, got 3"):
        sweep_picture(sweep(), ["a", "b", "c"])
    with pytest.raises(ValueError, match="at least one result over two axes"):
        path_picture({})
    other = dataclasses.replace(sweep(), labels=(SITES, ("0", "2")))
    with pytest.raises(ValueError, match="the senders of 'b' are not those of the first"):
        path_picture({"a": sweep(), "b": other})
