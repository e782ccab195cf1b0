"""A run that a signal stops writes a checkpoint, prints where, and resumes bit for bit."""

import contextlib
import gc
import os
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn import console
from gradfn.train import checkpoint
from gradfn.train.stopping import deferred

pytestmark = pytest.mark.usefixtures("hang_ups_are_not_ignored")

module = sys.modules["gradfn.train._fit"]
X = np.random.default_rng(0).normal(size=[24, 3]).astype("float32")
DATA = (X, X @ np.array([1.0, -2.0, 0.5], "float32"))
START = {"w": jnp.array([0.3, 0.1, -0.2])}
ENDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit, signal.SIGHUP: SystemExit}


def loss(params, batch):
    return jnp.square(batch[0] @ params["w"] - batch[1]).mean()


def train(folder, steps=12, **options):
    options = {"batch_size": 4, "eval_every": 3, "progress": False, "checkpoint_seconds": 1e9} | options
    return gf.fit(loss, START, DATA, optax.adam(0.1), steps, folder=folder, **options)


def handlers():
    return [signal.getsignal(number) for number in ENDS]


def assert_same_run(one, other):
    as_bytes = lambda leaf: np.asarray(  # noqa: E731
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    ).tobytes()
    assert jax.tree.map(as_bytes, one.state) == jax.tree.map(as_bytes, other.state)
    for rows in ("history", "inspections", "noise"):
        names = ("step", "loss", "value", "grads")
        found, expected = ([{n: row.get(n) for n in names} for row in getattr(f, rows)] for f in (one, other))
        assert found == expected


def once(number, at=1):
    """Return an `evaluate` that raises a signal in call number `at`."""
    calls = []

    def evaluate(params):
        calls.append(0)
        if len(calls) == at:
            signal.raise_signal(number)
        return {}

    return evaluate


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("chunk_seconds", [0, 0.2])
def test_a_signal_writes_a_checkpoint_and_resumes_bit_for_bit(
    tmp_path, monkeypatch, capsys, number, chunk_seconds
):
    monkeypatch.setattr(module, "CHUNK_SECONDS", chunk_seconds)
    before, every = handlers(), {"inspect_every": 2}
    with pytest.raises(ENDS[number]) as end:
        train(tmp_path, evaluate=once(number, at=2), **every)
    assert handlers() == before
    assert number == signal.SIGINT or end.value.code == 128 + number
    file = tmp_path / "checkpoint.safetensors"
    out, err = capsys.readouterr()
    assert err == f"stopped at step 6 of 12; resume=True continues from {file}\n"
    assert out == ""
    assert_same_run(train(tmp_path, resume=True, **every), train(None, **every))
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("trace", [1, 2])
def test_a_signal_while_it_is_traced_and_compiled_is_not_lost(tmp_path, capsys, number, trace):
    traces = []

    def signalling(params, batch):
        traces.append(0)
        if len(traces) == trace:
            signal.raise_signal(number)
        return loss(params, batch)

    with pytest.raises(ENDS[number]):
        gf.fit(signalling, START, DATA, optax.adam(0.1), 12, folder=tmp_path, batch_size=4, progress=False)
    assert len(traces) >= trace
    assert capsys.readouterr().err.startswith("stopped at step 0 of 12; ")
    assert_same_run(train(tmp_path, resume=True, eval_every=None), train(None, eval_every=None))


