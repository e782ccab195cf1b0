"""A run owns its folder, and resumes as itself or not at all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn.run import RunError

X = np.random.default_rng(0).normal(size=[24, 3]).astype("float32")
DATA = {"x": X, "y": X @ np.array([1.0, -2.0, 0.5], "float32")}
START = {"w": jnp.array([0.3, 0.1, -0.2])}


def mean_square(params, batch):
    return jnp.square(batch["x"] @ params["w"] - batch["y"]).mean()


def train(folder, steps=6, *, loss=mean_square, params=START, data=DATA, optimizer=None, **options):
    options = {"batch_size": 4, "eval_every": 3, "progress": False, "checkpoint_seconds": 0} | options
    return gf.fit(loss, params, data, optimizer or optax.adam(0.1), steps, folder=folder, **options)


def content(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class InterruptionError(Exception):
    pass


def interrupted(params):
    raise InterruptionError


# B2. A run owns its folder


def test_b2_a_fresh_run_that_dies_is_not_resumed_as_the_run_before_it(tmp_path):
    old = train(tmp_path, keep_every=2, inspect_every=2)
    with pytest.raises(InterruptionError):
        train(tmp_path, params={"w": -START["w"]}, evaluate=interrupted, checkpoint_seconds=1e9)
    assert not (tmp_path / "checkpoint.safetensors").exists()
    assert not list((tmp_path / "kept").iterdir())
    resumed = train(tmp_path, params={"w": -START["w"]}, resume=True)
    fresh = train(None, params={"w": -START["w"]})
    np.testing.assert_array_equal(resumed.params["w"], fresh.params["w"])
    assert not np.array_equal(resumed.params["w"], old.params["w"])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(resumed.history)
    assert (tmp_path / "inspections.jsonl").read_text() == ""


def test_b2_files_of_others_stay(tmp_path):
    (tmp_path / "kept").mkdir()
    mine = [tmp_path / name for name in ("notes.txt", "model.json", "kept/best.safetensors", "weights.npz")]
    for file in mine:
        file.write_text("mine")
    train(tmp_path)
    train(tmp_path)
    assert [file.read_text() for file in mine] == ["mine"] * 4
    assert len(list((tmp_path / "events").iterdir())) == 1


def closing_over(weights):
    return lambda params, batch: (jnp.square(batch["x"] @ params["w"] - batch["y"]) * weights).mean()


def smoothed(amount):
    return lambda params, batch: mean_square(params, batch) + amount * jnp.abs(params["w"]).sum()


def drawn(rows):
    return lambda key: jax.tree.map(lambda leaf: leaf[jax.random.randint(key, (4,), 0, 24)], rows)


def host(rows):
    return gf.train.from_host(lambda step: jax.tree.map(lambda leaf: leaf[step % 20 : step % 20 + 4], rows))


ON_DEVICE = jax.tree.map(jnp.asarray, DATA)
OTHER = {"x": DATA["x"].copy(), "y": DATA["y"]}
OTHER["x"][0, 0] += 1


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"data": OTHER}, r"data: expected x float32\[24, 3\] \w+, got float32\[24, 3\]"),
        ({}, {"data": jax.tree.map(lambda a: a[:20], DATA)}, r"expected x float32\[24, 3\] \w+, got float32\[20, 3\]"),
        ({}, {"data": {**DATA, "z": DATA["y"]}}, "expected z nothing, got float32"),
        ({"data": drawn(ON_DEVICE)}, {"data": drawn(jax.tree.map(jnp.asarray, OTHER))}, "data: batches are made"),
        ({"data": jax.tree_util.Partial(lambda rows, key: drawn(rows)(key), ON_DEVICE)},
         {"data": jax.tree_util.Partial(lambda rows, key: drawn(rows)(key), jax.tree.map(jnp.asarray, OTHER))},
         "data: expected .*x float32"),
        ({"data": host(DATA)}, {"data": host(OTHER)}, "data: expected x float32"),
        ({}, {"params": {"w": START["w"] + 0.01}}, "params: expected w to start from"),
        ({"loss": smoothed(0.1)}, {"loss": smoothed(0.2)}, "loss: it computes something else"),
        ({"loss": closing_over(np.ones(4, "float32"))}, {"loss": closing_over(np.full(4, 2, "float32"))}, "loss: it"),
        ({}, {"optimizer": optax.sgd(0.1)}, "of another network or optimizer"),
    ],
)  # fmt: skip
def test_b2_another_run_is_refused_before_anything_is_written(tmp_path, before, after, message):
    with pytest.raises(InterruptionError):
        train(tmp_path, evaluate=interrupted, **before)
    done = train(tmp_path, **before)
    for steps in (6, 9):
        was = content(tmp_path)
        with pytest.raises(gf.CheckpointError, match=message):
            train(tmp_path, steps, resume=True, **(before | after))
        assert content(tmp_path) == was
    np.testing.assert_array_equal(train(tmp_path, resume=True, **before).params["w"], done.params["w"])


def test_b2_what_changes_nothing_resumes(tmp_path):
    done = train(tmp_path)
    same = {"x": jnp.asarray(DATA["x"]), "y": DATA["y"].copy()}

    def renamed_and_moved(weights, rows):
        predictions = rows["x"] @ weights["w"]
        return jnp.square(predictions - rows["y"]).mean()

    rounded = {"w": START["w"] * (1 + 2**-22)}  # as another CPU might
    for other in (
        {"data": same},
        {"loss": renamed_and_moved},
        {"params": rounded},
        {"optimizer": optax.adam(0.2)},
    ):
        np.testing.assert_array_equal(train(tmp_path, resume=True, **other).params["w"], done.params["w"])


def test_b2_a_checkpoint_that_does_not_say_of_what_it_is(tmp_path):
    from gradfn.train import checkpoint

    train(tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    state, notes = checkpoint.load(file, gf.train_state(START, optax.adam(0.1), jax.random.key(0)))
    checkpoint.save(file, state, {name: note for name, note in notes.items() if name != "identity"})
    with pytest.raises(gf.CheckpointError, match="does not say of which data it is"):
        train(tmp_path, resume=True)


def test_b2_large_arrays_are_told_by_rows(monkeypatch):
    from gradfn.train import identity

    monkeypatch.setattr(identity, "HASHED", 64)
    rows = np.arange(300, dtype=np.float32).reshape(100, 3)
    assert identity.content(rows) == identity.content(jnp.asarray(rows))
    assert identity.content(rows) != identity.content(rows[::-1])
    assert identity.content(np.array(3.0)) != identity.content(np.array(4.0))
    assert identity.content(jax.random.key(0)) != identity.content(jax.random.key(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", ["or not to be, to be: that is the question.\n", "a text of other letters, quick fox.\n"]
)
def test_b2_gpt_on_another_text_is_refused_and_its_model_stays(tmp_path, other):
    from experiments import gpt

    text, folder = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("to be, or not to be: that is the question.\n" * 30)
    small = {"steps": 4, "layers": 1, "heads": 2, "width": 8, "context": 8, "batch": 4, "warmup": 1}
    config = gpt.Config(**small, data=str(text), folder=str(folder))
    gpt.run(config)
    was = content(folder)
    text.write_text(other * 30)
    with pytest.raises((gf.CheckpointError, RunError), match=r"another run|of another model|checkpoint"):
        gpt.run(dataclasses.replace(config, resume=True))
    assert content(folder) == was
