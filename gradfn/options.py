"""Options of the command line: a dataclass with one option per field."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

C = TypeVar("C")


class _Parser(argparse.ArgumentParser):
    """A parser that raises its errors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def read_options(default: C, words: Sequence[str], command: str, description: str) -> C:
    """Read the fields of a dataclass from the command line.

    Args:
        default: an instance with the defaults. Its fields are from `gradfn.runs.option`, and bool, int, float, str,
            Literal, tuples of these, or None.
        words: the command line after `command`; with `--help` the help is printed and SystemExit raised.
        command: what the user typed before them.
        description: the first part of the help.

    Returns:
        `default` with the given options.

    Raises:
        ValueError: an unknown option, or a value of another type; the message names the option.
    """
    kind: Any = type(default)
    parser = _Parser(
        prog=command,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = get_type_hints(kind)
    texts = {field.name: field.metadata.get("text", "") for field in dataclasses.fields(kind)}
    # Inherited fields come last.
    names = sorted(
        (field.name for field in dataclasses.fields(kind)), key=lambda n: n not in kind.__annotations__
    )
    for name in names:
        value, hint = getattr(default, name), without_none(hints[name])
        shown = "" if value is None or value is False or value in ("", ()) else f" (default: {value})"
        text = f"{texts[name]}{shown}"
        settings: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS,
            "help": text.replace("%", "%%"),
        }
        if hint is bool:
            settings["action"] = "store_true"
        elif get_origin(hint) is tuple:
            settings |= {"nargs": "*", "metavar": _metavar(get_args(hint)[0])}
        else:
            settings["metavar"] = _metavar(hint)
        parser.add_argument(flag(name), **settings)
    given, unknown = parser.parse_known_args(words)
    if unknown:
        word = unknown[0].partition("=")[0]
        known = [*map(flag, names)]
        raise ValueError(f"no option {word!r}{near(word, known)}; there are {', '.join(known)}")
    values = {name: _value(name, text, hints[name]) for name, text in vars(given).items()}
    return dataclasses.replace(default, **values)  # type: ignore[type-var]


def near(word: str, known: Iterable[str]) -> str:
    """Return a hint at the known word that a misspelled one resembles, or nothing.

    >>> near("--hiden", ["--hidden", "--rate"])
    ' (did you mean --hidden?)'
    """
    found = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {found[0]}?)" if found else ""


def flag(name: str) -> str:
    """Return the option of a field, as it is typed."""
    return f"--{name.replace('_', '-')}"


def without_none(hint: Any) -> Any:
    """Return the type of an option that may be None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _metavar(hint: Any) -> str:
    return f"{{{','.join(get_args(hint))}}}" if get_origin(hint) is Literal else hint.__name__.upper()


def _value(name: str, text: Any, hint: Any) -> Any:
    """Return the value of an option, given as text or a list of texts."""
    kind = without_none(hint)
    if kind is not hint and text == "None":
        return None
    if get_origin(kind) is tuple:
        return tuple(_value(name, each, get_args(kind)[0]) for each in text)
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(f"{flag(name)}: expected one of {', '.join(get_args(kind))}, got {text}")
        return text
    try:
        return kind(text)
    except ValueError:
        expected = "an integer" if kind is int else "a number"
        raise ValueError(f"{flag(name)}: expected {expected}, got {text}") from None
