"""The harness of the benchmarks, and that all contenders do the same work. Nothing here is timed."""

import json
import mmap
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from benchmarks import all as all_of_them
from benchmarks import (
    attention,
    commands,
    experiments,
    fit_mnist,
    gpt_step,
    harness,
    picture,
    prefetch,
    readme,
    saving,
    scaling,
)
from benchmarks.rows import rows_of
from gradfn import cli


def test_contenders_are_interleaved():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) or 2.0 for name in "abc"}
    timings = harness.race(contenders, rounds=6, warmup=2)
    assert calls[:6] == ["a", "a", "b", "b", "c", "c"]
    rounds = ["".join(calls[6 + 3 * i : 9 + 3 * i]) for i in range(6)]
    assert rounds == ["abc", "bca", "cab", "cba", "acb", "bac"]
    assert all(len(timing.wall) == len(timing.cpu) == 6 for timing in timings.values())


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_orders_are_balanced(n):
    """In two cycles every contender has every position equally often."""
    rounds = [harness.order_of_round(list(range(n)), number) for number in range(2 * n)]
    for position in zip(*rounds, strict=True):
        assert sorted(position) == sorted([*range(n), *range(n)])


def test_times_are_per_unit_of_work(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 16.0, 20.0, 22.0])  # start and end of each call
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(harness.time, "process_time", lambda: 0.0)
    timing = harness.race({"only": lambda: 4.0}, rounds=2, warmup=1)["only"]
    assert timing == (5.0, [1.5, 0.5], [0.0, 0.0])


def test_ratios_are_taken_round_by_round():
    # Both slow down together in the second round: the ratio stays.
    timings = {
        "baseline": harness.Timing(0.1, [1.0, 9.0, 1.0], [1.0, 9.0, 1.0]),
        "twice as fast": harness.Timing(0.2, [0.5, 4.5, 0.5], [1.0, 9.0, 1.0]),
    }
    first, second = harness.summarize(timings, "baseline")
    assert (first.name, first.ratio, first.low, first.high) == ("twice as fast", 2.0, 2.0, 2.0)
    assert (first.rate, first.cpu_ratio, first.cpu_per_wall, first.first) == (2.0, 1.0, 2.0, 0.2)
    assert (second.name, second.ratio) == ("baseline", 1.0)


def test_quartiles_of_few_values():
    assert harness.quartiles([3.0]) == (3.0, 3.0, 3.0)
    low, middle, high = harness.quartiles([5.0, 1.0])
    assert (low, middle, high) == (2.0, 3.0, 4.0)
    values = np.random.default_rng(0).random(101).tolist()
    assert harness.quartiles(values)[1] == statistics.median(values)
    np.testing.assert_allclose(harness.quartiles(values), np.quantile(values, [0.25, 0.5, 0.75]))


@pytest.mark.parametrize(
    ("contenders", "rounds", "warmup"), [({}, 1, 1), ({"a": int}, 0, 1), ({"a": int}, 1, 0)]
)
def test_an_empty_race_raises(contenders, rounds, warmup):
    with pytest.raises(ValueError, match="race: expected at least one contender"):
        harness.race(contenders, rounds, warmup)


def test_report_prints_a_table_and_writes_json(tmp_path, capsys):
    timings = {
        "ours": harness.Timing(0.5, [0.5, 0.25, 0.5], [0.5, 0.25, 0.5]),
        "theirs": harness.Timing(0.25, [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]),
    }
    file = tmp_path / "out.json"
    skipped = {"another": "it is not installed"}
    harness.report("a race", timings, "theirs", "steps", skipped=skipped, json_file=file)
    printed = capsys.readouterr().out
    for text in (
        "a race",
        "ours",
        "2.000",
        "steps/s",
        "another: skipped, it is not installed",
        "jaxlib",
        "CPUs",
    ):
        assert text in printed
    written = json.loads(file.read_text())
    (table,) = written["tables"]
    assert table["ratios"]["ours"] == {"wall": [2.0, 4.0, 2.0], "cpu": [4.0, 8.0, 4.0]}
    assert [line["name"] for line in table["summary"]] == ["ours", "theirs"]
    assert table["summary"][0]["ratio"] == 2.0
    assert table["summary"][1]["cpu_per_wall"] == 2.0
    assert (table["rounds"], table["aims"], table["skipped"]) == (3, {}, skipped)
    assert written["environment"]["jax"] == jax.__version__


