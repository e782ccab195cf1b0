"""Figures: their panels, titles and color scales, not their pixels."""

import itertools

import matplotlib
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradfn.pages.figures import TEXT_COLORS, confusion, curves, mistakes, save, spread, weight_images


def images_in(figure):
    return [panel.images[0] for panel in figure.axes if panel.images]


@pytest.mark.parametrize(
    ("n_rows", "n_shown"), [(1, 1), (16, 16), (17, 17), (30, 30), (100, 100), (397, 100)]
)
def test_weight_images_draw_every_row_on_one_scale_centered_at_zero(n_rows, n_shown):
    W = np.random.default_rng(0).normal(size=[n_rows, 784]) + 0.3
    figure = weight_images(W)
    images = images_in(figure)
    assert len(images) == n_shown
    assert {(image.get_clim(), image.cmap.name) for image in images} == {(images[0].get_clim(), "RdBu_r")}
    low, high = images[0].get_clim()
    assert low == -high
    assert high > 0
    np.testing.assert_array_equal(images[-1].get_array(), W[n_shown - 1].reshape(28, 28))
    assert (f"first {n_shown} of {n_rows}" in figure.get_suptitle()) == (n_shown < n_rows)


def test_weight_images_of_nothing_but_zeros_and_of_broken_weights():
    assert images_in(weight_images(np.zeros([2, 784])))[0].get_clim() == (-1.0, 1.0)
    W = np.ones([2, 784])
    W[0, 0], W[1, 1] = np.nan, np.inf
    assert images_in(weight_images(W))[0].get_clim() == (-1.0, 1.0)


def test_weight_images_report_the_expected_shape():
    with pytest.raises(ValueError, match=r"need \[out, 784\], got \[784, 16\]"):
        weight_images(np.zeros([784, 16]))


HISTORY = [
    {"step": 10, "loss": 2.0, "test_accuracy": 0.5, "examples_per_second": 1e5},
    {"step": 20, "loss": 1.0, "test_accuracy": 0.936, "train_accuracy": 0.95, "test_loss": 1.5},
]


def test_curves_have_a_panel_for_losses_and_one_for_accuracies_in_percent():
    losses, accuracies = curves(HISTORY).axes
    assert [line.get_label() for line in losses.lines] == ["training loss", "test loss"]
    assert [line.get_label() for line in accuracies.lines] == ["test accuracy", "training accuracy"]
    np.testing.assert_array_equal(losses.lines[0].get_ydata(), [2.0, 1.0])
    np.testing.assert_array_equal(losses.lines[1].get_xdata(), [20])
    np.testing.assert_allclose(accuracies.lines[0].get_ydata(), [50.0, 93.6])
    assert (losses.get_xlabel(), losses.get_ylabel()) == ("training step", "loss (nats)")
    assert accuracies.get_ylabel() == "accuracy (%)"


def contrast_with_white(color):
    """Return the contrast ratio of WCAG 2."""
    channels = np.array(matplotlib.colors.to_rgb(color))
    linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)


def test_lines_have_their_names_at_their_ends_and_no_legend():
    figure = curves(HISTORY)
    for panel in figure.axes:
        assert panel.get_legend() is None
        names = {text.get_text(): text for text in panel.texts}
        assert set(names) == {line.get_label() for line in panel.lines}
        for line in panel.lines:
            color = names[line.get_label()].get_color()
            assert color == TEXT_COLORS.get(line.get_color(), line.get_color())
            assert contrast_with_white(color) >= 4.5
        heights = sorted(text.xy[1] for text in panel.texts)
        assert np.diff(heights).min() >= 0.07 - 1e-9


@given(st.lists(st.floats(0, 1), max_size=8).map(sorted), st.floats(0.01, 0.1))
def test_names_are_moved_apart_and_keep_their_order_and_center(heights, gap):
    found = spread(heights, gap)
    assert len(found) == len(heights)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(found))
    assert sum(found) == pytest.approx(sum(heights))
    if all(b - a >= gap for a, b in itertools.pairwise(heights)):
        np.testing.assert_allclose(found, heights)


