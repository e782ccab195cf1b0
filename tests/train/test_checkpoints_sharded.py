"""Checkpoints of a state that is split over devices."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gradfn as gf
from gradfn.files import FileError
from gradfn.runs.kept import read_run
from gradfn.stored import Stored, newest, shapes
from gradfn.train import restore, sharded
from tests.train import one_of_several as one
from tests.train.test_processes import workers

NET = gf.mlp([8, 16, 8])
X = np.random.default_rng(0).normal(size=[64, 8]).astype("float32")
DATA = (X, np.tanh(X[:, ::-1]))
LOSS = gf.batch_mean(gf.regression_loss(NET))


def mesh(n, first=0, kind=AxisType.Auto):
    return Mesh(np.array(jax.devices()[first : first + n]), ("data",), axis_types=(kind,))


def start(n=None, seed=0):
    """Return initial parameters, split over n devices; None leaves them on one."""
    params = NET.init(jax.random.key(seed))
    return params if n is None else jax.device_put(params, NamedSharding(mesh(n), P("data")))


def train(folder, params, steps=6, **options):
    options = {"batch_size": 8, "eval_every": 3, "progress": False, "checkpoint_seconds": 0} | options
    return gf.fit(LOSS, params, DATA, optax.adam(0.01), steps, folder=folder, **options)


def leaves(tree):
    """Return the arrays of a tree by path, keys as their data."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )
        for path, leaf in named
    }


def assert_same(a, b):
    a, b = leaves(a), leaves(b)
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].tobytes() == b[name].tobytes(), name


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), leaves(a), leaves(b))


class InterruptionError(Exception):
    pass


def interrupt_at(n):
    calls = []

    def evaluate(params):
        calls.append(0)
        if len(calls) == n:
            raise InterruptionError
        return {}

    return evaluate


def interrupted(folder, params, **options):
    """Train until an evaluation fails, with a checkpoint after each chunk."""
    with pytest.raises(InterruptionError):
        train(folder, params, 9, evaluate=interrupt_at(2), **options)


def many_kinds(on):
    """Return a tree with arrays of many kinds, the first of them split over devices."""
    with jax.numpy_dtype_promotion("standard"):
        tree = {
            "split": jnp.arange(64.0).reshape(16, 4) / 7,
            "a/b": {"bfloat16": jnp.arange(16).astype(jnp.bfloat16), "bool": jnp.arange(8) % 3 == 0},
            "complex": jnp.arange(8) * (1 + 2j),
            "int8": jnp.arange(-4, 4, dtype=jnp.int8),
            "float8": jnp.arange(8).astype(jnp.float8_e4m3fn),
            "scalar": jnp.float32(np.nan),
            "empty": jnp.zeros([0, 3]),
        }
    whole = NamedSharding(on, P())
    tree = jax.device_put(tree, whole) | {"keys": jax.device_put(jax.random.split(jax.random.key(3)), whole)}
    return tree | {"split": jax.device_put(tree["split"], NamedSharding(on, P("data")))}


def test_a_state_of_eight_devices_is_restored_on_four_and_on_one(tmp_path):
    state = many_kinds(mesh(8))
    assert sharded.is_split(state)
    sharded.begin(tmp_path / "checkpoint", 3, state, {"loss": float("nan")})()
    stored = newest(tmp_path)
    assert stored == Stored(tmp_path / "checkpoint/0000000003.json", tmp_path / "checkpoint/0000000003")
    assert shapes(stored)["a/b/bool"] == (8,)
    for like in (state, many_kinds(mesh(4)), many_kinds(mesh(2, first=5)), many_kinds(mesh(1))):
        restored, notes = restore.load(stored, like)
        assert_same(restored, state)
        assert notes == {"loss": "nan"}
        placed = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), restored, like)
        assert all(jax.tree.leaves(placed))
    explicit = NamedSharding(mesh(2, kind=AxisType.Explicit), P(None, "data"))
    like = {"split": jax.ShapeDtypeStruct([16, 4], jnp.float32, sharding=explicit)}
    restored, _ = restore.load(stored, like, rest=True)
    assert restored["split"].sharding == explicit
    assert_same(restored, {"split": state["split"]})


def test_an_interrupted_run_resumes_bit_for_bit_on_the_same_devices(tmp_path):
    whole = train(None, start(8), 9)
    interrupted(tmp_path, start(8))
    assert [file.name for file in sorted((tmp_path / "checkpoint").iterdir())] == [
        name for step in [newest(tmp_path).file.stem] for name in (step, f"{step}.json")
    ]
    assert not (tmp_path / "checkpoint.safetensors").exists()
    resumed = train(tmp_path, start(8), 9, resume=True)
    assert_same(resumed.state, whole.state)
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in whole.history]
    assert newest(tmp_path).file.stem == "0000000009"
    # The run has ended: it is read, and not trained again.
    assert_same(train(tmp_path, start(8), 9, resume=True).state, whole.state)


