"""Norms of values whose squares overflow or underflow, compared with numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradfn.core.precision import norm

scales = st.integers(-36, 37)


@settings(deadline=None, max_examples=10)
@given(st.lists(scales, min_size=6, max_size=6), st.booleans(), st.integers(0, 2**20))
def test_norms_of_any_magnitude(exponents, is_complex, seed):
    """Rows of different magnitudes, each with elements of several magnitudes."""
    random = np.random.default_rng(seed)
    x = random.uniform(1, 2, (3, 6)) * 10.0 ** np.array(exponents)
    x = (x + 1j * x[:, ::-1]).astype(np.complex64) if is_complex else x.astype(np.float32)
    expected = np.linalg.norm(x.astype(np.complex128), axis=1)
    np.testing.assert_allclose(norm(jnp.asarray(x), 1), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(norm)(jnp.asarray(x)), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(norm)(jnp.asarray(x)), np.linalg.norm(expected), rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "expected"), [([], 0), ([0, 0], 0), ([np.inf, 1], np.inf), ([np.nan, np.inf], np.nan)]
)
def test_norms_of_empty_and_non_finite_arrays(x, expected):
    np.testing.assert_equal(float(norm(jnp.array(x, jnp.float32))), expected)


def test_norms_of_narrow_floats_are_float32():
    assert float(norm(jnp.array([3e4, 4e4], jnp.float16))) == 5e4
    assert norm(jnp.zeros((3, 0), jnp.bfloat16), 1).dtype == jnp.float32
