"""The command line: `gradfn run digits --hidden 30`, `gradfn report digits`, `gradfn list`; `usage.py` lists it all.

An experiment is a module in `experiments/` with a line that says what it does, `EXPECTED` (its expectations), `Config`
(a dataclass of options) and `run(config)`. A mistake of the user gets one line and exit code 2.
Importing this module does not import jax: until that has been imported, a signal ends the process at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import keyword
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gradfn.console import (
    ENDED,
    discard,
    exit_code,
    handle,
    handling,
    leave,
    open_missing_streams,
    optional,
    stop,
    stop_at_once,
    styled,
)
from gradfn.options import near, read_options
from gradfn.usage import COMMANDS, SHELLS, help_of, usage

if TYPE_CHECKING:
    from gradfn.runs.about import About


class UserError(Exception):
    """A mistake of the user, reported in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after `gradfn`; the process's own by default.

    Returns:
        The exit code: 0, 1 for a run that failed, 2 for a user's mistake, 130 for Ctrl-C, 143 for SIGTERM.

    >>> from gradfn.cli import main
    >>> main(["table", "728", "16", "10"])  # doctest: +ELLIPSIS
      path    shape       dtype       count    bytes
    ...
    11,808 weights + 26 biases = 11,834 parameters
    0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        handle(stop_at_once)  # to the end of the process
        return _guarded(lambda: _command(words, own_process=True))
    with handling(stop_at_once):
        return _guarded(lambda: _command(words, own_process=False))


def _guarded(command: Callable[[], int]) -> int:
    """Return a command's exit code, on any console; a closed pipe ends it quietly."""
    open_missing_streams()
    _replace_unknown_characters()
    with optional("stderr"):
        try:
            return command()
        except UserError as error:
            return _fail(f"gradfn: {error}", 2)
        except BrokenPipeError:  # gradfn list | head
            discard(sys.stdout)
            return 1
        except OSError as error:  # gradfn list > /dev/full
            discard(sys.stdout)
            output = f"the output cannot be written ({error.strerror})"
            return _fail(f"gradfn: {_message(error) if error.filename else output}", 1)
        except (KeyboardInterrupt, SystemExit) as end:
            code = exit_code(end)
            return _fail(f"gradfn: {ENDED[code]}", code) if code in ENDED else code


def script(file: str) -> None:
    """Run an experiment's file as a script, with the options on the command line, and exit.

    Args:
        file: the experiment's `__file__`.
    """
    command = f"python {shlex.quote(sys.argv[0])}"
    handle(stop_at_once)
    leave(_guarded(lambda: _run(Path(file), sys.argv[1:], command, own_process=True)))


def _replace_unknown_characters() -> None:
    """Print question marks for characters that the console cannot encode."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _command(words: list[str], own_process: bool) -> int:
    match words:
        case [] | ["-h" | "--help" | "help"]:
            print(usage(), end="")
        case ["help", name] if name in COMMANDS:
            print(help_of(name), end="")
        case [name, "-h" | "--help"] if name in COMMANDS and name != "sample":
            print(help_of(name), end="")
        case ["-V" | "--version"]:
            import gradfn

            print(f"gradfn {gradfn.__version__}")
        case ["help", name, *_]:
            raise UserError(f"no command {name!r}{near(name, COMMANDS)}; there are {', '.join(COMMANDS)}")
        case ["list", *options]:
            _list(options)
        case ["table", *sizes]:
            _table(sizes)
        case ["run"]:
            raise UserError(f"run needs the name of an experiment: {', '.join(experiments())}")
        case ["run", name, *options]:
            file = _file_of(name)
            if own_process and name.endswith(".py"):
                # As `python FILE` has it, for modules beside the file.
                sys.path.insert(0, str(file.resolve().parent))
            return _run(file, options, f"gradfn run {shlex.quote(name)}", own_process)
        case ["runs", *options]:
            _runs(options)
        case ["report", *rest]:
            return _report(rest)
        case ["sample", *rest]:
            return _sample(rest, own_process)
        case ["new", *names]:
            _new(names)
        case ["completion", *shell]:
            from gradfn.completion import SCRIPTS

            if len(shell) != 1 or shell[0] not in SHELLS:
                raise UserError(f"completion: expected one of {', '.join(SHELLS)}, got {_got(shell)}")
            print(SCRIPTS[shell[0]], end="")
        case ["complete", "--", *typed]:
            from gradfn.completion import completions

            for word, what in completions(typed, experiments()):
                print(f"{word}\t{what}")
        case [name, *_]:
            commands = (*COMMANDS, "--help", "--version")
            raise UserError(f"no command {name!r}{near(name, commands)}; there are {', '.join(commands)}")
    sys.stdout.flush()  # Here, a failed write is still reported.
    return 0


def experiments() -> dict[str, Path]:
    """Return the files of the experiments, by name."""
    from gradfn.experiments import __path__ as folders

    files = sorted(file for file in Path(folders[0]).glob("*.py") if not file.stem.startswith("_"))
    if not files:
        raise UserError(f"no experiments in {folders[0]}")
    return {file.stem: file for file in files}


def _file_of(name: str) -> Path:
    """Return the file of an experiment, given by its name or as a file."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UserError(f"no file {name}; gradfn new {Path(name).stem} writes one to start from")
        return Path(name)
    found = experiments()
    if name not in found:
        own = f"{name}.py"
        hint = f" (did you mean {own}?)" if Path(own).is_file() else near(name, found)
        raise UserError(f"no experiment {name!r}{hint}; there are {', '.join(found)}")
    return found[name]