@pytest.mark.parametrize(("before", "after"), [(8, 4), (8, None), (None, 8), (2, 8)])
def test_a_run_resumes_on_other_devices(tmp_path, before, after):
    whole = train(None, start(), 9)
    interrupted(tmp_path, start(before))
    kind = (tmp_path / "checkpoint.safetensors").exists()
    assert kind == (before is None)
    resumed = train(tmp_path, start(after), 9, resume=True)
    assert_close(resumed.params, whole.params)
    assert [row["step"] for row in resumed.history] == [3, 6, 9]
    assert len(resumed.params["W1"].devices()) == (after or 1)
    # One checkpoint is left, of the kind of the run that wrote it.
    assert (tmp_path / "checkpoint.safetensors").exists() == (after is None)
    assert len(list(tmp_path.glob("checkpoint/*"))) == (0 if after is None else 2)
    assert_same(gf.train.load_params(tmp_path, like=start()), resumed.params)


def test_a_finished_run_takes_more_steps(tmp_path):
    whole = train(None, start(8), 12)
    train(tmp_path, start(8), 6)
    assert_same(train(tmp_path, start(8), 12, resume=True).state, whole.state)
    with pytest.raises(gf.CheckpointError, match="is of a run with steps 12, got 9"):
        train(tmp_path, start(8), 9, resume=True)


def test_another_run_does_not_resume_and_a_new_one_removes_it(tmp_path):
    train(tmp_path, start(8))
    with pytest.raises(gf.CheckpointError, match="is of another run"):
        train(tmp_path, start(8, seed=1), resume=True)
    with pytest.raises(gf.CheckpointError, match="is of a run with seed 0, got 3"):
        train(tmp_path, start(8), resume=True, seed=3)
    mine = tmp_path / "checkpoint" / "notes.txt"
    mine.write_text("mine")
    with pytest.raises(InterruptionError):
        train(tmp_path, start(8), evaluate=interrupt_at(1), checkpoint_seconds=1e9)
    assert newest(tmp_path) is None
    assert list((tmp_path / "checkpoint").iterdir()) == [mine]


def test_kept_parameters_of_either_kind(tmp_path):
    fitted = train(tmp_path, start(8), 6, keep_every=3)
    names = ["0000000003", "0000000003.json", "0000000006", "0000000006.json"]
    assert sorted(file.name for file in (tmp_path / "kept").iterdir()) == names
    kept = gf.train.kept(tmp_path, like=start())
    assert list(kept) == [3, 6]
    assert_same(kept[6], fitted.params)
    assert_same(gf.train.load_params(tmp_path / "kept" / "0000000003"), kept[3])
    # Resumed on one device: the older ones stay, the newer ones are files.
    train(tmp_path, start(), 9, keep_every=3, resume=True)
    both = gf.train.kept(tmp_path, like=start(8))
    assert list(both) == [3, 6, 9]
    assert_same(both[3], kept[3])
    assert {len(params["W1"].devices()) for params in both.values()} == {8}
    train(tmp_path, start(8), 3, keep_every=3)
    assert list(gf.train.kept(tmp_path, like=start())) == [3]


def test_load_params_reads_either_kind_onto_the_devices_that_are_asked_for(tmp_path):
    fitted = {n: train(tmp_path / str(n), start(n)).params for n in (None, 8)}
    for n, params in fitted.items():
        folder = tmp_path / str(n)
        assert_same(gf.train.load_params(folder), params)
        assert_same(gf.train.load_params(str(folder), like=NET), params)
        assert_same(gf.train.load_params(folder, like=NET.spec), params)
        on = NamedSharding(mesh(4, first=2), P("data"))
        loaded = gf.train.load_params(folder, shardings=on)
        assert_same(loaded, params)
        assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {on}
        each = jax.tree.map(lambda leaf: leaf.sharding, start(2))
        assert gf.train.load_params(folder, shardings=each)["W2"].sharding == each["W2"]
        assert gf.train.load_params(folder, like=start(4))["W2"].sharding == start(4)["W2"].sharding
        with pytest.raises(ValueError, match="load_params: shardings must be a tree like the parameters"):
            gf.train.load_params(folder, shardings={"W1": on})
        with pytest.raises(
            gf.CheckpointError, match=r"params/W2: expected \[10, 16\] float32, got \[8, 16\]"
        ):
            gf.train.load_params(folder, like=gf.mlp([8, 16, 10]))
    assert_same(gf.train.load_params(tmp_path / "8" / "checkpoint"), fitted[8])
    assert_same(gf.train.load_params(newest(tmp_path / "8").folder), fitted[8])
    assert_same(gf.train.load_params(tmp_path / "None" / "checkpoint.safetensors"), fitted[None])
    with pytest.raises(gf.CheckpointError, match="does not contain a checkpoint; train with"):
        gf.train.load_params(tmp_path)


