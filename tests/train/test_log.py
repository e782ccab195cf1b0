"""`fit(log=)`: every row and figure, once, in order; and what trackers show of them."""

import contextlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn.train.logged import histogram_edges, row_histograms
from tests.train.test_resume import tensorboard

NET = gf.mlp([3, 4, 2], activation=jax.nn.tanh)
X = jax.random.normal(jax.random.key(0), [24, 3])
PARAMS = NET.init(jax.random.key(1))
DATA = (X, (X[:, 0] > 0).astype(jnp.int32))
LOSS = gf.batch_mean(gf.classification_loss(NET))


class DiedError(Exception):
    pass


def train(folder=None, steps=12, loss=LOSS, params=PARAMS, rate=0.05, **options):
    options = {"batch_size": 8, "eval_every": 3, "progress": False} | options
    return gf.fit(loss, params, DATA, optax.adam(rate), steps, folder=folder, **options)


def quick(*args, **options):
    """Train something that compiles faster."""
    loss = lambda params, batch: jnp.square(batch[0] @ params["w"]).mean()  # noqa: E731
    return train(*args, loss=loss, params={"w": jnp.ones(3)}, **options)


def kept(rows):
    """Return a function that keeps rows in a list."""
    return lambda kind, row: rows.append((kind, row))


def without_times(row):
    return {name: value for name, value in row.items() if "second" not in name}


@pytest.mark.slow
@pytest.mark.parametrize("in_folder", [False, True])
def test_every_row_is_logged_once_and_in_order(tmp_path, in_folder):
    rows, again = [], []

    def spoil(kind, row):
        again.append((kind, row.pop("step")))

    fitted = train(
        tmp_path if in_folder else None,
        log=[kept(rows), spoil],
        inspect_every=4,
        noise_every=6,
        inspect_when=gf.train.Spike(after=2, deviations=0.01),
        rate=-0.05,  # the loss grows
    )
    by_kind = {
        kind: [row for k, row in rows if k == kind] for kind in ("metrics", "inspection", "noise", "spike")
    }
    assert by_kind["metrics"] == list(fitted.history)
    assert [row["step"] for row in by_kind["inspection"]] == [0, 4, 8]
    assert by_kind["inspection"] == list(fitted.inspections)
    assert by_kind["noise"] == list(fitted.noise)
    assert by_kind["spike"] == list(fitted.spikes) != []
    assert again == [(kind, row["step"]) for kind, row in rows]
    # Rows of one kind are in the order of their steps; a row of metrics follows everything of its steps.
    last = 0
    for kind, row in rows:
        assert row["step"] >= last
        last = row["step"] if kind == "metrics" else last


def test_other_processes_than_the_first_log_nothing(monkeypatch):
    monkeypatch.setattr(sys.modules["gradfn.train._fit"], "is_first", lambda: False)
    rows = []
    assert len(quick(log=kept(rows)).history) == 4
    assert rows == []


@pytest.mark.slow
def test_an_error_of_a_function_ends_the_run_and_resuming_logs_the_row(tmp_path):
    rows, whole = [], []
    quick(log=kept(whole), inspect_every=2)

    def broken(kind, row):
        if (kind, row["step"]) == ("metrics", 9):
            raise DiedError("no connection")
        rows.append((kind, row))

    with pytest.raises(DiedError, match="no connection"):
        quick(tmp_path, log=broken, inspect_every=2, checkpoint_seconds=0)
    assert (tmp_path / "checkpoint.safetensors").exists()
    quick(tmp_path, log=kept(rows), inspect_every=2, resume=True)
    assert [(kind, without_times(row)) for kind, row in sorted(rows, key=order)] == [
        (kind, without_times(row)) for kind, row in sorted(whole, key=order)
    ]


def order(entry):
    return entry[0], entry[1]["step"]


@pytest.mark.slow
def test_rows_are_not_repeated_however_often_a_run_dies_after_a_checkpoint(tmp_path):
    """It dies at step 9 and again at step 6, of which the last checkpoint, at step 3, knows nothing."""
    rows, figures = [], pytest.importorskip("matplotlib.figure")

    def dying(at):
        def evaluate(params):
            steps.append(3 * (len(steps) + 1))
            if steps[-1] == at:
                raise DiedError
            return {"figure": figures.Figure()}

        return evaluate

    options = {"log": kept(rows), "inspect_every": 1}
    steps = []
    quick(tmp_path, 3, evaluate=dying(None), **options)
    for at in (9, 6, None):
        steps = [3]
        with pytest.raises(DiedError) if at else contextlib.nullcontext():
            quick(tmp_path, evaluate=dying(at), resume=True, checkpoint_seconds=1e9, **options)
    logged = [(kind, row["step"]) for kind, row in rows]
    assert sorted(logged) == sorted(
        [("inspection", step) for step in range(12)]
        + [(kind, step) for kind in ("metrics", "figure") for step in (3, 6, 9, 12)]
    )


