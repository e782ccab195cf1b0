"""Weights & Biases and MLflow, written to files and read back."""

import json
import math
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import gradfn as gf
from gradfn.train.logged import histogram_edges
from tests.train.test_log import train


def evaluate(params):
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(1, 1))
    return {"figure": figure, "none:so/far": math.nan}


OPTIONS = {"inspect_every": 5, "inspect_stats": ("rms", "saturated", "histogram"), "evaluate": evaluate}


def rows_of_wandb(file):
    """Return the history in a file of Weights & Biases, which has the format of LevelDB's log."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, at, part, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, part = pb.Record.FromString(part), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of wandb itself
def test_a_run_of_wandb_has_every_row_inspection_and_figure(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True)
    with wandb.init(project="test", mode="offline", dir=tmp_path, settings=settings) as run:
        run.log({"mine": 1}, step=100)  # later steps than those of the training
        fitted = train(**OPTIONS, log=gf.train.wandb_log())
        file = Path(run.settings.sync_file)
    wandb.teardown()  # its process has then written everything
    rows = rows_of_wandb(file)
    logged = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logged] == [3, 6, 9, 12]
    assert [row["loss"] for row in logged] == pytest.approx([row["loss"] for row in fitted.history])
    assert all(math.isnan(row["none:so/far"]) for row in logged)
    inspected = [row for row in rows if "activation_rms/z1" in row]
    assert [row["step"] for row in inspected] == [0, 5, 10]
    last = fitted.inspections[-1]
    assert inspected[-1]["activation_rms/z1"] == pytest.approx(last["sites"]["z1"]["rms"])
    assert inspected[-1]["gradient_log2/W1.values"] == last["grads"]["W1"]["histogram"]
    assert inspected[-1]["gradient_log2/W1.bins"] == histogram_edges().tolist()
    assert [row["step"] for row in rows if row.get("figure._type") == "image-file"] == [3, 6, 9, 12]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of mlflow itself
def test_a_run_of_mlflow_has_every_row_inspection_and_figure(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    has_database = pytest.importorskip("importlib.util").find_spec("sqlalchemy")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"sqlite:///{tmp_path}/mlflow.db" if has_database else tmp_path.as_uri()
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        experiment = mlflow.create_experiment("test", artifact_location=(tmp_path / "artifacts").as_uri())
        with mlflow.start_run(experiment_id=experiment) as run:
            fitted = train(**OPTIONS, log=gf.train.mlflow_log())
        client, run_id = mlflow.MlflowClient(), run.info.run_id
        history = lambda name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)]  # noqa: E731
        assert history("loss") == [(row["step"], pytest.approx(row["loss"])) for row in fitted.history]
        assert [step for step, value in history("none_so/far") if math.isnan(value)] == [3, 6, 9, 12]
        assert history(
            "activation_rms/z1_tanh" if "z1:tanh" in fitted.inspections[0]["sites"] else "activation_rms/a1"
        )
        assert [step for step, _ in history("gradient_rms/W1")] == [0, 5, 10]
        figures = [file.path for file in client.list_artifacts(run_id, "figures/figure")]
        assert figures == [f"figures/figure/{step:08}.png" for step in (3, 6, 9, 12)]
    finally:
        mlflow.set_tracking_uri(before)


def test_thousands_of_metrics_are_sent_to_mlflow_in_batches(monkeypatch):
    sent = []
    client = SimpleNamespace(log_batch=lambda run_id, metrics: sent.append((run_id, metrics)))
    entities = SimpleNamespace(Metric=lambda *args: args)
    fake = SimpleNamespace(MlflowClient=lambda: client, entities=entities)
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    gf.train.mlflow_log("run")("metrics", {"step": 7} | {f"m{i}": float(i) for i in range(2100)})
    assert [(run_id, len(metrics)) for run_id, metrics in sent] == [
        ("run", 1000),
        ("run", 1000),
        ("run", 100),
    ]
    name, value, _, step = sent[2][1][-1]
    assert (name, value, step) == ("m2099", 2099.0, 7)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_without_the_tracker_or_a_run_the_error_says_what_to_do(monkeypatch, name):
    function = getattr(gf.train, f"{name}_log")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"needs {name}: pip install 'gradfn\[{name}\]'"):
        function()
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(run=None, active_run=lambda: None))
    monkeypatch.setitem(sys.modules, "mlflow.entities", SimpleNamespace(Metric=None))
    with pytest.raises(ValueError, match=rf"{name}_log: there is no active run. Call {name}\.\w+\("):
        function()
