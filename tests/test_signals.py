"""Signals at any moment of a command: one line, the exit code of the signal, and a run that can be resumed."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from gradfn import cli
from gradfn.pages import page
from gradfn.runs import sample
from tests.attack.children import wait_for_handlers
from tests.test_cli import EXPERIMENT

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# What an installed `gradfn` runs.
CONSOLE_SCRIPT = "import sys; from {} import {}; sys.exit(main())".format(
    *PROJECT["scripts"]["gradfn"].split(":")
)
COMMANDS = {
    "console script": [sys.executable, "-c", CONSOLE_SCRIPT, "run", "digits"],
    "module": [sys.executable, "-m", "gradfn", "run", "digits"],
    "script": [sys.executable, "experiments/digits.py"],
}
KILL = "import signal; signal.raise_signal(%d)"
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc"),
    pytest.mark.usefixtures("hang_ups_are_not_ignored"),
]


def started(command, folder, *options):
    """Start a run, and return once it handles signals; jax is not imported then."""
    words = [*command, "--folder", str(folder), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, text=True, **pipes)
    wait_for_handlers(process)
    return process


def ended(process, number):
    """Assert that a process ends with one line and the exit code of a signal; return the line."""
    # A process that hangs must not disturb later tests.
    with process:
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == CODES[number], err
    assert err.count("\n") == 1, err
    assert "Traceback" not in out + err
    return err


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_while_jax_is_imported(tmp_path, name):
    process = started(COMMANDS[name], tmp_path / "run")
    process.send_signal(signal.SIGINT)
    assert ended(process, signal.SIGINT) == "gradfn: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"),
    [*((name, signal.SIGINT) for name in COMMANDS), *(("module", number) for number in CODES)],
)
def test_signals_at_any_moment(tmp_path, name, number):
    for i, seconds in enumerate((0.1, 0.4, 1.0, 2.0, 4.0)):
        process = started(COMMANDS[name], tmp_path / f"run{i}", "--epochs", "100000")
        time.sleep(seconds)
        process.send_signal(number)
        reason = {130: "interrupted", 143: "terminated", 129: "hung up"}[CODES[number]]
        line = ended(process, number)
        assert reason in line
        assert ("; to resume: " in line) == (tmp_path / f"run{i}" / "config.json").exists()


@pytest.mark.slow
def test_a_run_resumes_with_the_command_in_the_line(tmp_path):
    process = started(COMMANDS["module"], tmp_path / "run", "--epochs", "100000")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    line = ended(process, signal.SIGTERM)
    words = re.fullmatch(r"terminated; to resume: (gradfn run digits --resume --folder \S+)\n", line)[1]
    assert words.split()[-1] == str(tmp_path / "run")
    process = started([sys.executable, "-m", *words.split()[:-2]], tmp_path / "run")
    assert f"resuming in {tmp_path / 'run'}\n" in iter(process.stdout.readline, "")
    process.send_signal(signal.SIGINT)
    ended(process, signal.SIGINT)


@pytest.mark.parametrize("number", CODES)
def test_signals_in_each_command(tmp_path, monkeypatch, capsys, number):
    """In a process that continues: the exit code, one line, and the handlers from before."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "echo.py").write_text(
        EXPERIMENT.replace("raise KeyboardInterrupt", KILL % number), encoding="utf-8"
    )
    monkeypatch.setattr(cli, "experiments", lambda: {"echo": tmp_path / "echo.py"})
    monkeypatch.setattr(page, "write_report", lambda *_: signal.raise_signal(number))
    monkeypatch.setattr(sample, "load_model", lambda *_: signal.raise_signal(number))
    before = [signal.getsignal(each) for each in CODES]
    reason = {130: "interrupted", 143: "terminated", 129: "hung up"}[CODES[number]]
    for words, line in {
        (
            "run",
            "echo",
            "--hidden",
            "13",
            "--folder",
            "a",
        ): f"{reason}; to resume: gradfn run echo --resume --folder a\n",
        ("report", "run"): f"gradfn: {reason}\n",
        ("sample", "run"): f"gradfn: {reason}\n",
    }.items():
        assert cli.main(words) == CODES[number]
        assert capsys.readouterr().err == line
    assert [signal.getsignal(each) for each in CODES] == before


@pytest.mark.parametrize(
    ("argument", "code", "err"), [("None", 0, ""), ("3", 3, ""), ("'no luck'", 1, "no luck\n")]
)
def test_the_exit_code_of_an_experiment_is_that_of_the_process(
    tmp_path, monkeypatch, capsys, argument, code, err
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "experiments", lambda: {"echo": tmp_path / "echo.py"})
    text = EXPERIMENT.replace("raise KeyboardInterrupt", f"raise SystemExit({argument})")
    (tmp_path / "echo.py").write_text(text, encoding="utf-8")
    assert cli.main(["run", "echo", "--hidden", "13"]) == code
    assert capsys.readouterr().err == err


def test_an_ignored_signal_stays_ignored(tmp_path):
    """Under nohup, closing the terminal does not end a run."""
    command = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *COMMANDS["module"]]
    process = started(command, tmp_path / "run", "--hidden", "x")
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=60)[1].startswith("gradfn run digits: --hidden")
    assert process.returncode == 2


def test_ctrl_c_while_a_string_is_executed_has_its_exit_code(tmp_path):
    """As when Python makes a dataclass; the interpreter alone would end itself by SIGINT."""
    lines = [
        "from gradfn.console import exit_code, leave",
        "try:",
        "    exec('import signal; signal.raise_signal(2)')",
    ]
    lines += ["except KeyboardInterrupt as end:", "    leave(exit_code(end))"]
    (tmp_path / "interrupted.py").write_text("\n".join(lines))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "")
