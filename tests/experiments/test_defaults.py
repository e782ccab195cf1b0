"""Defaults adapt to valid options, and an error names the option that is wrong on its own."""

import dataclasses
import importlib

import numpy as np
import pytest
from gradfn.experiments._common import batch_for, heads_for

from gradfn import cli, runs
from gradfn.experiments import gpt, neuron, rnn, vit

NAMES = [name for name in cli.experiments() if not name.startswith("_")]
# Options that are texts, and one whose values depend on each other.
OTHERS = ("folder", "data", "data_path", "mesh", "coordinator", "rates")
VALUES = (1, 2, 3, 5, 7, 10, 25, 30, 60, 100, 1000)


@pytest.mark.parametrize("name", NAMES)
def test_a_default_never_makes_an_option_an_error(name):
    kind = importlib.import_module(f"gradfn.experiments.{name}").Config
    for field in dataclasses.fields(kind):
        if isinstance(field.default, (bool, str)) or field.name in OTHERS:
            continue
        for value in VALUES:
            given = {int: value, float: value / 1000, tuple: (value,)}.get(type(field.default), value)
            try:
                kind(**{field.name: given})
            except ValueError as error:
                named = str(error).partition(" must")[0].partition(":")[0].split(", ")
                assert field.name in named, f"{field.name}={given}: {error}"  # noqa: PT017


def test_few_steps_warm_up_for_fewer(monkeypatch):
    """`gradfn run gpt --steps 60` until it makes its optimizer."""
    warmups = []

    def optimizer(steps, rate, warmup, **others):
        warmups.append(warmup)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpt, "adamw_warmup_cosine", optimizer)
    monkeypatch.setattr(runs, "start", lambda name, config: None)
    monkeypatch.setattr(gpt.sample, "save_model", lambda *args: None)
    for options in ({"steps": 60}, {"steps": 1}, {"steps": 2000}, {"steps": 60, "warmup": 59}):
        with pytest.raises(KeyboardInterrupt):
            gpt.run(gpt.Config(**options, width=8, layers=1))
    assert warmups == [6, 0, 100, 59]


def test_the_default_number_of_heads_divides_the_width():
    for width in range(1, 70):
        for kind in (gpt.Config, vit.Config):
            more = {"positions": "learned"} if kind is gpt.Config else {}
            heads = heads_for(kind(width=width, **more))
            assert 1 <= heads <= 4
            assert width % heads == 0
    assert heads_for(gpt.Config()) == heads_for(vit.Config()) == 4
    with pytest.raises(ValueError, match="width: rope needs an even number of features per head, got 25"):
        gpt.Config(width=25)


def test_the_default_batch_is_at_most_all_examples():
    assert batch_for(gpt.Config(), 5, "lines") == 5
    assert batch_for(gpt.Config(), 50, "lines") == gpt.Config().batch
    assert batch_for(gpt.Config(batch=7), 50, "lines") == 7
    with pytest.raises(runs.RunError, match="batch: there are 5 lines, got 7"):
        batch_for(gpt.Config(batch=7), 5, "lines")


def test_the_region_of_a_node_ends_with_the_image():
    weights = neuron.node(neuron.Config(top=26, left=20, ring=0))
    assert np.argwhere(weights == 1).min(0).tolist() == [26, 20]
    assert weights.sum() == 2 * 8
    np.testing.assert_array_equal(
        neuron.node(neuron.Config()), neuron.node(neuron.Config(height=5, width=16))
    )


@pytest.mark.parametrize("experiment", [gpt, rnn])
def test_a_text_of_few_lines_is_refused_before_the_run_starts(experiment, tmp_path):
    (tmp_path / "names.txt").write_text("ab\ncd\nabc\n")
    options = {"lines": True} if experiment is gpt else {}
    with pytest.raises(runs.RunError, match="too few examples: none are left for validation"):
        experiment.run(
            experiment.Config(data=str(tmp_path / "names.txt"), folder=str(tmp_path / "run"), **options)
        )
    assert not (tmp_path / "run").exists()
