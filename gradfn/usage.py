"""What each command of the command line is for: the usage, the help of a command, and what the shell completes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Command(NamedTuple):
    """A command of `gradfn`.

    Attributes:
        form: how it is typed, without `gradfn`.
        what: what it does, in a few words.
        help: the rest of its help.
        options: its own options, each with its meaning.
    """

    form: str
    what: str
    help: str = ""
    options: Mapping[str, str] = MappingProxyType({})


COMMANDS = {
    "list": Command(
        "list",
        "the experiments, in the order in which to learn",
        "gradfn run NAME --help shows the options and the expectations of one.",
        {"--long": "also print what each does and what is expected of it"},
    ),
    "run": Command(
        "run NAME [options]",
        "run an experiment; --help shows its options",
        "NAME is an experiment that `gradfn list` shows, or the file of your own, such as my_experiment.py.\n"
        "A run that was interrupted resumes with --resume. `gradfn run NAME --help` shows all options of an\n"
        "experiment, and what is expected of it.",
    ),
    "runs": Command(
        "runs [NAME ...]",
        "runs so far, newest first: state, time, result",
        "With names, only the runs of these experiments in the folder runs/. A run is finished, running,\n"
        "interrupted (resume it), failed (with the error), or damaged (with what cannot be read).",
        {"--json": "print a JSON array, with all that is known of each run"},
    ),
    "report": Command(
        "report RUN [RUN]",
        "write the page of a run, or of two side by side",
        "RUN is the folder of a run or of gf.fit, or the name of an experiment for its latest run.",
        {"--open": "open the page in the browser", "--out": "FILE to write (default: in the run's folder)"},
    ),
    "sample": Command(
        "sample RUN [options]",
        "let a language model write; --help shows how",
    ),
    "new": Command(
        "new NAME",
        "write NAME.py, an experiment to start from",
        "The file is complete: `python NAME.py` and `gradfn run NAME.py` run it, with options, a report and a\n"
        "figure. A file that exists is not overwritten.",
    ),
    "table": Command(
        "table N N [N ...]",
        "the parameters of a network of N nodes per layer",
        "The inputs come first: gradfn table 784 16 10.",
    ),
    "completion": Command(
        "completion SHELL",
        "a script that completes commands in your shell",
        "bash: echo 'eval \"$(gradfn completion bash)\"' >> ~/.bashrc\n"
        "zsh:  echo 'eval \"$(gradfn completion zsh)\"' >> ~/.zshrc\n"
        "fish: gradfn completion fish > ~/.config/fish/completions/gradfn.fish",
    ),
    "help": Command("help COMMAND", "more about a command"),
}
SHELLS = ("bash", "zsh", "fish")


def usage() -> str:
    """Return the usage, in at most 80 columns.

    >>> print(usage().splitlines()[2])
      gradfn list                 the experiments, in the order in which to learn
    """
    rows = [f"  gradfn {command.form:20} {command.what}" for command in COMMANDS.values()]
    rows.append(f"  gradfn {'--version':20} the version")
    return "\n".join(["gradfn: functional models in JAX, with every gradient visible", "", *rows, ""])


def help_of(name: str) -> str:
    """Return the help of a command.

    >>> print(help_of("help"), end="")
    gradfn help COMMAND: more about a command
    """
    command = COMMANDS[name]
    rows = [f"gradfn {command.form}: {command.what}"]
    if command.help:
        rows += ["", command.help]
    if command.options:
        rows += ["", *(f"  {option:8} {text}" for option, text in command.options.items())]
    return "\n".join([*rows, ""])
