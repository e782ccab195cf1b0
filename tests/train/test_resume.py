"""A run owns its folder, and only the same run resumes in it."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn.files import FileError, owned
from gradfn.runs import RunError
from gradfn.train import checkpoint
from gradfn.train.log import Log
from gradfn.train.notes import Notes, Settings

X = np.random.default_rng(0).normal(size=[24, 3]).astype("float32")
DATA = {"x": X, "y": X @ np.array([1.0, -2.0, 0.5], "float32")}
START = {"w": jnp.array([0.3, 0.1, -0.2])}


def mean_square(params, batch):
    return jnp.square(batch["x"] @ params["w"] - batch["y"]).mean()


def train(folder, steps=6, *, loss=mean_square, params=START, data=DATA, optimizer=None, **options):
    options = {"batch_size": 4, "eval_every": 3, "progress": False, "checkpoint_seconds": 0} | options
    return gf.fit(loss, params, data, optimizer or optax.adam(0.1), steps, folder=folder, **options)


def content_of(folder):
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
    train(tmp_path, keep_every=6)
    train(tmp_path, keep_every=3)
    assert [file.read_text() for file in mine] == ["mine"] * 4
    assert len(list((tmp_path / "events").iterdir())) == 1
    assert list(gf.train.kept(tmp_path, like=START)) == [3, 6]


def closing_over(weights):
    return lambda params, batch: (jnp.square(batch["x"] @ params["w"] - batch["y"]) * weights).mean()


def smoothed(amount):
    return lambda params, batch: mean_square(params, batch) + amount * jnp.abs(params["w"]).sum()


def sample(rows):
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
        ({"data": sample(ON_DEVICE)}, {"data": sample(jax.tree.map(jnp.asarray, OTHER))}, "data: batches are computed"),
        ({"data": jax.tree_util.Partial(lambda rows, key: sample(rows)(key), ON_DEVICE)},
         {"data": jax.tree_util.Partial(lambda rows, key: sample(rows)(key), jax.tree.map(jnp.asarray, OTHER))},
         "data: expected .*x float32"),
        ({"data": host(DATA)}, {"data": host(OTHER)}, "data: expected x float32"),
        ({}, {"params": {"w": START["w"] + 0.01}}, "params: expected w to start from"),
        ({"loss": smoothed(0.1)}, {"loss": smoothed(0.2)}, "loss: it computes something different"),
        ({"loss": closing_over(np.ones(4, "float32"))}, {"loss": closing_over(np.full(4, 2, "float32"))}, "loss: it"),
        ({}, {"optimizer": optax.sgd(0.1)}, "of another network or optimizer"),
    ],
)  # fmt: skip
def test_b2_another_run_is_refused_before_anything_is_written(tmp_path, before, after, message):
    with pytest.raises(InterruptionError):
        train(tmp_path, evaluate=interrupted, **before)
    done = train(tmp_path, **before)
    for steps in (6, 9):
        was = content_of(tmp_path)
        with pytest.raises(gf.CheckpointError, match=message):
            train(tmp_path, steps, resume=True, **(before | after))
        assert content_of(tmp_path) == was
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


def test_b2_a_checkpoint_without_an_identity(tmp_path):
    train(tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    state, notes = checkpoint.load(file, gf.train_state(START, optax.adam(0.1), jax.random.key(0)))
    checkpoint.save(file, state, {name: note for name, note in notes.items() if name != "identity"})
    with pytest.raises(gf.CheckpointError, match="does not describe its data"):
        train(tmp_path, resume=True)


def test_b2_large_arrays_are_identified_by_rows(monkeypatch):
    from gradfn.train import identity

    monkeypatch.setattr(identity, "HASHED", 64)
    rows = np.arange(300, dtype=np.float32).reshape(100, 3)
    assert identity.content(rows) == identity.content(jnp.asarray(rows))
    assert identity.content(rows) != identity.content(rows[::-1])
    assert identity.content(np.array(3.0)) != identity.content(np.array(4.0))
    assert identity.content(3) != identity.content(4)
    assert identity.content(jax.random.key(0)) != identity.content(jax.random.key(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", ["or not to be, to be: that is the question.\n", "a text of other letters, quick fox.\n"]
)
def test_b2_gpt_on_another_text_is_refused_and_its_model_stays(tmp_path, other):
    from gradfn.experiments import gpt

    text, folder = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("to be, or not to be: that is the question.\n" * 30)
    small = {"steps": 4, "layers": 1, "heads": 2, "width": 8, "context": 8, "batch": 4, "warmup": 1}
    config = gpt.Config(**small, data=str(text), folder=str(folder))
    gpt.run(config)
    was = content_of(folder)
    text.write_text(other * 30)
    with pytest.raises((gf.CheckpointError, RunError), match=r"another run|another model|checkpoint"):
        gpt.run(dataclasses.replace(config, resume=True))
    assert content_of(folder) == was


# B10. Resuming with any optimizer, dtype and number of steps


def with_python_numbers():
    """Momentum whose state contains Python numbers and a float64."""

    def init(params):
        return {"count": 0, "rate": 0.1, "wide": np.float64(0.5), "m": jax.tree.map(jnp.zeros_like, params)}

    def update(grads, state, params=None):
        m = jax.tree.map(lambda m, g: state["wide"] * m + g, state["m"], grads)
        updates = jax.tree.map(lambda m: -state["rate"] * m, m)
        return updates, {**state, "count": state["count"] + 1, "rate": state["rate"] * 0.99, "m": m}

    return optax.GradientTransformation(init, update)


def on_plateau():
    return optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=1, factor=0.5))


OPTIMIZERS = {
    "python numbers": with_python_numbers(),
    "reduce_on_plateau": on_plateau(),
    "lbfgs": optax.lbfgs(),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(0.1),
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 2),
}


def dying(evaluations):
    """Return an `evaluate` that is interrupted in call number `evaluations`."""
    calls = []

    def evaluate(params):
        calls.append(0)
        if len(calls) == evaluations:
            raise InterruptionError
        return {}

    return evaluate


def run_in_two(folder, **options):
    """Return a run that dies at its third evaluation and resumes from its checkpoint."""
    with pytest.raises(InterruptionError):
        train(folder, 12, eval_every=2, evaluate=dying(3), **options)
    assert (folder / "checkpoint.safetensors").exists()
    return train(folder, 12, eval_every=2, resume=True, **options)


def assert_same(one, other):
    def as_bytes(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

    assert jax.tree.map(as_bytes, one) == jax.tree.map(as_bytes, other)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), one) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), other
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_b10_optimizers_resume_bit_for_bit(tmp_path, name):
    options = {"optimizer": OPTIMIZERS[name], "inspect_every": 5}
    whole = train(None, 12, eval_every=2, **options)
    resumed = run_in_two(tmp_path, **options)
    assert_same(resumed.state, whole.state)
    assert resumed.history[-1]["loss"] == whole.history[-1]["loss"] < 0.9 * whole.history[0]["loss"]


def test_b10_reduce_on_plateau_sees_the_loss():
    optimizer = on_plateau()
    fitted = train(None, 12, optimizer=optimizer)
    params, state = START, optimizer.init(START)
    for step in range(12):
        rows = gf.data.epoch_order(24, 4, 0, step // 6)[step % 6]
        batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], DATA)
        value, grads = jax.value_and_grad(mean_square)(params, batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params, value=value)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(fitted.params["w"], params["w"], rtol=1e-5)
    assert fitted.state.opt_state[1].scale == state[1].scale < 1


@pytest.mark.slow
def test_b10_lbfgs_gets_the_value_the_gradient_and_the_function():
    optimizer = optax.lbfgs()
    fitted = train(None, 4, optimizer=optimizer, batch_size=24)
    params, state = START, optimizer.init(START)
    whole = lambda params: mean_square(params, DATA)  # noqa: E731
    for _ in range(4):
        value, grads = jax.value_and_grad(whole)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params, value=value, grad=grads, value_fn=whole)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(fitted.params["w"], params["w"], rtol=1e-4)
    assert mean_square(fitted.params, DATA) < 1e-3


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "complex64"])
def test_b10_parameters_of_every_dtype_resume_bit_for_bit(tmp_path, dtype):
    def loss(params, batch):
        w = {"w": params["w"].real.astype(jnp.float32)}
        return mean_square(w, batch) + jnp.square(params["scalar"].real.astype(jnp.float32) - 3)

    options = {
        "params": {"w": START["w"].astype(dtype), "scalar": jnp.ones([], dtype)},
        "loss": loss,
        "optimizer": optax.sgd(0.1, momentum=0.5),
    }
    whole = train(None, 12, eval_every=2, **options)
    resumed = run_in_two(tmp_path, **options)
    assert_same(resumed.state, whole.state)
    assert resumed.params["w"].dtype == resumed.params["scalar"].dtype == dtype
    assert not np.array_equal(np.asarray(resumed.params["w"]), np.asarray(options["params"]["w"]))


def test_b10_a_python_number_resumes_as_the_dtype_that_it_had(tmp_path):
    def loss(params, batch):
        return mean_square({"w": params["w"].astype(jnp.float32) * params["gain"]}, batch)

    params = {"w": START["w"].astype(jnp.bfloat16), "gain": 1.0}
    options = {"params": params, "loss": loss, "optimizer": optax.adam(0.1)}
    assert_same(run_in_two(tmp_path, **options).state, train(None, 12, eval_every=2, **options).state)


def test_b10_an_optimizer_state_that_cannot_be_carried_is_refused():
    def text(params):
        return {"rule": "steepest"}

    def growing(grads, state, params=None):
        return grads, jnp.concatenate([state, state])

    with pytest.raises(TypeError, match="optimizer's state must be numbers and arrays, got str"):
        train(
            None,
            optimizer=optax.GradientTransformation(text, lambda grads, state, params=None: (grads, state)),
        )
    with pytest.raises(
        TypeError, match=r"optimizer's state opt_state is float32\[1\] before a step and float32\[2\]"
    ):
        train(None, optimizer=optax.GradientTransformation(lambda params: jnp.zeros(1), growing))


def test_b10_a_run_is_extended_bit_for_bit(tmp_path):
    for name, every in {"epochs": None, "two": 2, "ragged": 5}.items():
        train(tmp_path / name, 7, eval_every=every)
        longer = train(tmp_path / name, 12, resume=True, eval_every=every)
        whole = train(None, 12, eval_every=every)
        assert_same(longer.state, whole.state)
        assert [row["step"] for row in longer.history if row["step"] != 7] == [
            row["step"] for row in whole.history
        ]
    with pytest.raises(gf.CheckpointError, match="is of a run with steps 12, got 11"):
        train(tmp_path / "two", 11, resume=True, eval_every=2)
    # With data from a function the default of eval_every depends on steps; the run keeps its own.
    for steps in (10, 40):
        run = train(tmp_path / "function", steps, data=sample(ON_DEVICE), eval_every=None, resume=True)
        assert len(run.history) == steps


def test_b10_a_run_that_stop_ended_has_ended(tmp_path):
    def run(steps):
        return train(tmp_path, steps, eval_every=2, stop=lambda history: len(history) == 2, resume=True)

    assert run(9).history[-1]["step"] == 4
    assert run(20).history[-1]["step"] == 4


def tensorboard(folder):
    """Return what TensorBoard shows of a folder, `{(tag, step): [values]}`, without purged events."""
    from tensorboardX.proto import event_pb2

    shown = []
    for file in sorted((folder / "events").iterdir(), key=lambda file: file.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = [entry for entry in shown if entry[1] < event.step]
            shown += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    found = {}
    for tag, step, value in shown:
        found.setdefault((tag, step), []).append(value)
    return found


@pytest.mark.parametrize("eval_every", [3, 5])
def test_b10_tensorboard_keeps_every_row_and_inspection_once(tmp_path, eval_every):
    options = {"eval_every": eval_every, "inspect_every": 1}
    with pytest.raises(InterruptionError):
        train(tmp_path, 12, evaluate=dying(2), **options)
    train(tmp_path, 12, resume=True, **options)
    shown = tensorboard(tmp_path)
    assert {step for tag, step in shown if tag == "gradient_rms/w"} == set(range(12))
    assert {step for tag, step in shown if tag == "loss"} == {*range(eval_every, 13, eval_every), 12}
    assert {len(values) for values in shown.values()} == {1}


# A checkpoint is small, because rows are in separate files


def test_a_checkpoint_is_as_large_after_many_rows_as_after_none(tmp_path):
    sizes = {}
    for n in (0, 100_000):
        settings = Settings(steps=10**6, batch_size=1, seed=0, eval_every=1)
        log = Log(tmp_path, 10**6, None, False)
        log.history.open()
        for step in range(n):
            log.history.append({"step": step, "loss": 0.5})
        checkpoint.save(
            tmp_path / "x",
            {"w": jnp.zeros(3)},
            vars(Notes(settings=settings, finished=False, logs=log.extents)),
        )
        sizes[n] = (tmp_path / "x").stat().st_size
        log.history.close()
    assert (tmp_path / "metrics.jsonl").stat().st_size > 2_000_000
    assert sizes[100_000] - sizes[0] <= 32  # digits of the count, of the offset and of the checksum


def damaged(folder, name, content):
    file = folder / name
    data = file.read_bytes()
    file.unlink() if content is None else file.write_bytes(content(data))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", None, "metrics.jsonl: there is no such file"),
        ("inspections.jsonl", lambda data: data[:-1], r"inspections.jsonl: expected at least [\d,]+ bytes, got"),
        ("metrics.jsonl", lambda data: b"\xff" + data[1:], "metrics.jsonl: line 1: "),
        ("metrics.jsonl", lambda data: data.replace(b'"step": 3', b'"step": 9'), "line 1: expected a step from 1 to 6"),
        ("metrics.jsonl", lambda data: data.replace(b'"loss"', b'"lass"'), "line 1: expected numbers, among"),
        ("inspections.jsonl", lambda data: data.replace(b'"step": 2', b'"step": 0'), "line 2: expected a step from 1"),
        ("metrics.jsonl", lambda data: data[:-1] + b" ", "line 2: expected a row of JSON that ends at byte"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_the_checkpoint_are_named(tmp_path, name, content, message):
    train(tmp_path, inspect_every=2)
    damaged(tmp_path, name, content)
    was = content_of(tmp_path)
    for steps in (6, 9):
        with pytest.raises(gf.CheckpointError, match=message) as error:
            train(tmp_path, steps, resume=True, inspect_every=2)
        assert "\n" not in str(error.value)
        assert content_of(tmp_path) == was


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_steps": 1}, "is of step 6, but counts 6 in the last row and 1 since; it is damaged"),
        ({"logs": None}, "does not count its rows; an earlier version"),
        ({"logs": {}}, "is of step 6, but counts 0 in the last row"),
        ({"logs": {"metrics.jsonl": {"rows": 3, "bytes": -7, "crc": 0}}}, "expected 3 rows in -7 bytes"),
        (
            {"logs": {"metrics.jsonl": 3}},
            "not a readable checkpoint .its notes: Expected `object`, got `int`",
        ),
        ({"sums": {"loss": "fast"}}, "not a readable checkpoint .its notes: Invalid enum value"),
        ({"settings": 3}, "not a readable checkpoint .its notes: Expected `object`"),
        ({"seconds": "long"}, "not a readable checkpoint .its notes: Expected `float`"),
        ({"identity": {"data": 3}}, "not a readable checkpoint .its notes: "),
    ],
)
def test_notes_that_cannot_be_this_runs_are_refused(tmp_path, changes, message):
    train(tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    state, notes = checkpoint.load(file, gf.train_state(START, optax.adam(0.1), jax.random.key(0)))
    checkpoint.save(file, state, notes | changes)
    was = content_of(tmp_path)
    with pytest.raises(gf.CheckpointError, match=message):
        train(tmp_path, 9, resume=True)
    assert content_of(tmp_path) == was


def test_names_in_notes_set_nothing(tmp_path):
    whole = train(None, 9)
    train(tmp_path / "run")
    file = tmp_path / "run" / "checkpoint.safetensors"
    state, notes = checkpoint.load(file, gf.train_state(START, optax.adam(0.1), jax.random.key(0)))
    more = {"folder": str(tmp_path / "elsewhere"), "progress": True, "history": [3], "tokens": 7, "row": None}
    logs = notes["logs"] | {"../../outside": {"rows": 1, "bytes": 5, "crc": 0}}
    checkpoint.save(file, state, notes | more | {"logs": logs})
    resumed = train(tmp_path / "run", 9, resume=True)
    assert_same(resumed.state, whole.state)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert "tokens_per_second" not in resumed.history[-1]


def test_sums_that_are_not_finite_are_resumed(tmp_path):
    def with_aux(params, batch):
        return mean_square(params, batch), {"bound": jnp.float32(jnp.inf), "odd": jnp.float32(jnp.nan)}

    options = {"loss": with_aux, "eval_every": 4, "keep_every": 3}
    with pytest.raises(InterruptionError):  # the checkpoint is that of step 3, between two rows
        train(tmp_path, 8, evaluate=interrupted, **options)
    row = train(tmp_path, 8, resume=True, **options).history[0]
    assert (row["bound"], str(row["odd"])) == (np.inf, "nan")
    assert row["loss"] == train(None, 8, **options | {"keep_every": None}).history[0]["loss"]


def test_old_rows_are_read_from_the_file_and_stop_sees_all(tmp_path, monkeypatch):
    monkeypatch.setattr("gradfn.train.rows.RECENT", 300)
    steps = []

    def stop(history):
        steps.append([row["step"] for row in history])
        return len(history) == 15

    fitted = train(tmp_path, 100, eval_every=1, stop=stop)
    assert steps == [list(range(1, n + 1)) for n in range(1, 16)]
    assert len(fitted.history._recent) < 5
    assert [row["loss"] for row in fitted.history] == [
        row["loss"] for row in train(None, 15, eval_every=1).history
    ]


def test_a_report_of_rows_with_infinities(tmp_path):
    from gradfn.runs.kept import read_run

    train(tmp_path, evaluate=lambda params: {"bound": np.inf, "odd": np.nan}, inspect_every=2)
    history = read_run(tmp_path).parts[""].history
    assert set(history.last) >= {"loss", "bound", "odd"}
    assert "not_finite" not in {*history.last, *history.curves}


# A run owns its folder


def test_a_folder_that_another_run_trains_in_is_refused_before_anything_is_written(tmp_path):
    train(tmp_path)
    was = content_of(tmp_path)
    messages = []

    def other():
        for resume in (False, True):
            with pytest.raises(FileError, match="is in use by another run") as error:
                train(tmp_path, 9, resume=resume)
            messages.append(str(error.value))

    with owned(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert content_of(tmp_path) == was
        train(tmp_path, 9)  # the owner itself may
    assert len(messages) == 2
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("name", ["events", "kept"])
def test_nothing_is_written_or_removed_through_a_link(tmp_path, name):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    for path in (folder, outside):
        path.mkdir()
    mine = [outside / "0000000003.safetensors", outside / "events.out.tfevents.1.mine"]
    for file in mine:
        file.write_text("mine")
    (folder / name).symlink_to(outside, target_is_directory=True)
    (folder / "checkpoint.safetensors").symlink_to(mine[0])
    if name == "kept":
        train(folder)  # does not keep parameters, so the link stays
        assert not (folder / "checkpoint.safetensors").is_symlink()
    with pytest.raises(FileError, match=f"{name}: is a link"):
        train(folder, keep_every=2)
    assert sorted(outside.iterdir()) == sorted(mine)
    assert {file.read_text() for file in mine} == {"mine"}


def test_what_killed_saves_left_is_removed(tmp_path):
    train(tmp_path, keep_every=3)
    mine = [tmp_path / ".mine.part", tmp_path / "kept" / ".mine.0123456789abcdef.part"]
    for resume in (False, True):
        parts = [
            tmp_path / ".checkpoint.safetensors.0123456789abcdef.part",
            tmp_path / "kept" / ".0000000007.safetensors.0123456789abcdef.part",
        ]
        for file in (*parts, *mine):
            file.write_text("half")
        train(tmp_path, 9, keep_every=3, resume=resume, eval_every=3 if resume else 9)
        assert not any(part.exists() for part in parts)
        assert all(file.exists() for file in mine)
        train(tmp_path, keep_every=3)


def test_a_parameter_may_be_called_checksum(tmp_path):
    params = {"checksum": jnp.array([1.0, 2.0], jnp.float32)}
    checkpoint.save(tmp_path / "x", params, {})
    assert_same(checkpoint.load(tmp_path / "x", params)[0], params)
