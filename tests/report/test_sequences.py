"""Figures of networks that read sequences: their panels, data and titles."""

import jax.numpy as jnp
import numpy as np
import pytest
from gradfn.experiments._language import loss_per_token
from gradfn.experiments.rnn import gradient_through_time

import gradfn as gf
from gradfn.pages.sequences import attention_maps, attention_patterns, clearest_head, token_probabilities


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


def of_heads(*heads, n=8):
    """Return the weights of a block `[1, heads, n, n]` whose heads attend to a token N back, or evenly (None)."""
    made = [causal(1, n)[0] if back is None else np.eye(n, k=-back) for back in heads]
    for head in made:
        head[head.sum(1) == 0, 0] = 1.0
    return np.stack(made)[None]


@pytest.mark.parametrize(
    ("back", "target"), [(0, "the token itself"), (1, "the previous token"), (3, "the token three back")]
)
def test_the_head_with_a_clear_target_is_found_and_named(back, target):
    weights = {"block 0": of_heads(None, None), "block 1": of_heads(None, back)}
    best, *others = attention_patterns(weights)
    assert best == ("block 1", 1, target, 1.0)
    assert all(other.share < 0.3 for other in others)
    figure = clearest_head(weights, "abcdefgh")
    assert figure.get_suptitle() == f"A head for {target}: block 1, head 1 gives it 100 % of its attention"
    assert len(figure.axes) == 2
    np.testing.assert_allclose(figure.axes[0].images[0].get_array() ** 2, weights["block 1"][0, 1])
    bars = figure.axes[1].patches
    assert [bar.get_width() for bar in bars] == pytest.approx(
        [100 * each.share for each in attention_patterns(weights)]
    )
    assert bars[0].get_facecolor() != bars[1].get_facecolor() == bars[2].get_facecolor()


def test_heads_without_a_target_are_said_to_have_none_and_few_are_compared():
    figure = clearest_head({f"block {i}": of_heads(*[None] * 8) for i in range(4)}, "abcdefgh")
    assert figure.get_suptitle().startswith(
        "No head attends to one fixed target: the most is 16 %, of block 0, head 0 to "
    )
    assert figure.axes[1].get_title() == "the 12 clearest of 32 heads"
    assert len(figure.axes[1].patches) == 12
    assert (
        clearest_head({"block 0": np.ones([1, 1, 1, 1])}, "a")
        .get_suptitle()
        .startswith("A head for the token itself")
    )


def test_token_probabilities_have_a_bar_per_token_and_name_the_first_guess_where_it_is_wrong():
    p = np.array([[0.7, 0.2, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4]])
    figure = token_probabilities("ab", [1, 3], p, "abc\n")
    [panel] = figure.axes
    assert [bar.get_height() for bar in panel.patches] == pytest.approx([20, 40])
    assert panel.patches[0].get_facecolor() != panel.patches[1].get_facecolor()
    assert [(text.get_text(), text.get_position()) for text in panel.texts] == [("a", (0, 70))]
    assert [text.get_text() for text in panel.get_xticklabels()] == ["b", "↵"]
    title = figure.get_suptitle()
    assert (
        title
        == "Its first guess is right for 1 of 2 tokens; the right token gets 28 % (geometric mean, 1.26 nats)"
    )
    many = token_probabilities("a" * 90, [0] * 90, np.full([90, 4], 0.25), "abcd")
    assert len(many.axes[0].patches) == 40
    assert "for 90 of 90 tokens; the right token gets 25 %" in many.get_suptitle()
    with pytest.raises(ValueError, match=r"2 tokens, 1 targets, probabilities \[2, 4\]"):
        token_probabilities("ab", [1], p, "abc\n")


def test_gradients_through_time_are_shares_of_the_last():
    figure = gradient_through_time(
        {"vanilla": [0.0, 2e-5, 2.0], "lstm": [1.0, 1.0, 2.0]}, {"vanilla": [1.0] * 3, "lstm": [2.0] * 3}
    )
    [panel] = figure.axes
    assert panel.get_yscale() == "log"
    np.testing.assert_array_equal(panel.lines[2].get_xdata(), [0, 1, 2])
    np.testing.assert_allclose(panel.lines[0].get_ydata(), [1, 1e-5, np.nan])
    assert (
        figure.get_suptitle()
        == "2 steps back from the last step: lstm keeps 50 % of the gradient, vanilla nothing"
    )
    assert panel.lines[0].get_color() == panel.lines[1].get_color() != panel.lines[2].get_color()
    assert sorted(text.get_text() for text in panel.texts) == ["lstm", "vanilla"]
    assert panel.get_legend() is None
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


def test_a_tiny_gradient_is_a_fraction_in_words():
    title = gradient_through_time(
        {"vanilla": [9e-9, 1.0], "gru": [1e-3, 1.0], "deep": [2e-12, 1.0]}
    ).get_suptitle()
    assert title == (
        "1 steps back from the last step: gru keeps 1/1,000 of the gradient, vanilla 1/110 million, deep 1/500 billion"
    )
