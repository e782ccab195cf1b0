"""Completion: what may come next, and the shells that ask for it."""

import os
import shutil
import subprocess
import sys

import pytest

from gradfn import cli
from gradfn.completion import SCRIPTS, completions


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change to a folder with a run of digits and an experiment of the user's own."""
    (tmp_path / "runs/digits/a").mkdir(parents=True)
    (tmp_path / "runs/digits/a/config.json").write_text("{}")
    (tmp_path / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["ru"], ["run", "runs"]),
        (["--v"], ["--version"]),
        (["help", "c"], ["completion"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["run", "m"], ["moons", "mnist", "mine.py"]),
        (["run", "digits", "--hid"], ["--hidden"]),
        (["run", "digits", "--data", ""], ["digits", "mnist"]),
        (["run", "digits", "--data", "m"], ["mnist"]),
        (["run", "digits", "--data", "=", "m"], ["mnist"]),
        (["run", "digits", "--data=m"], ["--data=mnist"]),
        (["run", "digits", "--hidden", "3", "--hid"], []),
        (["run", "digits", "--folder", ""], []),
        (["run", "nothing", "--"], []),
        (["report", ""], ["digits", "runs/digits/a"]),
        (["report", "--o"], ["--open", "--out"]),
        (["report", "digits", "--out", ""], []),
        (["sample", "d"], ["digits"]),
        (["sample", "gpt", "--temp"], ["--temperature"]),
        (["runs", ""], ["digits"]),
        (["list", "-"], ["--long"]),
        (["new", ""], []),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_may_come_next(words, found):
    assert {word for word, _ in completions(words, cli.experiments())} == set(found)


CALLS = {
    "bash": """
        eval "$(gradfn completion bash)"
        COMP_WORDS=(gradfn run digits --data "") COMP_CWORD=4
        _gradfn
        printf '%s\\n' "${COMPREPLY[@]}"
    """,
    "zsh": """
        compdef() { : }
        eval "$(gradfn completion zsh)"
        _describe() { print -l -- "${(@P)2}" }
        words=(gradfn run digits --data '') CURRENT=5
        _gradfn
    """,
    "fish": """
        gradfn completion fish | source
        complete -C 'gradfn run digits --data '
    """,
}


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_shell_completes(folder, shell):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    command = folder / "bin" / "gradfn"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m gradfn "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(cli.Path(cli.__file__).parents[1]),
        "HOME": str(folder),
    }
    done = subprocess.run(
        [shell, "-c", CALLS[shell]], env=environment, capture_output=True, text=True, check=False
    )
    assert [line.rstrip(":") for line in done.stdout.split()] == ["digits", "mnist"], done.stderr