def test_aims_are_times_of_the_baseline(tmp_path, capsys):
    timings = {
        name: harness.Timing(0.1, [time], [time]) for name, time in (("a", 1.1), ("b", 1.101), ("1", 1.0))
    }
    harness.report("x", timings, "1", "steps", aims={"a": 1.1, "b": 1.1}, json_file=tmp_path / "out.json")
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    ends = {line[0]: line[-3:] for line in words if line and line[0] in timings and len(line) > 5}
    assert ends["a"] == ["1.100", "1.1", "reached"]
    assert ends["b"] == ["1.101", "1.1", "missed"]
    assert ends["1"][-1] == "1.000"
    (table,) = json.loads((tmp_path / "out.json").read_text())["tables"]
    assert table["aims"] == {"a": 1.1, "b": 1.1}
    with pytest.raises(ValueError, match=r"aims for \['c'\]"):
        harness.report("x", timings, "1", "steps", aims={"c": 1.1})
    harness.report("x", timings, "1", "steps", aims={"c": 1.1}, skipped={"c": "not installed"})


def test_figures_are_compared_column_by_column(tmp_path, capsys):
    figures = {
        "plain": {"trace, s": 0.5, "compile, s": 2.0},
        "inspect": {"trace, s": 0.6, "compile, s": 3.2},
        "other": {"compile, s": 1.0},
    }
    aims = {"inspect": {"compile, s": 1.5}}
    harness.report_figures("24 layers", figures, "plain", aims=aims, json_file=tmp_path / "out.json")
    printed = capsys.readouterr().out
    for text in ("24 layers", "0.6  1.20", "3.2  1.60 of 1.5 missed", "1  0.50", "-", "trace, s"):
        assert text in printed
    (table,) = json.loads((tmp_path / "out.json").read_text())["tables"]
    rows = {(row["name"], row["column"]): row for row in table["figures"]}
    assert len(rows) == 5
    assert rows["inspect", "compile, s"] == {
        "name": "inspect",
        "column": "compile, s",
        "value": 3.2,
        "time": 1.6,
        "aim": 1.5,
    }
    for wrong in ({"inspected": {}}, {"inspect": {"lower, s": 1.5}}):
        with pytest.raises(ValueError, match="aims for"):
            harness.report_figures("24 layers", figures, "plain", aims=wrong)


def test_a_run_has_one_file(tmp_path):
    file = tmp_path / "out.json"
    file.write_text("of an earlier run")
    for title in ("first", "second"):
        harness.report(title, {"a": harness.Timing(1.0, [1.0], [1.0])}, "a", "steps", json_file=file)
    harness.report_figures("third", {"a": {"MB": 1.0}}, json_file=file)
    written = json.loads(file.read_text())
    assert [table["title"] for table in written["tables"]] == ["first", "second", "third"]
    assert written["tables"][2]["figures"][0]["time"] is None


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    x = rng.random((100, 784), np.float32)
    return fit_mnist.starting_task(x, rng.integers(0, 10, 100).astype(np.int32))


def test_orders_are_shuffled_whole_batches(task):
    orders = task.orders()
    first, second = next(orders), next(orders)
    assert first.shape == (3, 32)
    assert task.examples == 96
    assert len(np.unique(first)) == 96
    assert not np.array_equal(first, second)


FRAMEWORKS = ("PyTorch", "Equinox", "Flax NNX")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in FRAMEWORKS else ()) for name in fit_mnist.TRAINERS],
)
def test_everyone_does_the_same_work(task, name):
    """Two epochs against the formulas written out in numpy, in float64."""
    # Most are written as a user would write them, under JAX's own settings.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        try:
            trainer = fit_mnist.TRAINERS[name](task)
        except ImportError as error:
            pytest.skip(f"{error.name} is not installed")
        for _ in range(2):
            trainer.epoch()
    expected = by_hand(task, epochs=2)
    trained = trainer.params()
    assert trained.keys() == expected.keys()
    for leaf, value in expected.items():
        np.testing.assert_allclose(trained[leaf], value, atol=2e-5, err_msg=leaf)