def test_a_damaged_end_of_a_file_does_not_keep_a_run_from_resuming(tmp_path):
    quick(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 15, "loss": 1}\n{"step": "x"}\n\xff\n{"ste')
    rows = []
    quick(tmp_path, 18, log=kept(rows), resume=True)
    assert [row["step"] for _, row in rows] == [18]


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (5, r"log must be a function \(kind, row\) or several, got 5"),
        ("print", "got 'print'"),
        ([print, None], "got None"),
        (lambda row: None, r"must take \(kind, row\), got <lambda>\(row\)"),
        (gf.train.wandb_log, r"got wandb_log\(run: .*Call it: log=wandb_log\(\)"),
        ([gf.train.mlflow_log], r"Call it: log=mlflow_log\(\)"),
    ],
)
def test_what_is_not_a_function_of_kind_and_row_is_refused(log, message):
    with pytest.raises(TypeError, match=message):
        quick(log=log)


def test_figures_reach_the_functions_and_tensorboard_and_are_closed(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")

    def evaluate(params):
        figure, axes = pyplot.subplots(figsize=(2, 1), dpi=100)
        axes.plot(params["w"])
        return {"weights": figure, "one": 1}

    rows = []
    fitted = quick(tmp_path, 3, evaluate=evaluate, log=kept(rows))
    (kind, row), (after, metrics) = rows
    assert (kind, after, metrics["one"]) == ("figure", "metrics", 1.0)
    assert row["step"] == 3
    assert row["name"] == "weights"
    assert row["figure"].axes
    assert "weights" not in fitted.history[-1]
    assert pyplot.get_fignums() == []
    (image,) = events(tmp_path, "weights")
    assert (image.image.width, image.image.height) == (200, 100)
    assert image.image.encoded_image_string.startswith(b"\x89PNG")
    assert len(quick(evaluate=evaluate).history) == 4  # without a place for figures
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("value", ["text", jnp.ones(2), object()])
def test_an_evaluation_that_is_neither_scalar_nor_figure_is_named(value):
    with pytest.raises(
        TypeError, match=r"evaluate must return scalars and matplotlib figures, got .* as thing"
    ):
        quick(evaluate=lambda params: {"thing": value})


def events(folder, tag):
    from tensorboardX.proto import event_pb2

    found = []
    for file in (folder / "events").iterdir():
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            found += [value for value in event.summary.value if value.tag == tag]
    return found


@pytest.mark.slow
def test_tensorboard_has_scalars_and_histograms_of_activations_and_gradients(tmp_path):
    stats = ("rms", "saturated", "histogram")
    fitted = train(tmp_path, 8, inspect_every=4, inspect_stats=stats)
    shown = tensorboard(tmp_path)
    site = fitted.inspections[-1]["sites"]["a1"]
    assert shown["activation_rms/a1", 4] == [pytest.approx(site["rms"])]
    assert shown["activation_saturated/a1", 4] == [pytest.approx(site["saturated"])]
    assert {"flags/dead", "update_ratio/W1", "gradient_rms/W1", "activation_gradient_rms/z1"} <= {
        t for t, _ in shown
    }
    assert "max" not in site
    for tag, counts in {
        "activation_log2/a1": site["histogram"],
        "gradient_log2/W1": fitted.inspections[-1]["grads"]["W1"]["histogram"],
    }.items():
        histogram = events(tmp_path, tag)[-1].histo
        assert list(histogram.bucket) == [0, *counts]
        assert list(histogram.bucket_limit) == histogram_edges().tolist()
        assert histogram.num == sum(counts) > 0
        # Magnitudes of tanh are below 2^0.
        assert histogram.min < histogram.max <= 0 or tag.startswith("gradient")
    assert gf.report(tmp_path).exists()


def test_inspect_stats_needs_inspections_and_known_names():
    with pytest.raises(ValueError, match="inspect_stats needs inspections: pass inspect_every"):
        quick(inspect_stats=("rms",))
    with pytest.raises(ValueError, match="fit: there is no statistic 'mode'"):
        quick(inspect_every=1, inspect_stats=("mode",))


def test_values_in_loops_have_a_scalar_per_iteration_or_one_for_all_of_many():
    def row(n):
        def loss(params, x):
            def body(h, W):
                return gf.tap(jnp.tanh(W @ h), "h"), None

            return jax.lax.scan(body, x, params["W"])[0].sum()

        weights = {"W": jax.random.normal(jax.random.key(0), [n, 2, 2])}
        inspection = gf.inspect(loss, stats=("rms", "histogram"))(weights, jnp.ones(2))
        return {"step": 0} | inspection.to_dict(), inspection

    found, inspection = row(3)
    scalars = gf.train.row_scalars("inspection", found)
    rms = inspection["h"].stats.rms
    assert [scalars[f"activation_rms/h[{i}]"] for i in range(3)] == pytest.approx(rms.tolist())
    assert row_histograms(found)["activation_log2/h[1]"].sum() == 2
    found, inspection = row(65)
    scalars = gf.train.row_scalars("inspection", found)
    assert scalars["activation_rms/h"] == pytest.approx(
        float(np.sqrt(np.mean(inspection["h"].stats.rms ** 2)))
    )
    assert not any("[" in name for name in scalars)
    assert row_histograms(found)["activation_log2/h"].sum() == 130


def test_scalars_leave_none_out_and_keep_nan():
    row = {"step": 1, "loss": float("nan"), "rate": None, "not_finite": [["nan", "loss"]]}
    assert [*gf.train.row_scalars("metrics", row)] == ["loss"]
    assert gf.train.row_scalars("noise", {"step": 1, "scale": None, "variance": 2}) == {"noise/variance": 2.0}
    with pytest.raises(ValueError, match=r"kind must be one of metrics, .*, got 'loss'"):
        gf.train.row_scalars("loss", row)