def _got(words: Sequence[str]) -> str:
    return " ".join(words) or "nothing"


def _list(options: list[str]) -> None:
    if options not in ([], ["--long"]):
        extra = next(word for word in options if word != "--long" or options.count(word) > 1)
        raise UserError(f"list: expected --long or nothing, got {extra}")
    from gradfn.experiments._order import ORDER

    found = experiments()
    ordered = {name for group in ORDER.values() for name in group}
    # Files that were added to the folder come last.
    groups = {**ORDER, "More": {name: "" for name in found if name not in ordered}}
    lines: list[str] = []
    for title, group in groups.items():
        if here := {name: idea for name, idea in group.items() if name in found}:
            lines += ["", styled(title, "bold")]
            for name, idea in here.items():
                lines += (
                    _described(found[name]) if options else [f"  {name:11}  {idea or _what(found[name])}"]
                )
    print("\n".join(lines[1:]))


def _what(file: Path) -> str:
    from gradfn.runs.about import read_about

    return read_about(file).what


def _described(file: Path) -> list[str]:
    from gradfn.runs import listed
    from gradfn.runs.about import read_about

    about = read_about(file)
    return [f"  {file.stem:11}  {about.what}", f"{'':15}Expected: {listed(about.expected)}."]


def _runs(words: list[str]) -> None:
    from gradfn.runs.overview import overview, table

    names = [word for word in words if word != "--json"]
    for word in names:
        if word.startswith("-"):
            raise UserError(f"no option {word!r}{near(word, ['--json'])}; there is --json")
    lines = overview(names)
    if "--json" in words:
        from gradfn.display import to_json

        shown = [
            line._asdict() | {"started": line.started.isoformat(), "folder": str(line.folder)}
            for line in lines
        ]
        print(to_json(shown, indent=2))
        return
    if not lines:
        what = f" of {' or '.join(names)}" if names else ""
        print(f"no runs{what} in runs/; gradfn run digits makes one", file=sys.stderr)
        return
    head, *rows = table(lines, shutil.get_terminal_size().columns)
    print(styled(head, "bold"))
    for line, row in zip(lines, rows, strict=True):
        print(styled(row, "red") if line.state in ("failed", "damaged") else row)


def _new(names: list[str]) -> None:
    if len(names) != 1:
        raise UserError(f"new needs the name of the experiment, such as my_experiment, got {_got(names)}")
    name = names[0].removesuffix(".py")
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name) or name.startswith("_"):
        raise UserError(
            f"new: expected a name of letters, digits and underscores, such as my_experiment, got {names[0]}"
        )
    if name in experiments():
        raise UserError(
            f"new: {name} is an experiment of gradfn, whose runs would mix with yours; take another name"
        )
    from gradfn.experiments import __path__ as folders
    from gradfn.files import write_new

    file = Path(f"{name}.py")
    text = (Path(folders[0]) / "_template.py").read_text(encoding="utf-8").replace("my_experiment", name)
    try:
        write_new(file, text)
    except FileExistsError:
        raise UserError(f"new: {file} exists already, and is left as it is; take another name") from None
    print(
        f"wrote {file}. Next:\n  python {file}\n  {_program()} run {file} --help\n  {_program()} report {name}"
    )


def _table(words: list[str]) -> None:
    from gradfn.display import parameter_table

    sizes = [int(word) for word in words if word.isascii() and word.isdigit() and int(word) > 0]
    if len(sizes) != len(words) or len(sizes) < 2:
        raise UserError(
            f"table needs two or more integers >= 1, nodes per layer, inputs first (784 16 10), got {_got(words)}"
        )
    # As in `gf.mlp`, without the time that jax takes to be imported.
    shapes: dict[str, list[int]] = {}
    for i, (n_in, n_out) in enumerate(pairwise(sizes), start=1):
        shapes |= {f"W{i}": [n_out, n_in], f"b{i}": [n_out]}
    print(parameter_table([(name, shape, "float32", 4) for name, shape in shapes.items()]))


