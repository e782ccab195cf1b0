"""Failed writes: one OSError that names the file, the last good checkpoint, and a resumed run with the same result."""

import json
import os
import pkgutil
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn.train import checkpoint, saver

X = np.random.default_rng(0).normal(size=[24, 3]).astype("float32")
DATA = (X, X @ np.array([1.0, -2.0, 0.5], "float32"))
START = {"w": jnp.array([0.3, 0.1, -0.2]), "rest": jnp.zeros(2000)}  # 8 kB: more than a few rows


def loss(params, batch):
    return jnp.square(batch[0] @ params["w"] - batch[1]).mean() + jnp.square(params["rest"] - 1).mean()


def train(folder, **options):
    options = {"batch_size": 4, "eval_every": 1, "progress": False, "checkpoint_seconds": 0} | options
    return gf.fit(loss, START, DATA, optax.adam(0.1), 12, folder=folder, **options)


def assert_same_run(one, other):
    as_bytes = lambda leaf: np.asarray(  # noqa: E731
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    ).tobytes()
    assert jax.tree.map(as_bytes, one.state) == jax.tree.map(as_bytes, other.state)
    assert [row["loss"] for row in one.history] == [row["loss"] for row in other.history]


def step_in(folder):
    """The step of the folder's checkpoint, which must be readable."""
    like = gf.train_state(START, optax.adam(0.1), jax.random.key(0))
    return int(checkpoint.load(folder / "checkpoint.safetensors", like)[0].step)


@pytest.fixture
def limit():
    """Return a function that limits the size of files, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def at_call(n, act):
    calls = []

    def evaluate(params):
        calls.append(0)
        if len(calls) == n:
            act()
        return {}

    return evaluate


def limit_at(monkeypatch, where, call, limit):
    """Limit files just before a given call of the function that writes them."""
    module, name = where.rsplit(".", 1)
    owner = pkgutil.resolve_name(module)
    write, calls = getattr(owner, name), []

    def limited(*args, **options):
        calls.append(0)
        if len(calls) == call:
            limit()
        return write(*args, **options)

    monkeypatch.setattr(owner, name, limited)


@pytest.mark.parametrize(
    ("name", "where", "call"),
    [
        ("metrics.jsonl", "gradfn.train.rows.Rows.append", 3),
        ("metrics.jsonl", "gradfn.train.rows.Rows.append", 12),
        ("events.out.tfevents", "gradfn.train.events.Events.add", 3),
        ("events.out.tfevents", "gradfn.train.events.Events.add", 12),
        ("checkpoint.safetensors", "gradfn.train.saver.write_tensors", 3),
        ("checkpoint.safetensors", "gradfn.train.saver.write_tensors", 10),
        ("0000000003.safetensors", "gradfn.train.checkpoint.write_tensors", 1),
        ("0000000012.safetensors", "gradfn.train.checkpoint.write_tensors", 4),
    ],
)
def test_a_full_disk_is_one_error_and_the_run_resumes_bit_for_bit(
    tmp_path, monkeypatch, limit, capfd, name, where, call
):
    monkeypatch.setattr(saver, "SHARE", 0)  # a checkpoint after each step
    every = {"keep_every": 3}

    def size():
        """The size limit of files: slightly more than the log and the events, less than an array."""
        logs = [tmp_path / "metrics.jsonl", *(tmp_path / "events").iterdir()]
        return next((log.stat().st_size + 5 for log in logs if log.name.startswith(name)), 5_000)

    limit_at(monkeypatch, where, call, lambda: limit(size()))
    with pytest.raises(OSError, match="File too large") as error:
        train(tmp_path, **every)
    assert name in Path(error.value.filename).name
    limit(resource.RLIM_INFINITY)
    assert not list(tmp_path.rglob(".*.part"))
    monkeypatch.undo()
    step = int(name[:10]) if name[0] == "0" else call
    assert step - 2 <= step_in(tmp_path) <= step  # the one that was being written may have failed, too
    assert_same_run(train(tmp_path, resume=True, **every), train(None))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_that_cannot_be_put_on_the_disk_at_the_end_is_an_error(tmp_path, monkeypatch):
    whole = train(None)
    full = lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # noqa: E731
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        train(tmp_path, checkpoint_seconds=1e9)
    assert error.value.filename == str(tmp_path / "metrics.jsonl")  # its rows come before the checkpoint
    assert not (tmp_path / "checkpoint.safetensors").exists()
    assert not list(tmp_path.rglob(".*.part"))
    monkeypatch.undo()
    assert_same_run(train(tmp_path, resume=True), whole)


@pytest.mark.parametrize("options", [{}, {"keep_every": 1}])
def test_a_deleted_folder_is_not_created_again(tmp_path, monkeypatch, capfd, options):
    folder = tmp_path / "run"
    with pytest.raises(OSError, match="No such file or directory") as error:
        train(folder, evaluate=at_call(3, lambda: shutil.rmtree(folder)), **options)
    assert Path(error.value.filename).is_relative_to(folder)
    assert not folder.exists()
    assert capfd.readouterr() == ("", "")
    assert_same_run(train(folder, resume=True), train(None))


@pytest.fixture
def read_only(tmp_path):
    """A folder that is read-only, even for root."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    mounted = False
    if os.geteuid() == 0:
        command = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", folder]
        mounted = (
            shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
        )
        if not mounted:
            pytest.skip("needs a file system that can be mounted, or a user other than root")
    folder.chmod(0o555) if not mounted else None
    yield folder
    subprocess.run(["umount", folder]) if mounted else folder.chmod(0o755)


@pytest.mark.skipif(sys.platform == "win32", reason="has other permissions")
@pytest.mark.parametrize("inner", [".", "new/run"])
def test_a_read_only_folder_is_one_error(read_only, inner, capfd):
    with pytest.raises(OSError, match=r"Read-only file system|Permission denied") as error:
        train(read_only / inner)
    assert Path(error.value.filename).is_relative_to(read_only)
    assert list(read_only.iterdir()) == []
    assert capfd.readouterr() == ("", "")
