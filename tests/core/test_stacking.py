import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradfn.core.stacking import SMALL, stacked
from gradfn.train.chunk import all_finite
from gradfn.train.measures import norm


def parameters(n):
    """Return 2n parameters of two shapes, and one that is too large to be copied."""
    rng = np.random.default_rng(0)
    layers = [
        {"W": rng.normal(size=(4, 3)).astype("f"), "b": rng.normal(size=4).astype("f")} for _ in range(n)
    ]
    return {"layers": layers, "large": rng.normal(size=SMALL + 1).astype("f")}


def test_every_number_is_in_one_of_the_stacks():
    arrays = [jnp.arange(3.0), jnp.arange(3), jnp.ones([2, 2]), jnp.arange(3.0) + 3, jnp.arange(SMALL + 1.0)]
    found = stacked(arrays)
    assert [array.shape for array in found] == [(2, 3), (1, 3), (1, 2, 2), (SMALL + 1,)]
    before = sorted(float(x) for array in arrays for x in array.ravel())
    assert sorted(float(x) for array in found for x in array.ravel()) == before


def test_the_norm_of_many_small_arrays_has_as_many_reductions_as_shapes():
    """One reduction for each of hundreds of parameters takes XLA minutes to compile."""
    program = str(jax.make_jaxpr(norm)(parameters(100)))
    assert program.count("reduce_max") == 3 + 1
    assert program.count("reduce_sum") == 3 + 1
    assert str(jax.make_jaxpr(all_finite)(parameters(100))).count("reduce_and") == 3 + 1


@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25])
def test_the_norm_is_that_of_one_long_vector(scale):
    params = jax.tree.map(lambda x: x * np.float32(scale), parameters(3))
    vector = np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(params)])
    np.testing.assert_allclose(float(jax.jit(norm)(params)), np.linalg.norm(vector), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("path", ["small", "large"])
def test_one_bad_number_is_found(path, bad):
    params = parameters(3)
    assert all_finite(params)
    (params["layers"][1]["W"] if path == "small" else params["large"]).flat[5] = bad
    assert not jax.jit(all_finite)(params)
