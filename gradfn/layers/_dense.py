"""The dense layer: every input connected to every node."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradfn.core.names import ParameterError
from gradfn.core.net import Net
from gradfn.core.params import Param, Params


def affine(W: jax.Array, b: jax.Array | None, x: jax.Array, name: str = "W") -> jax.Array:
    """Return the weighted sums `W x + b` of each node.

    Args:
        W: `[out, in]`; row `i` contains the weights into node `i`.
        b: `[out]`, or None.
        x: `[..., in]`.
        name: the name of `W` in errors.

    Returns:
        `[..., out]`.

    Raises:
        ParameterError: the last axis of `x` is not `in`, or its dtype is not that of `W`.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> gf.layers.affine(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([-10.0]), jnp.ones(3))
    Array([-4.], dtype=float32)
    """
    x = jnp.asarray(x)
    n_out, n_in = W.shape
    if x.ndim == 0 or x.shape[-1] != n_in:
        message = f"{name} is [{n_out}, {n_in}], expected an input of [..., {n_in}], got {list(x.shape)}"
        raise ParameterError(name, message)
    if x.dtype != W.dtype:
        cast = f"x.astype(jnp.{W.dtype})" + (" / 255" if x.dtype == jnp.uint8 else "")
        message = f"{name} is {W.dtype}, expected an input of {W.dtype}, got {x.dtype}. Cast it: {cast}"
        raise ParameterError(name, message)
    # Contract the last axes: [..., in] x [out, in] -> [..., out]. Under vmap the batch axis stays in front, so XLA
    # gets one plain matrix product without transposes.
    z = jax.lax.dot_general(x, W, (((x.ndim - 1,), (1,)), ((), ())))
    return z if b is None else z + b.reshape((1,) * (z.ndim - 1) + b.shape)  # [out] -> [1, ..., out]


def dense(n_in: int, n_out: int, bias: bool = True) -> Net:
    """Return a layer of `n_out` nodes, each connected to all `n_in` inputs.

    Args:
        n_in: inputs of each node.
        n_out: nodes.
        bias: whether each node has a bias.

    Returns:
        A net `[..., n_in] -> [..., n_out]` with `W` `[n_out, n_in]` and `b` `[n_out]`.

    Raises:
        ParameterError: an input of another size.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> layer = gf.layers.dense(784, 16)
    >>> layer.apply(layer.init(jax.random.key(0)), jnp.zeros(784)).shape
    (16,)
    """
    spec = {"W": Param((n_out, n_in), axes=("mlp", "mlp_in"))}
    spec |= {"b": Param((n_out,), axes=("mlp",))} if bias else {}

    def apply(params: Params, x: jax.Array) -> jax.Array:
        return affine(params["W"], params.get("b"), x)

    return Net(spec, apply)
