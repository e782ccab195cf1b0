"""Pictures of lenses and direct effects: what they draw, and what they refuse."""

import jax.numpy as jnp
import numpy as np
import pytest

from gradfn.circuits import BackwardLens, DirectEffects, LogitLens
from gradfn.pages.lenses import backward_lens_picture, direct_effects_picture, lens_picture

RANDOM = np.random.default_rng(0)


def lens(n):
    return LogitLens(jnp.asarray(RANDOM.normal(size=(3, n, 4))), ("a", "b", "c"), 3)


def test_a_cell_has_the_most_probable_token_and_is_bold_where_it_is_right():
    shown, targets = lens(5), [0, 1, 2, 3, -1]
    panel = lens_picture(shown, "v\nxyz", targets, "vxyz").axes[0]
    best = np.asarray(shown.top())[..., 0]
    cells = {(int(t.get_position()[1]), int(t.get_position()[0])): t for t in panel.texts}
    assert len(cells) == 15
    for (layer, position), text in cells.items():
        assert text.get_text() == "vxyz"[best[layer, position]]
        assert (text.get_weight() == "bold") == (best[layer, position] == targets[position])
    assert [label.get_text() for label in panel.get_xticklabels()][1] == "↵"
    expected = jnp.exp(shown.log_probability(jnp.array(targets)))[:, :4]
    np.testing.assert_allclose(panel.images[0].get_array()[:, :4], expected)


def test_long_sequences_are_cut():
    panel = lens_picture(lens(60), "v" * 60, [0] * 60, "vxyz").axes[0]
    assert panel.images[0].get_array().shape == (3, 40)
    shown = BackwardLens(jnp.zeros([]), lens(60).logits, jnp.zeros([3, 60]), ("a", "b", "c"))
    assert backward_lens_picture(shown, "v" * 60, [0] * 60, "vxyz").axes[0].images[0].get_array().shape == (
        3,
        40,
    )


def test_one_token_and_one_target_per_position():
    for tokens, targets in (("vv", [0] * 5), ("v" * 5, [0])):
        with pytest.raises(
            ValueError, match=r"lens_picture: expected one token and one target per position, got"
        ):
            lens_picture(lens(5), tokens, targets, "vxyz")


def test_of_many_effects_the_smallest_share_a_bar_and_the_bars_add_up():
    heads = jnp.asarray(RANDOM.normal(size=(5, 12)))
    zero = jnp.zeros([])
    effects = DirectEffects(
        heads.sum(),
        zero,
        heads.sum(1),
        heads,
        jnp.zeros(5),
        zero,
        zero,
        zero,
        tuple("abcde"),
        tuple(range(5)),
    )
    panel = direct_effects_picture(effects, "the logit").axes[0]
    *bars, total = (bar.get_width() for bar in panel.patches)
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert len(bars) == 41
    assert names[-2:] == ["20 others", "sum"]
    assert "constant" not in names
    np.testing.assert_allclose([sum(bars), total], float(effects.value), rtol=1e-5)