def test_dtypes_that_a_file_lacks_are_restored_without_a_tree_like_it(tmp_path):
    params = {
        "a": {"c": jnp.ones(3, jnp.complex64), "f": jnp.ones(4, jnp.float8_e4m3fn)},
        "w": jnp.ones([2, 2]),
    }
    (tmp_path / "kept").mkdir()
    restore.keep(tmp_path, 5, params)
    assert_same(gf.train.load_params(tmp_path / "kept" / "0000000005.safetensors"), params)


def test_a_page_shows_a_run_without_orbax(tmp_path, monkeypatch):
    train(tmp_path, start(8))
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    run = read_run(tmp_path)
    assert run.parts[""].shapes["W1"] == (16, 8)
    assert run.options["steps"] == 6


def test_without_orbax_the_error_says_what_to_install(tmp_path, monkeypatch):
    train(tmp_path / "old", start(8))
    was = (tmp_path / "old" / "metrics.jsonl").read_text()
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    install = r"need orbax: pip install 'gradfn\[distributed\]'"
    for resume in (False, True):
        with pytest.raises(ImportError, match=install):
            train(tmp_path / "old", start(8), resume=resume)
    with pytest.raises(ImportError, match=install):
        gf.train.load_params(tmp_path / "old")
    assert (tmp_path / "old" / "metrics.jsonl").read_text() == was
    assert newest(tmp_path / "old")
    train(tmp_path / "new", start())  # one device does not need it
    train(None, start(8))


def damage(folder, how):
    """Damage a checkpoint in one way."""
    file = folder.with_name(f"{folder.name}.json")
    if how == "description":
        file.write_text(file.read_text().replace('"finished": true', '"finished": false'))
    elif how == "half a description":
        file.write_text(file.read_text()[:100])
    elif how == "no folder":
        folder.rename(folder.with_name("elsewhere"))
    elif how == "link":
        (folder / "link").symlink_to("/etc/hostname")
    elif how == "lost parts":
        for part in folder.rglob("d/*"):
            part.unlink()
    elif how == "metadata":
        (folder / "_METADATA").write_text("{")
    elif how == "other arrays":  # complete, but not those of the description
        other = folder.parent.parent / "other"
        train(other, start(8, seed=1))
        folder.rename(folder.with_name("elsewhere"))
        newest(other).folder.rename(folder)


@pytest.mark.parametrize(
    "how",
    ["description", "half a description", "no folder", "link", "lost parts", "metadata", "other arrays"],
)
def test_a_damaged_checkpoint_is_one_error_and_nothing_is_written(tmp_path, how):
    train(tmp_path, start(8))
    damage(newest(tmp_path).folder, how)
    rows = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(FileError, match="checkpoint/0000000006") as error:
        train(tmp_path, start(8), 9, resume=True)
    assert "\n" not in str(error.value)
    assert (tmp_path / "metrics.jsonl").read_text() == rows
    if how != "link":
        with pytest.raises(FileError, match="checkpoint/0000000006"):
            gf.train.load_params(tmp_path, like=NET)


def test_flipped_bits_are_detected(tmp_path):
    fitted = train(tmp_path, start(8))
    folder = newest(tmp_path).folder
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.stat().st_size]
    random.seed(0)
    for _ in range(20):
        file = random.choice(files)
        was = file.read_bytes()
        i = random.randrange(len(was))
        file.write_bytes(was[:i] + bytes([was[i] ^ 1 << random.randrange(8)]) + was[i + 1 :])
        with pytest.raises(gf.CheckpointError, match=f"damaged: {file.relative_to(folder)}"):
            gf.train.load_params(tmp_path, like=NET)
        file.write_bytes(was)
    assert_same(gf.train.load_params(tmp_path, like=NET), fitted.params)


def test_what_killed_saves_left_is_removed(tmp_path):
    train(tmp_path, start(8), keep_every=3)
    mine = tmp_path / "checkpoint" / "mine.orbax-checkpoint-tmp"
    left = [
        tmp_path / "checkpoint" / "0000000007.orbax-checkpoint-tmp",
        tmp_path / "checkpoint" / "0000000007",
        tmp_path / "kept" / "0000000005.orbax-checkpoint-tmp-1",
    ]
    for folder in (*left, mine):
        folder.mkdir()
        (folder / "part").write_text("half")
    (tmp_path / "checkpoint" / ".0000000007.json.0123456789abcdef.part").write_text("half")
    train(tmp_path, start(8), 9, resume=True, keep_every=3)
    assert not any(folder.exists() for folder in left)
    assert sorted(file.name for file in (tmp_path / "checkpoint").iterdir()) == [
        "0000000009",
        "0000000009.json",
        mine.name,
    ]
    assert list(gf.train.kept(tmp_path, like=start())) == [3, 6, 9]


