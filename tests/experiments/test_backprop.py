"""One gradient in four ways: they agree, and a disagreement is reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.experiments import backprop


def test_finite_differences_are_those_of_every_parameter(x64):
    params = {"W": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.array([5.0])}

    def loss(params, example):  # whose gradient is example times 3 W^2, and cos b
        return example * jnp.sum(params["W"] ** 3) + jnp.sum(jnp.sin(params["b"]))

    found = backprop.finite_differences(loss, params, 2.0)
    np.testing.assert_allclose(found["W"], 6 * params["W"] ** 2, rtol=1e-8)
    np.testing.assert_allclose(found["b"], jnp.cos(params["b"]), rtol=1e-7)


def test_an_error_is_a_share_of_the_largest_gradient():
    by_hand = {"W1": np.array([[1.0, -4.0]]), "b1": np.zeros(2)}
    found = {"W1": np.array([[1.5, -4.0]]), "b1": np.zeros(2)}
    assert backprop.errors_against(by_hand, found) == {"W1": 0.125, "b1": 0.0}


def test_the_outcome():
    bounds = {each.name.removeprefix("error of "): each.at_most for each in backprop.EXPECTED}
    good = {way: {"W1": bound / 2, "b1": 0.0} for way, bound in bounds.items()}
    assert backprop.judge(good).state == "reached"
    for way, bound in bounds.items():
        for wrong in (bound * 2, float("nan")):
            assert backprop.judge(good | {way: {"W1": 0.0, "b1": wrong}}).state == "missed"


def test_an_example_out_of_range_does_not_start_a_run(tmp_path):
    with pytest.raises(ValueError, match="example: there are 1,257 training digits, got number 1257"):
        backprop.run(backprop.Config(example=1257, folder=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("scale", "change"), [(0.1, "shrinks"), (30.0, "grows")])
def test_the_title_of_the_equations_says_whether_the_error_shrinks(scale, change):
    rng = np.random.default_rng(0)
    params = {"W1": rng.normal(size=[16, 784]) / 28, "b1": np.zeros(16), "b2": np.zeros(10)}
    params["W2"] = scale * rng.normal(size=[10, 16])
    x = rng.uniform(size=784)
    by_hand = jax.tree.map(np.asarray, jax.jit(gf.chain_rule())(params, x, 3))
    figure = backprop.equations(by_hand, params["W2"], 3)
    before, after = (np.linalg.norm(by_hand.deltas[i]) for i in (2, 1))
    title = f"the error of one 3 {change} from {before:.3g} to {after:.3g}"
    assert figure.get_suptitle() == f"Backwards through the hidden layer {title}"
    panels = [panel for panel in figure.axes if panel.get_title()]
    assert len(panels) == 4
    assert [panel.get_title()[:3] for panel in panels] == ["BP1", "BP2", "BP2", "BP4"]
    bars = [np.array([bar.get_width() for bar in panel.patches]) for panel in panels[:3]]
    np.testing.assert_allclose(bars[0], by_hand.deltas[2], rtol=1e-5)
    np.testing.assert_allclose(bars[1], params["W2"].T @ by_hand.deltas[2], rtol=1e-4)
    np.testing.assert_allclose(bars[2], by_hand.deltas[1], rtol=1e-5)
    assert len({panel.get_xlim() for panel in panels[:3]}) == 1
    node = np.abs(by_hand.deltas[1]).argmax()
    np.testing.assert_allclose(panels[3].images[0].get_array().ravel(), by_hand.grads["W1"][node], rtol=1e-4)


@pytest.mark.slow
def test_a_run_agrees_with_float32_gradients_and_draws(tmp_path):
    result = backprop.run(backprop.Config(hidden=2, example=7, seed=3, folder=str(tmp_path / "run")))
    assert result.outcome.state == "reached"
    files = {file.name for file in result.folder.iterdir()}
    assert {"equations.png", "agree.png", "gradients.png", "steps.txt", "result.json"} <= files
    net = gf.mlp([784, 2, 10])
    images, labels = gf.data.digits().train
    plain = jax.grad(gf.classification_loss(net))(net.init(jax.random.key(3)), (images[7], labels[7]))
    for found in result.grads.values():
        assert set(found) == set(plain)
        np.testing.assert_allclose(found["W1"], plain["W1"], rtol=1e-3, atol=1e-6)
