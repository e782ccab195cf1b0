"""The examples in docstrings of the experiments."""

import doctest
import importlib
from pathlib import Path

import pytest

import gradfn.experiments

MODULES = sorted(file.stem for file in Path(gradfn.experiments.__path__[0]).glob("*.py"))


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("__init__", "_script")])
def test_examples(name):
    module = importlib.import_module(f"gradfn.experiments.{name}")
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0
