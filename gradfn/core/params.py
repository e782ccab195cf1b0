"""Parameters: how a spec declares them, and how they are initialized, counted and checked.

A spec is a nested dict whose leaves are `Param`s. Parameters are the same dict with arrays as leaves.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from gradfn.core.models import Leaf, model_leaves
from gradfn.core.names import ParameterError
from gradfn.core.precision import wide
from gradfn.display import TextTable, parameter_table

Spec = dict[str, Any]  # nested; its leaves are Params
Params = Any  # the same tree with arrays
Initializer = Callable[..., jax.Array]  # (key, shape, dtype) -> array, as in jax.nn.initializers
# A name, a name with the number of units that the axis consists of, or None for an axis that is never split.
Axis = str | tuple[str, int] | None


@dataclass(frozen=True)
class Param:
    """Declare one array of a network.

    Args:
        shape: the array's shape. Matrices are `[out, in]`, convolution kernels `[out, in, *window]`.
        init: `(key, shape, dtype) -> array`, as in `jax.nn.initializers`. By default vectors and scalars are
            zeros, and arrays with two or more axes are drawn from a truncated normal of variance 1 / fan_in
            (LeCun et al., *Efficient BackProp*, 1998), where fan_in is the product of all axes but the first.
        dtype: float32 by default.
        axes: a logical name for each axis, for sharding over devices: see `gf.train.shardings`. `("heads", 12)` is
            an axis of 12 units, such as attention heads, which are never split; None is an axis that never is.

    Raises:
        ValueError: a negative size, a number of axis names that differs from the number of axes, or units that do
            not divide a size.

    >>> import gradfn as gf
    >>> gf.Param([16, 784]).shape
    (16, 784)
    """

    shape: tuple[int, ...]
    init: Initializer | None = None
    dtype: DTypeLike = jnp.float32
    axes: tuple[Axis, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if any(size < 0 for size in self.shape):
            raise ValueError(f"Param: sizes must be >= 0, got shape {list(self.shape)}")
        if self.axes is None:
            return
        object.__setattr__(self, "axes", tuple(self.axes))
        if len(self.axes) != len(self.shape):
            raise ValueError(
                f"Param: shape {list(self.shape)} needs {len(self.shape)} axis names, got {self.axes}"
            )
        for axis, size in zip(self.axes, self.shape, strict=True):
            if isinstance(axis, tuple) and (axis[1] < 1 or size % axis[1]):
                raise ValueError(f"Param: the units of {axis} must divide the size of the axis, {size}")

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    def make(self, key: jax.Array) -> jax.Array:
        """Return the initial array."""
        default = default_init if self.ndim > 1 and self.size else jax.nn.initializers.zeros
        init = self.init or default
        # Samples in bfloat16 take 128 values only and have a mean of -0.01: draw in float32, then cast.
        dtype = wide(self.dtype) if jnp.issubdtype(self.dtype, jnp.floating) else self.dtype
        value = init(key, self.shape, dtype)
        return value if dtype == self.dtype else value.astype(self.dtype)


# fan_in and fan_out of an [out, in] matrix; for kernels both include the window, as is usual.
default_init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=1, out_axis=0)


def path_name(path: tuple[PyTree, ...]) -> str:
    """Return a leaf's key path as text, in the notation of named scopes: `blocks/attention/W`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_param(leaf: PyTree) -> bool:
    """Return whether a leaf is a `Param`."""
    return isinstance(leaf, Param)


def named_leaves(tree: PyTree, is_leaf: Callable[[PyTree], bool] | None = None) -> list[tuple[str, PyTree]]:
    """Return a tree's leaves with their paths as text, in order.

    Raises:
        ParameterError: two leaves have the same path, as in `{"a/b": ..., "a": {"b": ...}}`.

    >>> named_leaves({"a": {"b": 1}, "c": [2]})
    [('a/b', 1), ('c/0', 2)]
    """
    named = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf)]
    known = set()
    for name, _ in named:
        if name in known:
            raise ParameterError(name, "two entries have this path. Rename one: a key must not contain /")
        known.add(name)
    return named


