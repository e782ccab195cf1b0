"""The loss in chunks of positions against the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

T, VOCAB = 12, 67
SMALL = {"vocab": VOCAB, "context": T, "n_layers": 1, "n_heads": 2, "width": 8}
NETS = {
    "gpt": lambda: gf.gpt(gf.GPTConfig(**SMALL)),
    "untied": lambda: gf.gpt(gf.GPTConfig(**SMALL, tied=False, scan=True)),
    "dropout": lambda: gf.gpt(gf.GPTConfig(**SMALL, dropout=0.5)),
    "rnn": lambda: gf.rnn(VOCAB, 8),
}


def prepared(name):
    net = NETS[name]()
    tokens = jax.random.randint(jax.random.key(1), [3, T + 1], 0, VOCAB)
    # One chunk of padding alone, and some padding in another.
    targets = tokens[:, 1:].at[0, :3].set(-1).at[1, 4].set(-7)
    return net, jax.jit(net.init)(jax.random.key(0)), (tokens[:, :-1], targets)


def assert_close(actual, expected, rtol=1e-5):
    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))

    jax.tree.map(compare, actual, expected)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in NETS])
def test_values_and_gradients_are_those_of_the_plain_loss(name):
    net, params, batch = prepared(name)
    key = {"key": jax.random.key(2)} if name == "dropout" else {}
    plain, chunked = (
        jax.jit(jax.value_and_grad(gf.batch_mean(gf.next_token_loss(net, chunks))))(params, batch, **key)
        for chunks in (1, 4)
    )
    assert_close(chunked, plain)


@pytest.mark.slow
def test_per_example_norms_and_hessian_products_are_those_of_the_plain_loss():
    net, params, batch = prepared("gpt")
    plain, chunked = (gf.next_token_loss(net, chunks) for chunks in (1, 4))
    norms = [jax.jit(gf.per_example.norms(loss))(params, batch) for loss in (chunked, plain)]
    assert not norms[0].fallback
    # The gradient of a bias of keys is zero but for rounding.
    for leaf in (0, 1):
        norms[leaf].norms["blocks"]["0"]["attention"]["key"].pop("b")
    assert_close(norms[0].norms, norms[1].norms)
    assert_close(norms[0].total, norms[1].total)
    products = [
        jax.jit(gf.curvature.hvp(gf.batch_mean(loss)))(params, params, batch) for loss in (chunked, plain)
    ]
    assert_close(products[0]["embed"], products[1]["embed"], 1e-4)


@pytest.mark.slow
def test_logits_are_inspected_and_captured_in_chunks():
    net, params, batch = prepared("gpt")
    plain, chunked = (gf.batch_mean(gf.next_token_loss(net, chunks)) for chunks in (1, 4))
    capture = functools.partial(gf.capture, sites="logits", keep="logits")
    found = [jax.jit(capture(loss))(params, batch)["logits"].value for loss in (chunked, plain)]
    assert found[0].shape == (4, 3, T // 4, VOCAB)
    joined = found[0].swapaxes(0, 1).reshape(found[1].shape)  # [chunks, batch, T / chunks, vocab]
    np.testing.assert_allclose(joined, found[1], rtol=1e-5, atol=1e-6)
    inspections = [jax.jit(gf.inspect(loss))(params, batch) for loss in (chunked, plain)]
    assert set(inspections[0].stats) == set(inspections[1].stats)
    assert_close(inspections[0].grads, inspections[1].grads)


def test_unknown_targets_give_nan_and_wrong_chunks_raise():
    net, params, (tokens, targets) = prepared("rnn")
    loss = gf.next_token_loss(net, chunks=4)
    assert jnp.isnan(jax.jit(loss)(params, (tokens[0], targets[0].at[5].set(VOCAB))))
    with pytest.raises(ValueError, match="chunks must divide the 12 positions, got 5"):
        gf.next_token_loss(net, chunks=5)(params, (tokens[0], targets[0]))
    with pytest.raises(ValueError, match=r"expected targets \[12\] for logits \[12, 67\], got \[3\]"):
        loss(params, (tokens[0], targets[0, :3]))
    with pytest.raises(ValueError, match="chunks must be an integer >= 1, got 0"):
        gf.next_token_loss(net, chunks=0)
    with pytest.raises(ValueError, match="chunks=2 needs a net with a head"):
        gf.next_token_loss(gf.Net(net.spec, net.apply), chunks=2)
    with pytest.raises(gf.ParameterError, match="embed/W"):
        loss(params | {"embed": {"W": jnp.zeros([2, 2])}}, (tokens[0], targets[0]))


@pytest.mark.optimized
@pytest.mark.slow
def test_memory_falls_with_the_number_of_chunks():
    net = gf.rnn(2000, 4, "vanilla")
    params = jax.eval_shape(net.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct([4, 64], jnp.int32)

    def temporaries(chunks):
        loss = gf.batch_mean(gf.next_token_loss(net, chunks))
        compiled = jax.jit(jax.grad(loss)).lower(params, (tokens, tokens)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 4 * 64 * 2000
    assert temporaries(1) > logits
    assert temporaries(8) < logits / 2
