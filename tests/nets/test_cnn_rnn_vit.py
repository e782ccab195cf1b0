import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

VIT = gf.ViTConfig((8, 8, 1), patch=4, classes=3, n_layers=2, n_heads=2, width=8)


@functools.cache
def started(name):
    net = {
        "cnn": lambda: gf.cnn([8, 8, 1], [2, 3], [5], 4),
        "vit": lambda: gf.vit(VIT),
        "rnn": lambda: gf.rnn(11, 6, "gru", 2),
    }[name]()
    return net, jax.jit(net.init)(jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_images_come_in_three_shapes(name):
    net, params = started(name)
    x = jax.random.normal(jax.random.key(1), [8, 8, 1])
    apply = jax.jit(net.apply)
    for shape in ([8, 8], [64]):
        np.testing.assert_allclose(apply(params, x.reshape(shape)), apply(params, x), rtol=1e-5, atol=1e-6)
    for shape in ([7, 7], [1, 8, 8], [2, 32]):
        with pytest.raises(
            gf.ParameterError, match=r"expected an image of \[8, 8, 1\] or \[64\], got \[[127], "
        ):
            net.apply(params, jnp.zeros(shape))


def test_cnn_names_its_values_and_counts_its_parameters():
    net, params = started("cnn")
    names = gf.sites(net.apply)(params, jnp.zeros(64)).names
    assert [n for n in names if "/" not in n] == [*("z1", "a1", "p1", "z2", "a2", "p2", "z3", "a3", "z4")]
    # 2 windows of 3x3 on 1 channel, 3 on 2; then 2*2*3 -> 5 -> 4.
    assert gf.count(params) == (18 + 2) + (54 + 3) + (60 + 5) + (20 + 4)
    with pytest.raises(ValueError, match=r"image \[4, 4, 1\] is too small for 3 poolings"):
        gf.cnn([4, 4, 1], [1, 1, 1])


@pytest.mark.slow
def test_dropout_needs_a_key():
    x = jnp.ones(64)
    for net in (gf.cnn([8, 8, 1], [2], [5], 4, dropout=0.5), gf.vit(dataclasses.replace(VIT, dropout=0.5))):
        params = jax.jit(net.init)(jax.random.key(0))
        apply = jax.jit(net.apply)
        noisy = [apply(params, x, key=jax.random.key(i)) for i in (0, 1)]
        assert (noisy[0] != noisy[1]).any()
        assert (apply(params, x) == apply(params, x)).all()


@pytest.mark.slow
def test_rnn_continues_from_its_states():
    net, params = started("rnn")
    tokens = jnp.array([3, 1, 4, 1, 5, 9])
    step = jax.jit(net.step)
    first, states = step(params, tokens[:3], net.start(params))
    second, _ = step(params, tokens[3:], states)
    whole = jax.jit(net.apply)(params, tokens)
    np.testing.assert_allclose(np.concatenate([first, second]), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_rnn_generates_past_any_context():
    net, params = started("rnn")
    found = gf.generate(net, params, [3, 1, 4], 40, temperature=0)
    sequence = np.concatenate([[3, 1, 4], found])
    likeliest = jax.jit(net.apply)(params, sequence)[2:-1].argmax(-1)
    np.testing.assert_array_equal(found, likeliest)


def test_rnn_states_and_their_gradients_are_inspected():
    net, params = started("rnn")
    names = gf.sites(net.apply)(params, jnp.arange(6)).names
    assert {"layers/0/h", "layers/1/h", "embedded", "logits"} <= set(names)
    with pytest.raises(ValueError, match=r"got 'lstn'\. Did you mean 'lstm'\?"):
        gf.rnn(3, 4, "lstn")


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["mean", "class"])
def test_scanned_vit_equals_unrolled_vit(pool):
    config = dataclasses.replace(VIT, pool=pool)
    net, scanned = gf.vit(config), gf.vit(dataclasses.replace(config, scan=True))
    params = jax.jit(net.init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), [64])
    np.testing.assert_allclose(
        jax.jit(scanned.apply)(gf.stack_blocks(params), x),
        jax.jit(net.apply)(params, x),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.slow
def test_mean_pooled_vit_without_positions_ignores_the_order_of_patches():
    net, params = started("vit")
    params = params | {"positions": {"W": jnp.zeros([4, 8])}}
    x = jax.random.normal(jax.random.key(1), [8, 8])
    swapped = jnp.concatenate([x[4:], x[:4]])
    apply = jax.jit(net.apply)
    np.testing.assert_allclose(apply(params, swapped), apply(params, x), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_vit_filters_match_patches():
    net, params = started("vit")
    x = jnp.zeros([8, 8]).at[:4, 4:].set(jnp.arange(16.0).reshape(4, 4))  # the second patch
    inspection = gf.inspect(lambda p, x: net.apply(p, x).sum(), keep="patches*")(params, x)
    expected = params["patches"]["W"] @ jnp.arange(16.0) + params["patches"]["b"]
    np.testing.assert_allclose(inspection["patches"].value[1], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="patch must divide the image's 28 x 28, got 5"):
        gf.ViTConfig(patch=5)


@pytest.mark.slow
def test_they_learn():
    images = jax.random.normal(jax.random.key(0), [32, 64])
    labels = (images[:, :32].sum(1) > images[:, 32:].sum(1)).astype(jnp.int32)
    import optax

    for name in ("cnn", "vit"):
        net, params = started(name)
        fitted = gf.fit(
            gf.batch_mean(gf.classification_loss(net)),
            params,
            lambda step: (images, labels),
            optax.adam(1e-2),
            60,
        )
        assert gf.accuracy(net)(fitted.params, (images, labels)) > 0.9
