"""Recurrent layers: a state that is updated by each input of a sequence."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from gradfn.core.names import tap
from gradfn.core.net import Net
from gradfn.core.params import Param, Params, Spec
from gradfn.layers._dense import affine

# (Wx x + b, Wh h, state, params) -> (state, output); the first two are [gates * hidden], the rest [hidden]. The tapped
# value is the one that is carried to the next step, so its gradient is the sum over all later steps.
Cell = Callable[[jax.Array, jax.Array, PyTree, Params], tuple[PyTree, jax.Array]]


def vanilla_rnn(n_in: int, hidden: int) -> Net:
    """Return the plain recurrent layer, `h = tanh(Wx x + Wh h + b)`.

    Elman, *Finding structure in time*, 1990. All recurrent layers are called in one of two ways:

    - `apply(params, x)` takes `[T, n_in]` and returns the states `[T, hidden]`;
    - `apply(params, x, state=state)` continues from a state and returns `(states, last state)`; the first state is
      `recurrent_state(layer)`.

    Args:
        n_in: features of the input.
        hidden: features of the state.

    Returns:
        A net with `Wx` `[hidden, n_in]`, `Wh` `[hidden, hidden]`, `b` `[hidden]`. The states are tapped as `h`.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> layer = gf.layers.vanilla_rnn(3, 8)
    >>> layer.apply(layer.init(jax.random.key(0)), jnp.ones([5, 3])).shape
    (5, 8)
    """

    def cell(zx: jax.Array, zh: jax.Array, h: jax.Array, params: Params) -> tuple[jax.Array, jax.Array]:
        h = tap(jnp.tanh(zx + zh), "h")
        return h, h

    return _recurrent(n_in, hidden, 1, {}, cell)


def gru(n_in: int, hidden: int) -> Net:
    """Return a gated recurrent unit, whose gates control what of the state is kept and what is read.

    Cho et al., *Learning Phrase Representations using RNN Encoder-Decoder*, 2014, in the form of cuDNN and
    PyTorch: the reset gate `r` multiplies the state's contribution, which has its own bias,
    `n = tanh(Wx x + b + r (Wh h + bn))`, and `h = (1 - z) n + z h`.

    Args:
        n_in: features of the input.
        hidden: features of the state.

    Returns:
        A net like `vanilla_rnn`'s, with `Wx` `[3 hidden, n_in]`, `Wh` `[3 hidden, hidden]`, `b` `[3 hidden]` (reset,
        update, new) and `bn` `[hidden]`.

    >>> import gradfn as gf
    >>> gf.shapes(gf.layers.gru(3, 8).spec)
    {'Wh': [24, 8], 'Wx': [24, 3], 'b': [24], 'bn': [8]}
    """

    def cell(zx: jax.Array, zh: jax.Array, h: jax.Array, params: Params) -> tuple[jax.Array, jax.Array]:
        (rx, ux, nx), (rh, uh, nh) = jnp.split(zx, 3), jnp.split(zh, 3)
        reset, update = jax.nn.sigmoid(rx + rh), jax.nn.sigmoid(ux + uh)
        new = jnp.tanh(nx + reset * (nh + params["bn"]))
        h = tap((1 - update) * new + update * h, "h")
        return h, h

    return _recurrent(n_in, hidden, 3, {"bn": Param((hidden,), axes=(None,))}, cell)


def lstm(n_in: int, hidden: int) -> Net:
    """Return a long short-term memory: a cell with input, forget and output gates.

    Hochreiter and Schmidhuber, *Long Short-Term Memory*, 1997; with the forget gate of Gers et al., 2000, whose
    bias is initialized to 1 (Jozefowicz et al., 2015).

    Args:
        n_in: features of the input.
        hidden: features of the state and of the cell.

    Returns:
        A net like `vanilla_rnn`'s, with `Wx` `[4 hidden, n_in]`, `Wh` `[4 hidden, hidden]`, `b` `[4 hidden]` (input,
        forget, cell, output). Cells are tapped as `c`.

    >>> import gradfn as gf
    >>> gf.shapes(gf.layers.lstm(3, 8).spec)
    {'Wh': [32, 8], 'Wx': [32, 3], 'b': [32]}
    """

    def forget_bias_of_one(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        return jnp.zeros(shape, dtype).at[hidden : 2 * hidden].set(1)

    def cell(zx: jax.Array, zh: jax.Array, state: PyTree, params: Params) -> tuple[PyTree, jax.Array]:
        i, f, g, o = jnp.split(zx + zh, 4)
        c = tap(jax.nn.sigmoid(f) * state["c"] + jax.nn.sigmoid(i) * jnp.tanh(g), "c")
        h = tap(jax.nn.sigmoid(o) * jnp.tanh(c), "h")
        return {"h": h, "c": c}, h

    return _recurrent(n_in, hidden, 4, {"b": Param((4 * hidden,), forget_bias_of_one, axes=(None,))}, cell)


def recurrent_state(layer: Net, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Return the state of a recurrent layer before its first input: zeros.

    >>> import gradfn as gf
    >>> gf.shapes(gf.layers.recurrent_state(gf.layers.lstm(3, 8)))
    {'c': [8], 'h': [8]}
    """
    gates, hidden = layer.spec["Wh"].shape
    zeros = jnp.zeros((hidden,), dtype)
    # Separate buffers, because generation donates them.
    return {"h": zeros, "c": jnp.zeros((hidden,), dtype)} if gates == 4 * hidden else zeros


def _recurrent(n_in: int, hidden: int, gates: int, more: Spec, cell: Cell) -> Net:
    scale = jax.nn.initializers.orthogonal(column_axis=0)

    def orthogonal(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        # One orthogonal matrix per gate: it preserves the norm of gradients through time (Saxe et al., 2014).
        each = [scale(k, (hidden, hidden), dtype) for k in jax.random.split(key, gates)]
        return jnp.concatenate(each)

    spec = {
        # Split nodes would be collected at each step of time.
        "Wx": Param((gates * hidden, n_in), axes=(None, "mlp_in")),
        "Wh": Param((gates * hidden, hidden), orthogonal, axes=(None, "mlp_in")),
        "b": Param((gates * hidden,), axes=(None,)),
    } | more

    def apply(params: Params, x: jax.Array, state: PyTree = None) -> PyTree:
        zx = affine(params["Wx"], params["b"], x, "Wx")  # [T, gates * hidden], all inputs in one product
        first = recurrent_state(net, zx.dtype) if state is None else state

        def step(state: PyTree, zx: jax.Array) -> tuple[PyTree, jax.Array]:
            h = state["h"] if isinstance(state, dict) else state
            return cell(zx, affine(params["Wh"], None, h, "Wh"), state, params)

        last, hs = jax.lax.scan(step, first, zx)
        return hs if state is None else (hs, last)

    net = Net(spec, apply)
    return net
