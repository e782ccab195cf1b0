"""Arrays are differentiated, Python numbers in a model are configuration: one rule for every tool.

The models branch on their floats and integers, so a tool that traces one of them fails, and their gradients are known
from functions of the arrays alone, so a tool that differentiates a float shows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn.jaxpr.program import traced_leaves

# Other libraries promote ranks and dtypes, and warn, as they please.
pytestmark = pytest.mark.filterwarnings("default")

W = jnp.array([[0.3, 0.6], [0.9, 1.35]])
X, Y = jax.random.normal(jax.random.key(0), (2, 5, 2))
KEY = jax.random.key(2)


@pytest.fixture(autouse=True)
def their_promotion():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def build(gain=3.0, depth=2, rate=0.5):
    """Return an Equinox module with an array, a float and an integer that it branches on, and a function."""
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        w: jax.Array
        gain: float
        depth: int
        drop: eqx.nn.Dropout
        act: object

        def __call__(self, x, key=None):
            if self.gain > 1:
                x = x * self.gain
            for _ in range(self.depth):
                x = self.drop(self.act(self.w @ x), key=key, inference=key is None)
            return x

    return Net(W, gain, depth, eqx.nn.Dropout(rate), jnp.tanh)


def loss(net, example):
    return jnp.sum((net(example[0]) - example[1]) ** 2)


def noisy(net, batch, key):
    keys = jax.random.split(key, 5)
    return jnp.mean(jax.vmap(lambda x, y, k: jnp.sum((net(x, k) - y) ** 2))(*batch, keys))


def with_array(net, w):
    return pytest.importorskip("equinox").tree_at(lambda n: n.w, net, w.reshape(2, 2))


def vector_of(net, v):
    eqx = pytest.importorskip("equinox")
    return with_array(eqx.filter(net, eqx.is_array), v)


def by_array(f, net, *args):
    """Return the loss as a function of the flat array alone."""
    return lambda w: f(with_array(net, w), *args)


def mean_of(net, batch):
    return jnp.mean(jax.vmap(lambda *example: loss(net, example))(*batch))


@pytest.mark.slow
def test_static_python_floats_have_no_curvature():
    net, batch, v = build(), (X, Y), jnp.array([1.0, -2.0, 0.5, 3.0])
    H = jax.hessian(by_array(mean_of, net, batch))(W.ravel())
    values = np.linalg.eigvalsh(H)
    for f in (mean_of, gf.batch_mean(loss)):
        np.testing.assert_allclose(
            gf.curvature.hvp(f)(net, vector_of(net, v), batch).w.ravel(), H @ v, rtol=1e-4
        )
    eigs = gf.curvature.hessian_eigs(mean_of, k=4, which="smallest")(net, batch)
    np.testing.assert_allclose(eigs.values, values, rtol=1e-4)
    assert eigs.vectors.w.shape == (4, 2, 2)
    assert eigs.vectors.gain is None
    np.testing.assert_allclose(gf.curvature.sharpness(mean_of, 0.1)(net, batch).value, values[-1], rtol=1e-4)
    spectrum = gf.curvature.hessian_spectrum(mean_of, samples=1)(net, batch)
    np.testing.assert_allclose(spectrum.nodes[0], values, rtol=1e-4)
    assert int(spectrum.size) == 4
    assert gf.curvature.hessian_diagonal(mean_of, samples=2)(net, batch).value.gain is None


@pytest.mark.slow
def test_static_python_floats_have_no_curvature_where_dropout_is_on():
    net, batch, v = build(), (X, Y), jnp.array([1.0, -2.0, 0.5, 3.0])
    H = jax.hessian(by_array(noisy, net, batch, KEY))(W.ravel())
    product = gf.curvature.hvp(noisy)(net, vector_of(net, v), batch, KEY)
    np.testing.assert_allclose(product.w.ravel(), H @ v, rtol=1e-4)
    eqx = pytest.importorskip("equinox")
    compiled = eqx.filter_jit(gf.curvature.hvp(noisy))(net, vector_of(net, v), batch, KEY)
    np.testing.assert_allclose(compiled.w, product.w, rtol=1e-5)
    np.testing.assert_allclose(
        gf.curvature.hessian_eigs(noisy, k=1, which="largest")(net, batch, KEY).values[0],
        np.linalg.eigvalsh(H)[-1],
        rtol=1e-4,
    )
    # An estimate, beside its standard error.
    trace, error = gf.curvature.hessian_trace(noisy, samples=512)(net, batch, KEY)
    assert abs(trace - jnp.trace(H)) < 5 * error + 1e-4
    assert gf.check_grads(noisy)(net, batch, KEY)
    assert gf.nan_origin(noisy)(net, batch, KEY).ok


@pytest.mark.slow
def test_static_python_floats_in_gauss_newton_fisher_and_influence():
    net, batch, v = build(), (X, Y), jnp.array([1.0, -2.0, 0.5, 3.0])

    def outputs(w):
        return jax.vmap(lambda x: with_array(net, w)(x))(X)  # [5, 2]

    def each(w):
        return jax.vmap(lambda *example: loss(with_array(net, w), example))(X, Y)  # [5]

    J, G = jax.jacobian(outputs)(W.ravel()), jax.jacobian(each)(W.ravel())  # [5, 2, 4], [5, 4]
    gauss_newton = jnp.einsum("nop,noq,q->p", J, J, v) / 5  # squared error is a mean over two outputs
    product = gf.curvature.ggn_vp(lambda net, x: net(x), "squared")(net, vector_of(net, v), batch)
    np.testing.assert_allclose(product.w.ravel(), gauss_newton, rtol=1e-4)
    product = gf.curvature.fisher_vp(loss)(net, vector_of(net, v), batch)
    np.testing.assert_allclose(product.w.ravel(), G.T @ (G @ v) / 5, rtol=1e-4)
    np.testing.assert_allclose(
        gf.attribution.tracin(loss)([net], batch, batch, 0.1), 0.1 * G @ G.T, rtol=1e-4
    )
    unit = G / jnp.linalg.norm(G, axis=1, keepdims=True)
    np.testing.assert_allclose(
        gf.per_example.grad_cosines(loss)(net, batch).total, unit @ unit.T, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        gf.per_example.norms(loss)(net, batch).total, jnp.linalg.norm(G, axis=1), rtol=1e-4
    )
    np.testing.assert_allclose(gf.per_example.grads(loss)(net, batch).w.reshape(5, 4), G, rtol=1e-4)


def test_static_python_floats_stay_where_the_landscape_moves():
    net, batch = build(), (X, Y)
    landscape = gf.curvature.loss_landscape(mean_of, points=3)(net, batch)
    directions = landscape.directions.w  # [2, 2, 2]
    for i, j in np.ndindex(3, 3):
        moved = W + landscape.steps[i] * directions[0] + landscape.steps[j] * directions[1]
        np.testing.assert_allclose(landscape.losses[i, j], mean_of(with_array(net, moved), batch), rtol=1e-5)


def apply(net, x):
    return net(x)


TOOLS = {
    "inspect": lambda net, batch: gf.inspect(mean_of)(net, batch).grads,
    "capture": lambda net, batch: gf.capture(mean_of)(net, batch).output,
    "backprop": lambda net, batch: gf.backprop(mean_of)(net, batch).steps,
    "nan_guard": lambda net, batch: gf.nan_guard(mean_of)(net, batch)[1],
    "nan_origin": lambda net, batch: gf.nan_origin(gf.batch_mean(loss))(net, batch),
    "check_grads": lambda net, batch: gf.check_grads(gf.batch_mean(loss))(net, batch),
    "clipped_grads": lambda net, batch: gf.per_example.clipped_grads(loss, 1e6)(net, batch).grads,
    "patch": lambda net, batch: gf.patch(mean_of, {"w": 0.0})(net, batch),
    "sites": lambda net, batch: gf.sites(mean_of)(net, batch),
    "saliency": lambda net, batch: gf.attribution.saliency(apply, 0, at="w")(net, X[0]),
    "smooth_grad": lambda net, batch: gf.attribution.smooth_grad(apply, 0, samples=2)(net, X[0], key=KEY),
    "integrated_gradients": lambda net, batch: gf.attribution.integrated_gradients(apply, 0, steps=2)(
        net, X[0]
    ),
    "occlusion": lambda net, batch: gf.attribution.occlusion(lambda net, x: net(x[0]), 1, target=0)(
        net, X[:2]
    ),
    "maximize": lambda net, batch: gf.attribution.maximize(apply, 0, steps=2)(net, X[0], key=KEY),
    "randomize_weights": lambda net, batch: gf.attribution.randomize_weights(
        gf.attribution.saliency(apply, 0), lambda key: with_array(net, jax.random.normal(key, [4]))
    )(net, X, key=KEY),
}


@pytest.mark.parametrize("name", TOOLS)
def test_static_python_floats_are_configuration_in(name):
    net, batch = build(), (X, Y)
    found = TOOLS[name](net, batch)
    if hasattr(found, "w"):  # gradients
        expected = jax.grad(by_array(mean_of, net, batch))(W.ravel()).reshape(2, 2)
        np.testing.assert_allclose(found.w, expected, rtol=1e-4)
        assert (found.gain, found.drop.p, found.depth) == (None, None, None)


@pytest.mark.slow
def test_static_python_floats_are_not_those_that_jax_grad_would_differentiate():
    """Issue 11, A2: of `gain`, `rate` and the like, in modules of three frameworks and in plain containers."""
    net = build()
    traced = dict(zip(["w", "gain", "depth", "p", "inference", "act"], traced_leaves(net), strict=True))
    assert traced == {"w": True, "gain": False, "depth": False, "p": False, "inference": False, "act": False}
    plain = {
        "a": 1.0,
        "b": [2.0, (3, True)],
        "c": optax.EmptyState(),
        "d": np.ones(2),
        "e": np.array(["text"]),
    }
    assert traced_leaves(plain) == [True, True, False, False, True, False]
    pair = optax.ScaleByLionState(count=1.0, mu=np.float32(2.0))  # a named tuple is a tuple
    assert traced_leaves([pair, {"net": net}])[:3] == [True, True, True]
    assert traced_leaves({"net": net}) == traced_leaves(net)
    flax = pytest.importorskip("flax")

    @flax.struct.dataclass
    class Settings:
        scale: jax.Array
        rate: float

    assert traced_leaves(Settings(jnp.ones(2), 0.1)) == [True, False]
    assert traced_leaves({"p": flax.core.freeze({"w": 1.0})}) == [True]
    nnx = pytest.importorskip("flax.nnx")
    assert traced_leaves({"w": nnx.Param(0.5)}) == [True]
    Hessian = gf.curvature.hessian_eigs(lambda s: s.rate * jnp.sum(s.scale**2) + s.rate**2, k=2)
    np.testing.assert_allclose(Hessian(Settings(jnp.ones(2), 3.0)).values, [6.0, 6.0], rtol=1e-5)
    # [[2 v, 2 w], [2 w, 0]] = [[6, 4], [4, 0]]
    Hessian = gf.curvature.hessian_eigs(lambda p: p["w"] ** 2 * p["v"], k=2)
    np.testing.assert_allclose(Hessian({"w": 2.0, "v": 3.0}).values, [8.0, -2.0], rtol=1e-5)


@pytest.mark.parametrize("by", [None, [0, 1, 2, 3, 4]])
def test_parameters_in_a_list_have_one_gradient_for_each_example(by):
    cosines = gf.per_example.grad_cosines(lambda ws, x: ws[0] @ x + ws[1] @ x)([W[0], W[1]], X, by=by)
    unit = X / jnp.linalg.norm(X, axis=1, keepdims=True)
    np.testing.assert_allclose(cosines.total, unit @ unit.T, rtol=1e-5, atol=1e-6)
    assert [leaf.shape for leaf in cosines.leaves] == [(5, 5), (5, 5)]
