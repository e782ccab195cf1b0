"""Curvature of split parameters and batches on eight simulated devices, against one device."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gradfn as gf

KEYS = jax.random.split(jax.random.key(0), 6)


def everywhere():
    """Return an `out_sharding`: only explicit axes need one."""
    return P() if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types else None


def outputs(params, x):
    h = jnp.tanh(jnp.einsum("i,oi->o", x[0], params["W1"]) + params["b1"])
    return jnp.einsum("o,co->c", h, params["W2"], out_sharding=everywhere())


def hidden_split(params, x):
    return jnp.mean(outputs(params, x) ** 2)


def attention(params, x):
    q, k, v = (jnp.einsum("td,hed->the", x, params[name]) for name in "qkv")
    mixed = jnp.einsum("hts,she->the", jax.nn.softmax(jnp.einsum("the,she->hts", q, k)), v)
    return jnp.mean(jnp.einsum("the,dhe->td", mixed, params["o"], out_sharding=everywhere()) ** 2)


def normal(i, *shape):
    return jax.random.normal(KEYS[i], shape) / 2


X = normal(0, 8, 6, 8)
LOSSES = {
    "hidden split": (
        hidden_split,
        {"W1": normal(1, 16, 8), "b1": normal(2, 16), "W2": normal(3, 4, 16)},
        {"W1": P("model"), "b1": P("model"), "W2": P(None, "model")},
    ),
    "attention": (
        attention,
        {name: normal(1 + i, 2, 4, 8) for i, name in enumerate("qkv")} | {"o": normal(4, 8, 2, 4)},
        {**dict.fromkeys("qkv", P("model")), "o": P(None, "model")},
    ),
}


def everything(example):
    loss = gf.batch_mean(example)

    def run(params, vector, x):
        found = (
            gf.curvature.hvp(loss)(params, vector, x),
            gf.curvature.fisher_vp(example)(params, vector, x),
            gf.curvature.hessian_eigs(loss, k=1, max_products=20)(params, x, key=KEYS[5]).values,
            gf.curvature.hessian_diagonal(loss, 4)(params, x, key=KEYS[5]).value,
            gf.curvature.loss_landscape(loss, dims=1, points=3)(params, x, key=KEYS[5]).losses,
        )
        if example is not hidden_split:
            return found
        return *found, gf.curvature.ggn_vp(outputs)(params, vector, (x, jnp.argmax(x[:, 0, :4], 1)))

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [("hidden split", AxisType.Auto), *[(name, AxisType.Explicit) for name in LOSSES]]
)
def test_curvature_on_eight_devices_equals_one_device(name, kind):
    example, params, specs = LOSSES[name]
    vector = jax.tree.map(jnp.cos, params)
    mesh = jax.make_mesh((4, 2), ("data", "model"), (kind, kind))
    with jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
        split = jax.device_put(params, {leaf: NamedSharding(mesh, spec) for leaf, spec in specs.items()})
        # The vector is not split as the parameters are.
        whole = jax.device_put(vector, NamedSharding(mesh, P()))
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        got = jax.jit(everything(example))(split, whole, x)
    expected = jax.jit(everything(example))(params, vector, X)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.max(np.abs(b), initial=1e-6))
