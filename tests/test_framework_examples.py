"""The scripts for users of other frameworks run, learn and show what they promise."""

import runpy
from pathlib import Path

import jax
import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "examples").glob("*_digits.py"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_trains_and_looks_into_its_model(script, capsys):
    framework = script.stem.partition("_")[0]
    pytest.importorskip(framework)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        found = runpy.run_path(str(script), run_name="__main__")
    text = capsys.readouterr().out
    assert float(found["value"]) < 0.5
    assert float(found["norms"].total.min()) > 0
    for line in (
        "parameters",
        "forward pass:",
        "grad norm",
        "without the hidden layer",
        "curvature",
        "first NaN",
    ):
        assert line in text


def test_there_is_a_script_for_each_framework():
    assert [script.stem for script in SCRIPTS] == ["equinox_digits", "flax_digits", "haiku_digits"]
