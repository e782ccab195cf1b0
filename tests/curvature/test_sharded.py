"""Curvature of split parameters and batches on eight simulated devices, against one device."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gradfn as gf
from tests.inspection.test_sharded import ambient, mesh_of, same, spread
from tests.per_example.test_sharded import KEYS, LOSSES, X, hidden_split, placed


def outputs(params, x):
    h = jnp.tanh(jnp.einsum("i,oi->o", x[0], params["W1"]) + params["b1"])
    return jnp.einsum("o,co->c", h, params["W2"], out_sharding=spread())


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
    ("name", "kind"),
    [
        ("hidden split", AxisType.Auto),
        ("hidden split", AxisType.Explicit),
        ("attention", AxisType.Explicit),
    ],
)
def test_curvature_on_eight_devices_equals_one_device(name, kind):
    example, params, specs = LOSSES[name]
    vector = jax.tree.map(jnp.cos, params)
    mesh = mesh_of(kind)
    with ambient(mesh):
        split, x = placed(mesh, params, specs, X)
        # The vector is not split as the parameters are.
        whole = jax.device_put(vector, NamedSharding(mesh, P()))
        got = jax.jit(everything(example))(split, whole, x)
    expected = jax.jit(everything(example))(params, vector, X)
    same(got, expected, rtol=1e-3, atol=1e-4)
