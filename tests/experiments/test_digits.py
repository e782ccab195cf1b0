"""The digit network end to end: it learns, draws, and resumes after kill -9 to exactly the same parameters."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from gradfn.experiments.digits import PAGE_TEST, PAGE_TRAIN, Config, keep_for_page, run
from safetensors.numpy import load_file

import gradfn as gf
from gradfn.data._digits import enlarge
from gradfn.pages.live._train import train
from gradfn.runs.kept import Kept
from gradfn.runs.training_set import load_training_set
from gradfn.tensors import CHECKSUM

ROOT = Path(__file__).parents[2]
PICTURES = {"weights.png", "curves.png", "confusion.png", "mistakes.png"}


@pytest.mark.slow
def test_a_run_as_a_function(tmp_path, capsys):
    result = run(Config(hidden=4, epochs=2, batch=128, folder=str(tmp_path / "run")))
    assert result.folder == tmp_path / "run"
    files = {file.name for file in result.folder.iterdir()}
    assert PICTURES | {"config.json", "versions.json", "result.json", "metrics.jsonl"} <= files
    assert result.params["W1"].shape == (4, 784)
    assert [row["epoch"] for row in result.history] == [1.0, 2.0]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_accuracy"] == result.test_accuracy
    kept = load_training_set(result.folder / "training_set.safetensors")
    data = gf.data.digits()
    for (images, labels), (x, y) in ((kept.train, data.train), (kept.test, data.test)):
        enlarged = enlarge(images.reshape(-1, 8, 8) / 16, 28).reshape(len(images), -1)
        np.testing.assert_allclose(enlarged, x, atol=1e-6)
        np.testing.assert_array_equal(labels, y)
    start_params = gf.mlp([784, 4, 10]).init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, kept.params, dict(start_params))
    out = capsys.readouterr().out
    assert "8x8 resized to 28x28" in out
    assert "3,176 weights + 14 biases = 3,190 parameters" in out
    assert str(result.outcome) in out


@pytest.mark.slow
def test_a_finished_run_returns_its_result_again(tmp_path, capsys):
    result = run(Config(hidden=4, epochs=2, batch=128, folder=str(tmp_path / "run")))
    again = run(Config(resume=True, folder=str(tmp_path / "run")))
    assert "has finished: computing" in capsys.readouterr().out
    assert again.test_accuracy == result.test_accuracy
    assert again.history == result.history
    np.testing.assert_array_equal(again.params["W1"], result.params["W1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden must be an integer >= 1, got 0"),
        ({"batch": -1}, "batch must be an integer >= 1, got -1"),
        ({"rate": 0.0}, "rate must be a finite number > 0, got 0.0"),
        ({"rate": float("nan")}, "rate must be a finite number > 0, got nan"),
        ({"seed": 2**32}, "seed must be an integer from 0 to 4294967295"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_a_batch_larger_than_the_data_does_not_start_a_run(tmp_path):
    with pytest.raises(ValueError, match="batch: there are 1,257 training digits, got 1258"):
        run(Config(batch=1258, folder=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_of_mnist_the_page_holds_a_part_and_says_so(tmp_path):
    rng = np.random.default_rng(0)
    part = rng.random([600, 784], np.float32), rng.integers(0, 10, 600).astype(np.int32)
    data = gf.data.Dataset(part, part, part, "MNIST", (28, 28), tuple("0123456789"))
    start_params = gf.mlp([784, 16, 10]).init(jax.random.key(0))
    keep_for_page(tmp_path, Config(data="mnist"), start_params, data, 40)
    kept = load_training_set(tmp_path / "training_set.safetensors")
    assert (len(kept.train[1]), len(kept.test[1]), kept.spline) == (PAGE_TRAIN, PAGE_TEST, None)
    run_of = Kept(tmp_path, "digits", {}, {}, None, {}, {}, None, training_set=kept)
    live = train(run_of, 5_000_000)
    assert (live.about["n_train"], live.about["examples"]) == (str(PAGE_TRAIN), "600")
    assert len(live.content) < 700_000  # the images, and 70 kB of parameters


@pytest.mark.slow
def test_the_defaults_meet_their_expectation(tmp_path):
    result = run(Config(folder=str(tmp_path / "run")))
    assert result.test_accuracy >= 0.93
    assert str(result.outcome).endswith("Expected test accuracy at least 93 %: reached")


def start(folder, *options):
    """Start a run in a separate process, which writes a checkpoint as often as possible."""
    code = (
        "import functools, sys, gradfn as gf; from gradfn.cli import main;"
        "gf.fit = functools.partial(gf.fit, checkpoint_seconds=0.0); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "run", "digits", "--folder", str(folder), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = start(folder, "--epochs", "60")
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return load_file(folder / "checkpoint.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no kill -9 on Windows")
@pytest.mark.parametrize("moment", ["", "checkpoint.safetensors", "weights.png"])
def test_kill_9_and_resume_ends_with_the_parameters_of_an_uninterrupted_run(tmp_path, uninterrupted, moment):
    folder = tmp_path / "run"
    killed = start(folder, "--epochs", "60")
    while not (folder / moment).exists():
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (folder / "result.json").exists()

    # If it was killed before its options were written, they have to be given again.
    known = (folder / "config.json").exists()
    resumed = start(folder, "--resume", *([] if known else ["--epochs", "60"]))
    out, _ = resumed.communicate()
    assert resumed.returncode == 0, out
    assert ("resuming in" if known else "starting a new one") in out
    assert {file.name for file in folder.iterdir()} >= PICTURES | {"result.json"}
    ended = load_file(folder / "checkpoint.safetensors")
    assert set(ended) == set(uninterrupted)
    # The checksum covers the elapsed seconds, too.
    for name in uninterrupted.keys() - {CHECKSUM}:
        np.testing.assert_array_equal(ended[name], uninterrupted[name], err_msg=name)
