"""What an experiment's file says about it and its options, read without running the file, whose imports are slow."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple  # noqa: F401 (annotations of options name Literal)

from gradfn.runs.config import option
from gradfn.runs.outcome import Expectation


class About(NamedTuple):
    """The description of an experiment, from its file.

    Attributes:
        what: its first line.
        expected: what is expected of it.
        options: for each option its meaning and its default.
        config: a dataclass with the fields of its options, but no methods; None where that needs the file to run.
    """

    what: str = ""
    expected: tuple[Expectation, ...] = ()
    options: Mapping[str, tuple[str, Any]] = {}
    config: type[Any] | None = None


def abouts() -> dict[str, About]:
    """Return the descriptions of all experiments, by name."""
    from gradfn.experiments import __path__ as folders

    files = sorted(file for file in Path(folders[0]).glob("*.py") if not file.stem.startswith("_"))
    return {file.stem: read_about(file) for file in files}


@functools.cache
def read_about(file: Path) -> About:
    """Return the description of an experiment: its docstring, `EXPECTED` and `Config`, which contain only literals.

    Args:
        file: of the experiment, with its functions below these. Base classes of `Config` may be in `_common.py`
            beside it.
    """
    tree = _parsed(file)
    common = file.with_name("_common.py")
    trees = [_parsed(common), tree] if common.exists() else [tree]
    classes = {node.name: node for each in trees for node in each.body if isinstance(node, ast.ClassDef)}
    expected = [
        Expectation(*args, **named)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "EXPECTED"
        for args, named in map(_literals, getattr(node.value, "elts", []))
    ]
    try:
        config = _dataclass("Config", classes)
    except (KeyError, TypeError, ValueError):  # a base or a default that must be computed
        config = None
    fields = dataclasses.fields(config) if config else ()
    options = {field.name: (field.metadata.get("text", ""), field.default) for field in fields}
    what = (ast.get_docstring(tree) or "").partition("\n")[0]
    return About(what, tuple(expected), options, config)


@functools.cache
def _parsed(file: Path) -> ast.Module:
    """Return what stands above the first function below `Config`: parsing all would take most of `gradfn list`."""
    text = file.read_text(encoding="utf-8")
    function = re.compile(r"^(?:@.*\n)*def ", re.MULTILINE).search(text, max(text.find("\nclass Config"), 0))
    return ast.parse(text[: function.start()] if function else text, str(file))


def _dataclass(name: str, classes: Mapping[str, ast.ClassDef]) -> type[Any]:
    """Return a dataclass with the fields of a class and of its bases."""
    fields = [
        (ast.unparse(field.target), ast.unparse(field.annotation), _default(field.value))
        for field in classes[name].body
        if isinstance(field, ast.AnnAssign)
    ]
    bases = tuple(_dataclass(ast.unparse(base), classes) for base in classes[name].bases)
    # Its annotations are evaluated in this module.
    return dataclasses.make_dataclass(
        name, fields, bases=bases, namespace={"__module__": __name__}, frozen=True
    )


def _default(node: ast.expr | None) -> Any:
    """Return what stands on the right of a field: `runs.option(...)` or a literal."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("runs.option", "option"):
        args, named = _literals(node)
        return option(*args, **named)
    return dataclasses.field(default=ast.literal_eval(node))  # type: ignore[arg-type]


def _literals(call: ast.Call) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a call, all of which are literals."""
    named = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    return [ast.literal_eval(each) for each in call.args], named