def test_a_training_loss_above_the_validation_loss_is_explained_where_it_is():
    rows = lambda training: [  # noqa: E731
        {"step": i, "loss": training, "validation_loss": 1.0} for i in range(10)
    ]

    def note(history, **options):
        return " ".join(curves(history, **options).get_supxlabel().split())

    assert note(rows(0.9)) == ""
    assert note(rows(0.9)[:9] + rows(1.1)[9:]) == ""  # one row of ten
    assert note([{"step": 1, "loss": 2.0}]) == ""
    some = note(rows(1.1)[:4] + rows(0.9)[4:], harder="with 10 % dropout")
    assert some.startswith(
        "Training loss above validation loss in 4 of 10 rows: it is averaged over the steps"
    )
    assert ", with 10 % dropout, while the network improves" in some
    assert "in all rows" in note(rows(1.1))
    assert "dropout" not in note(rows(1.1))


def test_the_title_of_curves_is_the_final_row():
    ended = "After 20 steps: test accuracy 93.6 %, training accuracy 95.0 %"
    assert curves(HISTORY).get_suptitle() == ended
    assert curves([{"step": 1, "loss": 2.0}]).get_suptitle() == "After 1 step: training loss 2"
    with pytest.raises(ValueError, match="empty"):
        curves([])


def test_confusion_counts_with_the_true_class_as_row():
    figure = confusion([0, 4, 4, 4, 9], [0, 9, 9, 4, 9], "test digits")
    assert figure.get_suptitle() == "60.0 % of 5 test digits right; 4 is most often taken for 9 (2 times)"
    texts = {(text.get_position(), text.get_text()) for text in figure.axes[0].texts}
    # (column, row) of each count: prediction, label
    assert texts == {((0, 0), "1"), ((9, 4), "2"), ((4, 4), "1"), ((9, 9), "1")}


def test_confusion_without_mistakes_and_without_examples():
    assert confusion([0, 1], [0, 1]).get_suptitle() == "100.0 % of 2 examples right"
    assert confusion([0, 1], [0, 0]).get_suptitle().endswith("no two mistakes are alike")
    with pytest.raises(ValueError, match="one prediction per label"):
        confusion([0, 1], [0])
    with pytest.raises(ValueError, match="at least one"):
        confusion([], [])


def test_mistakes_name_both_classes_and_start_with_the_most_confident():
    pictures = np.arange(4.0)[:, None] * np.ones(784)
    probabilities = [[0.4, 0.6, 0.0], [0.0, 0.9, 0.1], [0.2, 0.1, 0.7], [1.0, 0.0, 0.0]]
    figure = mistakes(pictures, [0, 2, 2, 0], probabilities, what="test digits")
    assert figure.get_suptitle() == "2 of 4 test digits misclassified, the most confident first"
    shown = [panel for panel in figure.axes if panel.images]
    assert [panel.get_title() for panel in shown] == [
        "predicted 1 (90 %)\nis 2 (10 %)",
        "predicted 1 (60 %)\nis 0 (40 %)",
    ]
    assert shown[0].images[0].get_array().shape == (28, 28)
    assert shown[0].images[0].get_array()[0, 0] == 1.0


def test_no_mistake_shows_the_least_confident_predictions():
    figure = mistakes(np.zeros([2, 784]), [0, 1], [[0.9, 0.1], [0.45, 0.55]])
    assert figure.get_suptitle() == "No mistake in 2 examples; the 2 least confident predictions"
    shown = [panel.get_title() for panel in figure.axes if panel.images]
    assert shown == ["predicted 1 (55 %)\nnext was 0 (45 %)", "predicted 0 (90 %)\nnext was 1 (10 %)"]


def test_many_mistakes_are_cut_to_a_readable_number():
    figure = mistakes(np.zeros([100, 784]), np.zeros(100, int), np.eye(2)[np.ones(100, int)])
    assert len(images_in(figure)) == 24
    assert figure.get_suptitle() == "100 of 100 examples misclassified; the 24 most confident"


def test_mistakes_need_one_label_per_image():
    with pytest.raises(ValueError, match="2 images, 1 labels"):
        mistakes(np.zeros([2, 784]), [0], np.zeros([2, 10]))


def test_save_leaves_a_whole_picture_and_nothing_else(tmp_path):
    path = save(curves(HISTORY), tmp_path / "new" / "curves.png")
    assert [each.name for each in path.parent.iterdir()] == ["curves.png"]
    height, width, _ = matplotlib.image.imread(path).shape
    assert width > height > 100