def _report(words: list[str]) -> int:
    from gradfn.files import FileError
    from gradfn.pages.page import write_report
    from gradfn.runs.about import read_about

    runs: list[str] = []
    out: str | None = None
    opens = False
    rest = iter(words)
    try:
        for word in rest:
            option, equals, value = word.partition("=")
            if option == "--out":
                out = value if equals else next(rest, "")
                if not out:
                    raise UserError("--out needs the name of a file")
            elif word == "--open":
                opens = True
            elif word.startswith("-"):
                raise UserError(
                    f"no option {word!r}{near(option, ['--out', '--open', '--help'])}; there are --out FILE and --open"
                )
            else:
                runs.append(word)
        if not 1 <= len(runs) <= 2:
            raise UserError(
                "expected a run's folder, or an experiment's name for its latest run; or two of them, to compare; "
                f"got {' '.join(runs) or 'nothing'}"
            )
        about = {name: read_about(file) for name, file in experiments().items()}
        with handling(stop):
            file = write_report(runs, out, about)
    except (UserError, FileError, ImportError, OSError) as error:
        return _fail(f"gradfn report: {_message(error)}", 2)
    with optional("stdout"):
        size = f"{file.stat().st_size / 1e6:.1f} MB"
        print(f"wrote {file} ({size})" if opens else f"wrote {file} ({size}): open it in a browser")
    if opens:
        _open(file)
    return 0


def _open(file: Path) -> None:
    """Open a file in the user's browser, or say that there is none."""
    import webbrowser

    try:
        found = webbrowser.open(file.resolve().as_uri())
    except (webbrowser.Error, OSError):
        found = False
    if not found:
        print(
            "gradfn report: no browser was found that could be started; open the file in one", file=sys.stderr
        )


def _sample(words: list[str], own_process: bool) -> int:
    from gradfn import runs
    from gradfn.runs.about import read_about

    helping = words[:1] in (["-h"], ["--help"])
    run, options = ("RUN", ["--help"]) if helping else (words[0] if words else "", words[1:])
    command = f"gradfn sample {run}".strip()
    try:
        if not run:
            raise UserError(
                "expected a run's folder, an experiment's name for its latest run, or a Hugging Face folder"
            )
        about = read_about(Path(runs.__file__).with_name("sample.py"))
        _check_options(about, options, command, about.what)
        found = experiments()
        texts = {name: file.read_text(encoding="utf-8") for name, file in found.items()}
        # Other networks have a page, but are not sampled from.
        saves = re.compile(r'save_model\([^"]{0,80}"(gpt|rnn)"')
        writers = [name for name, text in texts.items() if saves.search(text)]
        if run in found and run not in writers and not Path(run).exists():
            *first, last = [f"gradfn run {name}" for name in writers]
            raise UserError(f"{run} does not train a language model; {', '.join(first)} and {last} do")
        from gradfn.compiled import keep_programs
        from gradfn.runs import sample

        if own_process:
            keep_programs()
        config = read_options(sample.Config(), options, command, about.what)
        with handling(stop):
            sample.run(sample.load_model(run, config.dtype), config)
    except (UserError, ImportError, OSError, ValueError, MemoryError) as error:
        if isinstance(error, OSError) and error.filename is None:  # of the output
            raise
        return _fail(f"{command}: {_message(error)}", 2)
    return 0


def _run(file: Path, words: list[str], command: str, own_process: bool) -> int:
    """Run an experiment's file.

    Args:
        file: of the experiment.
        words: the options.
        command: what the user typed before them.
        own_process: whether the process was started for this.
    """
    from gradfn import runs

    code = _run_file(file, words, command, own_process)
    if code and runs.several():
        from gradfn.train import processes

        processes.leave(code)
    return code