def by_hand(task: fit_mnist.Task, epochs: int) -> fit_mnist.Params:
    params = {name: np.array(leaf, np.float64) for name, leaf in task.start.items()}
    orders = task.orders()
    for _ in range(epochs):
        for index in next(orders):
            x, y = np.array(task.x[index], np.float64), np.array(task.y[index])
            hidden = 1 / (1 + np.exp(-(x @ params["W1"].T + params["b1"])))  # [batch, 16]
            logits = hidden @ params["W2"].T + params["b2"]  # [batch, 10]
            chances = np.exp(logits - logits.max(1, keepdims=True))
            chances /= chances.sum(1, keepdims=True)
            d2 = (chances - np.eye(10)[y]) / len(y)  # [batch, 10]
            d1 = d2 @ params["W2"] * hidden * (1 - hidden)  # [batch, 16]
            grads = {"W1": d1.T @ x, "b1": d1.sum(0), "W2": d2.T @ hidden, "b2": d2.sum(0)}
            params = {name: leaf - fit_mnist.RATE * grads[name] for name, leaf in params.items()}
    return params


def test_who_is_not_installed_is_skipped(task, monkeypatch):
    def missing(task):
        raise ModuleNotFoundError(name="nowhere")

    monkeypatch.setattr(fit_mnist, "TRAINERS", {"plain scan": fit_mnist.plain_scan, "other": missing})
    ready, skipped = fit_mnist.trainers(task, ["plain scan", "other"])
    assert list(ready) == ["plain scan"]
    assert skipped == {"other": "nowhere is not installed"}


def test_a_failure_inside_fit_is_raised(task, monkeypatch):
    def fail(*args, **kwargs):
        raise FloatingPointError("the loss became nan")

    monkeypatch.setattr(fit_mnist.gf, "fit", fail)
    trainer = fit_mnist.gradfn_fit(task)
    with pytest.raises(FloatingPointError, match="became nan"):
        trainer.epoch()


@pytest.fixture(scope="module")
def gpt_task():
    config = gf.GPTConfig(**{**vars(gpt_step.CONFIG), "n_layers": 2, "width": 32, "context": 16})
    return gpt_step.task_of(config, batch=3)


def four_losses(task, name):
    # Most are written as a user would write them, under JAX's own settings.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        step = gpt_step.CONTENDERS[name](task)
        return [float(step()) for _ in range(4)]


@pytest.fixture(scope="module")
def baseline_losses(gpt_task):
    return four_losses(gpt_task, gpt_step.BASELINE)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in gpt_step.CONTENDERS if name != gpt_step.BASELINE])
def test_everyone_takes_the_same_steps_of_the_gpt(gpt_task, baseline_losses, name):
    """The first loss tells the same parameters and loss, the later ones the same gradients and updates."""
    try:
        losses = four_losses(gpt_task, name)
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")
    assert baseline_losses[-1] < baseline_losses[0] - 0.01
    np.testing.assert_allclose(losses, baseline_losses, atol=1e-4)


@pytest.mark.slow
def test_fit_takes_the_same_steps_of_the_gpt(gpt_task, baseline_losses):
    step = gpt_step.gradfn_fit(gpt_task, every=1)
    np.testing.assert_allclose([step() for _ in range(4)], baseline_losses, atol=1e-4)
    two = gpt_step.gradfn_fit(gpt_task, every=2)
    np.testing.assert_allclose([two(), two()], np.reshape(baseline_losses, [2, 2]).mean(1), atol=1e-4)


def test_contenders_of_the_gpt_that_are_not_installed_are_skipped(gpt_task, monkeypatch):
    def missing(task):
        raise ModuleNotFoundError(name="nowhere")

    monkeypatch.setattr(gpt_step, "CONTENDERS", {"raw": lambda task: float, "other": missing})
    ready, skipped = gpt_step.steps(gpt_task, ["raw", "other"])
    assert list(ready) == ["raw"]
    assert skipped == {"other": "nowhere is not installed"}


def test_commands_are_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "COMMANDS", {commands.IMPORT: ["-c", "pass"], "gradfn x": ["-c", "pass"]})
    file = tmp_path / "out.json"
    commands.main(["--rounds", "2", "--json", str(file)])
    plain, command = rows_of(json.loads(file.read_text())["tables"][0])
    assert (plain.name, plain.time, plain.aim) == ("import jax: seconds", 1.0, None)
    assert (command.name, command.aim) == ("gradfn x: seconds", commands.AIM)
    assert command.time > 0


def test_experiments_are_measured_twice(tmp_path):
    file = tmp_path / "out.json"
    experiments.main(["--only", "neuron", "--json", str(file)])
    rows = {row.name: row for row in rows_of(json.loads(file.read_text())["tables"][0])}
    compiled = rows["second run: programs compiled"]
    assert (compiled.time, compiled.aim, compiled.reached) == (0.0, 0.0, True)
    assert rows["first run: programs compiled"].value != "0"
    assert rows["second run: pictures, s"].time > 0


