"""The public names: each is imported when it is first used, and is what type checkers take it to be."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import gradfn as gf


def declared(file):
    """Return the names that a module imports, by the modules that it imports them from."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {
        alias.name: node.module
        for node in imports
        for alias in node.names
        if node.module.startswith("gradfn")
    }


def test_names_are_what_type_checkers_take_them_to_be():
    file = Path(gf.__file__)
    names = declared(file) | declared(file.with_name("_public.py"))
    del names["*"]
    assert sorted(names) == sorted(gf.__all__)
    for name, module in names.items():
        expected = (
            import_module(f"gradfn.{name}") if module == "gradfn" else getattr(import_module(module), name)
        )
        assert getattr(gf, name) is expected
    assert set(gf.__all__) <= set(dir(gf))
    assert gf.train is import_module("gradfn.train")
    for name in ("mpl", "a.b", "", "_x"):
        with pytest.raises(AttributeError, match=f"module 'gradfn' has no attribute '{name}'"):
            getattr(gf, name)


def test_importing_imports_nothing_else():
    code = "import sys, gradfn, gradfn.cli; print([name for name in ('jax', 'numpy', 'rich') if name in sys.modules])"
    root = Path(gf.__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
