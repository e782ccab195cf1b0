"""Bad batches in a training run: what is planted, and that it is found."""

import numpy as np
import pytest

from gradfn.experiments import spike


def test_batches_are_those_of_the_data_but_for_the_planted_ones():
    draw = np.random.default_rng(0)
    train = draw.uniform(0.1, 1, [100, 4]).astype("float32"), draw.integers(0, 10, 100)
    batches = spike.Batches(spike.Config(steps=200, batch=10), train)
    assert list(batches.planted) == [75, 114, 155]
    images, labels = batches(3)
    np.testing.assert_array_equal(images, train[0][batches.order[3]])
    np.testing.assert_array_equal(labels, train[1][batches.order[3]])
    images, labels = batches(75)
    rows = batches.order[75]
    differs = (images != train[0][rows]).any(1) | (labels != train[1][rows])
    assert np.flatnonzero(differs).tolist() == [spike.BROKEN]
    images, labels = batches(114)
    np.testing.assert_array_equal(images, train[0][batches.order[114]])
    np.testing.assert_array_equal(np.sort(labels), np.sort(train[1][batches.order[114]]))
    assert (batches(155)[0] != train[0][batches.order[155]]).all()
    # Nothing of the data was changed.
    assert train[0].max() <= 1


def test_the_outcome():
    norms = np.ones(32)
    norms[spike.BROKEN] = 100
    planted = {5: "one broken record", 9: "labels in the wrong order"}
    rows = [{"step": step, "examples": {"norms": norms.tolist()}} for step in (5, 9)]
    assert spike.judge(spike.Config(), rows, planted).state == "reached"
    assert spike.judge(spike.Config(), rows[:1], planted).state == "missed"
    assert spike.judge(spike.Config(), [*rows, {"step": 12}], planted).state == "missed"
    assert spike.judge(spike.Config(), [], planted).measured["planted batches that are found"] == 0


@pytest.mark.slow
def test_planted_batches_are_found(tmp_path):
    result = spike.run(spike.Config(steps=240, folder=str(tmp_path / "run")))
    assert [row["step"] for row in result.spikes] == list(result.planted)
    assert {"spikes.png", "examples.png", "spikes.jsonl"} <= {file.name for file in result.folder.iterdir()}
