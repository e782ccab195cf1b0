import json
import operator
import os
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
from safetensors import safe_open

import gradfn as gf
from gradfn.train.log import Log
from gradfn.train.source import Source, source_of, take_rows

pytestmark = pytest.mark.optimized

module = sys.modules["gradfn.train._fit"]
net = gf.mlp([3, 4, 2])
x = jax.random.normal(jax.random.key(0), [50, 3])
data = (x, (x[:, 0] > 0).astype(jnp.int32))
start = net.init(jax.random.key(1))
loss = gf.batch_mean(gf.classification_loss(net))


def train(steps=40, **options):
    options = {"batch_size": 8, "progress": False, "seed": 3} | options
    optimizer = options.pop("optimizer", optax.adam(0.05))
    return gf.fit(options.pop("loss", loss), start, options.pop("data", data), optimizer, steps, **options)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def by_hand(steps):
    """The same training as a plain loop of plain JAX."""
    optimizer = optax.adam(0.05)
    params, state, losses = start, optimizer.init(start), []
    mean = lambda params, batch: jax.vmap(lambda one: loss.example(params, one))(batch).mean()  # noqa: E731
    value_and_grad = jax.jit(jax.value_and_grad(mean))
    for step in range(steps):
        index = gf.data.epoch_order(50, 8, 3, step // 6)[step % 6]
        value, grads = value_and_grad(params, jax.tree.map(operator.itemgetter(index), data))
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    return params, losses


@pytest.mark.slow
def test_fit_is_the_plain_loop():
    fitted = train(20)
    params, losses = by_hand(20)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), fitted.params, params)
    assert [row["step"] for row in fitted.history] == [6, 12, 18, 20]
    np.testing.assert_allclose(fitted.history[0]["loss"], np.mean(losses[:6]), rtol=1e-5)
    np.testing.assert_allclose(fitted.history[-1]["loss"], np.mean(losses[18:]), rtol=1e-5)
    assert fitted.history[1]["epoch"] == 2
    assert fitted.state.step == 20


def test_the_users_parameters_do_not_change():
    before = jax.tree.map(np.array, start)
    train(3)
    assert_same(start, before)


def test_how_steps_are_grouped_changes_no_bit(monkeypatch):
    whole = train(40)
    monkeypatch.setattr(module, "CHUNK_SECONDS", 0)  # chunks of one step
    assert_same(train(40).params, whole.params)
    assert [row["loss"] for row in train(40).history] == [row["loss"] for row in whole.history]


@pytest.mark.slow
def test_train_step_is_what_fit_does():
    optimizer = optax.adam(0.05)
    step = gf.train_step(loss, optimizer)
    state = gf.train_state(start, optimizer, jax.random.key(3))
    for index in gf.data.epoch_order(50, 8, 3, 0):
        state, metrics = step(state, jax.tree.map(operator.itemgetter(index), data))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.params, train(6).params)
    assert set(metrics) == {"loss"}


def test_training_learns():
    accuracy = gf.accuracy(net)
    fitted = train(300, evaluate=lambda params: {"accuracy": accuracy(params, data)}, eval_every=100)
    assert fitted.history[-1]["accuracy"] > 0.95
    assert [row["step"] for row in fitted.history] == [100, 200, 300]


def test_aux_and_noise():
    def noisy(params, batch, key):
        return params["w"] * 0 + 1.0, {"draw": jax.random.uniform(key), "vector": jnp.ones(3)}

    fitted = gf.fit(
        noisy, {"w": jnp.ones([])}, x, optax.sgd(0.1), 4, batch_size=2, eval_every=1, progress=False
    )
    draws = [row["draw"] for row in fitted.history]
    assert len(set(draws)) == 4  # each step has its own key
    assert "vector" not in fitted.history[0]


