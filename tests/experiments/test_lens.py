"""The lens experiment: a reduced run, and its outcome."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from gradfn.experiments.lens import Config, judge, run

import gradfn as gf


@pytest.mark.slow
def test_a_reduced_run(tmp_path, capsys):
    result = run(Config(steps=3, batch=2, context=12, layers=2, width=8, folder=str(tmp_path / "run")))
    files = {file.name for file in result.folder.iterdir()}
    assert {"logits.png", "gradients.png", "depth.png", "effects.png", "result.json"} <= files
    stored = json.loads((result.folder / "result.json").read_text())
    np.testing.assert_allclose(stored["losses"]["logit lens"], result.losses["logit lens"])
    assert result.losses["logit lens"][-1] == result.losses["Jacobian lens"][-1]
    assert result.outcome.state == "open"
    assert str(result.outcome) in capsys.readouterr().out


def test_verdict():
    def effects(parts):
        zero = jnp.float32(0)
        nothing = jnp.zeros([0, 0]), jnp.zeros([0])
        return gf.circuits.DirectEffects(
            jnp.float32(3), zero, jnp.array(parts), *nothing, zero, zero, zero, ("a", "b"), ()
        )

    losses = {"logit lens": np.array([7.5, 2.5, 1.5]), "Jacobian lens": np.array([4.0, 3.0, 1.5])}
    assert judge(Config(), losses, effects([1.0, 2.0])).state == "reached"
    assert judge(Config(steps=3), losses, effects([1.0, 2.0])).state == "open"
    assert judge(Config(), losses, effects([1.0, 2.1])).state == "missed"
    rises = losses | {"logit lens": np.array([7.5, 1.4, 1.5])}
    assert judge(Config(), rises, effects([1.0, 2.0])).state == "missed"


def test_options_out_of_range_are_named():
    with pytest.raises(ValueError, match="width must be a multiple of 8, got 20"):
        Config(width=20)
