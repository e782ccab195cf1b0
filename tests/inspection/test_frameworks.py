"""Unmodified models of other frameworks: complete reports under names that their users know."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradfn.inspection import inspect, patch, sites

# Other libraries promote ranks and dtypes, and warn, as they please.
pytestmark = pytest.mark.filterwarnings("default")

X = jax.random.normal(jax.random.key(1), (2, 5, 4))
IMAGES = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))


@pytest.fixture(autouse=True)
def their_promotion():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def report(f, model, x):
    """Inspect under jit; check the gradients against plain ones, and that each site has both of its sides."""
    seen = jax.jit(inspect(f, stats=["rms"]))(model, x)
    grads = jax.jit(jax.grad(f))(model, x)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
    jax.tree.map(close, seen.grads, grads)
    for site in seen.sites:
        assert float(seen.stats[site.name].count) > 0
        assert float(seen.grad_stats[site.name].count) > 0
    assert str(seen)
    return seen


@pytest.mark.slow
def test_linen():
    nn = pytest.importorskip("flax.linen")

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(nn.relu(nn.Dense(8)(x)))
            x = nn.MultiHeadDotProductAttention(2)(x, x)
            return nn.Dense(3)(x)

    model = Classifier()
    params = jax.jit(model.init)(jax.random.key(0), X)

    def loss(params, x):
        return jnp.mean(model.apply(params, x) ** 2)

    names = [site.name for site in report(loss, params, X).sites]
    attention = "Classifier/MultiHeadDotProductAttention_0"
    for name in (
        "Classifier/Dense_0",
        "Classifier/Dense_0:relu",
        "Classifier/LayerNorm_0",
        "Classifier/Dense_1",
    ):
        assert name in names
    for name in ("query", "key", "value", "out"):
        assert f"{attention}/{name}" in names
    assert "params/Dense_0/kernel" in names
    ablated = patch(loss, {"Classifier/Dense_1": 0.0})(params, X)
    assert float(ablated) == 0.0


@pytest.mark.slow
def test_linen_cnn():
    nn = pytest.importorskip("flax.linen")

    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.avg_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
            return nn.Dense(3)(nn.relu(nn.Conv(4, (3, 3))(x)).reshape(x.shape[0], -1))

    model = CNN()
    params = jax.jit(model.init)(jax.random.key(0), IMAGES)
    names = [s.name for s in report(lambda p, x: jnp.mean(model.apply(p, x) ** 2), params, IMAGES).sites]
    assert [n for n in names if n.startswith("CNN")] == [
        *("CNN/Conv_0", "CNN/Conv_0:relu", "CNN/Conv_1", "CNN/Conv_1:relu", "CNN/Dense_0")
    ]


@pytest.mark.slow
def test_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.last = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(self.attention(nnx.relu(self.first(x))))

    model = Model(nnx.Rngs(0))
    graph, state = nnx.split(model)

    def loss(state, x):
        return jnp.mean(nnx.merge(graph, state)(x) ** 2)

    names = [site.name for site in report(loss, state, X).sites]
    assert names[:3] == ["first/kernel", "first/bias", "first/bias:relu"]
    assert {"attention/query/kernel", "attention/out/bias", "last/kernel", "last/bias"} <= set(names)
    assert sites(lambda model, x: jnp.mean(model(x) ** 2))(model, X).names == names  # the model itself


@pytest.mark.slow
def test_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 3, 8, depth=2, key=jax.random.key(0))

    def loss(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    seen = eqx.filter_jit(inspect(loss, stats=["rms"]))(model, X[0])
    grads = eqx.filter_grad(loss)(model, X[0])
    np.testing.assert_allclose(seen.grads.layers[1].weight, grads.layers[1].weight, rtol=1e-5)
    assert seen.grads.activation is None
    names = [site.name for site in seen.sites]
    assert names == [
        *("layers/0/weight", "layers/0/bias", "layers/0/bias:relu"),
        *("layers/1/weight", "layers/1/bias", "layers/1/bias:relu"),
        *("layers/2/weight", "layers/2/bias"),
    ]
    attention = eqx.nn.MultiheadAttention(2, 4, key=jax.random.key(0))

    def attend(model, x):
        return jnp.mean(model(x, x, x) ** 2)

    assert "query_proj/weight" in sites(attend)(attention, X[0]).names


@pytest.mark.slow
def test_haiku():
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 3])(x)))
    params = model.init(jax.random.key(0), X)
    names = [s.name for s in report(lambda p, x: jnp.mean(model.apply(p, x) ** 2), params, X).sites]
    assert [n for n in names if "~" not in n] == ["mlp/linear_0", "mlp/linear_0:relu", "mlp/linear_1"]
    assert "mlp/~/linear_0/w" in names
