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
    inspection = jax.jit(inspect(f, stats=["rms"]))(model, x)
    grads = jax.jit(jax.grad(f))(model, x)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
    jax.tree.map(close, inspection.grads, grads)
    for site in inspection.sites:
        assert float(inspection.stats[site.name].count) > 0
        assert float(inspection.grad_stats[site.name].count) > 0
    assert str(inspection)
    return inspection


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

    inspection = eqx.filter_jit(inspect(loss, stats=["rms"]))(model, X[0])
    grads = eqx.filter_grad(loss)(model, X[0])
    np.testing.assert_allclose(inspection.grads.layers[1].weight, grads.layers[1].weight, rtol=1e-5)
    assert inspection.grads.activation is None
    names = [site.name for site in inspection.sites]
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


@pytest.mark.slow
def test_the_site_of_linens_batch_norm_in_training_is_its_output():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))
            return nn.Dense(2)(nn.gelu(x))

    model, x = Net(), X[:, 0]
    variables = model.init(jax.random.key(0), x)
    params, stats = variables["params"], variables["batch_stats"]

    def loss(params, x):
        out, new = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.mean(out**2), new

    inspection = jax.jit(inspect(loss, keep=None, stats="rms"))(params, x)
    names = [site.name for site in inspection.sites]
    assert [n for n in names if n.startswith("Net")] == [
        *("Net/Dense_0", "Net/BatchNorm_0", "Net/BatchNorm_0:gelu", "Net/Dense_1"),
    ]
    _, captured = model.apply(
        {"params": params, "batch_stats": stats},
        x,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )
    truth = captured["intermediates"]
    for layer in ("Dense_0", "BatchNorm_0", "Dense_1"):
        np.testing.assert_allclose(
            inspection[f"Net/{layer}"].value, truth[layer]["__call__"][0], rtol=1e-4, atol=1e-6
        )
    normed = truth["BatchNorm_0"]["__call__"][0]

    def rest(normed):
        head = params["Dense_1"]
        return jnp.mean((jax.nn.gelu(normed) @ head["kernel"] + head["bias"]) ** 2)

    np.testing.assert_allclose(
        inspection["Net/BatchNorm_0"].grad, jax.grad(rest)(normed), rtol=1e-4, atol=1e-6
    )
    patched, new = patch(loss, {"Net/BatchNorm_0": 0.5})(params, x)
    np.testing.assert_allclose(patched, rest(jnp.full_like(normed, 0.5)), rtol=1e-5)
    jax.tree.map(np.testing.assert_allclose, new["batch_stats"], captured["batch_stats"])  # not patched


@pytest.mark.slow
def test_equinox_is_named_by_the_parameters_whether_a_class_is_entered_once_or_twice():
    eqx = pytest.importorskip("equinox")
    first, second = (eqx.nn.Linear(4, 4, key=jax.random.key(k)) for k in (0, 1))
    x = X[0]

    def once(model, x):
        return jnp.mean(jax.nn.gelu(jax.vmap(model["first"])(x)) ** 2)

    def twice(model, x):
        h = jax.nn.gelu(jax.vmap(model["first"])(x))
        return jnp.mean(jax.vmap(model["second"])(h) ** 2)

    assert sites(once)({"first": first}, x).names == ["first/weight", "first/bias", "first/bias:gelu"]
    inspection = jax.jit(inspect(twice, keep=None, stats="rms"))({"first": first, "second": second}, x)
    assert [site.name for site in inspection.sites] == [
        *("first/weight", "first/bias", "first/bias:gelu", "second/weight", "second/bias")
    ]
    h = jax.vmap(first)(x)
    np.testing.assert_allclose(inspection["first/bias"].value, h, rtol=1e-5)
    np.testing.assert_allclose(
        inspection["second/bias"].value, jax.vmap(second)(jax.nn.gelu(h)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_equinox_batch_norm_in_training_is_its_output():
    eqx = pytest.importorskip("equinox")
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="batch")

    def loss(norm, x):
        out, new = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return jnp.mean(jnp.sin(out)), new

    inspection = eqx.filter_jit(inspect(loss, keep=None, stats="rms"))(norm, X[0])
    out, _ = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(X[0], state)
    assert [site.name for site in inspection.sites] == ["weight", "bias"]
    np.testing.assert_allclose(inspection["bias"].value, out, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(inspection["bias"].grad, jnp.cos(out) / out.size, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_activation_functions_of_nnx_and_haiku():
    nnx, hk = pytest.importorskip("flax.nnx"), pytest.importorskip("haiku")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return nnx.softmax(self.last(nnx.gelu(self.first(x), approximate=False)))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    names = sites(lambda s, x: jnp.mean(nnx.merge(graph, s)(x) ** 2))(state, X).names
    assert {"first/bias:gelu", "last/bias:softmax"} <= set(names)
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 3], activation=jax.nn.gelu)(x)))
    params = model.init(jax.random.key(0), X)
    assert "mlp/linear_0:gelu" in sites(lambda p, x: jnp.mean(model.apply(p, x) ** 2))(params, X).names


@pytest.mark.slow
def test_diffrax_shows_the_vector_field_or_says_what_hides_it():
    diffrax = pytest.importorskip("diffrax")
    params = {"W": jnp.eye(4) * 0.5, "b": jnp.ones(4) * 0.1}

    def loss(params, y, adjoint):
        term = diffrax.ODETerm(lambda t, y, p: jnp.tanh(p["W"] @ y + p["b"]))
        solved = diffrax.diffeqsolve(
            term, diffrax.Euler(), 0.0, 0.2, 0.1, y, args=params, adjoint=adjoint, max_steps=4
        )
        return jnp.sum(solved.ys)

    hidden = sites(lambda p, y: loss(p, y, diffrax.RecursiveCheckpointAdjoint()))(params, X[0, 0])
    assert any("derivative rule" in note for note in hidden.notes)
    forward = sites(lambda p, y: loss(p, y, diffrax.ForwardMode()))(params, X[0, 0])
    assert {"W", "b", "b:tanh"} <= set(forward.names)
    assert not any(site.differentiable for site in forward if site.name in ("W", "b", "b:tanh"))
    direct = jax.jit(
        inspect(lambda p, y: loss(p, y, diffrax.DirectAdjoint()), sites="W", keep="W", stats="rms")
    )(params, X[0, 0])
    y = X[0, 0]
    for k in range(2):  # Euler's method by hand
        visited = direct["W"].value.reshape(-1, 4)[k]
        np.testing.assert_allclose(visited, params["W"] @ y, rtol=1e-4, atol=1e-6)
        y = y + 0.1 * jnp.tanh(params["W"] @ y + params["b"])
