"""The layers of docs/architecture.md: each module imports only from its own layer and from those above it."""

import ast
import re
from pathlib import Path

import pytest

import gradfn

PACKAGE = Path(gradfn.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"


def layers():
    """Return the names of each layer's modules, in the order of the page's table."""
    rows = re.findall(r"^\| [a-z ]+ \| (`.*`) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.findall(r"`(\w+)`", row) for row in rows]


RANKS = {name: rank for rank, names in enumerate(layers()) for name in names}


def layer_of(file):
    """Return the module or folder of gradfn that a file is or lies in."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(file):
    """Return the modules and folders of gradfn that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("gradfn."))


def test_every_module_has_a_layer():
    top = {layer_of(file) for file in PACKAGE.rglob("*.py")}
    top -= {"__init__", "_missing", "experiments"}
    assert top == set(RANKS)


@pytest.mark.parametrize("name", RANKS)
def test_imports_follow_the_order_of_the_layers(name):
    files = [file for file in PACKAGE.rglob("*.py") if layer_of(file) == name]
    assert files
    below = [
        f"{file.relative_to(PACKAGE)} imports {other}"
        for file in files
        for other in imported(file)
        if other in RANKS and RANKS[other] > RANKS[name]
    ]
    assert not below


def test_an_import_of_a_later_layer_is_found(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("def f():\n    from gradfn.train._fit import fit\n    import gradfn.core.net\n")
    assert sorted(imported(file)) == ["core", "train"]
    assert RANKS["train"] > RANKS["core"]
