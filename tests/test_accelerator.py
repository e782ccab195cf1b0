"""The accelerator benchmark, reduced and on the CPU: it runs to its end, and all contenders train the same network."""

import json

import jax
import numpy as np
import pytest

from benchmarks import accelerator

REDUCED = accelerator.REDUCED


def rows_of(section):
    rows = {}
    # Raw JAX is written as users would write it, with JAX's default settings.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        accelerator.SECTIONS[section](REDUCED, lambda name, **figures: rows.update({name: figures}))
    return rows


def test_all_kinds_of_nets_are_compared():
    assert [name for name, *_ in accelerator.losses()] == ["mlp", "cnn", "gpt"]


@pytest.mark.slow
def test_correctness_reports_every_comparison(monkeypatch):
    first = next(accelerator.losses())
    monkeypatch.setattr(accelerator, "losses", lambda: iter([first]))
    rows = rows_of("correctness")
    assert {f"mlp: {what}" for what in ("value and gradients", "inspect", "per-example norms")} <= set(rows)
    assert {"nan_origin", "resume"} <= set(rows)
    assert all(row["ok"] for row in rows.values())


def test_a_difference_is_relative_to_the_largest_magnitude():
    expected = {"a": np.array([100.0, 0.0]), "b": np.array([1.0])}
    found = {"a": np.array([100.0, 1.0]), "b": np.array([1.0])}
    assert accelerator.difference(found, expected) == pytest.approx(0.01)
    assert accelerator.difference(expected, expected) == 0


@pytest.mark.slow
def test_all_contenders_take_the_same_steps():
    """Compare losses after equally many steps on one batch from the same initial parameters, in bfloat16."""
    rows = rows_of("gpt")
    assert rows["gradfn"]["loss"] == pytest.approx(rows["raw JAX"]["loss"], abs=0.02)
    assert rows["gradfn"]["peak_gb"] > 0
    pytest.importorskip("torch")
    (torch_row,) = rows_of("pytorch").values()
    assert torch_row["loss"] == pytest.approx(rows["gradfn"]["loss"], abs=0.02)


@pytest.mark.slow
def test_overhead_is_a_ratio_to_the_gradient():
    rows = rows_of("overhead")
    for name in ("inspect, five statistics", "per-example norms", "Hessian-vector product"):
        low, high = rows[name]["quartiles"]
        assert 0 < low <= rows[name]["over_gradient"] <= high


def test_mfu_counts_operations_per_token(monkeypatch):
    monkeypatch.setattr(accelerator, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    figures = accelerator.step_figures(accelerator.FULL.config, batch_size=16, seconds=0.05)
    # 124,475,904 parameters (the vocabulary is rounded up to 50,304), 12 layers of 768 features, 1,024 tokens
    flops = 6 * 124_475_904 + 12 * 12 * 1024 * 768
    assert figures["tokens_per_s"] == pytest.approx(16 * 1024 / 0.05)
    assert figures["mfu"] == pytest.approx(flops * 16 * 1024 / 0.05 / 989e12)


@pytest.mark.slow
def test_the_command_writes_its_results(tmp_path, capsys):
    file = tmp_path / "out.json"
    wrong = accelerator.main(["--reduced", "--only", "mlp", "--json", str(file)])
    assert wrong == 0
    rows = json.loads(file.read_text())["rows"]
    assert rows[0]["device"] == "cpu"
    rates = {row["name"]: row["examples_per_s"] for row in rows[1:]}
    assert rates.keys() >= {"784-16-10: gf.fit", "784-16-10: plain scan"}
    assert min(rates.values()) > 0
    assert "examples/s" in capsys.readouterr().out


def test_a_timeout_affects_one_section_only(tmp_path, capsys):
    file = tmp_path / "out.json"
    accelerator.main(["--reduced", "--minutes", "0", "--only", "mlp", "--json", str(file)])
    assert json.loads(file.read_text())["rows"][-1]["skipped"] == "out of time"
    assert "out of time" in capsys.readouterr().out


def test_a_failed_section_names_its_error():
    errors = "Traceback ...\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory\n----\nFor simplicity, ...\n"
    assert accelerator.fault_in(errors) == "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert accelerator.fault_in("") == "no message"