def test_data_from_a_function():
    def batch(key):
        return jax.random.normal(key, [16, 2])

    fitted = gf.fit(
        lambda params, batch: jnp.square(params - batch.mean(0)).sum(),
        jnp.ones(2),
        batch,
        optax.sgd(0.05),
        400,
        progress=False,
    )
    np.testing.assert_allclose(fitted.params, 0, atol=0.1)
    assert len(fitted.history) == 10
    assert "epoch" not in fitted.history[0]
    assert len({row["loss"] for row in fitted.history}) == 10


def test_stop_ends_early():
    fitted = train(1000, eval_every=5, stop=lambda history: len(history) == 3)
    assert fitted.state.step == 15
    assert len(fitted.history) == 3


def test_stalled_waits_for_an_improvement():
    stop = gf.stalled("accuracy", evaluations=2, better=max)
    rows = [{"accuracy": value} for value in (0.5, 0.7, 0.7, 0.6)]
    assert [stop(rows[:n]) for n in range(5)] == [False, False, False, False, True]


@pytest.mark.slow
def test_many_devices_share_a_batch():
    mesh = jax.make_mesh((8,), ("data",))
    shared = train(12, mesh=mesh)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), shared.params, train(12).params
    )
    assert len(shared.params["W1"].devices()) == 8