def init(spec: Spec, key: jax.Array, shardings: PyTree = None) -> Params:
    """Return initial parameters as a spec declares them.

    Each leaf gets a key derived from its path, so adding, removing or reordering parameters does not change the
    others.

    Args:
        spec: a nested dict of `Param`.
        key: from `jax.random.key`.
        shardings: a sharding per parameter, as `gf.train.shardings` returns them, or one for all. Each device makes
            its own part of each array only. In several processes all of them call `init`, with the same key.

    Returns:
        The same dict with arrays.

    Raises:
        ParameterError: a leaf that is not a `Param`, or whose initializer returned another shape; two leaves with
            the same path.
        TypeError: a seed instead of a key.
        ValueError: shardings in another structure than the spec's.

    >>> import jax, gradfn as gf
    >>> params = gf.init({"W": gf.Param([2, 3]), "b": gf.Param([2])}, jax.random.key(0))
    >>> gf.shapes(params)
    {'W': [2, 3], 'b': [2]}
    """
    named_leaves(spec, is_param)
    if not hasattr(key, "dtype") or not (
        np.ndim(key) or jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    ):
        seed = key if isinstance(key, int) else 0
        raise TypeError(f"init: expected a key, got {key!r:.40}. Pass jax.random.key({seed})")

    make_sharded = functools.cache(_sharded_maker)  # equal layers share a compiled function

    def make(path: tuple[PyTree, ...], param: Param, sharding: PyTree = None) -> jax.Array:
        name = path_name(path)
        if not isinstance(param, Param):
            raise ParameterError(name, f"expected a gf.Param in the spec, got {describe(param)}")
        words = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], np.uint32)
        leaf_key = jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1])
        value = param.make(leaf_key) if sharding is None else make_sharded(param, sharding)(leaf_key)
        if value.shape != param.shape:
            message = f"expected shape {list(param.shape)} from its init, got {list(value.shape)}"
            raise ParameterError(name, message)
        return value

    if shardings is None:
        return jax.tree_util.tree_map_with_path(make, spec, is_leaf=is_param)
    return jax.tree_util.tree_map_with_path(make, spec, _one_each(shardings, spec), is_leaf=is_param)


