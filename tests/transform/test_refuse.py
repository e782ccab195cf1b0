"""Results that refuse derivatives: forward and reverse, under transforms, and beside what is differentiated."""

import jax
import jax.numpy as jnp
import pytest

from gradfn.transform.refuse import refuse_derivatives


def f(x):
    return refuse_derivatives({"square": x * x, "n": jnp.int32(3)}, "f: not differentiable")


@pytest.mark.parametrize(
    "around", [lambda f: f, jax.jit, jax.checkpoint, lambda f: lambda x: jax.vmap(f)(x[None])[0]]
)
def test_a_gradient_raises(around):
    with pytest.raises(TypeError, match="f: not differentiable"):
        jax.grad(around(lambda x: jnp.sum(jnp.sin(f(x)["square"]))))(jnp.ones(3))


def test_forward_mode_raises():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: f(x)["square"], (1.0,), (1.0,))


def test_values_and_aux_stay():
    assert float(jax.jit(f)(3.0)["square"]) == 9
    (_, aux), g = jax.value_and_grad(lambda x: (2 * x, f(x)), has_aux=True)(3.0)
    assert (float(aux["square"]), float(g)) == (9, 2)
