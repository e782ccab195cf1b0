"""Recurrent networks on lines: the gradient through time, and that all three learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.experiments import rnn
from gradfn.runs import sample


@pytest.fixture(scope="module")
def data():
    return gf.data.lines()


def test_the_gradient_is_that_of_the_last_letter_alone(data):
    tokens, targets = rnn.long_sequences(data, most=3)
    assert tokens.shape == targets.shape == (3, 50)
    assert (targets[:, :-1] == -1).all()
    text = data.tokenizer.decode(np.asarray(tokens).ravel())
    assert "\n" not in text
    assert data.tokenizer.decode(np.asarray(targets[:2, -1])) == text[50] + text[100]


@pytest.mark.slow
@pytest.mark.parametrize("cell", rnn.CELLS)
def test_the_gradient_through_time_is_that_of_jax(data, cell):
    tokens, targets = rnn.long_sequences(data, most=2)
    net = gf.rnn(data.tokenizer.size, 8, cell)
    params = net.init(jax.random.key(0))
    loss = gf.next_token_loss(net)
    found = rnn.gradients(loss, cell, params, (tokens, targets))
    assert found.shape == (50,)

    # The gradient of the state after 40 letters, by starting from it.
    def rest(state, tokens, targets):
        logits, _ = net.step(params, tokens[40:], {"0": state})
        return -jax.nn.log_softmax(logits)[-1, targets[-1]] / 2  # the mean over two sequences

    def of_one(tokens, targets):
        state = net.step(params, tokens[:40], net.start(params))[1]["0"]
        if cell != "lstm":
            return jax.grad(rest)(state, tokens, targets)
        # The hidden state of an LSTM, h = o tanh(c), is computed from the cell state of the same step.
        o = state["h"] / jnp.tanh(state["c"])
        return jax.grad(lambda c: rest({"h": o * jnp.tanh(c), "c": c}, tokens, targets))(state["c"])

    grads = jax.vmap(of_one)(tokens, targets)  # [2, 8]
    np.testing.assert_allclose(found[39], np.sqrt(np.mean(np.square(grads))), rtol=1e-4)


def test_the_outcome_needs_the_losses_and_the_gradients(data):
    names = data._replace(sha256=rnn.NAMES)
    gradients = {"vanilla": np.array([1e-6, 1.0]), "lstm": np.array([1e-3, 1.0])}
    losses = {"vanilla": 2.1, "lstm": 2.0}
    config = rnn.Config(data="names.txt")
    assert rnn.judge(config, names, losses, gradients).state == "reached"
    assert rnn.judge(config, names, losses | {"vanilla": 2.2}, gradients).state == "missed"
    assert rnn.judge(config, data, losses | {"vanilla": 2.2}, gradients).state == "reached"
    same = gradients | {"vanilla": np.array([1e-3, 1.0])}
    assert rnn.judge(config, names, losses, same).state == "missed"
    assert rnn.judge(rnn.Config(steps=5), names, losses, gradients).state == "open"


@pytest.mark.slow
def test_a_run_leaves_pictures_and_models(tmp_path):
    result = rnn.run(rnn.Config(width=8, steps=40, batch=16, folder=str(tmp_path / "run")))
    assert {"gradients.png", "curves.png", "probabilities.png", "result.json"} <= {
        file.name for file in result.folder.iterdir()
    }
    assert set(result.validation_losses) == {"vanilla", "gru", "lstm"}
    for cell in rnn.CELLS:
        model = sample.load_model(result.folder / cell)
        jax.tree.map(np.testing.assert_array_equal, model.params, result.params[cell])
        assert len(list(sample.write(model, sample.Config(n=20)))) >= 20