def _sharded_maker(param: Param, sharding: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    """Return a function from a key to the initial array, each part of which is made on its own device."""

    def make_on_devices(key: jax.Array) -> jax.Array:
        typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
        words = jax.random.key_data(key) if typed else key
        again = (
            functools.partial(jax.random.wrap_key_data, impl=jax.random.key_impl(key))
            if typed
            else lambda words: words
        )
        made = jax.jit(lambda words: param.make(again(words)), out_shardings=sharding)
        # An array of one process's device is not an argument of a program of several processes; numbers are.
        return made(words if isinstance(words, jax.core.Tracer) else np.asarray(words))

    return make_on_devices


def _one_each(shardings: PyTree, spec: Spec) -> PyTree:
    """Return the shardings in the tree of the spec, where one may stand for a subtree."""
    try:
        return jax.tree.broadcast(shardings, spec)
    except ValueError as error:
        raise ValueError(
            f"init: shardings must have the structure of the spec, or be one sharding: {error}"
        ) from None


def count(tree: PyTree) -> int:
    """Return the number of values in parameters, a spec, a net, or a model of another framework.

    Leaves that are not arrays (functions, Python numbers) are configuration and not counted. Nor is state, which
    `gf.table` lists apart.

    Raises:
        TypeError: an argument without any parameters.

    >>> import gradfn as gf
    >>> gf.count(gf.mlp([784, 16, 10]))
    12730
    """
    return sum(math.prod(leaf.value.shape) for leaf in _arrays(tree, "count") if not leaf.state)


def _arrays(tree: PyTree, function: str) -> list[Leaf]:
    """Return the leaves of parameters, a net or a model that have a shape and a dtype."""
    leaves = model_leaves(tree, function)
    arrays = [leaf for leaf in leaves if hasattr(leaf.value, "shape") and hasattr(leaf.value, "dtype")]
    if leaves and not arrays:
        raise TypeError(f"{function}: expected parameters, a spec, a net or a model, got {describe(tree)}")
    return arrays


def _spec_of(tree: PyTree) -> PyTree:
    return tree.spec if hasattr(tree, "spec") and hasattr(tree, "apply") else tree


def shapes(tree: PyTree) -> PyTree:
    """Return a tree (of a net, its spec) with each array replaced by its shape, as a list.

    >>> import gradfn as gf
    >>> gf.shapes(gf.mlp([784, 16, 10]).spec)
    {'W1': [16, 784], 'W2': [10, 16], 'b1': [16], 'b2': [10]}
    """
    return jax.tree.map(lambda leaf: list(leaf.shape) if hasattr(leaf, "shape") else leaf, _spec_of(tree))


def table(tree: PyTree) -> TextTable:
    """Return a table of parameters, a spec, a net or a model: path, shape, dtype, count, bytes, and the total.

    Arrays with two or more axes count as weights, all others (biases and gains) as biases, and so do those named
    `bias`, whatever their shape. Leaves that are not arrays are left out. The last rows are those of state, which is
    not trained, if there is any: the variables of a Flax NNX module that are not `nnx.Param`s, Linen's collections
    beside `params` (`batch_stats`, `cache`), Equinox's `State`.

    Returns:
        A `rich` table; `print` shows it as text.

    >>> import gradfn as gf
    >>> print(gf.table({"W": gf.Param([2, 3]), "b": gf.Param([2])}))
      path    shape    dtype      count   bytes
     ───────────────────────────────────────────
      W       [2, 3]   float32        6      24
      b       [2]      float32        2       8
     ───────────────────────────────────────────
      total            2 arrays       8      32
    6 weights + 2 biases = 8 parameters
    """
    rows = [
        (name, array.shape, str(array.dtype), array.dtype.itemsize, state)
        for name, array, state in _arrays(tree, "table")
    ]
    return parameter_table([row[:4] for row in rows if not row[4]], [row for row in rows if row[4]])


def describe(value: PyTree) -> str:
    """Return a short description of a value for an error: `[16, 784] float32`, or its type."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{list(value.shape)} {value.dtype}"
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(str, value)) or 'no keys':.200}"
    return f"{type(value).__name__} {' '.join(repr(value).split()):.40}"


def check(spec: PyTree, params: PyTree) -> None:
    """Check that parameters match a spec.

    Shapes must be equal. A whole tree may be cast (to bfloat16, say), so dtypes only have to be of the declared
    kind (floating, complex, integer), and arrays declared with one dtype must all have one dtype.

    Raises:
        ParameterError: names the parameter's path, what was expected and the actual value.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.mlp([784, 16, 10])
    >>> params = net.init(jax.random.key(0))
    >>> check(net.spec, params | {"W1": jnp.ones([784, 16])})
    Traceback (most recent call last):
    gradfn.core.names.ParameterError: W1: expected [16, 784] float32, got [784, 16] float32. Weights are [out, in]: pass its transpose
    """  # noqa: E501
    _check(spec, params, "", {})


def _check(spec: PyTree, params: PyTree, path: str, dtypes: dict[Any, tuple[str, Any]]) -> None:
    if isinstance(spec, Mapping):
        _check_names(spec, params, path)
        for name in spec:
            _check(spec[name], params[name], f"{path}/{name}" if path else str(name), dtypes)
        return
    expected = f"expected {list(spec.shape)} {spec.dtype}, got {describe(params)}"
    if not (hasattr(params, "shape") and hasattr(params, "dtype")):
        raise ParameterError(path, f"{expected}. Make it an array: jnp.asarray(..., jnp.{spec.dtype})")
    if tuple(params.shape) != spec.shape:
        hint = ""
        if len(spec.shape) == 2 and tuple(params.shape) == spec.shape[::-1]:
            hint = ". Weights are [out, in]: pass its transpose"
        elif len(spec.shape) == 1 and tuple(params.shape) == (*spec.shape, 1):
            hint = ". Biases are vectors: pass its [:, 0]"
        raise ParameterError(path, expected + hint)
    dtype = jnp.dtype(params.dtype)
    if _kind(dtype) != _kind(spec.dtype):
        raise ParameterError(path, f"{expected}. Cast it: .astype(jnp.{spec.dtype})")
    first_path, first = dtypes.setdefault(spec.dtype, (path, dtype))
    if dtype != first:
        message = f"{expected}, but {first_path} is {first}. Cast the whole tree or none of it"
        raise ParameterError(path, message)


def _check_names(spec: Mapping[str, Any], params: PyTree, path: str) -> None:
    here = path or "parameters"
    declared = f"{', '.join(map(str, spec)):.300}"
    if not isinstance(params, Mapping):
        raise ParameterError(here, f"expected a dict with {declared}, got {describe(params)}")
    prefix = f"{path}/" if path else ""
    for name in spec:
        if name not in params:
            raise ParameterError(
                f"{prefix}{name}", f"missing. Expected {declared}; got {', '.join(map(str, params)):.300}"
            )
    for name in params:
        if name not in spec:
            near = difflib.get_close_matches(str(name), map(str, spec), 1)
            hint = f". Did you mean {near[0]}?" if near else ""
            raise ParameterError(f"{prefix}{name}", f"not declared. Expected {declared}{hint}")


def _kind(dtype: DTypeLike) -> str:
    for kind in (jnp.floating, jnp.complexfloating, jnp.integer):
        if jnp.issubdtype(dtype, kind):
            return kind.__name__
    return str(dtype)