def test_benchmarked_experiments_are_those_there_are():
    assert set(experiments.OPTIONS) == set(cli.experiments())


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measures memory as Linux tells it")
def test_saving_is_measured(tmp_path, capsys):
    saving.main(["--folder", str(tmp_path), "--gigabytes", "0.05", "--chunk", "0.01"])
    printed = capsys.readouterr().out
    for text in ("a state of 0.05 GB in 100 arrays", "safetensors, all at once", "gradfn, loading"):
        assert text in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measures memory as Linux tells it")
def test_memory_that_was_freed_again_is_measured():
    def act():
        # Memory of the system's own: an array may lie in what malloc has kept of earlier ones.
        with mmap.mmap(-1, 10**8, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as content:
            for _ in range(100):
                content.write(bytes(10**6))
            time.sleep(0.1)
            return float(len(content))

    result, peak = saving.peak_memory(act)
    assert result == 1e8
    assert 0.9e8 < peak < 2e8


def test_collectives_are_counted_in_loops():
    """A matrix [64, 64] that 8 devices gather in each of 5 iterations, and a sum over all of them."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((None, "data", None), ()))

    def f(stack, x):
        def layer(x, W):
            return jnp.tanh(jax.lax.with_sharding_constraint(W, whole) @ x), None

        return jax.lax.scan(layer, x, stack)[0].sum()

    stack = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(None, "data")))
    found = scaling.collectives(jax.jit(f).lower(stack, x).compile().as_text())
    assert found == {"all-gather": (5, 5 * 64 * 64 * 4), "all-reduce": (1, 4)}


def test_collectives_that_start_and_finish_apart_are_counted_once():
    text = """HloModule step

ENTRY %main (p: bf16[2,8]) -> bf16[16,8] {
  %start = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%p), dimensions={0}
  %done = bf16[16,8]{1,0} all-gather-done(%start)
  ROOT %both = (f32[3]{0}, f32[]) all-reduce(%a, %b), to_apply=%add
}
"""
    assert scaling.collectives(text) == {"all-gather": (1, 2 * 16 * 8), "all-reduce": (1, 16)}


@pytest.mark.slow
def test_a_step_on_many_devices_is_measured(tmp_path, capsys):
    file = tmp_path / "out.json"
    scaling.main(["--models", "tiny", "--devices", "1", "8", "--rules", "FSDP", "--json", str(file)])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    alone, split = (scaling.Case(**json.loads(line)) for line in lines)
    (table,) = json.loads(file.read_text())["tables"]
    assert {row["name"] for row in table["figures"]} == {"tiny, 1, DATA_PARALLEL", "tiny, 8, FSDP"}
    assert (alone.devices, split.devices, alone.collectives) == (1, 8, {})
    # The state is parameters and two moments, and the batch; biases of heads and hidden nodes are not split.
    for case in (alone, split):
        state = case.formula["parameters"] + case.formula["optimizer"]
        assert state <= case.state < state + 600
    assert split.state < alone.state / 7


@pytest.mark.slow
def test_forms_of_attention_are_compared(tmp_path, capsys):
    file = tmp_path / "out.json"
    arguments = ["--lengths", "520", "--width", "8", "--plain", "100", "--rounds", "1", "--json", str(file)]
    attention.main(arguments)
    printed = capsys.readouterr().out
    assert "Attention, 520 positions" in printed
    (table,) = json.loads(file.read_text())["tables"]
    figures = {(row["name"], row["column"]): row["value"] for row in table["figures"]}
    assert ("plain", "CPU ms") not in figures
    assert 0 < figures["blocks", "temporary MB"] < figures["plain", "temporary MB"]
    assert figures["blocks", "CPU ms"] > 0


def test_a_slow_loader_is_measured(tmp_path, monkeypatch):
    file = tmp_path / "out.json"
    monkeypatch.setattr(prefetch, "WAITS", (0.0, 2.0))
    prefetch.main(
        ["--sizes", "4", "2", "--batch-size", "3", "--steps", "4", "--rounds", "1", "--json", str(file)]
    )
    (table,) = json.loads(file.read_text())["tables"]
    figures = {(row["name"], row["column"]): row["value"] for row in table["figures"]}
    assert figures["load, then step", "loads in 2 ms"] >= 2
    assert all(figures[name, "loads in 0 ms"] > 0 for name in ("gf.fit", "gf.fit, no loader"))


TINY = """
import sys
from benchmarks import harness