def _run_file(file: Path, words: list[str], command: str, own_process: bool) -> int:
    from gradfn import runs
    from gradfn.files import FileError
    from gradfn.runs.about import read_about
    from gradfn.timings import process_started

    started = process_started() if own_process else time.time()
    config: Any = None

    def has_started() -> bool:
        return bool(config and config.folder and (Path(config.folder) / runs.CONFIG).exists())

    with optional("stdout"):
        try:
            about = read_about(file)
            description = f"{about.what}\n\nExpected: {runs.listed(about.expected)}."
            # Help and mistakes do not wait for jax.
            _check_options(about, words, command, description)
            from gradfn.compiled import keep_programs
            from gradfn.train import keep_freed_memory

            keep_freed_memory()
            if own_process:
                keep_programs()
            module = _load(file)
            if missing := [name for name in ("Config", "run") if not hasattr(module, name)]:
                raise UserError(
                    f"{file} is not an experiment: expected a dataclass Config of options and a function "
                    f"run(config), got no {' and no '.join(missing)}; gradfn new NAME writes one to start from"
                )
            with handling(stop):
                config = _config(module, words, command, description)
                with _together(config), _timed(config, started):
                    config = runs.settle(file.stem, config)
                    module.run(config)
                    _say_next(config)
        except (UserError, FileError, ImportError) as error:
            return _fail(f"{command}: {error}", 2)
        except ValueError as error:
            if has_started():
                runs.end(config.folder, "failed", f"ValueError: {error}")
                raise
            return _fail(f"{command}: {error}", 2)  # conflicting options
        except (FloatingPointError, OSError) as error:  # the loss became nan; the disk is full
            if has_started():
                runs.end(config.folder, "failed", _message(error))
            return _fail(f"{command}: {_message(error)}", 1)
        except (KeyboardInterrupt, SystemExit) as end:
            code = exit_code(end)
            if code not in ENDED:  # --help
                return code
            if has_started():
                runs.end(config.folder, "interrupted")
            if not has_started():
                return _fail(f"{command}: {ENDED[code]} before the run started", code)
            if not _is_first():
                return code
            folder = shlex.quote(str(config.folder))
            return _fail(f"{ENDED[code]}; to resume: {command} --resume --folder {folder}", code)
        except Exception as error:
            if has_started():
                runs.end(config.folder, "failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            if config and config.folder:
                runs.disown(config.folder)
    return 0


def _say_next(config: Any) -> None:
    """Say how to see a run that has finished."""
    from gradfn import runs

    if config.folder and (Path(config.folder) / runs.RESULT).exists():
        print(f"next: {_program()} report {shlex.quote(str(config.folder))} --open")


def _program() -> str:
    """Return how to call this gradfn: its name if that is on the PATH, or else where it is."""
    script = Path(sys.executable).with_name("gradfn.exe" if os.name == "nt" else "gradfn")
    found = shutil.which("gradfn")
    if found and (not script.exists() or os.path.samefile(found, script)):
        return "gradfn"
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m gradfn"
    near_here = os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)
    return shlex.quote(near_here)


def _is_first() -> bool:
    """Return whether this process is the only one, or the first of several."""
    from gradfn import runs
    from gradfn.train.processes import is_first

    return not runs.several() or is_first()


@contextlib.contextmanager
def _together(config: Any) -> Iterator[None]:
    """Make this process one of several, where the options say so; only the first of them prints what it does."""
    if not getattr(config, "distributed", False):
        yield
        return
    from gradfn.train import processes

    processes.initialize(config.coordinator, config.processes, config.process)
    if not _is_first():
        discard(sys.stdout)
    with processes.losing_none():
        yield


@contextlib.contextmanager
def _timed(config: Any, started: float) -> Iterator[None]:
    """Print at the end how long the phases of a run took, where its options say so."""
    if not getattr(config, "timings", False):
        yield
        return
    from gradfn.timings import measured

    with measured(started) as timings:
        yield
        print(timings.table())


def _message(error: BaseException) -> str:
    """Return an error's message; for an error of the system, the file and the reason."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _load(file: Path) -> ModuleType:
    """Import an experiment's file under the name of its module."""
    import gradfn.experiments

    name = f"{gradfn.experiments.__name__}.{file.stem}"
    if (module := sys.modules.get(name)) and module.__file__ == str(file):
        return module
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look here for the types that annotations name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _check_options(about: About, words: list[str], command: str, description: str) -> None:
    """Raise what `read_options` would raise, and a ValueError for a value out of bounds, without running the file."""
    from gradfn.runs import check

    if about.config:
        check(read_options(about.config(), words, command, description))


def _config(module: ModuleType, words: list[str], command: str, description: str) -> Any:
    """Read an experiment's options; with --resume the stored ones are the defaults, and given ones must agree."""
    from gradfn import runs

    file = Path(module.__file__ or "")
    config = read_options(module.Config(), words, command, description)
    before = runs.stored(file.stem, config) if config.resume else None
    if before is None:
        return config
    # What differs from the stored option was given on the command line, even where it is the experiment's default.
    default = dataclasses.replace(before, resume=False)
    return runs.merge(read_options(default, words, command, description), before, before)


def _fail(message: str, code: int) -> int:
    """Print an error in one line, without characters that could control the terminal; return the code."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    line = " ".join(message.split())
    print("".join(letter if letter.isprintable() else "?" for letter in line), file=sys.stderr)
    return code
