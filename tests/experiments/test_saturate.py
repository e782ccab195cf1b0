"""Deep networks: one program covers all depths, the measurements, and the outcome."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.experiments import saturate


@pytest.mark.slow
@pytest.mark.parametrize("wiring", saturate.WIRINGS)
def test_the_depth_is_the_number_of_layers(wiring):
    net, _ = saturate.deep(5, 4, "tanh", wiring)
    params = saturate.start(net, saturate.STARTS["LeCun"], jax.random.key(0))
    x = jnp.arange(5.0)
    a = jnp.tanh(params["first"]["W"] @ x)
    for i in range(2):  # three hidden layers
        before = a
        if wiring == "layer norm":
            before = (a - a.mean()) / jnp.sqrt(a.var() + 1e-5)
        after = jnp.tanh(params["more"]["dense"]["W"][i] @ before)
        a = a + after if wiring == "residual" else after
    found = jax.jit(net.apply)(params, (x, jnp.int32(3)))
    np.testing.assert_allclose(found, params["last"]["W"] @ a, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_initializers_have_the_documented_spread():
    net, _ = saturate.deep(64, 50, "relu", "plain")
    params = saturate.start(net, saturate.STARTS["He"], jax.random.key(1))
    for W, n_in in ((params["first"]["W"], 64), (params["more"]["dense"]["W"], 50)):
        assert np.std(W) == pytest.approx(np.sqrt(2 / n_in), rel=0.05)
    assert gf.shapes(params["more"]["dense"]) == {"W": [9, 50, 50], "b": [9, 50]}


def outcomes(share, accuracies):
    """Return outcomes whose first layer has that share of the gradient."""
    norms = np.ones([4, 10])
    norms[:, 0] = share
    of = {kind: np.full([4, 6], accuracies) for kind in ("residual", "layer norm", "relu")}
    bad = saturate.Outcome(norms, None, np.full([4, 6], 0.1))
    return {
        ("sigmoid", "plain"): bad,
        ("sigmoid", "residual"): bad._replace(accuracies=of["residual"]),
        ("sigmoid", "layer norm"): bad._replace(accuracies=of["layer norm"]),
        ("relu", "plain"): bad._replace(accuracies=of["relu"]),
    }


def test_the_outcome():
    config = saturate.Config(seed=5)
    assert saturate.judge(config, outcomes(1e-6, 0.9)).state == "reached"
    assert saturate.judge(config, outcomes(1e-2, 0.9)).state == "missed"
    assert saturate.judge(config, outcomes(1e-6, 0.7)).state == "missed"
    assert saturate.judge(config, outcomes(float("nan"), 0.9)).state == "missed"
    learned = outcomes(1e-6, 0.9)
    learned["sigmoid", "plain"] = learned["sigmoid", "residual"]
    assert saturate.judge(config, learned).state == "missed"
    assert saturate.judge(saturate.Config(steps=10), outcomes(1e-6, 0.9)).state == "open"


@pytest.mark.slow
def test_a_run_measures_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(saturate, "ACTIVATIONS", ("sigmoid", "tanh", "relu"))
    monkeypatch.setattr(saturate, "outcome", of_few_activations(saturate.outcome))
    result = saturate.run(saturate.Config(width=4, steps=3, batch=8, folder=str(tmp_path / "run")))
    assert {"flow.png", "saturated.png", "learned.png", "result.json"} <= {
        file.name for file in result.folder.iterdir()
    }
    found = result.outcomes["sigmoid", "plain"]
    assert found.norms.shape == found.off.shape == (4, 10)
    assert found.accuracies.shape == (4, 6)
    assert found.norms[0, 0] < 1e-6 * found.norms[0, -1]
    assert result.outcome.state == "open"


def of_few_activations(outcome):
    """Measure only sigmoids and reuse them for the others, because most of the time is compilation."""
    measured = {}

    def of(config, data, activation, wiring):
        if not measured:
            measured["plain"] = outcome(config, data, "sigmoid", "plain")
        return measured["plain"]

    return of


def test_the_title_of_the_flow_reports_the_network_that_keeps_least():
    vanishing = {"plain": np.geomspace(2e-6, 1, 10), "residual": np.full(10, 3.0)}
    figure = saturate.gradient_flow(vanishing)
    assert len(figure.axes) == 1
    assert (
        figure.get_suptitle()
        == "Of the gradient at layer 10, 1/500,000 arrives at layer 1 with plain, 100 % with residual"
    )
    assert {text.get_text() for text in figure.axes[0].texts} == {"plain", "residual", "1/1,000: vanished"}
    even = saturate.gradient_flow({"plain": np.ones(10), "residual": np.full(10, 3.0)})
    assert even.get_suptitle().startswith("Of the gradient at layer 10, 100 % arrives at layer 1 with plain")
    lost = saturate.gradient_flow({"plain": np.array([0.0, 1.0]), "other": np.array([1e-9, 1.0])})
    assert (
        lost.get_suptitle()
        == "Of the gradient at layer 2, nothing arrives at layer 1 with plain, 1/1,000 million with other"
    )


def test_the_title_of_the_saturation_says_whether_there_is_any():
    what = {"tanh": "saturated values", "relu": "dead nodes"}
    off = {"tanh": np.zeros([2, 10]), "relu": np.full([2, 10], 0.05)}
    figure = saturate.saturation(off, ["He", "N(0, 1)"], what)
    assert (
        figure.get_suptitle()
        == "Before training, no initial weights saturate much: at most 5 % dead nodes (relu, He)"
    )
    assert len(figure.axes) == 2
    off["tanh"][1] = np.linspace(0.6, 0.8, 10)
    title = saturate.saturation(off, ["He", "N(0, 1)"], what).get_suptitle()
    assert (
        title
        == "Before training, initial weights N(0, 1) give 70 % saturated values with tanh, the most of all"
    )


def test_the_title_of_what_was_learned_has_the_accuracies_of_the_deepest():
    found = {"sigmoid (LeCun)": [0.9, 0.1], "sigmoid + residual": [0.9, 0.88], "relu": [0.9, np.nan]}
    figure = saturate.learned(found, [1, 10], 300)
    assert len(figure.axes) == 1
    title = (
        "After 300 steps, 10 layers of sigmoid (LeCun) read 10 % of the test digits, sigmoid + residual 88 %"
    )
    assert figure.get_suptitle() == title
    assert {text.get_text() for text in figure.axes[0].texts} == {*found, "10 %: guessing"}
