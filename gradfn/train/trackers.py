"""Functions for `gf.fit(..., log=)` that write to trackers of experiments."""

from __future__ import annotations

import itertools
import posixpath
import re
import time
from collections.abc import Iterable
from typing import Any

from gradfn.train.figures import image
from gradfn.train.logged import LogFunction, histogram_edges, row_histograms, row_scalars
from gradfn.train.rows import Row

# The most metrics that MLflow accepts at once.
BATCH = 1000


def wandb_log(run: Any = None) -> LogFunction:
    """Return a function for `gf.fit(..., log=)` that writes to a run of Weights & Biases.

    Every row of metrics, inspection, noise scale and spike becomes scalars (see `gf.train.row_scalars`), and figures
    become images. With `gf.fit(..., inspect_stats=)` that contains `"histogram"`, inspections also become histograms of
    activations and gradients, over the binary logarithm of the magnitude. The horizontal axis of all charts is `step`,
    because inspections belong to other steps than rows, and Weights & Biases accepts its own steps in order only.

    Args:
        run: a `wandb.Run`, as `wandb.init` returns it; by default the active one.

    Returns:
        `(kind, row) -> None`.

    Raises:
        ImportError: wandb is not installed.
        ValueError: there is no active run.

    To continue a run, resume both: `wandb.init(id=..., resume="must")` and `gf.fit(..., folder=..., resume=True)`.

    >>> import gradfn as gf, wandb  # doctest: +SKIP
    >>> with wandb.init(project="digits", config={"learning_rate": 3e-3}):  # doctest: +SKIP
    ...     gf.fit(loss, params, data, optimizer, 1000, log=gf.train.wandb_log())
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError("gf.train.wandb_log needs wandb: pip install 'gradfn[wandb]'") from error
    target = wandb.run if run is None else run
    if target is None:
        raise ValueError(
            'wandb_log: there is no active run. Call wandb.init(project="...") before, or pass run='
        )
    target.define_metric("step", hidden=True)
    target.define_metric("*", step_metric="step")

    def log(kind: str, row: Row) -> None:
        values: dict[str, Any] = dict(row_scalars(kind, row))
        if kind == "figure":
            values[row["name"]] = wandb.Image(image(row["figure"]))
        elif kind == "inspection":
            edges = histogram_edges()
            for name, counts in row_histograms(row).items():
                values[name] = wandb.Histogram(np_histogram=(counts, edges))
        elif kind == "spike":
            values["spike/text"] = row["text"]
        target.log({"step": row["step"]} | values)

    return log


def mlflow_log(run_id: str | None = None) -> LogFunction:
    """Return a function for `gf.fit(..., log=)` that writes to a run of MLflow.

    Every row of metrics, inspection, noise scale and spike becomes metrics (see `gf.train.row_scalars`); figures become
    artifacts, `figures/<name>/<step>.png`. MLflow has no histograms, and allows fewer characters in names: `z1:tanh`
    becomes `z1_tanh`. Databases of MLflow store infinity as the largest float.

    Args:
        run_id: of a run; by default the active one.

    Returns:
        `(kind, row) -> None`.

    Raises:
        ImportError: neither mlflow nor mlflow-skinny is installed.
        ValueError: there is no active run.

    To continue a run, resume both: `mlflow.start_run(run_id=...)` and `gf.fit(..., folder=..., resume=True)`.

    >>> import gradfn as gf, mlflow  # doctest: +SKIP
    >>> with mlflow.start_run():  # doctest: +SKIP
    ...     gf.fit(loss, params, data, optimizer, 1000, log=gf.train.mlflow_log())
    """
    try:
        import mlflow
        from mlflow.entities import Metric
    except ImportError as error:
        raise ImportError("gf.train.mlflow_log needs mlflow: pip install 'gradfn[mlflow]'") from error
    if run_id is None:
        active = mlflow.active_run()
        if active is None:
            raise ValueError(
                "mlflow_log: there is no active run. Call mlflow.start_run() before, or pass run_id="
            )
        run_id = active.info.run_id
    run, client = run_id, mlflow.MlflowClient()

    def log(kind: str, row: Row) -> None:
        if kind == "figure":
            (name,) = mlflow_names([row["name"]])
            client.log_figure(run, row["figure"], f"figures/{name}/{row['step']:08}.png")
            return
        values, now = row_scalars(kind, row), time.time_ns() // 1_000_000
        named = zip(mlflow_names(values), values.values(), strict=True)
        metrics = [Metric(name, value, now, row["step"]) for name, value in named]
        for start in range(0, len(metrics), BATCH):
            client.log_batch(run, metrics=metrics[start : start + BATCH])

    return log


def mlflow_names(names: Iterable[str]) -> list[str]:
    """Return names that MLflow accepts, all different.

    >>> mlflow_names(["loss", "activation_rms/z1:tanh", "activation_rms/z1_tanh", "h[3]", "../a//b"])
    ['loss', 'activation_rms/z1_tanh', 'activation_rms/z1_tanh_2', 'h_3_', 'a/b']
    """
    found: dict[str, None] = {}
    for name in names:
        plain = re.sub(r"[^/\w.\- ]", "_", name)
        path = posixpath.normpath("/" + plain).lstrip("/") or "_"
        numbered = (f"{path}_{i}" for i in itertools.count(2))
        while path in found:
            path = next(numbered)
        found[path] = None
    return list(found)
