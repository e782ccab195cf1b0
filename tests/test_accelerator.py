"""The accelerator benchmark, reduced and on the CPU: it runs to its end, and all contenders train the same network."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from benchmarks import harness
from benchmarks.accelerator import __main__ as command
from benchmarks.accelerator import checks, common, overhead, small
from benchmarks.accelerator import gpt as gpt_section
from benchmarks.accelerator.common import FULL, REDUCED


def rows_of(section, shapes=REDUCED):
    rows = {}
    # Raw JAX is written as users would write it, with JAX's default settings.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        command.SECTIONS[section](shapes, lambda name, **figures: rows.update({name: figures}))
    return rows


def test_all_kinds_of_nets_are_compared():
    assert list(checks.examples()) == ["mlp", "cnn", "gpt"]


@pytest.mark.slow
def test_correctness_reports_every_comparison(monkeypatch):
    monkeypatch.setattr(checks, "examples", lambda: {"mlp": checks._mlp})
    rows = rows_of("correctness")
    assert {f"mlp: {what}" for what in checks.RESULTS} <= set(rows)
    assert {"nan_origin", "nan_guard", "resume"} <= set(rows)
    assert all(row["ok"] for row in rows.values())


def test_a_difference_is_relative_to_the_largest_magnitude():
    expected = {"a": np.array([100.0, 0.0]), "b": np.array([1.0])}
    found = {"a": np.array([100.0, 1.0]), "b": np.array([1.0])}
    assert checks.difference(found, expected) == pytest.approx(0.01)
    assert checks.difference(expected, expected) == 0
    assert checks.difference({"a": np.nan, "b": 1.0}, {"a": 1.0, "b": 1.0}) == np.inf


@pytest.mark.slow
def test_all_contenders_take_the_same_steps():
    """Compare losses after equally many steps on one batch from the same initial parameters, in bfloat16."""
    rows = rows_of("gpt")
    assert rows["gradfn"]["loss"] == pytest.approx(rows["raw JAX"]["loss"], abs=0.02)
    assert rows["gradfn"]["peak_gb"] > 0
    if "skipped" not in rows["Flax NNX"]:
        assert rows["Flax NNX"]["loss"] == pytest.approx(rows["raw JAX"]["loss"], abs=0.02)
    pytest.importorskip("torch")
    (torch_row,) = rows_of("pytorch").values()
    assert torch_row["loss"] == pytest.approx(rows["gradfn"]["loss"], abs=0.02)


@pytest.mark.slow
def test_fit_takes_the_step_that_is_timed():
    (row,) = rows_of("fit").values()
    assert row["tokens_per_s"] == pytest.approx(2 * 16 / (row["ms"] / 1e3))
    assert np.isfinite(row["loss"])


@pytest.mark.slow
def test_overhead_is_a_ratio_to_the_gradient(monkeypatch):
    """The sections differ in the transforms alone; one that is quick to compile stands for all."""
    rows = {}
    loss = gf.batch_mean(gf.next_token_loss(gf.gpt(REDUCED.config)))
    ways = {"forward": (lambda params, batch: loss(params, batch), 0.5)}
    overhead.over_gradient(loss, ways, REDUCED, lambda name, **figures: rows.update({name: figures}))
    low, high = rows["forward"]["quartiles"]
    assert 0 < low <= rows["forward"]["over_gradient"] <= high
    assert rows["forward"]["aim"] == "<= 0.50"


def test_mfu_counts_operations_per_token(monkeypatch):
    monkeypatch.setattr(common, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    figures = common.step_figures(FULL.config, batch_size=16, seconds=0.05)
    # 124,475,904 parameters (the vocabulary is rounded up to 50,304), 12 layers of 768 features, 1,024 tokens
    flops = 6 * 124_475_904 + 12 * 12 * 1024 * 768
    assert figures["tokens_per_s"] == pytest.approx(16 * 1024 / 0.05)
    assert figures["mfu"] == pytest.approx(flops * 16 * 1024 / 0.05 / 989e12)


def test_the_largest_batch_is_found_from_the_plan_of_a_small_one():
    plan = SimpleNamespace(
        argument_size_in_bytes=100, output_size_in_bytes=100, alias_size_in_bytes=50, temp_size_in_bytes=40
    )
    assert gpt_section.fitting_batch(plan, batch_size=4, available=1_000) == 85  # 150 + 85 * 10 <= 1,000
    assert gpt_section.fitting_batch(plan, batch_size=4, available=100) == 1


def test_a_batch_that_does_not_fit_is_made_smaller():
    tried = []

    def make(batch_size):
        tried.append(batch_size)
        if batch_size > 75:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return None, lambda: jnp.zeros(())

    assert gpt_section.first_that_fits(make, 100)[0] == tried[-1] == 72
    assert tried == [100, 90, 81, 72]
    with pytest.raises(MemoryError, match="not even one example"):
        gpt_section.first_that_fits(lambda _: make(100), 2)
    with pytest.raises(ZeroDivisionError):
        gpt_section.first_that_fits(lambda _: 1 / 0, 2)


def test_the_peak_is_what_the_device_counted_if_it_rose(monkeypatch):
    counts = iter(
        [
            {"bytes_in_use": 1_000_000_000, "peak_bytes_in_use": 2_000_000_000},
            {"bytes_in_use": 3_000_000_000, "peak_bytes_in_use": 6_000_000_000},
            {"bytes_in_use": 3_000_000_000, "peak_bytes_in_use": 6_000_000_000},
            {"bytes_in_use": 3_000_000_000, "peak_bytes_in_use": 6_000_000_000},
        ]
    )
    monkeypatch.setattr(common, "memory_counts", lambda: next(counts))
    make = lambda: (None, lambda: jnp.zeros(()))  # noqa: E731
    assert common.made_ready(make).peak == 5.0
    assert common.made_ready(make).peak is None


def test_attention_by_hand_equals_gradfn():
    shape = (2, 8, 2, 4)
    inputs = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3)]
    plain = overhead.plain_attention(*inputs)
    for f in overhead.attentions().values():
        np.testing.assert_allclose(f(*inputs), plain, atol=1e-6)


@pytest.mark.slow
def test_attention_is_timed_for_every_length():
    rows = rows_of("attention")
    assert rows.keys() == {f"T = {n}: {name}" for n in REDUCED.lengths for name in overhead.attentions()}
    assert all(row["ms"] > 0 and row["peak_gb"] > 0 for row in rows.values())


@pytest.mark.slow
def test_small_contenders_take_the_same_steps():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for makers, *_ in (small.mlp_contenders(4), small.gpt_contenders(REDUCED.small, 2)):
            losses = {}
            for name, make in makers.items():
                try:
                    _, run = make()
                except ImportError:
                    continue
                losses[name] = [float(run()) for _ in range(3)]
            for name, values in losses.items():
                np.testing.assert_allclose(values, losses["raw JAX"], atol=1e-4, err_msg=name)
            assert losses["gradfn"][-1] < losses["gradfn"][0]


@pytest.mark.slow
def test_the_command_writes_its_results(tmp_path, capsys):
    file = tmp_path / "out.json"
    wrong = command.main(["--reduced", "--only", "attention", "--json", str(file)])
    assert wrong == 0
    rows = json.loads(file.read_text())["rows"]
    assert rows[0]["device"] == "cpu"
    times = {row["name"]: row["ms"] for row in rows[1:]}
    assert times.keys() >= {"T = 128: gradfn", "T = 512: plain"}
    assert min(times.values()) > 0
    assert "batch 4" in capsys.readouterr().out


def test_a_timeout_affects_one_section_only(tmp_path, capsys):
    file = tmp_path / "out.json"
    command.main(["--reduced", "--minutes", "0", "--only", "small", "--json", str(file)])
    assert json.loads(file.read_text())["rows"][-1]["skipped"] == "out of time"
    assert "out of time" in capsys.readouterr().out


def test_a_failed_section_names_its_error():
    errors = "Traceback ...\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory\n----\nFor simplicity, ...\n"
    assert harness.fault_in(errors) == "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert harness.fault_in("") == "no message"
