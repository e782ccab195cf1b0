"""The command line: its output, and one line and exit code 2 for a mistake of the user."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gradfn.experiments._order import ORDER

import gradfn as gf
from gradfn import cli
from gradfn.cli import main
from gradfn.options import read_options
from gradfn.runs.about import read_about
from gradfn.usage import COMMANDS

ROOT = Path(__file__).parents[1]

# An experiment that only prints its options.
EXPERIMENT = '''"""Print the options it gets.

More of it.
"""
from __future__ import annotations
from dataclasses import dataclass
from typing import Literal
from gradfn import runs

EXPECTED = (runs.Expectation("depth", at_least=3, unit="m"),)

@dataclass(frozen=True)
class Config:
    """Options."""

    hidden: int = runs.option(16, "nodes in the hidden layer", at_least=1)
    rate: float | None = None
    data: Literal["digits", "mnist"] = "digits"
    resume: bool = False
    folder: str | None = None

    def __post_init__(self) -> None:
        runs.check(self)

def run(config):
    config = runs.settle("echo", config)
    if config.hidden == 11:
        raise ValueError("hidden: not with this data")
    folder = runs.start("echo", config)
    if config.hidden == 12:
        raise OSError(28, "No space left on device", f"{folder}/result.json")
    if config.hidden == 10:
        raise ValueError("a mistake of the experiment's own")
    if config.hidden == 13:
        raise KeyboardInterrupt
    if config.hidden == 14:
        raise FloatingPointError("the loss begot nan at step 3")
    runs.finish(folder, runs.judge(EXPECTED, {"depth": 2}))
    print(f"hidden={config.hidden} rate={config.rate} data={config.data}")
'''


@pytest.fixture
def echo(tmp_path, monkeypatch):
    """Change to an empty folder, with an experiment called echo."""
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "echo.py").write_text(EXPERIMENT)
    monkeypatch.setattr(cli, "experiments", lambda: {"echo": folder / "echo.py"})
    monkeypatch.chdir(tmp_path)


def run_cli(capsys, *words):
    """Return the exit code, and the text on stdout and stderr."""
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("words", ["", "--help", "help"])
def test_the_usage_names_every_command_in_80_columns(capsys, words):
    code, out, err = run_cli(capsys, *words.split())
    assert (code, err) == (0, "")
    assert all(f"gradfn {command}" in out for command in (*COMMANDS, "--version"))
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capsys, name):
    code, out, _ = run_cli(capsys, "help", name)
    assert (code, out.splitlines()[0]) == (0, f"gradfn {COMMANDS[name].form}: {COMMANDS[name].what}")
    assert all(option in out for option in COMMANDS[name].options)
    if name != "sample":  # which has options of its own
        assert run_cli(capsys, name, "--help")[1] == out
    assert run_cli(capsys, "help", name.upper())[0] == 2


def test_the_version_is_that_of_the_package(capsys):
    assert run_cli(capsys, "--version") == run_cli(capsys, "-V") == (0, f"gradfn {gf.__version__}\n", "")
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", gf.__version__)


@pytest.mark.parametrize(
    ("sizes", "caption"),
    [
        ("784 16 10", "12,704 weights + 26 biases = 12,730 parameters"),
        ("728 16 10", "11,808 weights + 26 biases = 11,834 parameters"),
        ("784 100 50 10", "83,900 weights + 160 biases = 84,060 parameters"),
    ],
)
def test_table_counts(capsys, sizes, caption):
    code, out, _ = run_cli(capsys, "table", *sizes.split())
    assert code == 0
    assert out.splitlines()[-1] == caption


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "rnu",
            "gradfn: no command 'rnu' (did you mean run?); there are list, run, runs, report, sample, new, table, "
            "completion, help, --help, --version",
        ),
        ("run", "gradfn: run needs the name of an experiment: echo"),
        ("run ecko", "gradfn: no experiment 'ecko' (did you mean echo?); there are echo"),
        ("run echo --hiden 3", "no option '--hiden' (did you mean --hidden?); there are --hidden, --rate"),
        ("run echo --hiden=3", "no option '--hiden' (did you mean --hidden?)"),
        ("run echo 3", "no option '3'; there are --hidden"),
        ("run echo --hidden x", "gradfn run echo: --hidden: expected an integer, got x"),
        ("run echo --hidden 1.5", "--hidden: expected an integer, got 1.5"),
        ("run echo --hidden", "argument --hidden: expected one argument"),
        ("run echo --rate fast", "--rate: expected a number, got fast"),
        ("run echo --data cifar", "--data: expected one of digits, mnist, got cifar"),
        ("run echo --hidden 0", "gradfn run echo: hidden must be an integer >= 1, got 0"),
        ("run echo --folder experiments/echo.py", "experiments/echo.py: cannot become a run's folder"),
        ("run ecko.py", "gradfn: no file ecko.py; gradfn new ecko writes one to start from"),
        ("list all", "gradfn: list: expected --long or nothing, got all"),
        ("runs --jsn", "gradfn: no option '--jsn' (did you mean --json?); there is --json"),
        ("completion", "gradfn: completion: expected one of bash, zsh, fish, got nothing"),
        ("completion tcsh", "expected one of bash, zsh, fish, got tcsh"),
        ("help rnu", "gradfn: no command 'rnu' (did you mean run?); there are list, run"),
        ("new", "gradfn: new needs the name of the experiment, such as my_experiment, got nothing"),
        ("new 3d", "new: expected a name of letters, digits and underscores, such as my_experiment, got 3d"),
        ("new ../a", "such as my_experiment, got ../a"),
        (
            "new echo",
            "new: echo is an experiment of gradfn, whose runs would mix with yours; take another name",
        ),
        (
            "table",
            "gradfn: table needs two or more integers >= 1, nodes per layer, inputs first (784 16 10), got nothing",
        ),
        ("table 784", "got 784"),
        ("table a b", "got a b"),
        ("table 784 -1 10", "got 784 -1 10"),
        ("table 784 0", "got 784 0"),
    ],
)
@pytest.mark.usefixtures("echo")
def test_a_mistake_gets_one_line_and_exit_code_2(capsys, words, message):
    code, out, err = run_cli(capsys, *words.split())
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("echo")
def test_options_reach_the_experiment(capsys):
    code, out, _ = run_cli(capsys, "run", "echo", "--hidden", "30", "--rate=0.5", "--data", "mnist")
    assert code == 0
    *_, line, following = out.splitlines()
    assert line == "hidden=30 rate=0.5 data=mnist"
    assert re.fullmatch(r"next: .*gradfn report runs/echo/\S+ --open", following)


@pytest.mark.usefixtures("echo")
def test_help_of_an_experiment_shows_its_options_and_what_to_expect(capsys):
    code, out, err = run_cli(capsys, "run", "echo", "--help")
    assert (code, err) == (0, "")
    assert all(
        text in out for text in ("--hidden INT", "nodes in the hidden layer", "Expected: depth at least 3 m.")
    )


def test_list_says_what_there_is_without_running_any_of_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "echo.py").write_text(EXPERIMENT + "\nraise AssertionError('imported')\n")
    monkeypatch.setattr(cli, "experiments", lambda: {"echo": tmp_path / "echo.py"})
    code, out, _ = run_cli(capsys, "list", "--long")
    first, indent = "More\n  echo         Print the options it gets.\n", " " * 15
    assert (code, out) == (0, f"{first}{indent}Expected: depth at least 3 m.\n")
    assert run_cli(capsys, "list")[1] == first


def test_the_list_has_every_experiment_once_in_80_columns(capsys):
    names = [name for group in ORDER.values() for name in group]
    assert sorted(names) == sorted(cli.experiments())
    lines = run_cli(capsys, "list")[1].splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == names
    assert [line for line in lines if line and not line.startswith("  ")] == [*ORDER]
    assert max(map(len, lines)) <= 80


def test_every_experiment_says_what_it_does_and_what_to_expect(capsys):
    lines = run_cli(capsys, "list", "--long")[1].splitlines()
    assert sum("Expected: " in line for line in lines) == len(cli.experiments())
    assert all(len(line.split()) > 4 for line in lines if line.startswith("  "))


@pytest.mark.usefixtures("echo")
def test_resume_takes_the_stored_options_and_refuses_others(capsys):
    run_cli(capsys, "run", "echo", "--hidden", "30")
    code, out, _ = run_cli(capsys, "run", "echo", "--resume")
    assert (code, out.splitlines()[-2]) == (0, "hidden=30 rate=None data=digits")
    assert "has finished: computing" in out
    assert run_cli(capsys, "run", "echo", "--resume", "--hidden", "30")[0] == 0
    # 16 is the experiment's default, but it was given explicitly and differs from the run's.
    code, out, err = run_cli(capsys, "run", "echo", "--resume", "--hidden", "16")
    assert (code, out) == (2, "")
    assert re.fullmatch(
        r"gradfn run echo: hidden 16: the run in runs/echo/\S+ has hidden 30. "
        r"Drop the option, or start a new run without --resume\n",
        err,
    )


@pytest.mark.usefixtures("echo")
def test_resume_with_nothing_there_starts_a_new_run_and_says_so(capsys):
    code, out, _ = run_cli(capsys, "run", "echo", "--resume", "--hidden", "3")
    assert code == 0
    assert "no run to resume in runs/echo: starting a new one\nrunning in runs/echo/" in out
    assert out.splitlines()[-2] == "hidden=3 rate=None data=digits"


@pytest.mark.usefixtures("echo")
def test_ctrl_c_says_how_to_resume(capsys):
    code, _, err = run_cli(capsys, "run", "echo", "--hidden", "13", "--folder", "here")
    assert (code, err) == (130, "interrupted; to resume: gradfn run echo --resume --folder here\n")


@pytest.mark.usefixtures("echo")
def test_a_run_that_fails_gets_one_line_and_exit_code_1(capsys):
    code, _, err = run_cli(capsys, "run", "echo", "--hidden", "14")
    assert (code, err) == (1, "gradfn run echo: the loss begot nan at step 3\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", cli.experiments())
def test_options_are_read_from_the_file_as_they_are_in_its_class(capsys, name):
    file = cli.experiments()[name]
    texts = []
    for config in (read_about(file).config, cli._load(file).Config):
        with pytest.raises(SystemExit):
            read_options(config(), ["--help"], "command", "description")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "--folder" in texts[0]


def test_a_default_that_is_computed_leaves_the_options_to_the_class(tmp_path):
    file = tmp_path / "computed.py"
    file.write_text('"""Compute it."""\nclass Config:\n    n: int = runs.option(max(1, 2), "how many")\n')
    assert read_about(file) == ("Compute it.", (), {}, None)


@pytest.mark.parametrize("sizes", [[784, 16, 10], [2, 1], [3, 4, 5, 6]])
def test_the_table_is_that_of_the_net(capsys, sizes):
    cli.main(["table", *map(str, sizes)])
    assert capsys.readouterr().out == f"{gf.table(gf.mlp(sizes))}\n"


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "--version",
        "list",
        "runs",
        "completion bash",
        "complete -- run gpt --shard f",
        "table 784 16 10",
        "rnu",
        "run digit",
        "run mnist --help",
        "run gpt --hiden 3",
        "run gpt --steps 0",
        "sample --help",
        "sample gpt --top-k x",
    ],
)
def test_what_computes_nothing_imports_neither_jax_nor_numpy(words):
    code = (
        "import sys; from gradfn.cli import main; code = main(sys.argv[1:]);"
        "slow = {'jax', 'numpy', 'matplotlib'} & set(sys.modules); sys.exit(str(slow) if slow else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True)
    assert done.returncode in (0, 2), done.stderr


@pytest.mark.parametrize("command", [["-m", "gradfn", "run", "digits"], ["experiments/digits.py"]])
def test_processes_end_with_the_exit_code(command):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # as an editable installation has it
    found = subprocess.run(
        [sys.executable, *command, "--hidden", "x"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert re.fullmatch(
        r"(gradfn run digits|python \S*digits.py): --hidden: expected .* got x\n", found.stderr
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "digits",
            "digits does not train a language model; gradfn run gpt, gradfn run reverse and gradfn run rnn do",
        ),
        (
            "gpt",
            "gpt: neither a run's folder nor an experiment with a run in runs/gpt; gradfn run gpt makes one",
        ),
        (
            "runs/digits/a",
            "runs/digits/a: not a run of a language model (it has no model.json); gradfn run gpt trains one",
        ),
        ("rnn", "rnn: has several models; name one of runs/rnn/a/gru, runs/rnn/a/lstm"),
        ("runs/rnn/a", "runs/rnn/a: has several models; name one of runs/rnn/a/gru, runs/rnn/a/lstm"),
    ],
)
def test_sampling_says_what_is_not_a_language_model(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/digits/a", "runs/rnn/a"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    for cell in ("lstm", "gru"):
        (tmp_path / "runs/rnn/a" / cell).mkdir()
        (tmp_path / "runs/rnn/a" / cell / "model.json").write_text("{}")
    code, out, err = run_cli(capsys, "sample", name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"gradfn sample {name}: {message}" in err


@pytest.mark.usefixtures("echo")
def test_the_advice_after_ctrl_c_can_be_pasted(capsys):
    code, _, err = run_cli(capsys, "run", "echo", "--hidden", "13", "--folder", "my run")
    assert (code, err) == (130, "interrupted; to resume: gradfn run echo --resume --folder 'my run'\n")


@pytest.mark.usefixtures("echo")
def test_a_full_disk_and_options_that_do_not_go_together_get_one_line(capsys):
    code, _, err = run_cli(capsys, "run", "echo", "--hidden", "12", "--folder", "here")
    assert (code, err) == (1, "gradfn run echo: here/result.json: No space left on device\n")
    code, _, err = run_cli(capsys, "run", "echo", "--hidden", "11")
    assert (code, err) == (2, "gradfn run echo: hidden: not with this data\n")
    with pytest.raises(ValueError, match="the experiment's own"):  # which is not the user's mistake
        main(["run", "echo", "--hidden", "10"])


@pytest.mark.parametrize("can", [True, False])
def test_a_report_is_opened_in_the_browser(tmp_path, monkeypatch, capsys, can):
    run = tmp_path / "a run"
    run.mkdir()
    (run / "config.json").write_text('{"experiment": "digits", "options": {}}')
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or can)
    code, out, err = run_cli(capsys, "report", "--open", str(run))
    assert (code, opened) == (0, [(run / "report.html").as_uri()])
    assert out.startswith(f"wrote {run / 'report.html'} (")
    assert ("no browser was found" in err) is not can
    code, out, _ = run_cli(capsys, "report", str(run))
    assert (code, len(opened)) == (0, 1)
    assert "open it in a browser" in out
    assert "there are --out FILE and --open" in run_cli(capsys, "report", str(run), "--opne")[2]
