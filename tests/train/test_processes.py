"""Several processes that train together, on this machine: what they compute, and how they end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import gradfn as gf
from gradfn.cli import main
from gradfn.train import lost, processes
from tests.train import one_of_several as one

ROOT = Path(__file__).parents[2]
WORKER = Path(one.__file__)
# Processes that have not ended after this time are killed.
SECONDS = 400


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def together(n, tmp_path, command):
    """Run processes that train together to their ends.

    Args:
        n: how many.
        tmp_path: for their outputs.
        command: `(address, i) -> words`.

    Returns:
        Of each, its exit code, stdout and stderr; and how many seconds passed after the first of them ended.
    """
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // n}",
    }
    running, files = [], []
    try:
        for i in range(n):
            files.append([(tmp_path / f"{name}{i}").open("w+") for name in ("out", "err")])
            out, err = files[-1]
            running.append(
                subprocess.Popen(command(address, i), env=environment, cwd=tmp_path, stdout=out, stderr=err)
            )
        deadline, first = time.monotonic() + SECONDS, None
        while any(process.poll() is None for process in running) and time.monotonic() < deadline:
            if first is None and any(process.poll() is not None for process in running):
                first = time.monotonic()
            time.sleep(0.05)
        waited = time.monotonic() - (first or time.monotonic())
    finally:
        for process in running:
            process.kill()
            process.wait()
    time.sleep(0.5)  # until what stderr flows through has written the last line
    texts = []
    for pair in files:
        texts.append([])
        for file in pair:
            file.seek(0)
            texts[-1].append(file.read())
            file.close()
    return [(process.returncode, *text) for process, text in zip(running, texts, strict=True)], waited


def workers(n, tmp_path, **todo):
    """Run the worker in some processes; return what each wrote, with its end, and how long they took to end."""

    def command(address, i):
        return [
            sys.executable,
            str(WORKER),
            address,
            str(n),
            str(i),
            f"{tmp_path}/found{i}",
            json.dumps(todo),
        ]

    ends, waited = together(n, tmp_path, command)
    files = [tmp_path / f"found{i}" for i in range(n)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files], ends, waited


def assert_equal(found, expected):
    assert [row["step"] for row in found["rows"]] == [row["step"] for row in expected["rows"]]
    for name in ("loss", "norm"):
        both = ([row[name] for row in each["rows"]] for each in (found, expected))
        np.testing.assert_allclose(*both, rtol=1e-5)
    for one_leaf, other in zip(found["params"], expected["params"], strict=True):
        np.testing.assert_allclose(one_leaf, other, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def alone():
    """What one process with four devices computes."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    arrays = one.train(mesh, one.examples(), inspect_every=20, progress=False)
    host = one.train(mesh, gf.train.from_host(one.host_batch(0, one.BATCH)), progress=False)
    return {"arrays": arrays, "host": host, "local": host, "split": arrays}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes with two devices each compute, and their ends."""
    todo = {"arrays": 1, "host": 1, "split": 1, "nan": 1}
    found, ends, _ = workers(2, tmp_path_factory.mktemp("pair"), **todo)
    return found, ends


def assert_equal_to_one(found, ends, alone):
    """Assert that processes compute what one does, the same bits each, and that only the first shows progress."""
    assert [code for code, *_ in ends] == [0] * len(found), ends
    for kind in alone.keys() & found[0].keys():
        assert len({each[kind]["bits"] for each in found}) == 1
        assert all(each[kind]["rows"] == found[0][kind]["rows"] for each in found)
        assert_equal(found[0][kind], alone[kind])
    assert all(each["arrays"]["inspections"] == [0, 20] for each in found)
    assert "step 4/40" in ends[0][1]
    assert not any("step" in out for _, out, _ in ends[1:])


@pytest.mark.slow
def test_two_processes_compute_what_one_does(pair, alone):
    found, ends = pair
    assert_equal_to_one(found, ends, alone)
    assert found[0].keys() == alone.keys() | {"nan", "none", "few"}
    for each in found:
        assert each["none"] == each["few"]
        assert each["few"].startswith(
            "fit: several processes train together on one mesh, with devices of each"
        )
    assert {each["nan"] for each in found} == {"step 0: the loss became -inf"}


@pytest.mark.slow
def test_four_processes_compute_what_one_does(tmp_path, alone):
    found, ends, _ = workers(4, tmp_path, arrays=1)
    assert_equal_to_one(found, ends, alone)


@pytest.mark.slow
def test_a_run_whose_process_is_killed_and_that_is_terminated_resumes_to_the_bit(tmp_path, pair):
    folder = tmp_path / "run"
    # Killed: the other one ends with an error that names it.
    found, ends, waited = workers(2, tmp_path, folder="SIGKILL", path=str(folder))
    assert found == [None, None]
    assert ends[1][0] == -signal.SIGKILL
    assert ends[0][0] not in (0, None)
    assert ends[0][2].splitlines()[-1] == (
        "gradfn: process 0 of 2 ends because process 1 was lost: killed, ended by an error, or out of reach"
    )
    assert "Traceback" not in ends[0][2]
    assert waited < 90
    assert (folder / "checkpoint.safetensors").exists()
    # Terminated: both stop at the same step, with a checkpoint.
    found, ends, _ = workers(2, tmp_path, folder="SIGTERM", path=str(folder))
    assert found == [None, None]
    assert [code for code, *_ in ends] == [143, 143]
    assert "stopped at step" in ends[0][2]
    assert ends[1][2] == ""
    # Resumed: as if nothing had happened.
    found, ends, _ = workers(2, tmp_path, folder="", path=str(folder))
    assert [code for code, *_ in ends] == [0, 0], ends
    whole = pair[0][0]["arrays"]
    for each in found:
        assert each["folder"] == whole
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole["rows"]]
    assert len(list((folder / "events").iterdir())) == 3


@pytest.mark.slow
def test_gpt_runs_on_two_processes(tmp_path):
    sizes = {"steps": 8, "batch": 4, "context": 8, "layers": 1, "heads": 2, "width": 16}
    small = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]

    def command(address, i):
        here = ["--distributed", "--coordinator", address, "--processes", "2", "--process", str(i)]
        return [sys.executable, "-m", "gradfn", "run", "gpt", *small, "--folder", "run", *here]

    ends, _ = together(2, tmp_path, command)
    assert [code for code, *_ in ends] == [0, 0], ends
    assert "test" not in ends[1][1]
    assert "step" not in ends[1][1]
    assert "step 8/8" in ends[0][1]
    assert "validation loss" in ends[0][1]
    assert {"config.json", "result.json", "model.json", "metrics.jsonl"} <= set(os.listdir(tmp_path / "run"))
    options = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    assert not {"distributed", "coordinator", "processes", "process"} & options.keys()


def test_a_coordinator_that_cannot_be_reached_is_an_error_in_time():
    port, started = free_port(), time.monotonic()
    with pytest.raises(
        ConnectionError, match=f"process 1 did not reach process 0 at 127.0.0.1:{port} within"
    ):
        processes.initialize(f"127.0.0.1:{port}", 2, 1, timeout=0.3)
    assert time.monotonic() - started < 5


def test_a_port_that_is_taken_is_an_error():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConnectionError, match=f"cannot listen on port {port}"):
            processes.initialize(f"127.0.0.1:{port}", 2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1234", 2, 2), "process must be from 0 to 1, got 2"),
        (("127.0.0.1:1234", 0, 0), "processes must be an integer >= 1, got 0"),
        (("127.0.0.1:1234", 2, None), "process is missing"),
        ((None, 2, 1), "coordinator is missing"),
        (("127.0.0.1", 2, 1), "coordinator must be host:port"),
        (("127.0.0.1:0", 2, 1), "coordinator must be host:port"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        processes.initialize(*arguments)


def test_the_environment_is_checked(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID must be an integer >= 0, got 'one'"):
        processes.initialize("127.0.0.1:1234", 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--process 1", "process: add --distributed, which it belongs to"),
        (
            "--distributed --coordinator localhost:1 --processes 2 --process 2",
            "process must be from 0 to 1, got 2",
        ),
        ("--distributed --processes 2 --process 1", "coordinator is missing"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_one_line(words, message, capsys):
    assert main(["run", "gpt", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_one_process_agrees_with_itself():
    assert processes.is_first()
    assert processes.agreed(0.1) == 0.1
    assert processes.largest(3) == 3
    assert processes.from_first(lambda: {"a": 1}) == {"a": 1}
    array = jax.numpy.ones(3)
    assert processes.gathered({"w": array})["w"] is array


FATAL = "F1127 01:42:26.414321 105 client.h:80] Terminating process because the JAX distributed service detected fatal "
LOGS = {
    f"{FATAL}errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n"
    "1\n3\nThe tasks have crashed. Check the task logs\n\nRPC: /xla.coordination.CoordinationService/PollForError": (
        "process 2 of 4 ends because processes 1, 3 were lost"
    ),
    f"{FATAL}errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):"
    "\n2\n0\n": ("process 2 of 4 ends because process 0 got no sign of life of it in time"),
    f"{FATAL}errors. absl::Status: UNAVAILABLE: Failed to send RPC to coordination service. Either the leader": (
        "process 2 of 4 ends because process 0 was lost"
    ),
    f"{FATAL}errors. absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination.Coordination"
    "Service/Heartbeat": "process 2 of 4 ends because process 0 was lost",
    f"{FATAL}errors. absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination.Coordination"
    "Service/RegisterTask": "process 2 of 4 ends because process 0 at host:1 cannot be reached",
    f"{FATAL}errors. absl::Status: ALREADY_EXISTS: Aborted connect attempt as there is a request from a newer "
    "incarnation.\nRPC: /xla.coordination.CoordinationService/RegisterTask": (
        "process 2 of 4 ends because another process has the same index"
    ),
    f"{FATAL}errors. absl::Status: INTERNAL: something new": (
        "process 2 of 4 ends because another process has ended (INTERNAL: something new)"
    ),
}


@pytest.mark.parametrize("log", LOGS)
def test_the_log_of_jax_becomes_one_sentence(log):
    before = (
        "step 5\nE1127 01:42:26.413363   10567 coordination_service.cc:1549] [77] Use error polling to propagate the "
        "following error to all tasks: UNAVAILABLE: The following tasks are unhealthy\n1\nThe tasks have crashed.\n"
    )
    text = f"{before}{log}\n*** Check failure stack trace: ***\n    @     0x7f2a06240634  absl::SendToLog()\n"
    for size in (1, 7, len(text)):
        passed = lost.Filter(lambda fatal: lost.sentence(fatal, 2, 4, "host:1"))
        pieces = [text[i : i + size].encode() for i in range(0, len(text), size)]
        out = b"".join(map(passed.feed, pieces)) + passed.late(end=True)
        lines = out.decode().splitlines()
        assert lines[0] == "step 5"
        assert len(lines) == 2
        assert lines[1].startswith(f"gradfn: {LOGS[log]}")


def test_other_text_passes_at_once():
    passed = lost.Filter(lambda fatal: "lost")
    assert passed.feed(b"50%|###") == b"50%|###"
    assert passed.feed(b"\rError: a line\nF") == b"\rError: a line\n"
    assert passed.feed(b"ailed\n") == b"Failed\n"
    assert passed.feed(b"E1127 01:42 1 other.cc:1] an error\n") == b"E1127 01:42 1 other.cc:1] an error\n"


def test_a_log_that_does_not_end_the_process_passes_later(monkeypatch):
    monkeypatch.setattr(lost, "SECONDS", 0.0)
    passed = lost.Filter(lambda fatal: "lost")
    line = b"W1127 01:42:26.413363   10567 coordination_service.cc:185] a warning\n"
    assert passed.feed(line) == b""
    time.sleep(0.01)
    assert passed.late() == line
