"""The feed-forward layers of a transformer block, which apply to each position independently."""

from __future__ import annotations

import jax

from gradfn.core.axes import with_axes
from gradfn.core.names import scope, tap
from gradfn.core.net import Net
from gradfn.core.params import Params
from gradfn.layers._activations import Activation, activation
from gradfn.layers._dense import dense


def feed_forward(width: int, hidden: int, squash: str | Activation = "gelu", bias: bool = True) -> Net:
    """Return two dense layers, up to `hidden` nodes and back down, applied to each position independently.

    Vaswani et al., *Attention Is All You Need*, 2017, section 3.3. The hidden activations are tapped as `hidden`.

    Args:
        width: features of a position.
        hidden: hidden nodes, often `4 * width`.
        squash: the hidden activation, a name from `gf.layers.activations` or a function.
        bias: whether both dense layers have biases.

    Returns:
        A net `[..., width] -> [..., width]` with `up` `{"W" [hidden, width], "b"}` and `down`.

    >>> import gradfn as gf
    >>> gf.shapes(gf.layers.feed_forward(2, 8).spec)
    {'down': {'W': [2, 8], 'b': [2]}, 'up': {'W': [8, 2], 'b': [8]}}
    """
    up, down, fire = dense(width, hidden, bias), dense(hidden, width, bias), activation(squash)

    def apply(params: Params, x: jax.Array) -> jax.Array:
        with scope("up"):
            z = up.apply(params["up"], x)
        a = tap(fire(z), "hidden")
        with scope("down"):
            return down.apply(params["down"], a)

    return Net(
        {"up": with_axes(up.spec, "mlp", "embed"), "down": with_axes(down.spec, "embed", "mlp")}, apply
    )


def swiglu(width: int, hidden: int, bias: bool = False) -> Net:
    """Return a feed-forward layer whose hidden nodes are gated: `down(silu(gate(x)) * up(x))`.

    Shazeer, *GLU Variants Improve Transformer*, 2020. The gated nodes are tapped as `hidden`.

    Args:
        width: features of a position.
        hidden: hidden nodes, often near `8 / 3 * width`.
        bias: whether the three dense layers have biases.

    Returns:
        A net `[..., width] -> [..., width]` with `gate`, `up` and `down`.

    >>> import gradfn as gf
    >>> gf.shapes(gf.layers.swiglu(2, 6).spec)
    {'down': {'W': [2, 6]}, 'gate': {'W': [6, 2]}, 'up': {'W': [6, 2]}}
    """
    return _gated(width, hidden, jax.nn.silu, bias)


def geglu(width: int, hidden: int, bias: bool = False) -> Net:
    """Return a feed-forward layer whose hidden nodes are gated: `down(gelu(gate(x)) * up(x))`.

    Shazeer, *GLU Variants Improve Transformer*, 2020. The gated nodes are tapped as `hidden`. GELU is its tanh form, as
    in Gemma.

    Args:
        width: features of a position.
        hidden: hidden nodes.
        bias: whether the three dense layers have biases.

    Returns:
        A net `[..., width] -> [..., width]` with `gate`, `up` and `down`.

    >>> import gradfn as gf
    >>> gf.shapes(gf.layers.geglu(2, 6).spec)
    {'down': {'W': [2, 6]}, 'gate': {'W': [6, 2]}, 'up': {'W': [6, 2]}}
    """
    return _gated(width, hidden, activation("gelu"), bias)


def _gated(width: int, hidden: int, squash: Activation, bias: bool) -> Net:
    gate, up, down = dense(width, hidden, bias), dense(width, hidden, bias), dense(hidden, width, bias)

    def apply(params: Params, x: jax.Array) -> jax.Array:
        with scope("gate"):
            gated = squash(gate.apply(params["gate"], x))
        with scope("up"):
            z = up.apply(params["up"], x)
        a = tap(gated * z, "hidden")
        with scope("down"):
            return down.apply(params["down"], a)

    spec = {name: with_axes(net.spec, "mlp", "embed") for name, net in {"gate": gate, "up": up}.items()}
    return Net(spec | {"down": with_axes(down.spec, "embed", "mlp")}, apply)
