"""What a run keeps of its convolutional network, and the content of its part of the page."""

import json

import jax
import numpy as np
import pytest

import gradfn as gf
from gradfn.data import Dataset
from gradfn.pages.live._cnn import TOO_LARGE, cnn, live_cnn
from gradfn.runs.cnn_net import CnnNet, flat_params, keep_cnn_net, load_cnn_net
from gradfn.runs.kept import NET_LIMIT, read_run
from tests.report.test_page import write_run

ROOM = 5_000_000


def noise(n=30, image=(28, 28, 1)):
    rng = np.random.default_rng(0)
    images = rng.random([n, int(np.prod(image))], dtype=np.float32)
    labels = np.arange(n, dtype=np.int32) % 10
    part = images, labels
    return Dataset(part, part, part, "noise", image)


def test_the_network_is_read_back_unchanged(tmp_path):
    data = noise(image=(28, 28))
    params = gf.cnn((28, 28, 1), (2, 3), (4,)).init(jax.random.key(0))
    probabilities = np.eye(10)[data.test[1]]
    probabilities[[1, 21, 17]] = np.eye(10)[0] * [[0.5], [0.7], [0.9]]
    keep_cnn_net(tmp_path, params, data, probabilities, "gelu", enlarged_from=8)
    net = load_cnn_net(tmp_path / "cnn_net.safetensors")
    assert net.about == {"activation": "gelu", "image": [28, 28, 1], "data": "noise"}
    assert set(net.params) == {f"{layer}/{name}" for layer in params for name in "Wb"}
    np.testing.assert_array_equal(net.params["conv2/W"], params["conv2"]["W"])
    # The first correct one of each label (for 1 that at 11), then the most confident mistakes.
    assert net.labels.tolist() == [*range(10), 7, 1]
    np.testing.assert_array_equal(net.samples, data.test[0][[0, 11, *range(2, 10), 17, 21]])
    assert net.spline.shape == (28, 8)
    assert (net.n_convs, net.classes) == (2, 10)
    assert net.products == 28 * 28 * 2 * 9 + 14 * 14 * 3 * 2 * 9 + sum(
        params[layer][name].size for layer in ("dense1", "dense2") for name in "Wb"
    )


def test_what_the_page_cannot_compute_is_not_kept(tmp_path):
    data, unsure = noise(), np.full([30, 10], 0.1)
    params = gf.cnn((28, 28, 1), (2,), ()).init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"expected one of sigmoid, .*, got 'softmax'"):
        keep_cnn_net(tmp_path, params, data, unsure, "softmax")
    with pytest.raises(ValueError, match=r"images of \[14, 14, 1\], got \[28, 28, 1\]"):
        keep_cnn_net(tmp_path, params, data, unsure, image=(14, 14, 1))
    with pytest.raises(ValueError, match="conv1 is missing"):
        keep_cnn_net(tmp_path, {"dense1": params["dense1"]}, data, unsure)


def untrained(image=(28, 28, 1), channels=(2,), hidden=(), window=3, samples=None):
    net = gf.cnn(image, channels, hidden, 10, window)
    params = flat_params(jax.tree.map(np.zeros_like, net.init(jax.random.key(0))))
    samples = np.zeros([0, int(np.prod(image))], np.float32) if samples is None else samples
    labels = np.zeros(len(samples), np.int32)
    return CnnNet(
        params, samples, labels, None, {"activation": "relu", "image": list(image), "data": "noise"}
    )


@pytest.mark.parametrize(
    "large",
    [
        {"channels": (32,), "hidden": (128,)},  # 802,816 weights: 3.2 MB
        {"image": (200, 200, 3), "channels": (64, 8), "window": 5},  # 192 million products
        {"image": (8, 8, 1), "channels": (600,), "window": 1},  # 600 pictures
    ],
)
def test_a_network_that_is_too_large_is_a_sentence(large):
    assert live_cnn(untrained(**large), ROOM) == TOO_LARGE


def test_the_content_has_at_most_the_bytes_that_are_left(tmp_path):
    net = untrained()
    part = live_cnn(net, ROOM)
    assert live_cnn(net, len(part.content)) == part
    assert live_cnn(net, len(part.content) - 1) == TOO_LARGE
    assert json.loads(part.content)["image"] == [28, 28, 1]
    assert (part.kind, part.about["pad"], part.about["filters"]) == ("cnn", True, "2")

    folder = write_run(tmp_path / "run")
    assert cnn(read_run(folder), ROOM) is None
    with (folder / "cnn_net.safetensors").open("wb") as out:
        out.truncate(NET_LIMIT + 1)  # a sparse file
    assert cnn(read_run(folder), ROOM) == TOO_LARGE


@pytest.mark.parametrize(
    ("image", "scale", "pad"),
    [((28, 28, 1), 1, True), ((28, 28, 1), -1, False), ((28, 28, 1), 255, False), ((32, 32, 1), 1, False)],
)
def test_only_images_like_those_that_can_be_drawn_have_a_pad(image, scale, pad):
    samples = np.full([2, int(np.prod(image))], scale, np.float32)
    assert live_cnn(untrained(image, samples=samples), ROOM).about["pad"] == pad
