"""`inspect` on every kind of function against the plain one: the same arithmetic, whatever it is wrapped in.

Operation by operation the gradients are those of `value_and_grad` to the last bit. Compiled, XLA may fuse the
two programs differently (some versions do in loops), which may move a last bit; there the bound is a few of
those.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from gradfn.inspection import inspect

pytestmark = pytest.mark.optimized

X = jax.random.normal(jax.random.key(1), (16, 8))
FEW = X[:4]
W = jax.random.normal(jax.random.key(0), (8, 8))


def mlp(p, x):
    for i in range(3):
        x = jax.nn.relu(x @ p[f"W{i}"] + p[f"b{i}"][None])
    return jnp.mean(x**2), {"last": x}


def cnn(p, x):
    x = x.reshape(-1, 4, 2, 1)  # [batch, height, width, channels]
    numbers = ("NHWC", "HWIO", "NHWC")
    h = lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
    h = lax.reduce_window(jax.nn.relu(h), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jnp.mean((h.reshape(len(h), -1) @ p["W"]) ** 2)


def rnn(p, x):
    def step(h, x):
        h = checkpoint_name(jnp.tanh(p["Wh"] @ h + p["Wx"] @ x + p["b"]), "h")
        return h, h

    return jnp.mean(lax.scan(step, jnp.zeros(8, x.dtype), x)[1] ** 2)


def transformer(p, x):
    def block(h, p):
        a = jax.nn.softmax(h @ p["q"] @ (h @ p["k"]).T)
        h = h + a @ (h @ p["v"])
        return h + jax.nn.gelu(h @ p["w1"]) @ p["w2"], None

    remat = jax.checkpoint(block, policy=jax.checkpoint_policies.dots_saveable)
    return jnp.mean(lax.scan(remat, x, p)[0] ** 2)


def branches(p, x):
    def body(c, i):
        even, odd = (lambda c: jnp.tanh(c @ p)), (lambda c: checkpoint_name(c * 0.5, "odd"))
        return lax.cond(i % 2 == 0, even, odd, c), None

    return lax.scan(body, x, jnp.arange(4))[0].sum()


@jax.custom_vjp
def product(w, x):
    return jnp.sin(x @ w)


product.defvjp(lambda w, x: (product(w, x), (w, x)), lambda r, g: (r[1].T @ g, 2 * g @ r[0].T))


def custom(p, x):
    return jnp.sum(product(p, jax.nn.relu(x)) ** 2)


def vmapped(p, x):
    return jax.vmap(lambda row: jnp.sum(jnp.tanh(row @ p) ** 2))(x).mean()


def with_key(p, x):
    kept = jax.random.bernoulli(p["key"], 0.5, x.shape)
    return jnp.mean(jnp.where(kept, x @ p["W"], 0.0) ** 2)


def cut(p, x):
    return jnp.sum(lax.stop_gradient(checkpoint_name(x @ p, "cut"))) + jnp.sum(p**2)


CASES = {
    "mlp": (mlp, {f"W{i}": W for i in range(3)} | {f"b{i}": jnp.ones(8) * 0.1 for i in range(3)}),
    "cnn": (cnn, {"kernel": jnp.ones((3, 3, 1, 4)) * 0.3, "W": jnp.linspace(-1, 1, 24).reshape(8, 3)}),
    "rnn": (rnn, {"Wh": W * 0.5, "Wx": W, "b": jnp.ones(8)}),
    "transformer": (transformer, {n: jnp.stack([W * 0.2] * 3) for n in ("q", "k", "v", "w1", "w2")}),
    "branches": (branches, W),
    "custom": (custom, W),
    "vmapped": (vmapped, W),
    "cut": (cut, W),
}


def plain(f, params, x):
    has_aux = isinstance(jax.eval_shape(f, params, x), tuple)
    value, grads = jax.value_and_grad(f, argnums=(0, 1), has_aux=has_aux)(params, x)
    return (*value, *grads) if has_aux else (value, None, *grads)


def everything(f, params, x):
    inspection = inspect(f, keep=None)(params, x)
    return inspection.value, inspection.aux, inspection.grads, inspection.input_grads[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_operation_by_operation_the_same_to_the_last_bit(name):
    f, params = CASES[name]
    with jax.disable_jit():
        ours, theirs = everything(f, params, FEW), plain(f, params, FEW)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_compiled_the_same(name, dtype):
    f, params = CASES[name]
    params, x = jax.tree.map(lambda a: a.astype(dtype), (params, FEW))
    ours = jax.jit(lambda p, x: everything(f, p, x))(params, x)
    theirs = jax.jit(lambda p, x: plain(f, p, x))(params, x)

    def close(a, b):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(
            a, b, rtol=0, atol=(8 * float(jnp.finfo(dtype).eps)) * max(np.abs(b).max(), 1e-30)
        )

    jax.tree.map(close, ours, theirs)


@pytest.mark.slow
def test_activations_of_an_rnn_are_those_of_the_loop_unrolled_by_hand():
    _, params = CASES["rnn"]
    inspection = jax.jit(inspect(rnn, keep="h"))(params, FEW)
    offsets = jnp.zeros((4, 8))

    def unrolled(offsets):
        h, out = jnp.zeros(8), []
        for t in range(4):
            h = jnp.tanh(params["Wh"] @ h + params["Wx"] @ FEW[t] + params["b"]) + offsets[t]
            out.append(h)
        return jnp.mean(jnp.stack(out) ** 2), jnp.stack(out)

    (_, states), grads = jax.jit(jax.value_and_grad(unrolled, has_aux=True))(offsets)
    np.testing.assert_allclose(inspection["h"].value, states, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(inspection["h"].grad, grads, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(inspection.grad_stats["h"].rms, np.sqrt(np.mean(grads**2, 1)), rtol=1e-4)


def test_keys_among_the_arguments_and_integer_parameters():
    params = {"W": W, "key": jax.random.key(3), "n": jnp.arange(3)}
    inspection = jax.jit(inspect(with_key))(params, X)
    expected = jax.jit(jax.grad(lambda w: with_key({"W": w, "key": params["key"]}, X)))(W)
    np.testing.assert_array_equal(inspection.grads["W"], expected)
    assert inspection.grads["key"] is None
    assert inspection.grads["n"] is None


def test_integer_and_empty_sites_and_sites_no_gradient_reaches():
    def f(w, x):
        best = checkpoint_name(jnp.argmax(x @ w, -1), "best")
        return jnp.sum(checkpoint_name(x @ w, "cut")[:0]) + jnp.sum(checkpoint_name(w[:0], "none")), best

    inspection = inspect(f)(W, X)
    assert "best" not in inspection.grad_stats
    np.testing.assert_allclose(inspection.stats["best"].mean, np.mean(np.argmax(X @ W, -1)), rtol=1e-6)
    assert float(inspection.stats["none"].count) == 0
    assert "nan" not in str(inspection)


def test_branches_tell_which_of_them_ran():
    inspection = inspect(branches)(W, X)
    np.testing.assert_array_equal(inspection.stats["odd"].count, [0, 128, 0, 128])
    np.testing.assert_array_equal(inspection.grad_stats["params"].count, [128, 0, 128, 0])


def test_inside_vmap_and_scan():
    f = jax.jit(inspect(vmapped))
    scales = jnp.array([1.0, 2.0])
    many = jax.jit(jax.vmap(lambda s: inspect(vmapped)(s * W, X)))(scales)
    for i, s in enumerate(scales):
        one = f(s * W, X)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5), many, one)

    def step(w, x):
        inspection = inspect(vmapped)(w, x)
        return w - 0.1 * inspection.grads, inspection

    _, steps = jax.jit(lambda: lax.scan(step, W, jnp.stack([X] * 3)))()
    np.testing.assert_allclose(steps.value[0], f(W, X).value, rtol=1e-6)
    assert "the last of (3,) inspections" in str(steps)


def test_donated_parameters():
    def step(w, x):
        inspection = inspect(vmapped)(w, x)
        return w - 0.1 * inspection.grads, inspection

    w, _ = jax.jit(step, donate_argnums=0)(W + 0, X)
    np.testing.assert_allclose(w, W - 0.1 * jax.grad(vmapped)(W, X), rtol=1e-5, atol=1e-6)


@pytest.fixture
def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()), ("d",))


def test_shardings_are_those_of_the_plain_function(mesh):
    def f(w, x):
        return jnp.mean(jax.nn.relu(x @ w) ** 2)

    w, x = (jax.device_put(a, NamedSharding(mesh, PartitionSpec(*s))) for a, s in ((W, ()), (X, ("d",))))
    inspection = jax.jit(inspect(f, keep=None))(w, x)
    grads = jax.jit(jax.grad(f, argnums=(0, 1)))(w, x)
    for ours, theirs in ((inspection.grads, grads[0]), (inspection.input_grads[0], grads[1])):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)
        assert ours.sharding.is_equivalent_to(theirs.sharding, 2)
    for raw in (inspection["params"].value, inspection["params"].grad):
        assert raw.sharding.is_equivalent_to(x.sharding, 2)


@pytest.mark.slow
def test_shardings_in_types():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))

    def f(w, x):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)
        return jnp.mean(h**2)

    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.stack([W] * 3), PartitionSpec())
        x = jax.device_put(X, PartitionSpec("d"))
        inspection = jax.jit(inspect(f, keep=None))(w, x)
        np.testing.assert_allclose(inspection.grads, jax.jit(jax.grad(f))(w, x), rtol=1e-5, atol=1e-7)
        assert jax.typeof(inspection["params"].grad).sharding.spec == PartitionSpec(None, "d", None)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(mesh, check_vma):
    def f(w, x):
        def local(w, x):
            h = checkpoint_name(jax.nn.relu(x @ w), "h")
            return checkpoint_name(lax.psum(jnp.sum(h**2), "d"), "total")

        specs = (PartitionSpec(), PartitionSpec("d"))
        return jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check_vma
        )(w, x)

    inspection = jax.jit(inspect(f, keep=None))(W, X)
    np.testing.assert_allclose(inspection.grads, jax.jit(jax.grad(f))(W, X), rtol=1e-6)
    assert inspection["h"].value.shape == (8, 2, 8)
    np.testing.assert_allclose(inspection["h"].value.reshape(16, 8), jax.nn.relu(X @ W), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        inspection["h"].grad.reshape(16, 8), 2 * jax.nn.relu(X @ W), rtol=1e-5, atol=1e-6
    )
