"""Where a few digits are not enough: sums of squares and of exponentials are taken in float32 at least."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def wide(dtype: Any) -> Any:
    """Return float32 for the narrower floats (float16, bfloat16), and any other dtype as it is."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def widen(x: jax.Array) -> jax.Array:
    """Cast an array of narrow floats to float32."""
    return x.astype(wide(x.dtype))
