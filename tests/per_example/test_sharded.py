"""Per-example transforms of batches and parameters on eight simulated devices, against one device."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gradfn as gf
from tests.inspection.test_sharded import KINDS, ambient, mesh_of, same, spread

KEYS = jax.random.split(jax.random.key(0), 8)


def hidden_split(params, x):
    h = jnp.tanh(jnp.einsum("i,oi->o", x[0], params["W1"]) + params["b1"])
    return jnp.mean(jnp.einsum("o,co->c", h, params["W2"], out_sharding=spread()) ** 2)


def positions(params, x):
    """Return a loss with a product over positions, a gain, and a parameter that falls back."""
    h = jnp.tanh(x @ params["W"]) * params["g"][None]
    return jnp.mean((h @ jnp.sin(params["V"])) ** 2)


def recurrent(params, x):
    def step(h, x):
        return jnp.tanh(params["U"] @ h + params["W"] @ x), None

    return jnp.mean(lax.scan(step, jnp.zeros(8), x)[0] ** 2)


def attention(params, x):
    q, k, v = (jnp.einsum("td,hed->the", x, params[name]) for name in "qkv")
    mixed = jnp.einsum("hts,she->the", jax.nn.softmax(jnp.einsum("the,she->hts", q, k)), v)
    return jnp.mean(jnp.einsum("the,dhe->td", mixed, params["o"], out_sharding=spread()) ** 2)


def embedded(params, x):
    ids = jnp.argmax(x, axis=1)
    rows = params["E"].at[ids].get(out_sharding=spread())
    return jnp.mean((jnp.tanh(rows) @ params["W"]) ** 2)


def normal(i, *shape):
    return jax.random.normal(KEYS[i], shape) / 2


X = normal(0, 8, 6, 8)
# Loss of one example, parameters, how those are split.
LOSSES = {
    "hidden split": (
        hidden_split,
        {"W1": normal(1, 16, 8), "b1": normal(2, 16), "W2": normal(3, 4, 16)},
        {"W1": P("model"), "b1": P("model"), "W2": P(None, "model")},
    ),
    "positions": (positions, {"W": normal(1, 8, 40), "g": normal(2, 40), "V": normal(3, 40, 40)}, {}),
    "recurrent": (recurrent, {"U": normal(1, 8, 8), "W": normal(2, 8, 8)}, {}),
    "embedded": (embedded, {"E": normal(1, 8, 16), "W": normal(2, 16, 8)}, {}),
    "attention": (
        attention,
        {name: normal(1 + i, 2, 4, 8) for i, name in enumerate("qkv")} | {"o": normal(4, 8, 2, 4)},
        {**dict.fromkeys("qkv", P("model")), "o": P(None, "model")},
    ),
}


def placed(mesh, params, specs, x):
    split = {name: NamedSharding(mesh, specs.get(name, P())) for name in params}
    return jax.device_put(params, split), jax.device_put(x, NamedSharding(mesh, P("data")))


def everything(loss):
    of = gf.per_example

    def run(params, x):
        # Where axes cannot be merged, norms are found and gradients are clipped in other ways.
        clipped = dataclasses.replace(of.clipped_grads(loss, 0.1)(params, x), second_pass=())
        norms = dataclasses.replace(of.norms(loss, chunk=3)(params, x), methods=())
        compared = of.grad_cosines(loss)(params, x)
        return norms, clipped, of.grads(loss)(params, x), of.noise_scale(loss)(params, x), compared

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [("hidden split", AxisType.Auto), *[(name, AxisType.Explicit) for name in LOSSES]]
)
def test_per_example_transforms_on_eight_devices_equal_one_device(name, kind):
    loss, params, specs = LOSSES[name]
    mesh = mesh_of(kind)
    with ambient(mesh):
        got = jax.jit(everything(loss))(*placed(mesh, params, specs, X))
    same(got, jax.jit(everything(loss))(params, X))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_norms_that_are_not_compiled_and_their_derivatives_equal_one_device(kind):
    loss, params, specs = LOSSES["hidden split"]
    mesh = mesh_of(kind)

    def penalty(params, x):
        return jnp.mean(gf.per_example.norms(loss)(params, x).total)

    with ambient(mesh):
        args = placed(mesh, params, specs, X)
        norms = gf.per_example.norms(loss)(*args)
        slope = jax.jit(jax.grad(penalty))(*args)
    same((norms, slope), (gf.per_example.norms(loss)(params, X), jax.grad(penalty)(params, X)))


@pytest.mark.parametrize("kind", KINDS)
def test_norms_need_one_collective_more_than_the_gradient(kind):
    """Whether all norms are safe is decided together, for all examples and parameters."""
    mesh = jax.make_mesh((8,), ("data",), (kind,))
    net = gf.mlp([8, 16, 16, 4])
    loss = gf.classification_loss(net)
    params, x = placed(mesh, net.init(jax.random.key(0)), {}, X[:, 0])
    batch = x, jax.device_put(jnp.arange(8) % 4, NamedSharding(mesh, P("data")))
    with ambient(mesh):
        text = jax.jit(gf.per_example.norms(loss)).lower(params, batch).compile().as_text()
    found = re.findall(
        r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text
    )
    assert found == ["all-reduce"] * 2
