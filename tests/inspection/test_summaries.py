"""Statistics against numpy in double precision: complex values, and squares that over- or underflow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gradfn as gf
from gradfn.core.precision import norm
from gradfn.inspection.summaries import DEFAULT_STATS, summarize

STATS = ("mean", "rms", "max", "zeros", "nonfinite")


def check(x, stats=None, rtol=2e-6):
    """Compare with numpy in double precision."""
    stats = summarize(x, STATS) if stats is None else stats
    wide = np.asarray(x).astype(np.complex128)
    largest = np.max(np.abs(wide)) or 1.0
    expected = {
        "mean": abs(wide.mean()) if jnp.iscomplexobj(x) else wide.real.mean(),
        "rms": np.linalg.norm(np.abs(wide) / largest) * largest / np.sqrt(wide.size),
        "max": np.max(np.abs(wide)),
        "zeros": np.mean(wide == 0),
        "nonfinite": np.sum(~np.isfinite(wide)),
    }
    for name, value in expected.items():
        got = getattr(stats, name)
        np.testing.assert_allclose(got, value, rtol=rtol, atol=1e-6 * expected["max"], err_msg=name)


NORMAL = np.random.default_rng(0).normal(size=(3, 5000))


def split(x):
    """Return an array with its last axis over eight devices, where statistics have a form of their own."""
    mesh = jax.make_mesh((8,), ("i",), (AxisType.Auto,))
    spec = P(*[None] * (x.ndim - 1), "i") if x.shape[-1] % 8 == 0 else P()
    return jax.device_put(x, NamedSharding(mesh, spec))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1e-32, 1e-25, 1e-19, 1.0, 1e19, 1e25, 1e35])
def test_statistics_on_several_devices_are_right_at_any_size(scale, dtype):
    x = scale * NORMAL * (1 + 1j) if dtype == jnp.complex64 else scale * NORMAL
    x = split(jnp.asarray(x, dtype))
    stats = jax.jit(summarize, static_argnums=1)(x, STATS)
    check(x, stats, rtol=1e-5)
    np.testing.assert_allclose(norm(x), float(stats.rms) * np.sqrt(x.size), rtol=1e-5)
    np.testing.assert_allclose(norm(x, 0), np.linalg.norm(np.asarray(x, np.complex128), axis=0), rtol=1e-5)


def test_statistics_of_doubles_on_several_devices_are_right_at_any_size(x64):
    for scale in (1e-300, 1e-200, 1.0, 1e200, 1e305):
        check(split(jnp.asarray(scale * NORMAL)), rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-32, 1e-30, 1e-25, 1e-15, 1.0, 1e15, 1e25, 1e30, 1e37])
def test_squares_that_under_or_overflow_give_the_right_rms(scale):
    check(jnp.asarray(scale * NORMAL, jnp.float32))
    check(jnp.asarray(scale * (NORMAL + 1j * NORMAL[::-1]), jnp.complex64))
    check(
        jnp.asarray(scale * NORMAL, jnp.float32),
        jax.vmap(lambda x: summarize(x, STATS))(jnp.asarray(scale * NORMAL, jnp.float32)[None]),
    )
    check(jnp.asarray(scale * NORMAL, jnp.bfloat16), rtol=1e-5)


def test_squares_that_under_or_overflow_mixed_with_others():
    tiny = np.full(5000, 1e-22, np.float32)
    check(jnp.asarray(tiny))
    check(jnp.asarray(np.where(np.arange(5000) == 4321, np.float32(1e-19), tiny)))
    check(jnp.asarray(np.where(np.arange(5000) == 4321, np.float32(3e38), tiny)))
    check(jnp.zeros(7))
    check(jnp.asarray(NORMAL * 6e4 / 5, jnp.float16), rtol=1e-5)


@pytest.mark.parametrize("place", [jnp.asarray, split])
@pytest.mark.parametrize("n", [5, 5000])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_nan_and_infinity_are_counted_beside_values_of_any_size(n, scale, place):
    x = np.full(n, scale, np.float32)
    x[3] = np.nan
    stats = summarize(place(x), DEFAULT_STATS)
    assert float(stats.nonfinite) == 1
    assert np.isnan(float(stats.rms))
    assert np.isnan(float(stats.mean))
    x[3] = -np.inf
    stats = summarize(place(x), DEFAULT_STATS)
    assert float(stats.nonfinite) == 1
    assert float(stats.rms) == np.inf
    assert float(stats.mean) == -np.inf
    assert float(summarize(jax.lax.complex(*[jnp.asarray(x)] * 2), DEFAULT_STATS).nonfinite) == 1


@pytest.mark.parametrize("place", [jnp.asarray, split])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_the_rms_is_differentiated_right_at_any_size(scale, place):
    x = place(jnp.asarray(scale * np.array([3.0, -4.0]), jnp.float32))
    gradient = jax.grad(lambda x: summarize(x, ("rms",)).rms)
    for g in (gradient(x), jax.jit(gradient)(x), jax.vmap(gradient)(x[None])[0]):
        np.testing.assert_allclose(g, np.array([0.6, -0.8]) / np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize("value", [1e-25, 1e25, 3e38])
def test_constants_of_any_size_have_the_right_norm(value):
    def constant():
        return jnp.broadcast_to(jnp.float32(value), (2,))  # XLA computes with it at compile time

    np.testing.assert_allclose(jax.jit(lambda: summarize(constant(), ("rms",)).rms)(), value, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda: norm(constant() / 2))(), value / np.sqrt(2), rtol=1e-6)


def test_complex_numbers_use_the_modulus():
    stats = summarize(jnp.full((4,), 2j), DEFAULT_STATS)
    assert [float(v) for v in (stats.mean, stats.rms, stats.max, stats.zeros)] == [2, 2, 2, 0]
    assert float(summarize(jnp.array([3 + 4j]), ("rms", "histogram")).rms) == 5
    assert stats.values.dtype == jnp.float32
    opposite = summarize(jnp.array([1j, -1j, 0j, 0j]), STATS)
    assert [float(v) for v in (opposite.mean, opposite.zeros)] == [0, 0.5]
    histogram = summarize(jnp.array([3 + 4j]), ("histogram",)).histogram
    np.testing.assert_array_equal(histogram, summarize(jnp.array([5.0]), ("histogram",)).histogram)


def test_complex_doubles_stay_double(x64):
    x = jnp.asarray(1e-200 * (NORMAL + 1j * NORMAL[::-1]))
    assert summarize(x, STATS).values.dtype == jnp.float64
    check(x, rtol=1e-12)


def spectral(w, x):
    """Return a real loss of a real weight in a complex product."""
    z = gf.tap(jnp.fft.fft(x) @ w.astype(jnp.complex64), "z")
    return jnp.sum(jnp.abs(z) ** 2)


def test_complex_sites_are_shown_with_their_gradient():
    w, x = (
        jnp.asarray(NORMAL[0, :8].reshape(4, 2), jnp.float32),
        jnp.asarray(NORMAL[1, :12].reshape(3, 4), jnp.float32),
    )
    z = jnp.fft.fft(x) @ w.astype(jnp.complex64)
    for inspected in (gf.inspect(spectral, keep="z"), jax.jit(gf.inspect(spectral, keep="z"))):
        inspection = inspected(w, x)
        assert inspection.sites[-1].differentiable
        np.testing.assert_allclose(inspection["z"].value, z, rtol=1e-5)
        # The convention of jax.grad: d/d Re - i d/d Im, here of |z|^2.
        np.testing.assert_allclose(inspection["z"].grad, 2 * jnp.conj(z), rtol=1e-5)
        check(z, inspection.stats["z"], rtol=1e-5)
        check(2 * z, inspection.grad_stats["z"], rtol=1e-5)
        assert inspection.grads.dtype == jnp.float32
        np.testing.assert_allclose(inspection.grads, jax.grad(spectral)(w, x), rtol=1e-5)
    assert "z" in str(inspection)
    assert inspection.to_dict()["site_grads"]["z"]["rms"] > 0


def test_complex_parameters_in_reports_have_the_modulus():
    params = {"w": jnp.array([3 + 4j]), "a": jnp.array([1.0])}

    def f(params):
        return jnp.sum(jnp.real(params["w"] * (3 - 4j)) + params["a"])

    inspection = gf.inspect(f)(params)
    assert inspection.to_dict()["grads"]["w"] == {"rms": 5.0, "max": 5.0, "nonfinite": 0}
    np.testing.assert_allclose(
        inspection.with_updates(params, inspection.grads).update_ratios["w"], 1, rtol=1e-6
    )
    ratios = inspection.with_updates(params, jax.tree.map(lambda p: 1e-25 * p, params)).update_ratios
    np.testing.assert_allclose([ratios["w"], ratios["a"]], 1e-25, rtol=1e-6)
    steps = gf.backprop(f, keep=True)(params)
    found = [c for step in steps for c in step.outgoing if c.name == "w"]
    np.testing.assert_allclose([c.norm for c in found], 5, rtol=1e-6)


def test_gradients_that_vanish_in_many_layers_have_the_right_rms_and_norm():
    def deep(w, x):
        for i in range(10):
            x = gf.tap(jax.nn.sigmoid(x * w), f"h{i}")
        return jnp.sum(x)

    w, x = jnp.array(1e-3), jnp.ones(3)
    inspection = jax.jit(gf.inspect(deep, keep="h0"))(w, x)
    first = float(inspection.grad_stats["h0"].max)
    assert 0 < first < 1e-28
    np.testing.assert_allclose(inspection.grad_stats["h0"].rms, first, rtol=1e-5)
    assert inspection.to_dict()["site_grads"]["h0"]["rms"] > 0
    assert "vanishing" in inspection.flags()["h0"]
    assert gf.backprop(deep)(w, x)[-1].outgoing[-1].norm > 0


def test_the_chain_rule_by_hand_refuses_complex_numbers():
    params = {"W1": jnp.ones((2, 3)), "b1": jnp.zeros(2)}
    with pytest.raises(TypeError, match="got complex64 for x"):
        gf.chain_rule()(params, jnp.ones(3, jnp.complex64), 0)
    with pytest.raises(TypeError, match="got complex64 for W1"):
        gf.chain_rule()(params | {"W1": jnp.ones((2, 3), jnp.complex64)}, jnp.ones(3), 0)
