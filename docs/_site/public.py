"""The public names as the site shows them: which entry is on which page, and what a program needs to know of each.

The names are those of `gradfn/__init__.pyi` and of each namespace's `__all__`; nothing is listed here a second time.
An object that has two names, such as `gf.inspect` and `gf.inspection.inspect`, has one entry with both.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import gradfn as gf

# The page of a flat name by the package that defines it; names of the namespaces are on the page of their namespace.
TITLES = {
    "core": "Networks and parameters",
    "nets": "Whole networks",
    "losses": "Losses",
    "inspection": "Inspection",
    "per_example": "Per-example gradients",
    "curvature": "Curvature",
    "attribution": "Attribution",
    "circuits": "Circuits",
    "train": "Training",
    "data": "Data",
    "layers": "Layers",
    "report": "Reports",
}
ELSEWHERE = {"flatten": "losses", "display": "core", "pages": "report"}


class Entry(NamedTuple):
    """A public object.

    Attributes:
        name: its shortest public name, `gf.inspect`.
        names: all its public names.
        path: by which griffe finds it, `gradfn.inspect`.
        page: the stem of its page in the folder `reference`.
        value: the object.
    """

    name: str
    names: tuple[str, ...]
    path: str
    page: str
    value: Any

    @property
    def summary(self) -> str:
        """The first paragraph of its docstring; of a constant, that of the string below it."""
        text = (inspect.getdoc(self.value) if callable(self.value) else _below(self.name)) or ""
        return text.split("\n\n")[0].replace("\n", " ")

    @property
    def signature(self) -> str:
        """How it is called, with types and defaults as its source has them; of a constant or module, its name."""
        return self.name + (_written(self.value) if callable(self.value) else "")


def namespaces() -> dict[str, types.ModuleType]:
    """Return the public modules by name: `curvature`, `train`, ..."""
    return {name: getattr(gf, name) for name in gf.__all__ if isinstance(getattr(gf, name), types.ModuleType)}


def entries() -> list[Entry]:
    """Return every public object but the namespaces, by page; on a page, functions before classes."""
    # Constants may be equal or even identical (small integers); only functions and classes are one object.
    found: dict[object, tuple[list[str], str, Any]] = {}
    for name, page, value in _names():
        key = id(value) if callable(value) else name
        found.setdefault(key, ([], page, value))[0].append(name)
    made = [
        Entry(names[0], tuple(names), names[0].replace("gf.", "gradfn.", 1), page, value)
        for names, page, value in found.values()
    ]
    # What is called comes before what is returned.
    return sorted(made, key=lambda entry: (list(TITLES).index(entry.page), isinstance(entry.value, type)))


def public_names() -> set[str]:
    """Return every public name: the flat ones, the namespaces, and what these show."""
    return {name for entry in entries() for name in entry.names} | {f"gf.{name}" for name in namespaces()}


def pages() -> dict[str, list[Entry]]:
    """Return the entries by page."""
    out: dict[str, list[Entry]] = {page: [] for page in TITLES}
    for entry in entries():
        out[entry.page].append(entry)
    return out


def _names() -> Iterator[tuple[str, str, Any]]:
    spaces = namespaces()
    for name, package in _flat().items():
        if name not in spaces:
            page = ELSEWHERE.get(package, package)
            yield f"gf.{name}", page if page in TITLES else "core", getattr(gf, name)
    for space, module in spaces.items():
        for name in module.__all__:
            yield f"gf.{space}.{name}", space if space in TITLES else "core", getattr(module, name)


def _flat() -> dict[str, str]:
    """Return the package that each flat name is imported from, in the order of the stub."""
    stub = (Path(gf.__file__).parent / "__init__.pyi").read_text(encoding="utf-8")
    return {
        name: module.split(".")[0] or name
        for module, name in re.findall(r"^from \.([\w.]*) import (\w+) as \2$", stub, re.MULTILINE)
    }


def _below(name: str) -> str:
    """Return the string below the assignment of a constant, in the modules of its namespace."""
    *_, space, constant = name.split(".")
    folder = Path(gf.__file__).parent
    for file in sorted((folder / space if space in namespaces() else folder).glob("*.py")):
        body = ast.parse(file.read_text(encoding="utf-8")).body
        for node, after in pairwise(body):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            is_it = any(isinstance(target, ast.Name) and target.id == constant for target in targets)
            if is_it and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                return inspect.cleandoc(str(after.value.value))
    return ""


def _written(value: Callable) -> str:
    """Return the signature of a function, or of a class that is made by calling it, from its source."""
    plain = inspect.unwrap(value)
    if not isinstance(plain, type | types.FunctionType):
        return ""
    tree = ast.parse(textwrap.dedent(inspect.getsource(plain))).body[0]
    if isinstance(tree, ast.FunctionDef):
        return _call(tree) + (f" -> {ast.unparse(tree.returns)}" if tree.returns else "")
    assert isinstance(tree, ast.ClassDef)
    methods = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if "__init__" in methods:
        return _call(methods["__init__"])
    fields = getattr(plain, "_fields", None) or getattr(plain, "__dataclass_fields__", None)
    if not fields:
        return ""
    written = {
        node.target.id: ast.unparse(node)
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    # Inherited fields are in the source of another class.
    return f"({', '.join(written.get(name, name) for name in fields)})"


def _call(function: ast.FunctionDef) -> str:
    arguments = function.args
    for kind in (arguments.posonlyargs, arguments.args):
        if kind and kind[0].arg == "self":
            del kind[0]
            break
    return f"({ast.unparse(arguments)})"
