"""A keyword of the user's function reaches the user's function, whatever tool is around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf


def f(w, x, step=0):
    return w * x + step


def test_a_losss_own_keyword_is_not_swallowed_by_inspect():
    assert float(gf.inspect(f)(1.0, 2.0, step=9).value) == 11
    assert float(jax.jit(gf.inspect(f))(1.0, 2.0, step=9.0).value) == 11
    assert float(gf.inspect(lambda w, x, step=5: w * x + step)(1.0, 2.0).value) == 7


def test_parameters_by_keyword_are_differentiated():
    by_keyword = gf.inspect(lambda params, x: params * x)(x=2.0, params=3.0)
    assert float(by_keyword.grads) == 2
    other = gf.inspect(lambda w, x, *, params: w * x * params)(3.0, 2.0, params=5.0)
    assert float(other.value) == 30
    assert float(other.grads) == 10
    with pytest.raises(TypeError, match="expected the parameters as the first argument"):
        gf.inspect(lambda w, x: w * x)(x=2.0)


@pytest.mark.parametrize(
    "tool",
    [
        gf.inspect,
        gf.backprop,
        gf.nan_origin,
        gf.nan_guard,
        gf.batch_mean,
        gf.sites,
        gf.capture,
        lambda f: gf.patch(f, {}),
    ],
)
def test_no_tool_takes_a_keyword_of_the_users_function_for_its_own(tool):
    received = []

    def loss(w, x, **own):
        received.append(set(own))
        return jnp.sum(w * x)

    own = dict.fromkeys(["f", "loss", "step", "key", "args", "kwargs", "program", "self"], 2.0)
    tool(loss)(jnp.ones(2), jnp.ones(2), **own)
    assert set(own) == received[0]


def test_batch_mean_splits_random_keys_and_passes_every_other_key():
    x = jnp.array([1.0, 2.0])
    assert float(gf.batch_mean(lambda w, x, key=0: w * x + key)(1.0, x, key=7.0)) == 8.5
    assert (
        float(gf.batch_mean(lambda w, x, key=1.0: w * x * (2.0 if key is None else 1.0))(1.0, x, key=None))
        == 3
    )
    assert float(gf.batch_mean(lambda w, x, batch: w * x + batch)(1.0, x, batch=1.0)) == 2.5

    def noisy(w, x, key):
        return w * x + jax.random.normal(key)

    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        expected = x.mean() + jnp.mean(jax.vmap(jax.random.normal)(jax.random.split(key)))
        np.testing.assert_allclose(gf.batch_mean(noisy)(1.0, x, key=key), expected, rtol=1e-6)
