"""Completion of the command line in bash, zsh and fish: the shell asks `gradfn complete` at each press of the tab key.

So what is completed is never out of date: the experiments, their options and their values, the runs in `runs/`. This
does not import jax. Where it knows nothing to complete, the shell completes names of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from gradfn.usage import COMMANDS, SHELLS

# Each line is a word, and after a tab its meaning, which bash cannot show.
SCRIPTS = {
    "bash": """\
_gradfn() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        COMPREPLY+=("$(printf '%q' "${line%%$'\\t'*}")")
    done < <("${COMP_WORDS[0]}" complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o default -F _gradfn gradfn
""",
    "zsh": """\
#compdef gradfn
_gradfn() {
    local -a lines found
    local line
    lines=("${(@f)$("${words[1]}" complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    for line in $lines; do
        [[ -n $line ]] || continue
        found+=("${${line%%$'\\t'*}//:/\\\\:}:${line#*$'\\t'}")
    done
    if (( $#found )); then _describe 'gradfn' found; else _files; fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
compdef _gradfn gradfn
""",
    "fish": """\
function __gradfn_complete
    set -l words (commandline -opc)
    set -l found ($words[1] complete -- $words[2..-1] (commandline -ct) 2>/dev/null)
    if set -q found[1]
        string join \\n -- $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c gradfn -f -a '(__gradfn_complete)'
""",
}


def completions(words: Sequence[str], experiments: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Return what the last word may be, each with its meaning; nothing where it is a file.

    Args:
        words: the command line after `gradfn`, up to the word that is completed, which may be empty.
        experiments: their files, by name.

    >>> completions(["comp"], {})
    [('completion', 'a script that completes commands in your shell')]
    """
    *before, word = words or [""]
    # bash splits --data=mnist at the equals sign.
    before, word = [each for each in before if each != "="], "" if word == "=" else word
    option, equals, value = word.partition("=")
    if option.startswith("--") and equals:
        found = _candidates([*before, option], value, experiments)
        return [(f"{option}={text}", what) for text, what in found if text.startswith(value)]
    return [(text, what) for text, what in _candidates(before, word, experiments) if text.startswith(word)]


def _candidates(
    before: Sequence[str], word: str, experiments: Mapping[str, Path]
) -> Iterable[tuple[str, str]]:
    match before:
        case []:
            commands = [(name, command.what) for name, command in COMMANDS.items()]
            return [*commands, ("--version", "the version")] if word.startswith("-") else commands
        case ["help"]:
            return [(name, command.what) for name, command in COMMANDS.items()]
        case ["completion"]:
            return [(shell, "") for shell in SHELLS]
        case ["run"]:
            own = sorted(Path().glob("*.py"))
            return [*_named(experiments), *((file.name, "your own experiment") for file in own)]
        case ["run", name, *given]:
            file = experiments.get(name, Path(name))
            return _options(file, given, word) if file.is_file() else []
        case ["sample", _, *given]:
            from gradfn import runs

            return _options(Path(runs.__file__).with_name("sample.py"), given, word)
        case [("report" | "runs" | "list") as name, *_] if word.startswith("-"):
            return list(COMMANDS[name].options.items())
        case ["report", *given] if not given or given[-1] != "--out":
            return _runs()
        case ["sample"]:
            return _runs()
        case ["runs", *_]:
            return _named({folder.name: folder for folder in _folders()})
    return []


def _named(experiments: Mapping[str, Path]) -> list[tuple[str, str]]:
    from gradfn.experiments._order import ORDER

    ideas = {name: idea for group in ORDER.values() for name, idea in group.items()}
    return [(name, ideas.get(name, "")) for name in experiments]


def _folders() -> list[Path]:
    """Return the folders of the experiments that have runs."""
    from gradfn.layout import CONFIG, RUNS

    return sorted({file.parent.parent for file in Path(RUNS).glob(f"*/*/{CONFIG}")})


def _runs() -> list[tuple[str, str]]:
    """Return the experiments that have runs, then the runs, the newest first."""
    from gradfn.layout import CONFIG

    folders = _folders()
    latest = [(folder.name, "its latest run") for folder in folders]
    runs = [file.parent for folder in folders for file in folder.glob(f"*/{CONFIG}")]
    return [*latest, *((str(run), "") for run in sorted(runs, key=lambda run: run.name, reverse=True))]


def _options(file: Path, given: Sequence[str], word: str) -> list[tuple[str, str]]:
    """Return the options of an experiment's file, or the values of the last one that was given."""
    from gradfn.options import flag, without_none
    from gradfn.runs.about import read_about

    about = read_about(file)
    if about.config is None:
        return [("--help", "show the options")]
    hints = {flag(name): without_none(hint) for name, hint in get_type_hints(about.config).items()}
    last = given[-1] if given else ""
    if last in hints and hints[last] is not bool and not word.startswith("-"):
        kind = hints[last]
        return [(value, "") for value in get_args(kind)] if get_origin(kind) is Literal else []
    texts = {flag(name): text for name, (text, _) in about.options.items()}
    return [*((option, text) for option, text in texts.items() if option not in given), ("--help", "")]