@pytest.mark.parametrize("name", ["checkpoint", "kept"])
def test_nothing_is_written_or_removed_through_a_link(tmp_path, name):
    train(tmp_path / "outside", start(8), keep_every=3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "outside" / name, target_is_directory=True)
    was = sorted(tmp_path.joinpath("outside").rglob("*"))
    train(tmp_path / "run", start())  # writes neither
    with pytest.raises(FileError, match=f"{name}: is a link"):
        train(tmp_path / "run", start(8), keep_every=3)
    assert sorted(tmp_path.joinpath("outside").rglob("*")) == was


def test_a_failed_write_is_one_error_that_names_the_folder_and_the_older_one_stays(tmp_path, monkeypatch):
    interrupted(tmp_path, start(8), checkpoint_seconds=1e9)
    train(tmp_path, start(8), 3)
    old = newest(tmp_path)

    def full(file, data):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(sharded, "replace_file", full)
    with pytest.raises(OSError, match="No space left") as error:
        train(tmp_path, start(8), 9, resume=True)
    assert "checkpoint/00000000" in error.value.filename
    monkeypatch.undo()
    assert newest(tmp_path) == old
    assert_same(train(tmp_path, start(8), 9, resume=True).state, train(None, start(8), 9).state)


CHILD = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_disable_most_optimizations", {fast})
from test_checkpoints_sharded import start, train
print("ready", flush=True)
train(sys.argv[1], start(8), 1_000, resume=True, eval_every=50)
print("ended", flush=True)
"""


@pytest.mark.slow
def test_kill_9_always_leaves_a_readable_checkpoint(tmp_path):
    random.seed(0)
    root, tests = Path(gf.__file__).parents[1], Path(__file__).parent
    fast = jax.config.read("jax_disable_most_optimizations")
    code = CHILD.format(root=str(root), tests=str(tests), fast=fast)
    last = 0
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout.readline() == "ready\n"
            deadline = time.monotonic() + 60
            # Let it write new checkpoints, then kill it at any moment.
            while time.monotonic() < deadline and child.poll() is None:
                found = newest(tmp_path)
                if found and int(found.file.stem) > last:
                    break
                time.sleep(0.005)
            time.sleep(random.random() * 0.3)
            child.send_signal(signal.SIGKILL)
            assert child.stdout.read() == ""  # it had not ended
        step = int(newest(tmp_path).file.stem)
        assert step > last
        last = step
        params = gf.train.load_params(tmp_path, like=NET)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    resumed = train(tmp_path, start(8), 1_000, resume=True, eval_every=50)
    assert_same(resumed.state, train(None, start(8), 1_000, eval_every=50).state)
    assert len(list((tmp_path / "checkpoint").iterdir())) == 2


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_that_two_or_one_read(tmp_path):
    folder, copy, other = tmp_path / "run", tmp_path / "copy", tmp_path / "other"
    _, ends, _ = workers(2, tmp_path, folder="SIGKILL", path=str(folder), sharded=True)
    assert ends[1][0] == -signal.SIGKILL
    assert 0 < int(newest(folder).file.stem) < one.STEPS
    shutil.copytree(folder, copy)
    found, ends, _ = workers(2, tmp_path, folder="", path=str(folder), sharded=True)
    assert [code for code, *_ in ends] == [0, 0], ends
    whole, ends, _ = workers(2, tmp_path, folder="", path=str(other), sharded=True)
    assert [code for code, *_ in ends] == [0, 0], ends
    assert len({each["folder"]["bits"] for each in (*found, *whole)}) == 1
    assert {*found[0]["kept"]} == {"20", "40"}
    assert found == whole
    assert len(list((folder / "checkpoint").iterdir())) == 2
    params = gf.train.load_params(folder)
    np.testing.assert_array_equal(params["W1"], found[0]["folder"]["params"][0])
    # One process, with as many devices.
    rules = gf.train.shardings(one.NET.spec, mesh(4), gf.train.FSDP)
    params = one.NET.init(jax.random.key(0), shardings=rules)
    alone = one.train(
        None, one.examples(), params, folder=copy, resume=True, evaluate=one.norm, progress=False
    )
    for a, b in zip(alone["params"], found[0]["folder"]["params"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert [row["step"] for row in alone["rows"]] == [row["step"] for row in found[0]["folder"]["rows"]]


def test_the_description_is_plain_json(tmp_path):
    train(tmp_path, start(8))
    content = json.loads(newest(tmp_path).file.read_text())
    assert content["arrays"]["params/W1"].keys() == {"dtype", "shape"}
    assert content["notes"]["settings"]["steps"] == 6
