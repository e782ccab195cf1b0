"""The multilayer perceptron: dense layers in sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gradfn.core.names import ParameterError, tap
from gradfn.core.net import Net
from gradfn.core.params import Param, Params
from gradfn.layers._activations import Activation
from gradfn.layers._activations import activation as activation_named
from gradfn.layers._dense import affine
from gradfn.nets._description import described


def hidden_width(n_in: int, n_out: int) -> int:
    """Return the mean of the numbers of inputs and outputs: a first guess for the width of one hidden layer.

    >>> import gradfn as gf
    >>> gf.hidden_width(784, 10)
    397
    """
    return (n_in + n_out) // 2


def mlp(
    sizes: Sequence[int],
    activation: str | Activation = "sigmoid",
    output: str | Activation | None = None,
) -> Net:
    """Return a multilayer perceptron, `a = σ(W a + b)` layer by layer.

    Its values are named: weighted sums `z1`, activations `a1`, `z2`, ... By default the output is the last layer's
    weighted sums (logits).

    Args:
        sizes: nodes per layer from inputs to outputs, `[784, 16, 10]`.
        activation: of the hidden layers: a name from `gf.layers.activations` or a function.
        output: activation of the last layer; None for no activation.

    Returns:
        A net with `W1` `[16, 784]`, `b1` `[16]`, `W2` `[10, 16]`, `b2` `[10]`, ... It maps a vector `[784]` to
        `[10]`, or a column `[784, 1]` to `[10, 1]`.

    Raises:
        ValueError: fewer than two sizes, or one below 1, or an unknown activation.
        ParameterError: parameters or an input of other shapes.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.mlp([784, 16, 10])
    >>> params = net.init(jax.random.key(0))
    >>> net.apply(params, jnp.zeros(784)).shape, net.apply(params, jnp.zeros([784, 1])).shape
    ((10,), (10, 1))
    """
    sizes = [int(size) for size in sizes]
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"mlp: sizes must be two or more integers >= 1, inputs first, got {sizes}")
    hidden = activation_named(activation)
    last = None if output is None else activation_named(output)
    n_layers = len(sizes) - 1
    spec = {}
    for i in range(1, n_layers + 1):
        nodes = None if i == n_layers else "mlp"
        spec[f"W{i}"] = Param((sizes[i], sizes[i - 1]), axes=(nodes, "mlp_in"))
        spec[f"b{i}"] = Param((sizes[i],), axes=(nodes,))

    def apply(params: Params, x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        column = x.shape == (sizes[0], 1)
        if not column and x.shape != (sizes[0],):
            raise ParameterError("W1", _wrong_input(sizes, x.shape))
        a = x.reshape(sizes[0])  # [n, 1] -> [n]
        for i in range(1, n_layers + 1):
            z = tap(affine(params[f"W{i}"], params[f"b{i}"], a, f"W{i}"), f"z{i}")
            squash = last if i == n_layers else hidden
            a = z if squash is None else tap(squash(z), f"a{i}")
        return a.reshape(-1, 1) if column else a  # [n] -> [n, 1]

    settings = {"sizes": sizes, "activation": activation, "output": output}
    return Net(spec, apply, description=described("mlp", settings))


def _wrong_input(sizes: list[int], actual: tuple[int, ...]) -> str:
    n_in, n_out = sizes[:2]
    message = (
        f"W1 is [{n_out}, {n_in}], expected an input of [{n_in}] or a column [{n_in}, 1], got {list(actual)}"
    )
    if len(actual) > 1 and actual[-1] == n_in:
        return f"{message}. For a batch: jax.vmap(net.apply, (None, 0))(params, x)"
    if math.prod(actual) == n_in:
        return f"{message}. Flatten it: x.reshape({n_in})"
    if len(actual) == 1:
        return f"{message}. For inputs of that size: gf.mlp([{actual[0]}, {n_out}, ...])"
    return message