@pytest.mark.slow
def test_a_signal_at_any_moment_of_the_loop_resumes_bit_for_bit(tmp_path, monkeypatch):
    """The signal arrives before call number `at` of the functions that write, evaluate or measure."""
    from gradfn.train.log import Log
    from gradfn.train.rows import Rows

    every = {"inspect_every": 2, "noise_every": 3, "eval_every": 2, "keep_every": 4}
    options = {"batch_size": 4, "progress": False} | every
    example = lambda params, one: jnp.square(one[0] @ params["w"] - one[1])  # noqa: E731
    run = lambda folder, **more: gf.fit(  # noqa: E731
        gf.batch_mean(example), START, DATA, optax.adam(0.1), 6, folder=folder, **options, **more
    )
    whole = run(tmp_path / "whole")
    counter = {"calls": 0, "at": None}

    def counted(f):
        def wrapped(*args, **kwargs):
            counter["calls"] += 1
            if counter["calls"] == counter["at"]:
                signal.raise_signal(signal.SIGINT)
            return f(*args, **kwargs)

        return wrapped

    for owner, name in (
        (Log, "advance"),
        (Log, "row"),
        (Log, "inspection"),
        (Rows, "append"),
        (checkpoint, "save"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    run(tmp_path / "counted")
    for at in range(1, counter["calls"] + 1, 3):
        counter |= {"calls": 0, "at": at}
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / str(at))
        assert_same_run(run(tmp_path / str(at), resume=True), whole)


@pytest.mark.parametrize("number", ENDS)
def test_a_second_signal_stops_at_once(tmp_path, capsys, number):
    before = handlers()

    def evaluate(params):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(number)
        pytest.fail("the run continued")

    with pytest.raises(ENDS[number]) as end:
        train(tmp_path, evaluate=evaluate)
    assert number == signal.SIGINT or end.value.code == 128 + number
    assert handlers() == before
    assert capsys.readouterr().err == ""
    assert sorted(file.name for file in tmp_path.glob("*checkpoint*")) == []


def test_a_second_signal_while_the_checkpoint_is_written_keeps_the_one_before(tmp_path, monkeypatch):
    from gradfn.train import saver

    train(tmp_path, 3)
    was = (tmp_path / "checkpoint.safetensors").read_bytes()
    started, main = threading.Event(), threading.main_thread().ident

    def slow(out, arrays, notes, checksum):
        out.write(b"half of it")
        started.set()
        for _ in range(2000):  # far longer than the test, unless it is canceled
            time.sleep(0.01)
            out.write(b"")
            out.write(b"more")

    def second():
        started.wait()
        time.sleep(0.1)
        signal.pthread_kill(main, signal.SIGINT)

    monkeypatch.setattr(saver, "write_tensors", slow)
    thread = threading.Thread(target=second)
    thread.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 12, resume=True, evaluate=once(signal.SIGINT))
    thread.join()
    assert time.monotonic() - began < 15
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == was
    assert not list(tmp_path.glob(".*.part"))
    monkeypatch.undo()
    assert_same_run(train(tmp_path, resume=True), train(None))


def test_the_programs_own_handler_is_called_when_the_checkpoint_is_there(tmp_path):
    calls = []

    def mine(number, frame):
        calls.append(
            (number, (tmp_path / "checkpoint.safetensors").exists(), signal.getsignal(number) is mine)
        )

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with pytest.raises(SystemExit):
            train(tmp_path, evaluate=once(signal.SIGTERM))
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [(signal.SIGTERM, True, True)]


def test_signals_that_are_ignored_stay_so(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert train(tmp_path, evaluate=once(signal.SIGINT)).state.step == 12
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_are_restored_after_errors_and_left_alone_without_a_folder(tmp_path):
    before, during = handlers(), []

    def failing(params):
        during.append(handlers())
        raise ZeroDivisionError

    for folder in (tmp_path, None):
        with pytest.raises(ZeroDivisionError):
            train(folder, evaluate=failing)
        assert handlers() == before
    assert during[0] != before
    assert during[1] == before
    with pytest.raises(KeyboardInterrupt):
        train(None, evaluate=once(signal.SIGINT))  # immediately, as usual


def test_fit_runs_in_a_thread_that_is_not_the_main_one(tmp_path):
    before, found, fitted = handlers(), [], []
    evaluate = lambda params: found.append(handlers()) or {}  # noqa: E731
    thread = threading.Thread(target=lambda: fitted.append(train(tmp_path, evaluate=evaluate)))
    thread.start()
    thread.join()
    assert fitted[0].state.step == 12
    assert all(inside == before for inside in found)


def test_a_closed_stderr_does_not_replace_the_signal(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        with pytest.raises(KeyboardInterrupt), deferred(True) as stop:  # noqa: PT012
            stop.message = "stopped"
            signal.raise_signal(signal.SIGINT)
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            broken.flush()
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), broken.fileno())


@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_whose_exception_was_swallowed_ends_the_next_run(number, end):
    """A finalizer, in which Python ignores exceptions, may be what runs when the signal arrives."""
    with console.handling(console.stop):
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            signal.raise_signal(number)
        with pytest.raises(end), deferred(True):
            pytest.fail("the run started")
    with deferred(True) as stop:
        assert stop.signal is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_callback_of_the_garbage_collector_is_not_lost(number):
    times = []

    def callback(phase, info):
        if not times:
            times.append(time.monotonic())
            signal.raise_signal(number)

    def collect_and_wait():
        gc.collect()
        assert times
        time.sleep(5)

    gc.callbacks.append(callback)
    try:
        with console.handling(console.stop), pytest.raises((KeyboardInterrupt, SystemExit)):
            collect_and_wait()
    finally:
        gc.callbacks.remove(callback)
