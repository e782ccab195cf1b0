"""Pictures of noise: their titles, and the errors for invalid input."""

import numpy as np
import pytest
from gradfn.experiments.noise import agreement, largest_gradients, noise_over_training


def rows(scales):
    return [
        {"step": i, "gradient_square": 1.0, "variance": scale, "scale": scale, "running_scale": scale}
        for i, scale in enumerate(scales)
    ]


def test_the_title_says_whether_it_grew():
    grew = noise_over_training(
        rows([10.0] * 4 + [90.0] * 4), 32, [{"step": 7, "gradient_square": 1.0, "variance": 90.0}]
    )
    assert "from about 10 to about 90 examples: large batches pay late" in grew.get_suptitle()
    assert "one size of batch" in noise_over_training(rows([10.0] * 8), 32).get_suptitle()


def test_hidden_gradients_are_counted():
    hidden = {"step": 9, "gradient_square": -1.0, "variance": 1.0, "scale": None, "running_scale": None}
    [panel] = noise_over_training([*rows([5.0, 5.0]), hidden], 32).axes
    assert "in 1 of 3 measures noise hid" in panel.get_title()
    [panel] = noise_over_training(rows([5.0, 5.0]), 32).axes
    assert panel.get_title() == "gray: one batch each"
    assert panel.get_legend() is None
    assert [text.get_text() for text in panel.texts] == ["estimate\nfrom batches", "batch in use:\n32"]
    with pytest.raises(ValueError, match="nothing to draw"):
        noise_over_training([hidden], 32)


def test_the_largest_are_first():
    norms = np.array([1.0, 3.0, 2.0])
    figure = largest_gradients(np.zeros([3, 4]), [0, 1, 2], [0, 1, 0], norms, (2, 2), n=2)
    assert [panel.get_title() for panel in figure.axes[1:]] == ["1, right\n|g| 3", "2, predicted 0\n|g| 2"]
    assert "2 of 3 examples make 93 % of the squared gradients" in figure.get_suptitle()
    with pytest.raises(ValueError, match="one label, prediction and norm per image"):
        largest_gradients(np.zeros([3, 4]), [0, 1], [0, 1, 0], norms, (2, 2))


def test_agreement_without_conflict():
    title = agreement([[1.0, 0.25], [0.25, 1.0]], ["a", "b"], "tasks").get_suptitle()
    assert title == "Gradients of a and b agree least (cosine 0.25)"
    with pytest.raises(ValueError, match=r"expected \[3, 3\]"):
        agreement(np.eye(2), ["a", "b", "c"])
