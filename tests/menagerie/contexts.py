"""A layer in its contexts: alone, in deeper nets, and inside of the transforms of jax that nest programs."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.menagerie.check import Case, loss_of

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "leaky_relu": jax.nn.leaky_relu,
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "hard_tanh": jax.nn.hard_tanh,
    "hard_swish": jax.nn.hard_swish,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "relu6": jax.nn.relu6,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "soft_sign": jax.nn.soft_sign,
    "log_sigmoid": jax.nn.log_sigmoid,
    "squareplus": jax.nn.squareplus,
    "mish": jax.nn.mish,
    "glu": lambda x: jax.nn.glu(jnp.concatenate([x, x[..., ::-1]], -1)),
}


class Layer(NamedTuple):
    """`f(params, x)`, its parameters and one example.

    They are cast to float64, unless `exact` is false: `f` computes in a narrower dtype.
    """

    f: Callable
    params: Any
    x: Any
    exact: bool = True


def in_double(layer):
    """Return the layer with random parameters in float64, and three examples."""
    rng = np.random.default_rng(7)

    def double(leaf):
        leaf = jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        noise = rng.normal(size=leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            return leaf.astype(jnp.complex128) + 0.3 * (noise + 1j * rng.normal(size=leaf.shape))
        return leaf.astype(jnp.float64) + 0.2 * noise

    def examples(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.stack([leaf, double(-leaf), double(0.5 * leaf)])
        return jnp.stack([leaf, jnp.flip(leaf), jnp.roll(leaf, 1)])

    if not layer.exact:
        xs = jax.tree.map(lambda leaf: jnp.stack([leaf, jnp.flip(leaf), leaf]), layer.x)
        return layer.params, xs
    return jax.tree.map(double, layer.params), jax.tree.map(examples, jax.tree.map(double, layer.x))


def alone(layer, params, x):
    return layer.f, params


def mapped(layer, params, x):
    return lambda p, x: jax.vmap(layer.f, (None, 0))(p, _pair(x)), params


def jitted(layer, params, x):
    return lambda p, x: jnp.sin(_flat(jax.jit(layer.f)(p, x))), params


def scanned(layer, params, x):
    def f(p, x):
        def step(carry, x):
            y = _flat(layer.f(p, x))
            return jnp.tanh(carry + y), jnp.sin(y)

        start = jnp.zeros_like(_flat(layer.f(p, x)))
        return jax.lax.scan(step, start, _pair(x))

    return f, params


def stacked(layer, params, x):
    """Layers of equal shape in a scan over their parameters, as deep networks are compiled."""
    if not _keeps_shape(layer, params, x):
        return None

    def f(p, x):
        return jax.lax.scan(lambda x, p: (x + jnp.tanh(layer.f(p, x)), None), x, p)[0]

    return f, jax.tree.map(lambda a: jnp.stack([a, 0.7 * a] if _floats(a) else [a, a]), params)


def remat(layer, params, x):
    return lambda p, x: jnp.tanh(_flat(jax.checkpoint(layer.f)(p, x))), params


def residual(layer, params, x):
    if not _keeps_shape(layer, params, x):
        return None

    def f(p, x):
        for each in p:
            x = x + jax.nn.gelu(layer.f(each, x))
        return x

    return f, [params, jax.tree.map(lambda a: 0.6 * a if _floats(a) else a, params)]


def tied(layer, params, x):
    """The same layer twice, so that each parameter is used twice."""
    if not _keeps_shape(layer, params, x):
        return None
    return lambda p, x: layer.f(p, jnp.tanh(layer.f(p, x))), params


def branch(layer, params, x):
    def f(p, x):
        total = sum(jnp.sum(leaf).real for leaf in jax.tree.leaves(x))
        return jax.lax.cond(
            total > 0,
            lambda x: _flat(layer.f(p["a"], x)),
            lambda x: jnp.tanh(_flat(layer.f(p["b"], x))),
            x,
        )

    return f, {"a": params, "b": jax.tree.map(lambda a: 0.6 * a if _floats(a) else a, params)}


def penalty(layer, params, x):
    """A loss with a gradient in it: the program contains a backward pass."""
    if not any(_floats(leaf) for leaf in jax.tree.leaves(x)):
        return None
    inner = loss_of(layer.f)

    def f(p, x):
        value, slope = jax.value_and_grad(inner, argnums=1, allow_int=True)(p, x)
        of_floats = [s for s in jax.tree.leaves(slope) if s.dtype != jax.dtypes.float0]
        return value, sum(jnp.sum(s * s) for s in of_floats)

    return f, params


def followed_by(activation):
    def net(layer, params, x):
        """The layer, an activation function, and a dense layer."""
        size = jax.tree.leaves(jax.eval_shape(layer.f, params, x))[0].size
        head = {"W": 0.5 * np.random.default_rng(3).normal(size=(size, 3)), "b": np.ones(3) * 0.1}

        def f(p, x):
            y = jax.tree.leaves(layer.f(p["layer"], x))[0]
            y = ACTIVATIONS[activation](y.real if jnp.iscomplexobj(y) else y)
            y = y.reshape(-1)  # [any shape] -> [features]
            return y @ p["head"]["W"] + p["head"]["b"]

        return f, {"layer": params, "head": jax.tree.map(jnp.asarray, head)}

    return net


CONTEXTS = {
    "alone": alone,
    "vmap": mapped,
    "jit": jitted,
    "scan": scanned,
    "stacked": stacked,
    "remat": remat,
    "residual": residual,
    "tied": tied,
    "cond": branch,
    "penalty": penalty,
}


def names(layer_name, activations=2):
    """Return the contexts of a layer: all, and nets with some of the activation functions, chosen by its name."""
    start = zlib.crc32(layer_name.encode()) % len(ACTIVATIONS)
    some = [list(ACTIVATIONS)[(start + 7 * k) % len(ACTIVATIONS)] for k in range(activations)]
    return [*CONTEXTS, *[f"net with {name}" for name in some]]


def case(name, layer, context):
    """Return a layer in a context, or None if it does not fit there."""
    params, xs = in_double(layer)
    build = CONTEXTS.get(context) or followed_by(context.removeprefix("net with "))
    built = build(layer, params, jax.tree.map(lambda leaf: leaf[0], xs))
    return built and Case(f"{name}, {context}", built[0], built[1], xs, layer.exact)


def _pair(x):
    return jax.tree.map(lambda a: jnp.stack([a, jnp.roll(a, 1)]), x)


def _floats(a):
    return jnp.issubdtype(jnp.asarray(a).dtype, jnp.inexact)


def _flat(tree):
    leaves = [y for y in jax.tree.leaves(tree) if _floats(y)]
    parts = [y.reshape(-1) for y in leaves]  # [any shape] -> [elements]
    return jnp.concatenate([p for y in parts for p in ((y.real, y.imag) if jnp.iscomplexobj(y) else (y,))])


def _keeps_shape(layer, params, x):
    if not isinstance(x, jax.Array) or not _floats(x):
        return False
    y = jax.eval_shape(layer.f, params, x)
    return isinstance(y, jax.ShapeDtypeStruct) and (y.shape, y.dtype) == (x.shape, x.dtype)
