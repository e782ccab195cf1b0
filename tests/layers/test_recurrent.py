import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

LAYERS = {"RNN": gf.layers.vanilla_rnn, "GRU": gf.layers.gru, "LSTM": gf.layers.lstm}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_states_and_gradients_equal_pytorch(name):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install torch")
    layer = LAYERS[name](3, 5)
    rng = np.random.default_rng(0)
    params = {key: jnp.asarray(rng.normal(size=p.shape), jnp.float32) for key, p in layer.spec.items()}
    x = rng.normal(size=[6, 3]).astype(np.float32)
    theirs = getattr(torch.nn, name)(3, 5)
    weights = {"weight_ih_l0": "Wx", "weight_hh_l0": "Wh", "bias_ih_l0": "b"}
    with torch.no_grad():
        theirs.bias_hh_l0.zero_()
        for key, ours in weights.items():
            getattr(theirs, key).copy_(torch.tensor(np.asarray(params[ours])))
        if name == "GRU":
            theirs.bias_hh_l0[10:] = torch.tensor(np.asarray(params["bn"]))
    states, _ = theirs(torch.tensor(x))
    (states**2).sum().backward()

    grads = jax.jit(jax.grad(lambda p: jnp.square(layer.apply(p, x)).sum()))(params)
    np.testing.assert_allclose(layer.apply(params, x), states.detach(), rtol=1e-4, atol=1e-5)
    for key, ours in weights.items():
        np.testing.assert_allclose(grads[ours], getattr(theirs, key).grad, rtol=1e-4, atol=1e-4)
    if name == "GRU":
        np.testing.assert_allclose(grads["bn"], theirs.bias_hh_l0.grad[10:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_a_state_continues_a_sequence(name):
    layer = LAYERS[name](3, 4)
    params = layer.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), [6, 3])
    apply = jax.jit(layer.apply)
    first, state = apply(params, x[:3], state=gf.layers.recurrent_state(layer))
    second, _ = apply(params, x[3:], state=state)
    np.testing.assert_allclose(np.concatenate([first, second]), apply(params, x), rtol=1e-5, atol=1e-6)


def test_initial_weights_are_orthogonal_and_the_forget_bias_is_one():
    params = gf.layers.lstm(3, 4).init(jax.random.key(0))
    for Wh in np.split(np.asarray(params["Wh"]), 4):
        np.testing.assert_allclose(Wh @ Wh.T, np.eye(4), atol=1e-5)
    np.testing.assert_array_equal(params["b"], np.repeat([0.0, 1, 0, 0], 4))
