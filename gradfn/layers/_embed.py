"""Embeddings: vectors for tokens, and for their positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gradfn.core.devices import rows_sharding
from gradfn.core.names import ParameterError
from gradfn.core.net import Net
from gradfn.core.params import Param, Params
from gradfn.layers._rope import frequencies_of


def embed(n: int, width: int) -> Net:
    """Return a layer that looks up a learned vector for each of `n` tokens (or positions).

    Args:
        n: the vocabulary size (or the number of positions).
        width: the size of each vector.

    Returns:
        A net from integers `[...]` in [0, n) to `[..., width]`, with `W` `[n, width]`. An integer out of range
        gives NaN, because compiled code cannot raise.

    Raises:
        ParameterError: an input whose dtype is not an integer type.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> layer = gf.layers.embed(65, 128)
    >>> layer.apply(layer.init(jax.random.key(0)), jnp.array([7, 7, 64])).shape
    (3, 128)
    """
    spec = {"W": Param((n, width), jax.nn.initializers.normal(1.0), axes=("vocab", "embed"))}

    def apply(params: Params, tokens: jax.Array) -> jax.Array:
        return look_up(params["W"], tokens)

    return Net(spec, apply)


def look_up(W: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return the rows of `W` `[n, width]` for integers `[...]`; NaN for those that are not in [0, n)."""
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        message = f"expected integer indices, got {list(tokens.shape)} {tokens.dtype}"
        raise ParameterError("W", f"{message}. Cast them: x.astype(jnp.int32)")
    W = jnp.asarray(W)
    return W.at[tokens].get(
        mode="fill", fill_value=jnp.nan, wrap_negative_indices=False, out_sharding=rows_sharding(W, tokens)
    )


def sinusoidal(n: int, width: int, base: float = 10_000.0) -> jax.Array:
    """Return fixed position vectors for positions 0 to n-1: sines and cosines of increasing wavelengths.

    Vaswani et al., *Attention Is All You Need*, 2017, section 3.5: the sine and cosine of frequency `i` are
    features `2i` and `2i + 1`.

    Args:
        n: positions.
        width: features; an even number.
        base: the longest wavelength is close to `2 pi base`.

    Returns:
        `[n, width]` float32.

    Raises:
        ValueError: an odd width.

    >>> import gradfn as gf
    >>> gf.layers.sinusoidal(2, 2)
    Array([[0.        , 1.        ],
           [0.84147096, 0.5403023 ]], dtype=float32)
    """
    if width % 2:
        raise ValueError(f"sinusoidal: width must be even, got {width}")
    angles = np.arange(n)[:, None] * frequencies_of(width, base)  # [n, width / 2]
    return jnp.asarray(np.stack([np.sin(angles), np.cos(angles)], -1).reshape(n, width), jnp.float32)
