"""Parameters gathered where a loss computes with them: values, gradients, and where the compiled program gathers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gradfn as gf
from gradfn.train.gathering import gather_where_used
from gradfn.train.split import split_of

N = 16


def on_mesh(tree, spec):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return jax.device_put(tree, NamedSharding(mesh, spec))


def matrices(*shape):
    return jax.random.normal(jax.random.key(0), shape) / 4


def product(params, x):
    return jnp.square(x @ params.T).sum()


def twice(params, x):
    return jnp.square(x @ params + jnp.tanh(x) @ params.T).sum()


def of_two(params, x):
    return jnp.square(x @ (params @ params)).sum()


def cut(params, x):
    return jnp.square(x @ params[:, 3:9]).sum() + jnp.square(x @ params.reshape(2, N // 2, N)[0].T).sum()


def carried(params, x):
    return jnp.square(jax.lax.fori_loop(0, 3, lambda _, W: W @ params, params) @ x.T).sum()


def chosen(params, x):
    return jax.lax.cond(x.sum() > 0, lambda: (x @ params).sum(), lambda: (x @ params.T).sum() ** 2)


def read_by_a_loop(params, x):
    return jnp.square(jax.lax.map(lambda one: jnp.tanh(one @ params), x)).sum()


def of_its_own(params, x):
    return jnp.square(params).sum() + x.sum()


def scanned(params, x):
    return jnp.square(jax.lax.scan(lambda x, W: (jnp.tanh(x @ W), None), x, params)[0]).sum()


@pytest.mark.parametrize("spec", [P("data"), P("model", "data")])
@pytest.mark.parametrize("f", [product, twice, of_two, cut, carried, chosen, read_by_a_loop, of_its_own])
def test_values_and_gradients_are_those_of_one_device(f, spec):
    params, x = matrices(N, N), jnp.linspace(-1, 2, 8 * N).reshape(8, N)
    compare(f, params, x, spec)


@pytest.mark.parametrize(
    "spec", [P(None, "data"), P("data"), P(None, "model", "data"), P(None, ("data", "model"))]
)
def test_layers_of_a_stack(spec):
    compare(scanned, matrices(4, N, N), jnp.linspace(-1, 2, 8 * N).reshape(8, N), spec)


def compare(f, params, x, spec):
    expected = jax.jit(jax.value_and_grad(f))(params, x)
    split = on_mesh(params, spec)
    actual = jax.jit(jax.value_and_grad(gather_where_used(f, split_of(split))))(split, on_mesh(x, P("data")))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def gathers(compiled):
    """Return for each all-gather the number of values that it returns."""
    lines = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(.*", compiled.as_text())
    return [int(np.prod([int(n) for n in dims.split(",")])) for dims in lines]


@pytest.mark.parametrize("stack", [pytest.param("gpt", marks=pytest.mark.slow), "repeat"])
def test_one_layer_of_a_stack_is_gathered_at_a_time(stack):
    """No device ever has more than one layer's matrices of a stack, forward and backward."""
    if stack == "gpt":
        config = gf.GPTConfig(vocab=64, context=8, n_layers=6, n_heads=2, width=16, scan=True)
        net, x = gf.gpt(config), jnp.zeros([8, 8], jnp.int32)
        loss, largest = gf.batch_mean(lambda params, x: net.apply(params, x).mean()), 4 * 16 * 16
    else:
        net, x = gf.repeat(gf.serial(mix=gf.layers.dense(32, 32), squash=jnp.tanh), 6), jnp.ones([8, 32])
        loss, largest = gf.batch_mean(lambda params, x: net.apply(params, x).mean()), 32 * 32
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shardings = gf.train.shardings(net, mesh, gf.train.FSDP)
    shapes = jax.tree.map(
        lambda param, sharding: jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=sharding),
        net.spec,
        shardings,
    )
    batch = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P("data")))
    step = jax.value_and_grad(gather_where_used(loss, split_of(shapes)))
    compiled = jax.jit(step, out_shardings=(None, shardings)).lower(shapes, batch).compile()
    assert largest in gathers(compiled)
    assert max(gathers(compiled)) == largest


def test_what_all_iterations_of_a_loop_read_is_gathered_once():
    split, x = on_mesh(matrices(N, N), P("data")), on_mesh(jnp.ones([8, N]), P("data"))
    step = jax.value_and_grad(gather_where_used(read_by_a_loop, split_of(split)))
    text = jax.jit(step).lower(split, x).compile().as_text()
    inside = [
        line
        for line in text.splitlines()
        if " all-gather(" in line and f"[{N},{N}]" in line and "while/body" in line
    ]
    assert " all-gather(" in text
    assert not inside
