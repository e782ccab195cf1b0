"""Statistics, flags, the table and the dict."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradfn.inspection import inspect, sites
from gradfn.inspection.summaries import DEFAULT_STATS, summarize


def network(activation):
    def loss(params, x, y):
        for w, b in params[:-1]:
            x = activation(x @ w + b[None])
        w, b = params[-1]
        return optax.softmax_cross_entropy_with_integer_labels(x @ w + b[None], y).mean()

    return loss


def setup(widths, scale, bias=0.0):
    keys = jax.random.split(jax.random.key(0), len(widths))
    params = [
        (jax.random.normal(k, (n, m)) * math.sqrt(scale / n), jnp.full(m, bias))
        for k, n, m in zip(keys, widths, widths[1:], strict=False)
    ]
    x = jax.random.normal(keys[-1], (64, widths[0]))
    return params, x, jnp.arange(64) % widths[-1]


@pytest.mark.slow
def test_a_deep_sigmoid_network_vanishes_visibly():
    inspection = jax.jit(inspect(network(jax.nn.sigmoid), stats=["rms"]))(*setup([32] * 10 + [10], 1.0))
    flags = inspection.flags()
    assert flags["0/0"] == ["vanishing"]
    assert "9/0" not in flags
    norms = [float(inspection.grad_stats[f"{i}/0"].rms) for i in range(10)]
    assert all(a < b for a, b in itertools.pairwise(norms))
    text = str(inspection)
    assert text.count("vanishing") > 5
    assert "0/1:sigmoid" in text


@pytest.mark.slow
def test_he_initialised_relu_raises_no_flag():
    inspection = jax.jit(inspect(network(jax.nn.relu), sites="*/1*"))(*setup([32] * 10 + [10], 2.0))
    assert inspection.flags() == {}


def test_biases_far_below_zero_are_dead():
    params, x, y = setup([32, 32, 32, 10], 2.0, bias=-10.0)
    flags = jax.jit(inspect(network(jax.nn.relu)))(params, x, y).flags()
    assert "dead" in flags["0/1:relu"]


@pytest.mark.slow
def test_large_weights_saturate_or_explode():
    assert (
        "saturated" in jax.jit(inspect(network(jnp.tanh)))(*setup([32] * 4 + [10], 100.0)).flags()["1/1:tanh"]
    )
    assert "exploding" in jax.jit(inspect(network(jax.nn.relu)))(*setup([32] * 6 + [10], 50.0)).flags()["0/0"]


def test_non_finite_values_are_counted_and_flagged():
    def f(w, x):
        return jnp.sum(jnp.log(x @ w))

    x = jnp.array([[0.0], [1.0], [jnp.inf], [2.0]])
    inspection = inspect(f)(jnp.ones((1, 1)), x)
    assert float(inspection.stats["params"].nonfinite) == 1
    assert float(inspection.grad_stats["params"].nonfinite) == 1  # 1 / 0
    assert inspection.flags() == {"params": ["non-finite"]}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_statistics_are_those_of_numpy(dtype):
    x = jnp.maximum(jax.random.normal(jax.random.key(0), (24, 10)), 0).at[:, 3].set(0).astype(dtype)
    stats = summarize(x, (*DEFAULT_STATS, "histogram"), "relu")
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(stats.mean, wide.mean(), rtol=1e-5)
    np.testing.assert_allclose(stats.rms, np.sqrt((wide**2).mean()), rtol=1e-5)
    np.testing.assert_allclose(stats.max, np.abs(wide).max(), rtol=1e-6)
    np.testing.assert_allclose(stats.zeros, (wide == 0).mean(), rtol=1e-6)
    np.testing.assert_allclose(stats.dead, 0.1, rtol=1e-6)
    exponents = np.where(wide == 0, -32, np.floor(np.log2(np.where(wide == 0, 1, np.abs(wide)))))
    np.testing.assert_array_equal(
        stats.histogram, np.bincount(np.clip(exponents + 32, 0, 47).astype(int).ravel(), minlength=48)
    )
    squashed = jnp.tanh(3 * jax.random.normal(jax.random.key(1), (24, 10))).astype(dtype)
    share = summarize(squashed, ("saturated",), "tanh").saturated
    np.testing.assert_allclose(share, (1 - np.asarray(squashed, np.float64) ** 2 < 0.1).mean(), atol=0.01)
    assert summarize(x[:7], DEFAULT_STATS, "relu").dead is None  # too few rows to call a unit dead


def test_empty_arrays_have_statistics():
    for shape in ((0,), (4, 0), (0, 4), ()):
        stats = summarize(jnp.zeros(shape), DEFAULT_STATS, "relu")
        assert float(stats.rms) == float(stats.max) == 0


def test_sums_of_huge_finite_values_are_not_called_non_finite():
    assert float(summarize(jnp.full(4, 1e30), ("nonfinite",)).nonfinite) == 0


def test_update_ratios_and_dict():
    params, x, y = setup([32, 32, 10], 2.0)
    optimizer = optax.sgd(0.1)

    @jax.jit
    def step(params):
        inspection = inspect(network(jax.nn.relu))(params, x, y)
        updates, _ = optimizer.update(inspection.grads, optimizer.init(params))
        return inspection.with_updates(params, updates)

    inspection = step(params)
    w = np.asarray(params[0][0])
    expected = 0.1 * np.sqrt(np.mean(np.asarray(inspection.grads[0][0]) ** 2)) / np.sqrt(np.mean(w**2))
    np.testing.assert_allclose(inspection.update_ratios[0][0], expected, rtol=1e-5)
    assert "update/weight" in str(inspection)
    report = json.loads(json.dumps(inspection.to_dict()))
    assert report["value"] == pytest.approx(float(inspection.value))
    assert report["sites"]["0/0"]["rms"] == pytest.approx(float(inspection.stats["0/0"].rms))
    assert report["update_ratios"]["0/0"] == pytest.approx(expected, rel=1e-5)


def test_long_loops_share_one_row_per_site_unless_all_rows_are_requested(monkeypatch):
    def f(w, x):
        return jnp.sum(jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=100)[0])

    inspection = inspect(f)(jnp.eye(3), jnp.ones((2, 3)))
    assert "params:tanh[0:100]" in str(inspection)
    assert "params:tanh[99]" not in str(inspection)
    everything = inspection.table(rows=None)
    assert len(everything.rows) == 200
    assert "params:tanh[99]" in str(everything)
    summary = inspection.table().to_dataframe().set_index("site").loc["params:tanh[0:100]"]
    stats, grads = jax.device_get((inspection.stats["params:tanh"], inspection.grad_stats["params:tanh"]))
    np.testing.assert_allclose(summary["rms"], np.sqrt(np.mean(stats.rms**2)), rtol=1e-5)
    np.testing.assert_allclose(summary["mean"], np.mean(stats.mean), rtol=1e-5)
    np.testing.assert_allclose(summary["max"], np.max(stats.max), rtol=1e-6)
    np.testing.assert_allclose(summary["grad norm"], np.sqrt(np.sum(grads.rms**2 * 6)), rtol=1e-5)
    np.testing.assert_allclose(summary["grad ×"], grads.rms[0] / grads.rms[-1], rtol=1e-5)
    for width in (60, 80, 120, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        assert max(map(len, str(inspection).splitlines())) <= width
        assert f"{summary['grad norm']:.3g}" in str(inspection)
    assert "100 × [2, 3]" in str(sites(f)(jnp.eye(3), jnp.ones((2, 3))))


def test_long_tables_keep_flagged_sites_and_large_changes_and_say_how_to_see_the_rest():
    inspection = inspect(network(jnp.tanh))(*setup([32] * 4 + [10], 100.0))
    flagged = [name for name in inspection if name in inspection.flags()]
    assert 3 <= len(flagged) < len(inspection.sites)
    folded = inspection.table(rows=len(flagged))
    assert list(folded.to_dataframe()["site"]) == flagged
    left = len(inspection.sites) - len(flagged)
    note = f"{left} of {len(inspection.sites)} rows are not shown: inspection.table(rows=None) lists them"
    assert note in " ".join(str(folded).split())
    largest = max(range(4), key=lambda i: float(jnp.linalg.norm(inspection.grads[i][0])))
    assert inspection.parameter_table(rows=1).to_dataframe()["parameter"][0].startswith(f"{largest}/")


def test_printing_while_traced_says_so():
    shown = []

    def f(w):
        shown.append(str(inspect(lambda w: jnp.sum(w**2))(w)))
        return w

    jax.jit(f)(jnp.ones(2))
    assert "being traced" in shown[0]
