"""Networks: `Net = (spec, apply)`, and how nets compose.

`apply(params, x)` is a pure function of one example; `jax.vmap` turns it into a function of a batch. A stochastic
net (one with dropout) also takes `key=`; without a key it is deterministic.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from gradfn.core import params as _params
from gradfn.core.names import scope
from gradfn.core.params import Param, Params, Spec


@dataclass(frozen=True, eq=False)
class Net:
    """A network: a declaration of its parameters, and a pure function of them.

    Args:
        spec: a nested dict of `Param`.
        apply: `(params, x) -> y` for one example, or `(params, x, key=None) -> y` if the net is stochastic.
        description: what the net was made with, as JSON: `{"net": "mlp", "settings": {"sizes": [2, 1], ...}}`. Whole
            networks of gradfn have one, unless an activation is a function without a name in
            `gf.layers.activations`; it is None for other nets. `gf.fit` writes it into a run's folder.

    `net.apply` first checks the parameters against the spec, and raises `ParameterError` if they differ.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.Net({"w": gf.Param([3])}, lambda params, x: params["w"] @ x)
    >>> net.apply(net.init(jax.random.key(0)), jnp.ones(3))
    Array(0., dtype=float32)
    """

    spec: Spec
    apply: Callable
    description: Mapping[str, Any] | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        _params.named_leaves(self.spec, _params.is_param)  # raises if two leaves have the same path
        object.__setattr__(self, "apply", _checked(self.spec, self.apply))

    def init(self, key: jax.Array, shardings: PyTree = None) -> Params:
        """Return initial parameters: see `gf.init`."""
        return _params.init(self.spec, key, shardings)


def _checked(spec: Spec, apply: Callable) -> Callable:
    @functools.wraps(apply)
    def checked_apply(params: Params, *args: PyTree, **kwargs: PyTree) -> PyTree:
        _params.check(spec, params)
        return apply(params, *args, **kwargs)

    return checked_apply


def takes_key(function: Callable) -> bool:
    """Return whether a function is stochastic: whether it has a parameter called `key`."""
    return "key" in inspect.signature(function).parameters


def serial(**named: Net | Callable[[PyTree], Any]) -> Net:
    """Compose nets in sequence; each net's parameters are stored under its name.

    Args:
        **named: nets, or functions of one array without parameters (`jax.nn.relu`), in order.

    Returns:
        A net whose spec is `{name: net.spec}` for the nets that have parameters.

    Raises:
        ParameterError: raised by one of the nets; its path starts with the net's name.

    >>> import jax, gradfn as gf
    >>> net = gf.serial(hidden=gf.layers.dense(784, 16), squash=jax.nn.sigmoid, out=gf.layers.dense(16, 10))
    >>> gf.shapes(net.spec)
    {'hidden': {'W': [16, 784], 'b': [16]}, 'out': {'W': [10, 16], 'b': [10]}}
    """
    spec = {name: net.spec for name, net in named.items() if isinstance(net, Net) and net.spec}
    noisy = [name for name, net in named.items() if isinstance(net, Net) and takes_key(net.apply)]

    def run(params: Params, x: PyTree, key: jax.Array | None) -> PyTree:
        for name, net in named.items():
            with scope(name):
                if not isinstance(net, Net):
                    x = net(x)
                elif name in noisy:
                    x = net.apply(params.get(name, {}), x, key=fold(key, noisy.index(name)))
                else:
                    x = net.apply(params.get(name, {}), x)
        return x

    return Net(spec, with_or_without_key(run, bool(noisy)))


def residual(net: Net) -> Net:
    """Add a net's output to its input, `x + net(x)` (He et al., *Deep Residual Learning*, 2015).

    Args:
        net: a net whose output has the shape of its input.

    Returns:
        A net with the same spec.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.residual(gf.layers.dense(3, 3))
    >>> net.apply({"W": jnp.zeros([3, 3]), "b": jnp.ones(3)}, jnp.arange(3.0))
    Array([1., 2., 3.], dtype=float32)
    """

    def run(params: Params, x: PyTree, key: jax.Array | None) -> PyTree:
        return x + call(net, params, x, key)

    return Net(net.spec, with_or_without_key(run, takes_key(net.apply)))


def repeat(net: Net, n: int) -> Net:
    """Compose `n` copies of a net in sequence, each with its own parameters, as one `lax.scan`.

    The parameters are stacked along a new first axis, so compile time does not grow with depth.

    Args:
        net: a net whose output has the shape and dtype of its input.
        n: the number of copies.

    Returns:
        A net whose parameters are arrays `[n, ...]`.

    Raises:
        ValueError: `n` below 1.

    >>> import gradfn as gf
    >>> gf.shapes(gf.repeat(gf.layers.dense(64, 64), 24).spec)
    {'W': [24, 64, 64], 'b': [24, 64]}
    """
    if n < 1:
        raise ValueError(f"repeat: n must be an integer >= 1, got {n}")

    def stacked(param: Param) -> Param:
        def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
            return jax.vmap(param.make)(jax.random.split(key, n))  # [n, *param.shape]

        axes = ("layers", *(param.axes or (None,) * param.ndim))
        return Param((n, *param.shape), init, param.dtype, axes)

    def run(params: Params, x: PyTree, key: jax.Array | None) -> PyTree:
        def layer(x: PyTree, xs: tuple[Params, jax.Array | None]) -> tuple[PyTree, None]:
            layer_params, layer_key = xs
            return call(net, layer_params, x, layer_key), None

        keys = None if key is None else jax.random.split(key, n)
        return jax.lax.scan(layer, x, (params, keys), length=n)[0]

    return Net(jax.tree.map(stacked, net.spec), with_or_without_key(run, takes_key(net.apply)))


def call(net: Net, params: Params, x: PyTree, key: jax.Array | None) -> PyTree:
    """Apply a net, with the key if it takes one."""
    return net.apply(params, x, key=key) if takes_key(net.apply) else net.apply(params, x)


def fold(key: jax.Array | None, number: int) -> jax.Array | None:
    """Return `jax.random.fold_in(key, number)`, or None if there is no key."""
    return None if key is None else jax.random.fold_in(key, number)


def with_or_without_key(run: Callable[[Params, PyTree, PyTree], Any], noisy: bool) -> Callable:
    """Turn `run(params, x, key)` into an `apply` that has `key` in its signature only if it is used."""
    if noisy:

        def apply_with_noise(params: Params, x: PyTree, key: jax.Array | None = None) -> PyTree:
            return run(params, x, key)

        return apply_with_noise
    return lambda params, x: run(params, x, None)