def test_data_are_placed_on_a_mesh_once(monkeypatch):
    """Every chunk gets arrays that are already on all devices; the result does not change."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    calls, chunks = [], module.chunks

    def watched(loss, optimizer, source, *rest):
        run = chunks(loss, optimizer, source, *rest)

        def advance(state, order, *rest):
            calls.append(jax.tree.leaves((source.arrays, order)))
            return run.advance(state, order, *rest)

        return run._replace(advance=advance)

    monkeypatch.setattr(module, "chunks", watched)
    shared = train(12, mesh=mesh)
    assert len(calls) >= 3
    assert all(len(leaf.devices()) == 2 for leaves in calls for leaf in leaves)
    # The same arrays, not copies.
    assert all(a is b for leaves in calls for a, b in zip(leaves[:2], calls[0][:2], strict=True))
    monkeypatch.setattr(Source, "placed", lambda source, mesh, axis: source)
    assert_same(train(12, mesh=mesh).state.params, shared.state.params)


@pytest.mark.parametrize("shape", [[20], [20, 3], [20, 2, 2]])
def test_take_rows_is_indexing(shape):
    array = jax.random.normal(jax.random.key(0), shape)
    index = jnp.array([3, 3, 19, 0])
    np.testing.assert_array_equal(jax.jit(take_rows)(array, index), array[index])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"data": (x, x[:3])},
            "one row per example, but their lengths differ: data\\[0\\]: 50, data\\[1\\]: 3",
        ),
        ({"data": (x, 1.0)}, "data\\[1\\] must be an array \\[examples, ...\\], got 1.0"),
        ({"batch_size": 51}, "batch_size must be in \\[1, 50\\], the number of examples, got 51"),
        ({"batch_size": 0}, "batch_size must be in \\[1, 50\\], the number of examples, got 0"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"eval_every": 0}, "eval_every must be an integer >= 1, got 0"),
        ({"loss": lambda params, batch: jnp.ones(3)}, "scalar"),
    ],
)
def test_invalid_arguments_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        train(**options)


# The files of a run


@pytest.mark.slow
def test_folder_holds_metrics_and_events(tmp_path):
    fitted = train(20, folder=tmp_path / "run", evaluate=lambda params: {"one": 1.0})
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == fitted.history
    assert rows[-1]["one"] == 1
    events = list((tmp_path / "run" / "events").iterdir())
    assert len(events) == 1
    assert events[0].stat().st_size > 200


def test_a_finished_run_is_returned_as_it_was(tmp_path):
    fitted = train(20, folder=tmp_path)
    again = train(20, folder=tmp_path, resume=True, evaluate=lambda params: pytest.fail("it trained on"))
    assert_same(again.params, fitted.params)
    assert again.history == fitted.history


class InterruptionError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("noisy", [False, True])
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, noisy):
    dropping = gf.serial(drop=gf.layers.dropout(0.2), mlp=net)
    begin = {"mlp": start}
    options = {"batch_size": 8, "progress": False, "checkpoint_seconds": 0}

    def run(**more):
        chosen, params = (gf.batch_mean(gf.classification_loss(dropping)), begin) if noisy else (loss, start)
        return gf.fit(chosen, params, data, optax.adam(0.05), 40, **options, **more)

    def interrupt(params, calls=[]):  # noqa: B006
        calls.append(0)
        if len(calls) == 4:
            raise InterruptionError
        return {}

    whole = run()
    with pytest.raises(InterruptionError):
        run(folder=tmp_path, evaluate=interrupt)
    resumed = run(folder=tmp_path, resume=True)
    assert_same(resumed.state.params, whole.state.params)
    assert_same(resumed.state.opt_state, whole.state.opt_state)
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in whole.history]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == resumed.history


@pytest.mark.slow
def test_parameters_are_kept_without_those_of_an_earlier_run_in_the_folder(tmp_path):
    train(20, folder=tmp_path, keep_every=4)
    fitted = train(10, folder=tmp_path, keep_every=5)
    kept = gf.train.kept(tmp_path, like=start)
    assert list(kept) == [5, 10]
    assert_same(kept[10], fitted.params)
    assert_same(kept[5], train(5).params)
    assert_same(fitted.params, train(10).params)
    with pytest.raises(gf.CheckpointError, match="does not contain kept parameters; train with"):
        gf.train.kept(tmp_path / "kept", like=start)


def test_resume_without_a_checkpoint_starts(tmp_path):
    assert_same(train(5, folder=tmp_path / "new", resume=True).params, train(5).params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 19}, "is of a run with steps 20, got 19"),
        ({"seed": 4}, "is of a run with seed 3, got 4"),
        ({"batch_size": 5}, "is of a run with batch_size 8, got 5"),
        ({"optimizer": optax.sgd(0.1)}, "also contains .*; it is of another network or optimizer"),
        ({"optimizer": optax.lion(0.1)}, "of another network or optimizer"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path, options, message):
    train(20, folder=tmp_path, eval_every=10)
    with pytest.raises(gf.CheckpointError, match=message):
        train(**({"steps": 20, "folder": tmp_path, "resume": True, "eval_every": 10} | options))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_damaged_checkpoint_is_refused(tmp_path, keep):
    train(5, folder=tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(gf.CheckpointError, match="not a readable checkpoint"):
        train(5, folder=tmp_path, resume=True)


def test_a_loss_that_is_no_longer_finite_stops_and_keeps_the_last_good(tmp_path):
    def explode(params, batch):
        return jnp.exp(params) * batch.mean()

    options = {"batch_size": 5, "progress": False, "folder": tmp_path, "checkpoint_seconds": 0}
    with pytest.raises(FloatingPointError, match="the loss became"):
        gf.fit(explode, jnp.array(1.0), jnp.ones(50), optax.sgd(-1.0), 100, **options)
    state, _ = gf.train.checkpoint.load(
        tmp_path / "checkpoint.safetensors",
        gf.train_state(jnp.array(1.0), optax.sgd(-1.0), jax.random.key(0)),
    )
    assert np.isfinite(state.params)


VICTIM = """
import jax, jax.numpy as jnp, optax, sys, time
import gradfn as gf
x = jax.random.normal(jax.random.key(0), [50, 3])
net = gf.mlp([3, 4, 2])
def slow(params):
    print("row", flush=True)
    time.sleep(0.02)
    return {}
loss = gf.batch_mean(gf.classification_loss(net))
fitted = gf.fit(loss, net.init(jax.random.key(1)), (x, (x[:, 0] > 0).astype(jnp.int32)),
    optax.adam(0.05), 600, batch_size=8, folder=sys.argv[1], resume=True, checkpoint_seconds=0, progress=False,
    evaluate=slow)
