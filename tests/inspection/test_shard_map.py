"""The tools inside a `jax.shard_map` that types what varies, on four simulated devices, against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gradfn as gf

W = jnp.arange(6.0).reshape(3, 2) / 10 + 0.1
X = jnp.linspace(-1, 1, 24).reshape(8, 3)


def model(w, x):
    """Return a loss per row: a cond that depends on the data, a scan, a while loop."""
    h = gf.tap(jnp.tanh(x @ w), "h")
    h = lax.cond(jnp.sum(h) > 0, jnp.sin, lambda h: 2 * h, h)
    h, _ = lax.scan(jax.checkpoint(lambda c, _: (gf.tap(jnp.cos(c) * jnp.sum(w), "c"), None)), h, length=2)
    n = lax.while_loop(lambda n: jnp.sum(n) < 3, lambda n: gf.tap(n + 1, "n"), lax.stop_gradient(0 * h))
    return jnp.mean((h + n) ** 2)


def sharded(f, w_spec, out, check_vma=True):
    mesh = jax.make_mesh((4,), ("i",), (AxisType.Auto,), devices=jax.devices()[:4])
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(w_spec, P("i")), out_specs=out, check_vma=check_vma))


def loss(w, x):
    return lax.pmean(model(w, x), "i")


def by_hand(w, x):
    return jnp.mean(jnp.stack([model(w, part) for part in x.reshape(4, 2, 3)]))  # [8, 3] -> [4, 2, 3]


def local_sites(w, x):
    return jnp.tanh(x @ w)


def test_inspect_inside_shard_map_is_right():
    def inspected(w, x):
        inspection = gf.inspect(loss, keep="h")(w, x)
        rms = [
            inspection.stats["h"].rms[None],
            inspection.stats["c"].rms[None],
            inspection.grad_stats["h"].rms[None],
        ]
        return inspection.value, inspection.grads, inspection["h"].value, inspection["h"].grad, rms

    out = (P(), P(), P("i"), P("i"), P("i"))
    value, grads, kept, kept_grads, (rms, looped, grad_rms) = sharded(inspected, P(), out)(W, X)
    expected = jax.value_and_grad(by_hand)(W, X)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(grads, expected[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kept, local_sites(W, X), rtol=1e-5)
    parts = local_sites(W, X).reshape(4, 4)  # [8, 2] -> [device, its values]
    np.testing.assert_allclose(rms, np.sqrt(np.mean(parts**2, axis=1)), rtol=1e-5)
    assert looped.shape == (4, 2)
    # The gradient of the sum over devices, as jax has it: each device's own is that of the mean.
    np.testing.assert_allclose(np.sqrt(np.mean(kept_grads.reshape(4, 4) ** 2, axis=1)), grad_rms, rtol=1e-5)
    assert float(grad_rms.min()) > 0


@pytest.mark.slow
def test_the_other_tools_inside_shard_map_are_right():
    expected = jax.value_and_grad(by_hand)(W, X)

    def guarded(w, x):
        value, grads, record = gf.nan_guard(loss)(w, x)
        return (value, grads), record.keys[None]

    def walked(w, x):
        backward = gf.backprop(loss)(w, x)
        norms = [c["norm"][None] for part in backward.cotangents for c in part["results"]]
        return (backward.value, jax.grad(loss)(w, x)), jnp.concatenate([n.reshape(1, -1) for n in norms], 1)

    def patched(w, x):
        f = gf.patch(loss, {"h": lambda h: h, "c": lambda c: c})
        return jax.value_and_grad(f)(w, x), jnp.zeros((1,))

    for tool in (guarded, walked, patched):
        (value, grads), rest = sharded(tool, P(), ((P(), P()), P("i")))(W, X)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        np.testing.assert_allclose(grads, expected[1], rtol=1e-5, atol=1e-6)
        assert np.all(np.isfinite(rest))


def test_a_patch_inside_shard_map_may_be_the_same_on_all_devices():
    got = sharded(gf.patch(loss, {"h": 0.5}), P(), P())(W, X)
    np.testing.assert_allclose(got, gf.patch(model, {"h": 0.5})(W, X), rtol=1e-5)


def test_sharded_parameters_inside_shard_map_have_their_own_gradients():
    def rows(w, x):
        return lax.psum(jnp.sum(jnp.tanh(gf.tap(x * w, "p"))), "i")

    w = jnp.arange(8.0).reshape(8, 1) / 8

    def inspected(w, x):
        return gf.inspect(rows)(w, x).grads

    def guarded(w, x):
        return gf.nan_guard(rows)(w, x)[1]

    expected = jax.grad(lambda w: jnp.sum(jnp.tanh(X * w)))(w)
    for tool in (inspected, guarded):
        np.testing.assert_allclose(sharded(tool, P("i"), P("i"))(w, X), expected, rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_nan_on_one_device_is_found_on_all(check_vma):
    """Devices that disagreed would wait for each other in the sum over all of them."""

    def local(w, x):
        return jnp.sum(jnp.log(x * w)) + lax.stop_gradient(lax.psum(jnp.sum(x), "i"))

    def guarded(w, x):
        _, _, record = gf.nan_guard(local)(w, x)
        return record.keys[None], record.nonfinite_inputs[None], record.value[None]

    x = jnp.ones((8, 3)).at[7].set(-1.0)
    keys, _, values = sharded(guarded, P("i"), P("i"), check_vma)(jnp.ones((8, 3)), x)
    assert np.isnan(np.asarray(values)).tolist() == [False, False, False, True]
    assert (np.asarray(keys)[:, 0, 0] >= 0).tolist() == [False, False, False, True]
