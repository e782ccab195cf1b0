"""Normalization layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gradfn.core.names import ParameterError
from gradfn.core.net import Net
from gradfn.core.params import Param, Params, Spec
from gradfn.core.precision import widen


def layer_norm(n: int, bias: bool = True, epsilon: float = 1e-5) -> Net:
    """Return a layer that normalizes each vector to mean 0 and variance 1, times a gain, plus a bias.

    Ba et al., *Layer Normalization*, 2016.

    Args:
        n: features.
        bias: whether to add a bias.
        epsilon: added to the variance.

    Returns:
        A net `[..., n] -> [..., n]` with `gain` `[n]` (ones) and `b` `[n]` (zeros).

    Raises:
        ParameterError: an input of another size.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> norm = gf.layers.layer_norm(2)
    >>> norm.apply(norm.init(jax.random.key(0)), jnp.array([-3.0, 5.0]))
    Array([-0.9999997,  0.9999997], dtype=float32)
    """
    spec = _gain_and_bias(n, "embed", bias)

    def apply(params: Params, x: jax.Array) -> jax.Array:
        gain, b = _aligned(params["gain"], x), params.get("b")
        wide = widen(x)
        centered = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centered).mean(-1, keepdims=True)
        y = (centered * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype) * gain
        return y if b is None else y + _aligned(b, x)

    return Net(spec, apply)


def rms_norm(n: int, epsilon: float = 1e-6, unit_offset: bool = False) -> Net:
    """Return a layer that normalizes each vector to root mean square 1, times a gain.

    Zhang and Sennrich, *Root Mean Square Layer Normalization*, 2019.

    Args:
        n: features.
        epsilon: added to the mean square.
        unit_offset: whether the parameter is the gain minus 1, as in Gemma. So half precision has its full accuracy
            near a gain of 1, and weight decay pulls the gain to 1. The product is computed in single precision.

    Returns:
        A net `[..., n] -> [..., n]` with `gain` `[n]` (ones), or `gain_offset` `[n]` (zeros).

    Raises:
        ParameterError: an input of another size.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> norm = gf.layers.rms_norm(2)
    >>> norm.apply(norm.init(jax.random.key(0)), jnp.array([3.0, -3.0]))
    Array([ 0.99999994, -0.99999994], dtype=float32)
    """

    def normalized(x: jax.Array) -> jax.Array:
        wide = widen(x)
        return wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + epsilon)

    def apply(params: Params, x: jax.Array) -> jax.Array:
        gain = _aligned(params["gain"], x)
        return normalized(x).astype(x.dtype) * gain

    def apply_with_offset(params: Params, x: jax.Array) -> jax.Array:
        offset = _aligned(params["gain_offset"], x, "gain_offset")
        y = normalized(x)
        return (y * (1 + offset.astype(y.dtype))).astype(x.dtype)

    if unit_offset:
        return Net({"gain_offset": Param((n,), axes=("embed",))}, apply_with_offset)
    return Net(_gain_and_bias(n, "embed", bias=False), apply)


def group_norm(n: int, groups: int, bias: bool = True, epsilon: float = 1e-5) -> Net:
    """Return a layer that normalizes each group of channels, over all positions, to mean 0 and variance 1.

    Wu and He, *Group Normalization*, 2018. With one group it is a layer norm over the whole example, with `n`
    groups an instance norm.

    Args:
        n: channels.
        groups: groups of channels that are normalized separately.
        bias: whether to add a bias.
        epsilon: added to the variance.

    Returns:
        A net `[..., n] -> [..., n]` with `gain` `[n]` (ones) and `b` `[n]` (zeros).

    Raises:
        ValueError: groups that do not divide the channels.
        ParameterError: an input with another number of channels.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> norm = gf.layers.group_norm(2, 2)
    >>> norm.apply(norm.init(jax.random.key(0)), jnp.array([[1.0, 10.0], [3.0, 30.0]])).round(3)
    Array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    """
    if n % groups:
        raise ValueError(f"group_norm: groups must divide the number of channels, got {groups} for {n}")
    spec = _gain_and_bias(n, "channels", bias)

    def apply(params: Params, x: jax.Array) -> jax.Array:
        gain, b = _aligned(params["gain"], x), params.get("b")
        grouped = widen(x).reshape(-1, groups, n // groups)  # [..., n] -> [positions, groups, n / groups]
        centered = grouped - grouped.mean((0, 2), keepdims=True)
        variance = jnp.square(centered).mean((0, 2), keepdims=True)
        y = (centered * jax.lax.rsqrt(variance + epsilon)).reshape(x.shape).astype(x.dtype) * gain
        return y if b is None else y + _aligned(b, x)

    return Net(spec, apply)


def _gain_and_bias(n: int, axis: str, bias: bool) -> Spec:
    spec = {"gain": Param((n,), jax.nn.initializers.ones, axes=(axis,))}
    return spec | ({"b": Param((n,), axes=(axis,))} if bias else {})


def _aligned(gain: jax.Array, x: jax.Array, name: str = "gain") -> jax.Array:
    if x.ndim == 0 or x.shape[-1] != gain.shape[0]:
        expected = f"{name} is {list(gain.shape)}, expected an input of [..., {gain.shape[0]}]"
        raise ParameterError(name, f"{expected}, got {list(x.shape)}")
    return gain.reshape((1,) * (x.ndim - 1) + gain.shape)  # [n] -> [1, ..., n]