options = harness.arguments("a benchmark", rounds=3).parse_args()
timings = {
    "plain": harness.Timing(1.0, [1.0] * options.rounds, [1.0] * options.rounds),
    "ours": harness.Timing(1.0, [1.04] * options.rounds, [1.04] * options.rounds),
    "theirs": harness.Timing(1.0, [1.2] * options.rounds, [1.2] * options.rounds),
    "another": harness.Timing(1.0, [3.0] * options.rounds, [3.0] * options.rounds),
}
aims = {"ours": 1.05, "theirs": 1.1}
skipped = {"PyTorch": "torch is not installed"}
harness.report("a race", timings, "plain", "steps", aims=aims, skipped=skipped, json_file=options.json)
figures = {"plain": {"compile, s": 2.0}, "ours": {"compile, s": 2.5}, "zero": {"compile, s": 0.0}}
harness.report_figures("compiled", figures, "plain", aims={"zero": {"compile, s": 0.0}}, json_file=options.json)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run of four small benchmarks: one works, one fails after its tables, one needs a package, one a device."""
    folder = tmp_path_factory.mktemp("all")
    (folder / "tiny_benchmark.py").write_text(TINY)
    (folder / "failing_benchmark.py").write_text(TINY + 'raise ValueError("too slow")')
    (folder / "needing_benchmark.py").write_text("import nowhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        runs = {
            "works": all_of_them.Run("tiny_benchmark", "--rounds 5", 0.1),
            "fails": all_of_them.Run("failing_benchmark", "", 0.1),
            "needs": all_of_them.Run("needing_benchmark", "", 0.1),
            "device": all_of_them.Run("benchmarks.accelerator", "", 0.1, accelerator=True),
        }
        patch.setattr(all_of_them, "RUNS", runs)
        patch.setattr(all_of_them, "has_accelerator", lambda: False)
        code = all_of_them.main(["--json", str(folder / "out.json")])
    return code, folder, json.loads((folder / "out.json").read_text())


def test_all_benchmarks_run_whatever_happens_to_one(ran):
    code, _, content = ran
    assert code == 1
    assert content["cpus"] == harness.cpus()
    runs = content["runs"]
    assert runs["works"]["command"] == "python -m tiny_benchmark --rounds 5"
    assert runs["works"]["environment"]["jax"] == jax.__version__
    assert not runs["works"].keys() & {"failed", "skipped"}
    # The tables that were finished before the fault are kept.
    for name, rounds in (("works", 5), ("fails", 3)):
        assert [table["title"] for table in runs[name]["tables"]] == ["a race", "compiled"]
        assert runs[name]["tables"][0]["rounds"] == rounds
    assert runs["fails"]["failed"] == "ValueError: too slow"
    assert runs["needs"] | {"seconds": 0} == {
        "command": "python -m needing_benchmark",
        "seconds": 0,
        "tables": [],
        "skipped": "nowhere is not installed",
    }
    assert runs["device"] == {"skipped": "there is no accelerator", "tables": []}


def test_a_missing_module_of_gradfn_is_a_failure(capsys):
    for module in ("gradfn.nowhere", "benchmarks.nowhere"):
        trace = f"Traceback ...\nModuleNotFoundError: No module named '{module}'"
        assert "failed" in all_of_them.problem_of(trace, 1)
        assert trace in capsys.readouterr().err
    assert all_of_them.problem_of("", -9) == {"failed": "exit status -9"}


def test_every_benchmark_is_run():
    """And within 20 minutes, apart from the accelerator's."""
    helpers = {"__init__", "all", "harness", "paused", "picture", "readme", "rows"}
    files = {file.stem for file in Path(all_of_them.__file__).parent.glob("*.py")} - helpers
    assert files == {run.module.removeprefix("benchmarks.") for run in all_of_them.RUNS.values()} - {
        "accelerator"
    }
    assert sum(run.minutes for run in all_of_them.RUNS.values() if not run.accelerator) < 20
    for run in all_of_them.RUNS.values():
        __import__(run.module)


