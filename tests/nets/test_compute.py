"""Nets that compute in bfloat16, with parameters, gradients, norms, softmax and losses in float32."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Literal

import gradfn as gf
from gradfn.jaxpr import trace

NARROW = jnp.dtype("bfloat16")
GPT = {"vocab": 17, "context": 8, "n_layers": 1, "n_heads": 2, "width": 16}
LLAMA = {"n_kv_heads": 1, "positions": "rope", "norm": "rms", "feed": "swiglu", "bias": False, "tied": False}
VIT = {"image": (8, 8, 1), "patch": 4, "classes": 3, "n_layers": 1, "n_heads": 2, "width": 16}
NETS = {
    "gpt": lambda dtype: gf.gpt(gf.GPTConfig(**GPT, compute=dtype)),
    "gpt, scanned": lambda dtype: gf.gpt(gf.GPTConfig(**GPT | {"n_layers": 2}, scan=True, compute=dtype)),
    "llama": lambda dtype: gf.gpt(gf.GPTConfig(**GPT, **LLAMA, compute=dtype)),
    "vit": lambda dtype: gf.vit(gf.ViTConfig(**VIT, compute=dtype)),
    "cnn": lambda dtype: gf.cnn([8, 8, 1], [4, 8], [16], 3, compute=dtype),
}
names = pytest.mark.parametrize("name", NETS)
slow_but_cnn = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "cnn" else pytest.mark.slow) for name in NETS]
)


def prepared(name):
    """Return both losses of a batch, parameters and a batch of learnable examples."""
    nets = [NETS[name](dtype) for dtype in ("bfloat16", None)]
    if name in ("vit", "cnn"):
        x = jax.random.normal(jax.random.key(1), [16, 64])
        batch, loss = (x, jnp.argmax(x[:, :3], 1)), gf.classification_loss
    else:
        tokens = jnp.asarray((np.arange(9) + np.arange(16)[:, None]) % 17, jnp.int32)
        batch, loss = (tokens[:, :-1], tokens[:, 1:]), gf.next_token_loss
    return [gf.batch_mean(loss(net)) for net in nets], jax.jit(nets[1].init)(jax.random.key(0)), batch


@names
def test_products_are_narrow_and_norms_softmax_and_loss_are_not(name):
    (rough, _), params, batch = prepared(name)
    narrow = 0
    for equation in trace(rough, params, batch).equations().values():
        dtypes = {v.aval.dtype for v in equation.eqn.invars if not isinstance(v, Literal)}
        operation = equation.eqn.primitive.name
        narrow += operation in ("dot_general", "conv_general_dilated", "cond") and NARROW in dtypes
        # Of softmax and loss; of norms; of both and of means.
        if operation in ("exp", "log", "rsqrt", "reduce_sum"):
            assert NARROW not in dtypes, equation
    assert narrow >= 3


@slow_but_cnn
def test_values_and_gradients_are_close_to_those_in_float32(name):
    losses, params, batch = prepared(name)
    (value, grads), (exact, exact_grads) = (
        jax.jit(jax.value_and_grad(loss))(params, batch) for loss in losses
    )
    assert value.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    # Each of some tens of roundings in a row has a relative error of up to 2^-9.
    np.testing.assert_allclose(value, exact, rtol=0.01)
    grads, exact_grads = (jax.flatten_util.ravel_pytree(tree)[0] for tree in (grads, exact_grads))
    assert 0 < jnp.linalg.norm(grads - exact_grads) < 0.03 * jnp.linalg.norm(exact_grads)


@slow_but_cnn
def test_it_learns_as_in_float32(name):
    losses, params, batch = prepared(name)
    optimizer = optax.adam(0.01)

    def train(loss):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        (trained, _), values = jax.lax.scan(step, (params, optimizer.init(params)), length=60)
        return trained, values

    # optax relies on promotion.
    with jax.numpy_dtype_promotion("standard"):
        (trained, values), (_, exact) = (jax.jit(train, static_argnums=0)(loss) for loss in losses)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    assert exact[-1] < 0.3 * exact[0]
    assert values[-1] < 0.3 * values[0]
