"""Consoles that lack a character or cannot redraw, closed pipes, full disks: one line, no traceback."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

import gradfn as gf
from gradfn import cli
from gradfn.layout import METRICS
from gradfn.pages.figures import curves, save
from gradfn.train import checkpoint
from gradfn.train.rows import Rows
from tests.report.test_page import write_run
from tests.test_cli import EXPERIMENT


class Console(io.TextIOWrapper):
    """A stream as Python opens it, which raises where its encoding lacks a character; optionally a terminal."""

    def __init__(self, encoding, terminal=False):
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def text(self):
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1251", "cp932", "cp437", "latin-1"])
@pytest.mark.parametrize(
    ("words", "expected", "code"),
    [
        ("--help", "gradfn run NAME [options]", 0),
        ("list", "regress", 0),
        ("table 784 16 10", "12,704 weights + 26 biases = 12,730 parameters", 0),
        ("run digits --help", "--hidden", 0),
        ("report run", "wrote run", 0),
        ("report", "expected a run's folder", 2),
        ("sample λ", "neither a run's folder", 2),
        ("run ψ", "no experiment", 2),
        ("run digits --hidden ½", "expected an integer", 2),
        ("列表", "no command", 2),
    ],
)
def test_what_a_console_lacks_is_replaced(tmp_path, monkeypatch, encoding, words, expected, code):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", name="R² →")
    out, err = Console(encoding), Console(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert cli.main(words.split()) == code
    assert expected in (err if code else out).text()


def test_tables_have_a_frame_that_the_console_has(monkeypatch):
    console = Console("ascii")
    monkeypatch.setattr(sys, "stdout", console)
    print(gf.table(gf.mlp([3, 2])))  # from Python, without the command line
    assert "| W1" in console.text()
    assert "?" not in console.text()


@pytest.mark.parametrize(("terminal", "lines"), [("dumb", 4), ("xterm", 0)])
def test_a_terminal_that_cannot_redraw_gets_a_line_per_evaluation(monkeypatch, terminal, lines):
    monkeypatch.setenv("TERM", terminal)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    console = Console("utf-8", terminal=True)
    monkeypatch.setattr(sys, "stdout", console)
    loss = lambda params, x: jnp.square(params - x).mean()  # noqa: E731
    gf.fit(loss, jnp.array(0.0), jnp.ones(8), optax.sgd(0.1), 8, batch_size=4, eval_every=2)
    printed = [line for line in console.text().splitlines() if line.startswith("step ")]
    assert len(printed) == lines
    assert (lines == 0) == ("\x1b[" in console.text())  # the bar


def test_a_closed_pipe_ends_the_command_quietly(monkeypatch, capfd):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert cli.main(["list"]) == 1
    assert capfd.readouterr().err == ""


class Broken(io.StringIO):
    """A stream that fails at every use with a given error."""

    def __init__(self, error, terminal=False):
        super().__init__()
        self.error, self.terminal = error, terminal

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error

    def isatty(self):
        return self.terminal


BROKEN = {
    "no reader": BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)),
    "a full disk": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "a terminal that went away": OSError(errno.EIO, os.strerror(errno.EIO)),
    "closed": ValueError("I/O operation on closed file"),
}


@pytest.mark.parametrize("why", [*BROKEN, "none"])
@pytest.mark.parametrize("terminal", [False, True])
def test_training_continues_without_its_output(monkeypatch, why, terminal):
    """`fit` alone, with a line per evaluation or with a bar."""
    monkeypatch.setenv("TERM", "xterm")
    output = None if why == "none" else Broken(BROKEN[why], terminal)
    monkeypatch.setattr(sys, "stdout", output)
    loss = lambda params, x: jnp.square(params - x).mean()  # noqa: E731
    fitted = gf.fit(loss, jnp.array(0.0), jnp.ones(8), optax.sgd(0.1), 8, batch_size=4, eval_every=2)
    assert [row["step"] for row in fitted.history] == [2, 4, 6, 8]
    assert sys.stdout is output


@pytest.mark.parametrize("why", [*BROKEN, "none"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_run_continues_without_its_output(tmp_path, monkeypatch, capsys, name, why):
    (tmp_path / "echo.py").write_text(EXPERIMENT, encoding="utf-8")
    monkeypatch.setattr(cli, "experiments", lambda: {"echo": tmp_path / "echo.py"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, name, None if why == "none" else Broken(BROKEN[why]))
    assert cli.main(["run", "echo", "--folder", "here"]) == 0
    assert (tmp_path / "here" / "result.json").exists()
    assert cli.main(["run", "echo", "--folder", "here"]) == 2  # the exit code still reports the mistake
    write_run(tmp_path / "run")
    assert cli.main(["report", "run"]) == 0
    assert (tmp_path / "run" / "report.html").exists()
    getattr(sys, name).close()


def test_a_command_that_prints_reports_a_full_disk(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Broken(BROKEN["a full disk"]))
    assert cli.main(["list"]) == 1
    assert capsys.readouterr().err == "gradfn: the output cannot be written (No space left on device)\n"


def test_errors_cannot_control_the_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "\x1b[2J\x07run\nof two lines"]) == 2
    err = capsys.readouterr().err
    assert err.endswith("\n")
    assert err[:-1].isprintable()


def ours(root, text):
    """Return the warnings about text in the locale's encoding that come from gradfn's files."""
    return re.findall(rf"{re.escape(str(root))}/(?:gradfn|experiments)/.*EncodingWarning.*", text)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("redirected", "code"),
    [
        ("run digits --epochs 2 --hidden 4 --folder run > /dev/full 2> /dev/full", 0),
        ("run digits --epochs 2 --hidden 4 --folder run <&- >&- 2>&-", 0),
        ("run digits --epochs 2 --hidden 4 --folder run 2>&1 | head -1", 0),
        ("list > /dev/full", 1),
        ("list >&-", 0),
        ("list | head -1", 1),
        ("nothing 2> /dev/full", 2),
        ("nothing 2>&-", 2),
    ],
)
def test_processes_end_with_their_exit_code_whatever_their_output(tmp_path, redirected, code):
    """The encoding is ASCII, and text in the locale's encoding raises a warning."""
    python = f"{sys.executable} -X warn_default_encoding -m gradfn"
    root = Path(cli.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    command = ["bash", "-c", f"{python} {redirected}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code
    output = done.stdout + done.stderr
    assert not re.search("Traceback|Exception ignored", output)
    assert ours(root, output) == []
    if "--folder" in redirected:
        result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
        assert result["test_accuracy"] > 0.1


@pytest.mark.slow
def test_text_is_read_and_written_as_utf8(tmp_path):
    """A run and its page, with a warning for each file that is opened in the locale's encoding."""
    root = Path(cli.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "LC_ALL": "C", "PYTHONWARNDEFAULTENCODING": "1"}
    for words in (
        ["run", "digits", "--epochs", "1", "--hidden", "4", "--folder", "run"],
        ["report", "run"],
        ["list"],
    ):
        command = [sys.executable, "-W", "always::EncodingWarning", "-m", "gradfn", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ours(root, done.stderr) == []


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full(descriptor):
    raise FULL


def test_a_full_disk_names_the_file_and_leaves_no_part(tmp_path, monkeypatch):
    old = tmp_path / "checkpoint.safetensors"
    checkpoint.save(old, {"w": jnp.zeros(2)}, {})
    before = old.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    writers = {
        old: lambda: checkpoint.save(old, {"w": jnp.ones(2)}, {}),
        tmp_path / "curves.png": lambda: save(curves([{"step": 1, "loss": 1.0}]), tmp_path / "curves.png"),
    }
    for file, writer in writers.items():
        with pytest.raises(OSError, match=r"No space left on device") as raised:
            writer()
        assert raised.value.filename == str(file)
    assert [file.name for file in tmp_path.iterdir()] == [old.name]
    assert old.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_rows_that_cannot_be_written_name_their_file(tmp_path, monkeypatch):
    full = lambda file, size: Path("/dev/full").open("ab")  # noqa: E731, SIM115
    monkeypatch.setattr("gradfn.train.rows.open_to_append", full)
    rows = Rows(tmp_path / METRICS)
    rows.open()
    with pytest.raises(OSError, match="No space left on device") as raised:
        rows.append({"step": 1})
    assert raised.value.filename == str(tmp_path / METRICS)
    rows.close()


def test_a_report_on_a_full_disk_gets_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["report", "run"]) == 2
    assert capsys.readouterr().err == (
        "gradfn report: run/report.html: cannot be written (No space left on device)\n"
    )
    # An unreadable file or an invalid name does not end in a traceback either.
    for words in (["report", "x" * 5000], ["sample", "x" * 5000]):
        assert cli.main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_whose_library_replaces_its_exception(tmp_path, monkeypatch, capsys, number):
    """NumPy raises an ImportError for whatever ends the import of its C interface."""
    monkeypatch.chdir(tmp_path)
    lines = "try:\n    %s\nexcept BaseException as error:\n    raise ImportError('NumPy failed to import') from error"
    signals = textwrap.indent(lines % f"import signal; signal.raise_signal({int(number)})", " " * 8).lstrip()
    (tmp_path / "echo.py").write_text(
        EXPERIMENT.replace("raise KeyboardInterrupt", signals), encoding="utf-8"
    )
    monkeypatch.setattr(cli, "experiments", lambda: {"echo": tmp_path / "echo.py"})
    assert cli.main(["run", "echo", "--hidden", "13", "--folder", "run"]) == 128 + number
    assert "to resume: gradfn run echo --resume --folder run" in capsys.readouterr().err