def test_rows_of_the_accelerator_become_tables():
    rows = [
        {"section": "about", "name": "about", "device": "H100", "jax": "0.12"},
        {"section": "overhead", "name": "inspect", "ms": 3.0, "over_gradient": 1.2, "aim": "<= 1.10"},
        {"section": "overhead", "name": "nan_guard", "skipped": "out of memory"},
        {"section": "gpt", "name": "gradfn", "ms": 9.0, "aim": "MFU >= 50%"},
        {"section": "correctness", "name": "gradients", "ok": True},
    ]
    found = all_of_them.of_accelerator(rows)
    assert found["environment"] == {"device": "H100", "jax": "0.12"}
    overhead, gpt = found["tables"]
    assert overhead["skipped"] == {"nan_guard": "out of memory"}
    (row,) = rows_of(overhead)
    assert (row.name, row.time, row.aim, row.reached) == ("inspect: ms", 1.2, 1.1, False)
    (row,) = rows_of(gpt)
    assert (row.time, row.aim, row.value) == (None, None, "9")


def test_the_picture_shows_every_row(ran, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    _, folder, content = ran
    pixels = np.asarray(Image.open(folder / "out.png").convert("RGB"), np.int32)
    for color in ([0x00, 0x72, 0xB2], [0xD5, 0x5E, 0x00]):  # of reached and missed aims
        assert (abs(pixels - color).max(-1) < 12).sum() > 30
    aimed, others = (picture.entries(content, with_aims) for with_aims in (True, False))
    assert [entry.text for entry in aimed if entry.row] == ["ours", "theirs", "zero: compile, s"] * 2
    assert [entry.row.reached for entry in aimed if entry.row] == [True, False, True] * 2
    assert [entry.text for entry in others if entry.row] == ["another", "ours: compile, s"] * 2
    assert [entry.text for entry in aimed if entry.level == 0] == ["works", "fails"]
    figure = picture.figure_of(content)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts] + [
        t.get_text() for t in figure.texts
    ]
    assert {"ours", "theirs", "another", "1.04", "1.20", "3.00"} <= set(texts)
    assert f"4 of 6 aims reached, on {harness.cpus()}" in texts


def test_there_may_be_nothing_to_draw():
    assert picture.figure_of({"cpus": "x", "runs": {"needs": {"tables": []}}}) is None


def test_the_readme_is_made_from_results(ran, tmp_path):
    _, _, content = ran
    file = readme.keep(content, tmp_path)
    assert "ratios" not in file.read_text()
    other = json.loads(file.read_text()) | {
        "cpus": "4 x Other",
        "date": "2020-01-01",
        "note": "By hand.",
    }
    del other["runs"]["fails"]
    other["runs"]["works"]["tables"] = other["runs"]["works"]["tables"][:1]
    other["runs"]["works"]["tables"][0]["summary"][1] |= {"low": None, "high": None}
    readme.keep(other, tmp_path)
    found = readme.results(tmp_path)
    assert [result["cpus"] for result in found] == [harness.cpus(), "4 x Other"]
    marks = "".join(f"<!-- benchmark: {name} -->\nold\n<!-- end -->\n" for name in ("cpus", "works", "fails"))
    text = readme.filled("by hand\n" + marks + "more", found)
    for part in (
        "by hand\n",
        "old" not in text and "more",
        f"| | aim | {harness.cpus()} | 4 x Other |\n| --- | ---: | ---: | ---: |",
        "| plain | | 1 = 1 steps/s | 1 = 1 steps/s |",
        "| ours | 1.05 | 1.040 (1.040, 1.040) ✓ | 1.040 ✓ |",
        "| theirs | 1.1 | 1.200 (1.200, 1.200) ✗ | 1.200 (1.200, 1.200) ✗ |",
        "| another | | 3.00 (3.00, 3.00) |",
        "| | compile, s |\n| --- | ---: |\n| plain | 1 = 2 |\n| ours | 1.250 |\n| zero | 0.000 of 0 ✓ |\n",
        f"\nSkipped: PyTorch: torch is not installed ({harness.cpus()}); PyTorch: ",
        "\nSkipped: PyTorch: torch is not installed.\n",
        "**4 x Other**, 2020-01-01",
        "By hand.",
        "fails: ValueError: too slow",
    ):
        assert part in text, part
    assert readme.filled(text, found) == text
    with pytest.raises(ValueError, match=r"results of \['fails'\] without marks"):
        readme.filled(text.replace("<!-- benchmark: fails -->", ""), found)


def test_the_readme_agrees_with_the_results():
    text, found = readme.README.read_text(), readme.results()
    assert readme.filled(text, found) == text, "run python -m benchmarks.readme"
