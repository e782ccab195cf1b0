"""Convolution and pooling: a small window of weights slid over time or over an image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gradfn.core.names import ParameterError
from gradfn.core.net import Net
from gradfn.core.params import Param, Params
from gradfn.flatten.windows import conv_as_product

_SPATIAL = {1: "H", 2: "HW"}


def conv(
    n_in: int,
    n_out: int,
    window: Sequence[int],
    stride: int = 1,
    padding: str = "SAME",
    dilation: int = 1,
    groups: int = 1,
    bias: bool = True,
) -> Net:
    """Return a convolution over time (a window with one axis) or over an image (with two axes).

    LeCun et al., *Gradient-based learning applied to document recognition*, 1998. As usual in deep learning, the
    kernel is not flipped: this is cross-correlation.

    Args:
        n_in: input channels.
        n_out: output channels.
        window: `[time]` or `[height, width]`.
        stride: step of the window.
        padding: `"SAME"` (zeros around, as many outputs as inputs at stride 1) or `"VALID"` (no padding).
        dilation: distance between the window's inputs.
        groups: groups of channels that are convolved separately; `n_in` groups give a depthwise convolution.
        bias: whether each output channel has a bias.

    Returns:
        A net `[T, n_in] -> [T', n_out]` or `[H, W, n_in] -> [H', W', n_out]` (channels last) with `W`
        `[n_out, n_in / groups, *window]` and `b` `[n_out]`.

    Raises:
        ValueError: a window without one or two axes, or groups that do not divide the channels.
        ParameterError: an input of another rank or with another number of channels.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> layer = gf.layers.conv(1, 8, [5, 5])
    >>> gf.shapes(layer.spec), layer.apply(layer.init(jax.random.key(0)), jnp.zeros([28, 28, 1])).shape
    ({'W': [8, 1, 5, 5], 'b': [8]}, (28, 28, 8))
    """
    window = tuple(window)
    n = len(window)
    if n not in _SPATIAL:
        raise ValueError(f"conv: window must be [time] or [height, width], got {list(window)}")
    if n_in % groups or n_out % groups:
        raise ValueError(f"conv: groups must divide n_in and n_out, got {groups} for {n_in} and {n_out}")
    axes = _SPATIAL[n]
    layout = (f"N{axes}C", f"OI{axes}", f"N{axes}C")
    spec = {"W": Param((n_out, n_in // groups, *window), axes=("channels", "channels_in", *(None,) * n))}
    spec |= {"b": Param((n_out,), axes=("channels",))} if bias else {}

    def as_product(x: jax.Array, W: jax.Array) -> jax.Array:
        return conv_as_product(x, W, stride, padding, dilation)

    # One operation: what inspects a program takes the choice between the two forms for it (`jaxpr.stands_for`).
    def convolve(x: jax.Array, W: jax.Array) -> jax.Array:
        z = jax.lax.conv_general_dilated(
            x[None],  # [H, W, n_in] -> [1, H, W, n_in]; under vmap the batch is merged into the new axis
            W,
            window_strides=(stride,) * n,
            padding=padding,
            rhs_dilation=(dilation,) * n,
            dimension_numbers=layout,
            feature_group_count=groups,
        )
        return jnp.squeeze(z, 0)  # [1, H', W', n_out] -> [H', W', n_out]

    def apply(params: Params, x: jax.Array) -> jax.Array:
        W, b = jnp.asarray(params["W"]), params.get("b")
        x = jnp.asarray(x)
        if x.ndim != n + 1 or x.shape[-1] != n_in or x.dtype != W.dtype:
            expected = f"[{'T' if n == 1 else 'H, W'}, {n_in}] {W.dtype}"
            message = f"W is {list(W.shape)}, expected an input of {expected}, got {list(x.shape)} {x.dtype}"
            raise ParameterError("W", message + _hint(x, n, n_in))
        if groups == 1:
            # Chosen when the program is compiled, for the platform that it is compiled for.
            z = jax.lax.platform_dependent(x, W, cpu=as_product, default=convolve)
        else:
            z = convolve(x, W)
        return z if b is None else z + b.reshape((1,) * n + b.shape)  # [n_out] -> [1, 1, n_out]

    return Net(spec, apply)


def max_pool(window: Sequence[int], stride: int | None = None) -> Net:
    """Return a layer that takes the maximum of each window, channel by channel.

    Args:
        window: `[time]` or `[height, width]`.
        stride: step of the window; by default the windows do not overlap, and a remainder at the end is dropped.

    Returns:
        A net without parameters, `[T, C] -> [T', C]` or `[H, W, C] -> [H', W', C]`.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> gf.layers.max_pool([2]).apply({}, jnp.array([[1.0], [3.0], [2.0], [0.0], [9.0]]))
    Array([[3.],
           [2.]], dtype=float32)
    """
    return _pool("max_pool", window, stride)


def avg_pool(window: Sequence[int], stride: int | None = None) -> Net:
    """Return a layer that takes the mean of each window, channel by channel: see `max_pool`.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> gf.layers.avg_pool([2]).apply({}, jnp.array([[1.0], [3.0], [2.0], [0.0]]))
    Array([[2.],
           [1.]], dtype=float32)
    """
    return _pool("avg_pool", window, stride)


def _pool(name: str, window: Sequence[int], stride: int | None) -> Net:
    window = tuple(window)
    steps = window if stride is None else (stride,) * len(window)

    def apply(params: Params, x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        if x.ndim != len(window) + 1:
            raise ValueError(f"{name}: expected {len(window)} axes and channels, got shape {list(x.shape)}")
        if steps == window:
            # A reshape yields windows that do not overlap; XLA's reduce_window takes twice the time on CPUs.
            n = [length // size for length, size in zip(x.shape, window, strict=False)]
            x = x[tuple(slice(count * size) for count, size in zip(n, window, strict=True))]
            x = x.reshape(*(each for pair in zip(n, window, strict=True) for each in pair), -1)
            axes = tuple(range(1, 2 * len(n), 2))  # [H', height, W', width, C]
            return x.max(axes) if name == "max_pool" else x.mean(axes)
        of_all = ((*window, 1), (*steps, 1), "VALID")
        if name == "max_pool":
            return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, *of_all)
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, *of_all) / math.prod(window)

    return Net({}, apply)


def _hint(x: jax.Array, n: int, n_in: int) -> str:
    if x.ndim == n and n_in == 1:
        return ". Add a channel axis: x[..., None]"
    if x.ndim == n + 1 and x.shape[0] == n_in:
        return ". Channels come last: jnp.moveaxis(x, 0, -1)"
    if x.ndim == n + 2:
        return ". For a batch: jax.vmap(net.apply, (None, 0))(params, x)"
    return ""