print(fitted.params["W1"].tobytes().hex())
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(gf.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}

    def start_run(folder):
        command = [sys.executable, "-c", VICTIM, str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def rows_in(checkpoint):
        if not checkpoint.exists():
            return 0
        with safe_open(checkpoint, "numpy") as content:
            return json.loads(content.metadata()["notes"])["logs"]["metrics.jsonl"]["rows"]

    rng = np.random.default_rng(0)
    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"
    for _ in range(3):
        run = start_run(tmp_path / "killed")
        run.stdout.readline()  # it trains
        while rows_in(checkpoint) == 0:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
    resumed = start_run(tmp_path / "killed").communicate()[0].split()
    whole = start_run(tmp_path / "whole").communicate()[0].split()
    assert resumed.count("row") < whole.count("row")  # it resumed and did not start again
    assert len(whole[-1]) > 50
    assert resumed[-1] == whole[-1]


# What it prints


def test_lines_where_there_is_no_terminal(capsys):
    train(20, progress=True, eval_every=10, evaluate=lambda params: {"accuracy": 0.5})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("step 20/20 loss 0.")
    assert "accuracy 0.5000" in lines[1]
    assert lines[1].endswith("0.0 s left")


def test_the_time_left_includes_evaluations_and_inspections(monkeypatch, capsys):
    """Half way, it is within 30 % of the time that the rest takes, although most time is spent outside the steps."""
    clock = {"now": 1000.0}
    monkeypatch.setattr("gradfn.train.log.time.monotonic", lambda: clock["now"])

    def evaluate(params):
        clock["now"] += 9.0
        ends.append(clock["now"])
        return {}

    look = Log.inspect
    monkeypatch.setattr(Log, "inspect", lambda *args: (clock.update(now=clock["now"] + 2.0), look(*args)))
    start_clock = Log.start
    monkeypatch.setattr(Log, "start", lambda log, step: (clock.update(now=5000.0), start_clock(log, step)))
    ends = []
    train(40, progress=True, eval_every=10, inspect_every=5, evaluate=evaluate)
    lines = capsys.readouterr().out.splitlines()
    left = [float(line.split(" s, ")[-1].removesuffix(" s left").replace(",", "")) for line in lines]
    assert left[1] == pytest.approx(ends[3] - ends[1], rel=0.3)
    assert left[3] == 0


def test_the_time_left_is_estimated_from_this_process_alone(monkeypatch):
    clock = {"now": 50.0}
    monkeypatch.setattr("gradfn.train.log.time.monotonic", lambda: clock["now"])
    log = Log(None, steps=100, tokens=None, progress=False)
    assert np.isnan(log.left(60))
    log.start(60)  # where the previous process stopped
    assert np.isnan(log.left(60))
    clock["now"] += 4.0
    assert log.left(68) == pytest.approx(4.0 / 8 * 32)


def test_a_bar_in_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    train(20, progress=True, eval_every=10, evaluate=lambda params: {"accuracy": 0.5})
    text = capsys.readouterr().out
    assert "examples/s" in text
    assert "accuracy 0.5" in text


# Inspections and noise


@pytest.mark.slow
def test_inspections_are_those_of_the_steps(tmp_path):
    fitted = train(20, inspect_every=8, folder=tmp_path)
    assert [row["step"] for row in fitted.inspections] == [0, 8, 16]
    index = gf.data.epoch_order(50, 8, 3, 0)[0]
    inspection = gf.inspect(loss, input_grads=False)(start, (data[0][index], data[1][index]))
    first = fitted.inspections[0]
    np.testing.assert_allclose(first["value"], inspection.value, rtol=1e-5)
    np.testing.assert_allclose(first["sites"]["a1"]["mean"], inspection.stats["a1"].mean, rtol=1e-5)
    assert set(first["update_ratios"]) == {"W1", "b1", "W2", "b2"}
    rows = [json.loads(line) for line in (tmp_path / "inspections.jsonl").read_text().splitlines()]
    assert rows == fitted.inspections


def test_an_inspected_step_is_differentiated_once():
    state = gf.train_state(start, optax.adam(0.05), jax.random.key(3))
    source = source_of(data, 8, 3)
    programs = module.chunks(loss, optax.adam(0.05), source, state, inspect_every=1)
    batch = jax.tree.map(lambda array: array[:8], data)

    def products(f, *args):
        return str(jax.make_jaxpr(f)(*args)).count("dot_general")

    inspected = products(lambda state: programs.advance(state, source.order(0), 0, 1), state)
    assert inspected == products(gf.inspect(loss, input_grads=False), start, batch) > 0


@pytest.mark.parametrize("every", [1, 3])
def test_inspections_within_a_chunk_are_those_of_single_steps(every, monkeypatch, tmp_path):
    """Against each step on its own: `gf.inspect` on its batch, then its update; chunks of every length."""
    optimizer = optax.adam(0.05)
    inspected = jax.jit(gf.inspect(loss, input_grads=False))
    params, opt_state, expected = start, optimizer.init(start), []
    for step in range(20):
        epoch, place = divmod(step, 50 // 8)
        index = gf.data.epoch_order(50, 8, 3, epoch)[place]
        found = inspected(params, (data[0][index], data[1][index]))
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(found.grads, opt_state, params)
        if step % every == 0:
            expected.append({"step": step} | found.with_updates(params, updates).to_dict())
        params = optax.apply_updates(params, updates)

    monkeypatch.setattr("gradfn.train.chunk.INSPECTED", 1 << 11)  # three of them
    for seconds, folder in ((0.2, None), (0, tmp_path)):
        monkeypatch.setattr(module, "CHUNK_SECONDS", seconds)
        assert_rows_agree(train(20, inspect_every=every, eval_every=20, folder=folder).inspections, expected)


def assert_rows_agree(actual, expected):
    """Two trees of numbers: the same structure and order of names, and values that differ by rounding."""
    assert str(jax.tree.structure(list(actual))) == str(jax.tree.structure(expected))
    for one, other in zip(actual, expected, strict=True):
        assert list(one) == list(other)
        assert [type(leaf) for leaf in jax.tree.leaves(one)] == [
            type(leaf) for leaf in jax.tree.leaves(other)
        ]
    for one, other in zip(jax.tree.leaves(list(actual)), jax.tree.leaves(expected), strict=True):
        assert one == (other if isinstance(other, str) else pytest.approx(other, rel=2e-4, abs=1e-7))


@pytest.mark.parametrize("donated", [1 << 24, 0])
@pytest.mark.parametrize("broken", ["loss", "grad"])
def test_no_step_after_a_broken_one_is_inspected(broken, donated, monkeypatch, tmp_path):
    """Of one chunk, in which step 4 breaks; its own inspection is in the file."""
    monkeypatch.setattr("gradfn.train.chunk.DONATED", donated)

    def root(params, batch):
        w = params["w"]  # 1, 0.75, 0.5, 0.25, 0
        return (jnp.log(w) * 0 + w if broken == "loss" else jnp.sqrt(w**2)) + batch.mean() * 0

    def fit():
        gf.fit(root, {"w": jnp.ones([])}, jnp.ones(500), optax.sign_sgd(0.25), 90, batch_size=5, eval_every=90,
               progress=False, folder=tmp_path, inspect_every=2)  # fmt: skip

    with pytest.raises(FloatingPointError, match="step 4: "):
        fit()
    rows = [json.loads(line) for line in (tmp_path / "inspections.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[-1]["grads"]["w"]["nonfinite"] == 1
    assert rows[1]["grads"]["w"] == {"rms": 1.0, "max": 1.0, "nonfinite": 0}


@pytest.mark.slow
def test_inspecting_changes_no_bit():
    assert_same(train(20, inspect_every=3).params, train(20).params)


@pytest.mark.slow
def test_noise_is_that_of_the_steps(tmp_path):
    fitted = train(6, noise_every=2, folder=tmp_path)
    assert [row["step"] for row in fitted.noise] == [0, 2, 4]
    index = gf.data.epoch_order(50, 8, 3, 0)[0]
    noise = gf.per_example.noise_scale(loss.example)(start, (data[0][index], data[1][index]))
    np.testing.assert_allclose(fitted.noise[0]["variance"], noise.variance, rtol=1e-4)
    signals, noises = ([row[name] for row in fitted.noise] for name in ("gradient_square", "variance"))
    weights = 0.98 ** np.array([2, 1, 0])
    signal = weights @ signals
    running = weights @ noises / signal if signal > 0 else None
    assert fitted.noise[-1]["running_scale"] == pytest.approx(running)
    rows = [json.loads(line) for line in (tmp_path / "noise.jsonl").read_text().splitlines()]
    assert rows == fitted.noise
    assert_same(fitted.params, train(6).params)


def test_noise_needs_single_examples():
    with pytest.raises(
        ValueError, match=r"noise_every needs the loss of one example as well. Pass gf.batch_mean\(loss\)"
    ):
        train(1, loss=lambda params, batch: loss(params, batch), noise_every=1)


@pytest.mark.slow
def test_inspections_are_resumed(tmp_path):
    every = {"inspect_every": 3, "noise_every": 8}

    def interrupt(params):
        raise InterruptionError

    with pytest.raises(InterruptionError):
        train(20, **every, folder=tmp_path, eval_every=11, evaluate=interrupt, checkpoint_seconds=0)
    resumed = train(20, **every, folder=tmp_path, eval_every=11, resume=True)
    assert [row["step"] for row in resumed.inspections] == [0, 3, 6, 9, 12, 15, 18]
    rows = [json.loads(line) for line in (tmp_path / "inspections.jsonl").read_text().splitlines()]
    assert rows == resumed.inspections
    assert [row["step"] for row in resumed.noise] == [0, 8, 16]


@pytest.mark.parametrize("chunk_seconds", [0, 0.2])
def test_a_gradient_that_breaks_is_traced_to_its_line(monkeypatch, chunk_seconds):
    monkeypatch.setattr(module, "CHUNK_SECONDS", chunk_seconds)

    def norm(params, batch):
        return jnp.sqrt(params["w"] ** 2) + batch.mean() * 0  # at 0 the slope of the root is infinite

    with pytest.raises(FloatingPointError) as error:
        # Four steps of 0.25 lead to 0, where the norm is finite and its gradient is not.
        gf.fit(
            norm, {"w": jnp.ones([])}, jnp.ones(50), optax.sign_sgd(0.25), 100, batch_size=5, progress=False
        )
    assert str(error.value).startswith("step 4: a gradient or an update is not finite")
    assert "test_fit.py" in str(error.value)


# B6. Names and numbers in rows


@pytest.mark.parametrize(
    "name", ["loss", "step", "epoch", "seconds", "examples_per_second", "tokens_per_second"]
)
def test_b6_a_metric_with_a_reserved_name_is_refused(name):
    def with_aux(params, batch):
        return jnp.square(params - batch).mean(), {"fine": jnp.float32(0), name: jnp.float32(7)}

    options = {"batch_size": 5, "progress": False}
    with pytest.raises(ValueError, match=f"{name}.*Rename it|aux: {name} is the name of the loss"):
        gf.fit(with_aux, jnp.array(0.0), jnp.ones(10), optax.sgd(0.1), 2, **options)
    with pytest.raises(ValueError, match=f"evaluate returned {name}, which a row of metrics has already"):
        gf.fit(
            lambda params, batch: jnp.square(params - batch).mean(),
            *(jnp.array(0.0), jnp.ones(10), optax.sgd(0.1), 2),
            **options,
            evaluate=lambda params: {"fine": 0.0, name: 7.0},
        )


def test_b6_evaluate_does_not_replace_a_scalar_of_aux():
    def with_aux(params, batch):
        return jnp.square(params - batch).mean(), {"size": params}

    with pytest.raises(ValueError, match="evaluate returned size"):
        gf.fit(with_aux, jnp.array(0.0), jnp.ones(10), optax.sgd(0.1), 2, batch_size=5, progress=False,
               evaluate=lambda params: {"size": 1.0})  # fmt: skip
    step = gf.train_step(lambda params, batch: (params.sum(), {"loss": params}), optax.sgd(0.1))
    with pytest.raises(ValueError, match="aux: loss is the name of the loss itself"):
        step(gf.train_state(jnp.array(0.0), optax.sgd(0.1), jax.random.key(0)), jnp.ones(2))


def test_b6_files_are_json_whatever_the_numbers(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    def with_aux(params, batch):
        return jnp.square(params["w"] - batch).mean(), {"bound": jnp.float32(jnp.inf)}

    def fit(steps, **options):
        return gf.fit(with_aux, {"w": jnp.array(0.0)}, jnp.ones(10), optax.sgd(0.1), steps, batch_size=5,
                      progress=False, folder=tmp_path, evaluate=lambda params: {"nan": np.nan, "low": -np.inf},
                      inspect_every=1, eval_every=1, **options)  # fmt: skip

    fitted = fit(3)
    for file in tmp_path.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            json.loads(line, parse_constant=refuse)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["nan"], row["low"], row["bound"]) for row in rows] == [(None, None, None)] * 3
    from safetensors import safe_open

    with safe_open(tmp_path / "checkpoint.safetensors", "numpy") as content:
        json.loads(content.metadata()["notes"], parse_constant=refuse)
    # In memory, and from there in a resumed run, numbers are unchanged.
    assert fitted.history[-1]["low"] == fit(3, resume=True).history[-1]["low"] == -np.inf
    again = fit(4, resume=True)
    assert np.isnan([row["nan"] for row in again.history]).all()
    assert [row["bound"] for row in again.history] == [np.inf] * 4


def test_b6_two_parameters_of_one_path_are_refused(tmp_path):
    twice = {"a/b": gf.Param([2]), "a": {"b": gf.Param([2])}}
    arrays = {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}
    run = lambda folder: gf.fit(lambda params, batch: params["a/b"].sum() * batch.mean(), arrays, jnp.ones(10),  # noqa: E731
                                optax.sgd(0.1), 1, batch_size=5, folder=folder, progress=False)  # fmt: skip
    for declare in (
        lambda: gf.init(twice, jax.random.key(0)),
        lambda: gf.Net(twice, lambda params, x: x),
        lambda: gf.table(twice),
        lambda: gf.train.checkpoint.save(tmp_path / "x", arrays, {}),
        lambda: run(tmp_path / "run"),
    ):
        with pytest.raises(gf.ParameterError, match="a/b: two entries have this path"):
            declare()
    assert not (tmp_path / "run").exists()
    aux = lambda params, batch: (params.sum(), {"a/b": params, "a": {"b": params}})  # noqa: E731
    with pytest.raises(ValueError, match="a/b: two entries"):
        gf.fit(aux, jnp.array(0.0), jnp.ones(10), optax.sgd(0.1), 1, batch_size=5, progress=False)


# B8. NaN is worse than any number


@pytest.mark.parametrize("better", [min, max])
def test_b8_stalled_treats_nan_as_worse_than_any_number(better):
    nan, sign = float("nan"), 1 if better is min else -1
    cases = [
        ([1.0, nan, nan], True),
        ([nan, 2.0, 2.0], False),
        ([nan, nan, nan], True),
        ([nan, 2.0, 1.0], False),
        ([nan, nan, 1.0], False),
        ([2.0, nan, 1.0], False),
        ([1.0, nan, 2.0, 1.5], True),
        ([nan, 1.0, nan, 0.5], False),
        ([float("inf"), nan, 1.0], False),
        ([1.0, float("inf"), nan], True),
        ([nan], False),
    ]
    for values, expected in cases:
        rows = [{"m": sign * value} for value in values]
        # metrics.jsonl stores NaN as null.
        null = [{"m": None if np.isnan(value) else sign * value} for value in values]
        assert gf.stalled("m", evaluations=2, better=better)(null) is expected, values
        assert gf.stalled("m", evaluations=2, better=better)(rows) is expected, values
