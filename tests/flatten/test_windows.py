import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradfn.flatten.windows import conv_as_product


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "window", "stride", "dilation", "padding"),
    [
        ((9,), (3,), 1, 1, "SAME"),
        ((9,), (3,), 2, 2, "VALID"),
        ((8, 11), (3, 2), 1, 1, "VALID"),
        ((8, 11), (3, 2), 3, 1, "SAME"),
        ((8, 11), (3, 2), 1, 2, "SAME"),
        ((7, 7), (5, 5), 2, 1, "SAME"),
    ],
)
def test_the_product_form_equals_convolution_with_its_gradients(shape, window, stride, dilation, padding):
    x = jax.random.normal(jax.random.key(0), [*shape, 3])
    W = jax.random.normal(jax.random.key(1), [4, 3, *window])
    axes = "HW"[: len(shape)]

    def expected(x, W):
        layout = (f"N{axes}C", f"OI{axes}", f"N{axes}C")
        strides, dilations = (stride,) * len(shape), (dilation,) * len(shape)
        return jax.lax.conv_general_dilated(x[None], W, strides, padding, None, dilations, layout)[0]

    def found(x, W):
        return conv_as_product(x, W, stride, padding, dilation)

    np.testing.assert_allclose(found(x, W), expected(x, W), rtol=1e-4, atol=1e-5)
    gradients = [jax.grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), (0, 1))(x, W) for f in (found, expected)]
    chex.assert_trees_all_close(*gradients, rtol=1e-3, atol=1e-4)
