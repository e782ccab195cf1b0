"""The noise scale against what is known: simulated gradients, and the examples' gradients one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf


def distance(params, x):
    """Half a squared distance: its gradient is w - x, so that noise and signal are those of x."""
    return jnp.square(params["w"] - x).sum() / 2


def test_estimates_are_unbiased():
    # x is normal around 0 with standard deviation 2 in 3 dimensions: |G|^2 = |w|^2 = 1.25, tr Sigma = 12.
    params, n = {"w": jnp.array([1.0, 0.5, 0.0])}, 20_000
    x = 2 * jax.random.normal(jax.random.key(0), [n, 4, 3])
    found = jax.jit(jax.vmap(gf.per_example.noise_scale(distance), (None, 0)))(params, x)
    for estimates, known in ((found.signals["w"], 1.25), (found.noises["w"], 12.0)):
        error = np.std(estimates) / np.sqrt(n)
        assert abs(np.mean(estimates) - known) < 4 * error
        assert error < 0.05  # or the line before says little
    assert (found.signals["w"] < 0).mean() > 0.2  # so they must be pooled, not divided one by one
    pooled = jax.tree.map(lambda leaf: leaf.sum(0), found)
    np.testing.assert_allclose(pooled.scale, 12 / 1.25, rtol=0.05)
    np.testing.assert_allclose(pooled.snr["w"], 1.25 / 12, rtol=0.05)


@pytest.mark.slow
def test_formulas_on_a_net():
    net = gf.mlp([6, 5, 3], activation="tanh")
    params, loss = net.init(jax.random.key(0)), gf.classification_loss(net)
    batch = jax.random.normal(jax.random.key(1), [7, 6]), jnp.arange(7) % 3
    found = jax.jit(gf.per_example.noise_scale(loss))(params, batch)
    each = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
    for name, leaf in each.items():
        flat = np.asarray(leaf, np.float64).reshape(7, -1)
        variance = flat.var(0, ddof=1).sum()  # tr Sigma, unbiased, of this leaf
        signal = np.square(flat.mean(0)).sum() - variance / 7
        np.testing.assert_allclose(found.noises[name], variance, rtol=1e-4)
        np.testing.assert_allclose(found.signals[name], signal, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_sums_and_running_averages():
    one = gf.per_example.noise_scale(distance)({"w": jnp.ones(1)}, jnp.array([[0.0], [1.0]]))
    two = gf.per_example.noise_scale(distance)({"w": jnp.ones(1)}, jnp.array([[3.0], [5.0]]))
    both = one + two
    np.testing.assert_allclose(both.variance, (one.variance + two.variance) / 2)
    np.testing.assert_allclose(both.gradient_square, (one.gradient_square + two.gradient_square) / 2)
    running = one.decayed(0.5) + two
    np.testing.assert_allclose(running.variance, (0.5 * one.variance + two.variance) / 1.5)


def test_a_signal_below_zero_is_reported():
    found = gf.per_example.noise_scale(distance)({"w": jnp.zeros(1)}, jnp.array([[1.0], [-1.0]]))
    assert float(found.gradient_square) == -1.0
    assert np.isnan(found.scale)
    assert found.to_dict()["scale"] is None
    assert "not above zero: noise hides the gradient" in str(found)
    good = gf.per_example.noise_scale(distance)({"w": jnp.full(1, 9.0)}, jnp.array([[1.0], [-1.0]]))
    assert "noise scale 0.025 examples" in str(good)


def test_one_example_shows_no_noise():
    with pytest.raises(ValueError, match="at least 2 examples, got 1"):
        gf.per_example.noise_scale(distance)({"w": jnp.zeros(1)}, jnp.ones([1, 1]))


def test_norm_test():
    params = {"w": jnp.zeros(1)}
    x = jnp.array([[1.0], [2.0], [3.0], [4.0]])  # g = -2.5, variance 5/3
    test = gf.per_example.norm_test(distance, theta=0.5)(params, x)
    np.testing.assert_allclose(test.ratio, np.sqrt(5 / 3 / 4) / 2.5, rtol=1e-6)
    assert test.passed
    assert test.examples == np.ceil(5 / 3 / (0.25 * 6.25))
    assert not gf.per_example.norm_test(distance, theta=0.1)(params, x).passed
    with pytest.raises(ValueError, match="theta must be > 0"):
        gf.per_example.norm_test(distance, theta=0.0)


@pytest.mark.slow
def test_cosines_of_examples_and_classes():
    net = gf.mlp([6, 5, 3])
    params, loss = net.init(jax.random.key(0)), gf.classification_loss(net)
    labels = np.array([0, 2, 2, 0, 2])
    batch = jax.random.normal(jax.random.key(1), [5, 6]), jnp.asarray(labels)
    each = jax.vmap(jax.grad(loss), (None, 0))(params, batch)

    def numpy_cosines(rows):
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return rows @ rows.T

    flat = np.concatenate([np.asarray(leaf, np.float64).reshape(5, -1) for leaf in each.values()], 1)
    found = gf.per_example.grad_cosines(loss)(params, batch)
    np.testing.assert_allclose(found.total, numpy_cosines(flat), atol=1e-5)
    np.testing.assert_allclose(found.leaves["W1"], numpy_cosines(each["W1"].reshape(5, -1)), atol=1e-5)

    by_class = jax.jit(gf.per_example.grad_cosines(loss, groups=3))(params, batch, by=labels).total
    np.testing.assert_allclose(
        gf.per_example.grad_cosines(loss)(params, batch, by=labels).total, by_class, atol=1e-6
    )
    means = np.stack([flat[labels == c].mean(0) for c in (0, 2)])
    np.testing.assert_allclose(by_class[0::2, 0::2], numpy_cosines(means), atol=1e-5)
    assert np.isnan(by_class[1]).all()  # no example of class 1


def test_cosines_refuse():
    call = {"w": jnp.zeros(1)}, jnp.ones([2, 1])
    for by in ([0.5, 1.0], [0, 1, 0], [-1, 0], [0, 3]):
        with pytest.raises(ValueError, match=r"expected by as 2 integers in \[0, 3\), got "):
            gf.per_example.grad_cosines(distance, groups=3)(*call, by=by)
    with pytest.raises(ValueError, match=r"by is traced; give the number of groups"):
        jax.jit(gf.per_example.grad_cosines(distance))(*call, by=jnp.array([0, 1]))
    with pytest.raises(ValueError, match="one leading axis"):
        gf.per_example.cosines({"w": jnp.ones([2, 3]), "b": jnp.ones([3, 3])})
    with pytest.raises(ValueError, match="nothing"):
        gf.per_example.cosines([])


def test_cosines_beside_leaves_that_are_not_floating():
    """Integers, booleans, keys and functions are not compared; complex leaves are, by their real products."""

    def loss(params, x):
        scaled = params["f"](x) * params["n"].astype(x.dtype) * jnp.where(params["flag"], 1.0, 2.0)
        noise = jax.random.normal(params["key"], x.shape)
        return jnp.sum(params["w"] * (scaled + noise)) + jnp.abs(params["z"]) ** 2 * x[0] ** 2

    params = {"w": jnp.ones(3), "z": jnp.array(2 + 1j), "n": jnp.array(3), "flag": jnp.array(True)}
    params |= {"f": jnp.tanh, "key": jax.random.key(0)}
    x = jax.random.normal(jax.random.key(1), (4, 3))
    w = 3 * np.tanh(x) + np.asarray(jax.random.normal(params["key"], (3,)))
    z = 2 * np.asarray(x[:, :1]) ** 2 * np.array([[2.0, 1.0]])
    whole = np.concatenate([w, z], 1)
    units = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (w, z, whole)]
    expected = [unit @ unit.T for unit in units]
    for found in (
        gf.per_example.grad_cosines(loss)(params, x),
        gf.per_example.grad_cosines(loss)(params, x, by=[0, 1, 2, 3]),
    ):
        for actual, its in zip((found.leaves["w"], found.leaves["z"], found.total), expected, strict=True):
            np.testing.assert_allclose(actual, its, atol=1e-6)
        assert all(found.leaves[name] is None for name in ("n", "flag", "f", "key"))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_cosines_and_norm_test_at_any_magnitude(scale):
    def loss(params, x):
        return scale * (jnp.sum(params["a"] * x) + 0.01 * jnp.sum(params["b"] * x**2))

    params, x = {"a": jnp.ones(3), "b": jnp.ones(3)}, 1 + jax.random.normal(jax.random.key(1), (4, 3))
    found, plain = (
        gf.per_example.grad_cosines(loss)(params, x),
        gf.per_example.grad_cosines(lambda p, x: loss(p, x) / scale)(params, x),
    )
    np.testing.assert_allclose(found.total, plain.total, atol=1e-6)
    np.testing.assert_allclose(found.leaves["b"], plain.leaves["b"], atol=1e-6)
    found, plain = (
        gf.per_example.norm_test(loss)(params, x),
        gf.per_example.norm_test(lambda p, x: loss(p, x) / scale)(params, x),
    )
    np.testing.assert_allclose(found.ratio, plain.ratio, rtol=1e-4)
    assert float(found.examples) == float(plain.examples)


def test_a_variance_within_rounding_is_zero_and_reported():
    """A loss that mixes examples, given as that of one: every example has the same gradient."""
    data = jax.random.normal(jax.random.key(0), (32, 7))

    def loss(params, i):
        return jnp.mean(jnp.sin(data @ params["w"]) ** 2)

    for dtype in (jnp.float32, jnp.bfloat16):
        params = {"w": jax.random.normal(jax.random.key(2), (7, 5)).astype(dtype)}
        of_dtype = lambda params, i: loss({"w": params["w"].astype(jnp.float32)}, i)  # noqa: E731
        found = gf.per_example.noise_scale(of_dtype)(params, jnp.arange(64))
        assert float(found.variance) == 0
        assert float(found.scale) == 0
        assert "equal up to rounding" in str(found)
        assert found.to_dict()["snr"] == {"w": None}
