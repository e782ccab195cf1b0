"""The public names: each is imported when it is first used, from the module that the stub gives."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import gradfn as gf
from gradfn._missing import NAMESPACES

OLD_NAMES = {
    "hvp": "gf.curvature.hvp",
    "per_example_norms": "gf.per_example.norms",
    "integrated_gradient": "gf.attribution.integrated_gradients",
    "clasification_loss": "gf.classification_loss",
}


def test_every_name_is_there():
    for name in gf.__all__:
        assert getattr(gf, name) is not None
    assert set(gf.__all__) <= set(dir(gf))
    assert gf.train is import_module("gradfn.train")
    for space in NAMESPACES:
        names = getattr(gf, space).__all__
        assert names == sorted(names)
        assert all(hasattr(getattr(gf, space), name) for name in names)


def test_dir_shows_every_name_before_first_use():
    code = "import gradfn; print(*dir(gradfn))"
    root = Path(gf.__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert set(gf.__all__) <= set(found.stdout.split())


@pytest.mark.parametrize("name", OLD_NAMES)
def test_a_name_that_does_not_exist_gets_a_hint(name):
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'. Did you mean {OLD_NAMES[name]}"):
        getattr(gf, name)


@pytest.mark.parametrize("name", ["zzz", "a.b", "", "_x"])
def test_a_name_like_no_other_gets_no_hint(name):
    with pytest.raises(AttributeError, match=f"module 'gradfn' has no attribute '{name}'$"):
        getattr(gf, name)


def test_importing_imports_nothing_else():
    code = "import sys, gradfn, gradfn.cli; print([name for name in ('jax', 'numpy', 'rich') if name in sys.modules])"
    root = Path(gf.__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
