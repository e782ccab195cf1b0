"""Figures of networks that read sequences: their panels, data and titles."""

import jax.numpy as jnp
import numpy as np
import pytest
from gradfn.experiments._language import loss_per_token
from gradfn.experiments.rnn import gradient_through_time

import gradfn as gf
from gradfn.pages.sequences import attention_maps, token_probabilities


def causal(heads, n):
    weights = np.tril(np.ones([heads, n, n]))
    return weights / weights.sum(-1, keepdims=True)


def test_attention_has_one_panel_per_head_on_one_scale():
    figure = attention_maps({"block 0": causal(2, 5), "block 1": causal(3, 5)}, "to be")
    panels = [panel for panel in figure.axes if panel.images]
    titles = [panel.get_title() for panel in panels]
    assert titles == [f"block {i}, head {j}" for i in range(2) for j in range(2 + i)]
    assert {panel.images[0].get_clim() for panel in panels} == {(0, 1)}
    np.testing.assert_allclose(panels[-1].images[0].get_array() ** 2, causal(1, 5)[0])
    assert [text.get_text() for text in panels[0].get_xticklabels()] == ["t", "o", "␣", "b", "e"]


def test_attention_of_some_rows_names_them_and_mismatches_are_reported():
    figure = attention_maps({"block 0": causal(1, 5)[:, 3:]}, "12=21", "21")
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["2", "1"]
    with pytest.raises(ValueError, match=r"block 0: expected \[heads, 5, 5\], got \[1, 4, 4\]"):
        attention_maps({"block 0": causal(1, 4)}, "to be")


def test_token_probabilities_frame_the_target():
    p = np.array([[0.7, 0.2, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4]])
    figure = token_probabilities("ab", [1, 0], p, "abc\n", n_best=3)
    panel = figure.axes[0]
    np.testing.assert_allclose(panel.images[0].get_array(), [[0.7, 0.4], [0.2, 0.3], [0.1, 0.2]])
    assert [text.get_text() for text in panel.texts] == ["a", "↵", "b", "c", "c", "b"]
    assert [patch.get_xy() for patch in panel.patches] == [(-0.46, 0.56)]  # the second row's first column
    assert figure.get_suptitle().startswith("Of 2 tokens, 50 % were the likeliest or second")
    assert "14 % (geometric mean)" in figure.get_suptitle()
    with pytest.raises(ValueError, match=r"2 tokens, 1 targets, probabilities \[2, 4\]"):
        token_probabilities("ab", [1], p, "abc\n")


def test_gradients_through_time_are_shares_of_the_last():
    figure = gradient_through_time(
        {"vanilla": [0.0, 2e-5, 2.0], "lstm": [1.0, 1.0, 2.0]}, {"vanilla": [1.0] * 3, "lstm": [2.0] * 3}
    )
    panel = figure.axes[0]
    assert panel.get_yscale() == "log"
    np.testing.assert_array_equal(panel.lines[2].get_xdata(), [2, 1, 0])
    np.testing.assert_allclose(panel.lines[0].get_ydata(), [np.nan, 1e-5, 1])
    assert "2 steps back, of what it is at the last step: vanilla nothing, lstm 50 %" in figure.get_suptitle()
    assert panel.lines[0].get_color() == panel.lines[1].get_color() != panel.lines[2].get_color()
    with pytest.raises(ValueError, match="no network"):
        gradient_through_time({})
    with pytest.raises(ValueError, match="lstm: the gradient at the last step is not above 0"):
        gradient_through_time({"lstm": [1.0, 0.0]})


def test_the_loss_per_token_weighs_tokens_alike():
    net = gf.Net({"z": gf.Param([2])}, lambda params, tokens: jnp.tile(params["z"], [len(tokens), 1]))
    targets = np.full([100, 3], -1)
    targets[0] = 1
    targets[1:, 0] = 0
    found = loss_per_token(gf.next_token_loss(net), (np.zeros([100, 3], int), targets))
    params = {"z": jnp.log(jnp.array([0.75, 0.25]))}
    np.testing.assert_allclose(found(params), -(3 * np.log(0.25) + 99 * np.log(0.75)) / 102, rtol=1e-5)


def test_a_tiny_gradient_is_shown_by_its_power_of_ten():
    title = gradient_through_time({"vanilla": [9e-9, 1.0], "gru": [1e-3, 1.0]}).get_suptitle()
    assert title.endswith("vanilla 9e-09, gru 1/1,000")
