"""Parameters: what a spec declares, how its arrays are made, counted and checked.

A spec is a nested dict whose leaves are `Param`s. Parameters are the same dict with arrays in it.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradfn.core.names import ParameterError
from gradfn.core.precision import wide
from gradfn.display import TextTable, reading_order

Spec = dict[str, Any]  # nested; its leaves are Params
Params = Any  # the same tree with arrays
Initializer = Callable[..., jax.Array]  # (key, shape, dtype) -> array, as in jax.nn.initializers


@dataclass(frozen=True)
class Param:
    """Declare one array of a network.

    Args:
        shape: its shape. Matrices are `[out, in]`; convolution kernels `[out, in, *window]`.
        init: `(key, shape, dtype) -> array`, as in `jax.nn.initializers`. By default vectors and scalars are
            zeros, and arrays of two and more axes are normal with variance 1 / (fan in), LeCun's choice
            (LeCun et al., *Efficient BackProp*, 1998), the fan in being all but the first axis.
        dtype: float32 unless told.
        axes: a logical name for each axis, for sharding over devices.

    Raises:
        ValueError: a negative size, or as many axis names as the array does not have.

    >>> import gradfn as gf
    >>> gf.Param([16, 784]).shape
    (16, 784)
    """

    shape: tuple[int, ...]
    init: Initializer | None = None
    dtype: Any = jnp.float32
    axes: tuple[str | None, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if any(size < 0 for size in self.shape):
            raise ValueError(f"Param: sizes are zero or more, came {list(self.shape)}")
        if self.axes is not None and len(self.axes) != len(self.shape):
            raise ValueError(
                f"Param: {list(self.shape)} needs {len(self.shape)} axis names, came {self.axes}"
            )

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    def make(self, key: jax.Array) -> jax.Array:
        """Make the array that this declares."""
        default = default_init if self.ndim > 1 and self.size else jax.nn.initializers.zeros
        init = self.init or default
        # Random numbers of bfloat16 have 128 values and a mean of -0.01: they are drawn in float32.
        dtype = wide(self.dtype) if jnp.issubdtype(self.dtype, jnp.floating) else self.dtype
        value = init(key, self.shape, dtype)
        return value if dtype == self.dtype else value.astype(self.dtype)


# Fans of an [out, in] matrix; for kernels the window counts into both, as is usual.
default_init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=1, out_axis=0)


def path_name(path: tuple[Any, ...]) -> str:
    """Return a leaf's key path as text: `blocks/attention/W`, as named scopes are written."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_param(leaf: Any) -> bool:
    """Tell whether something is a declared array."""
    return isinstance(leaf, Param)


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """Return a tree's leaves with their paths as text, in order.

    Raises:
        ParameterError: two leaves have the same path, as in `{"a/b": ..., "a": {"b": ...}}`.

    >>> named_leaves({"a": {"b": 1}, "c": [2]})
    [('a/b', 1), ('c/0', 2)]
    """
    named = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf)]
    seen = set()
    for name, _ in named:
        if name in seen:
            raise ParameterError(name, "two entries have this path. Rename one: a key must not contain /")
        seen.add(name)
    return named


def init(spec: Spec, key: jax.Array) -> Params:
    """Make the parameters that a spec declares.

    Each leaf's key is folded from its path, so adding, removing or reordering parameters changes no other.

    Args:
        spec: a nested dict of `Param`.
        key: from `jax.random.key`.

    Returns:
        The same dict with arrays.

    Raises:
        ParameterError: a leaf that is not a `Param`, or whose initialiser made another shape or dtype; two leaves with
            the same path.
        TypeError: a seed instead of a key.

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

    def make(path: tuple[Any, ...], param: Param) -> jax.Array:
        name = path_name(path)
        if not isinstance(param, Param):
            raise ParameterError(name, f"a spec's leaves are gf.Param, came {describe(param)}")
        words = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], np.uint32)
        leaf_key = jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1])
        value = param.make(leaf_key)
        if value.shape != param.shape:
            message = f"its init made {list(value.shape)}, declared is {list(param.shape)}"
            raise ParameterError(name, message)
        return value

    return jax.tree_util.tree_map_with_path(make, spec, is_leaf=is_param)


def count(tree: Any) -> int:
    """Count the values in parameters, a spec, a net, or a model of another framework.

    Leaves that are not arrays (functions, Python's own numbers) are settings, and not counted.

    Raises:
        TypeError: nothing that has parameters.

    >>> import gradfn as gf
    >>> gf.count(gf.mlp([784, 16, 10]))
    12730
    """
    return sum(math.prod(leaf.shape) for _, leaf in _arrays(tree, "count"))


def _arrays(tree: Any, function: str) -> list[tuple[str, Any]]:
    """Return what in parameters, in a net or in a model has a shape and a dtype, by its path."""
    leaves = named_leaves(_spec_of(tree))
    arrays = [(name, leaf) for name, leaf in leaves if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
    if leaves and not arrays:
        raise TypeError(f"{function}: expected parameters, a spec, a net or a model, got {describe(tree)}")
    return arrays


def _spec_of(tree: Any) -> Any:
    return tree.spec if hasattr(tree, "spec") and hasattr(tree, "apply") else tree


def shapes(tree: Any) -> Any:
    """Return the tree (of a net, its spec) with each leaf's shape, as a list, in its place.

    >>> import gradfn as gf
    >>> gf.shapes(gf.mlp([784, 16, 10]).spec)
    {'W1': [16, 784], 'W2': [10, 16], 'b1': [16], 'b2': [10]}
    """
    return jax.tree.map(lambda leaf: list(leaf.shape), _spec_of(tree))


def table(tree: Any) -> TextTable:
    """Return a table of parameters, a spec, a net or a model: path, shape, dtype, count, bytes, and the total.

    Weights are what has two axes or more, biases (and gains) what has one or none. Leaves that are not arrays are
    left out.

    Returns:
        A `rich` table that `print` shows too.

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
    rows = [(name, leaf.shape, leaf.dtype) for name, leaf in _arrays(tree, "table")]
    rows.sort(key=lambda row: reading_order(row[0]))
    sizes = [math.prod(shape) for _, shape, _ in rows]
    size_bytes = [size * dtype.itemsize for size, (_, _, dtype) in zip(sizes, rows, strict=True)]
    weights = sum(size for size, (_, shape, _) in zip(sizes, rows, strict=True) if len(shape) > 1)
    out = TextTable(
        caption=f"{weights:,} weights + {sum(sizes) - weights:,} biases = {sum(sizes):,} parameters"
    )
    out.add_column("path", footer="total", shorten=True)
    out.add_column("shape")
    out.add_column("dtype", footer=f"{len(rows)} arrays", drop=1)
    out.add_column("count", footer=f"{sum(sizes):,}")
    out.add_column("bytes", footer=f"{sum(size_bytes):,}", drop=2)
    for (name, shape, dtype), size, n_bytes in zip(rows, sizes, size_bytes, strict=True):
        out.add_row(name, shape, str(dtype), size, n_bytes)
    return out


def describe(value: Any) -> str:
    """Say what a value is, for an error: `[16, 784] float32`, or its type."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{list(value.shape)} {value.dtype}"
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(str, value)) or 'nothing in it':.200}"
    return f"{type(value).__name__} {' '.join(repr(value).split()):.40}"


def check(spec: Any, params: Any) -> None:
    """Check that parameters are what a spec declares, before anything is traced with them.

    Shapes must be the declared ones. A whole tree may be cast (to bfloat16, say), so of dtypes it asks that
    arrays declared alike come alike, and that floats come as floats, integers as integers.

    Raises:
        ParameterError: with the parameter's path, what was expected and what came.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.mlp([784, 16, 10])
    >>> params = net.init(jax.random.key(0))
    >>> check(net.spec, params | {"W1": jnp.ones([784, 16])})
    Traceback (most recent call last):
    gradfn.names.ParameterError: W1: expected [16, 784] float32, came [784, 16] float32. Weights are [out, in]: pass its transpose
    """  # noqa: E501
    _check(spec, params, "", {})


def _check(spec: Any, params: Any, path: str, seen: dict[Any, tuple[str, Any]]) -> None:
    if isinstance(spec, Mapping):
        _check_names(spec, params, path)
        for name in spec:
            _check(spec[name], params[name], f"{path}/{name}" if path else str(name), seen)
        return
    expected = f"expected {list(spec.shape)} {spec.dtype}, came {describe(params)}"
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
    first_path, first = seen.setdefault(spec.dtype, (path, dtype))
    if dtype != first:
        message = f"{expected}, while {first_path} came as {first}. Cast the whole tree or none of it"
        raise ParameterError(path, message)


def _check_names(spec: Mapping[str, Any], params: Any, path: str) -> None:
    here = path or "parameters"
    declared = f"{', '.join(map(str, spec)):.300}"
    if not isinstance(params, Mapping):
        raise ParameterError(here, f"expected a dict with {declared}, came {describe(params)}")
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


def _kind(dtype: Any) -> str:
    for kind in (jnp.floating, jnp.complexfloating, jnp.integer):
        if jnp.issubdtype(dtype, kind):
            return kind.__name__
    return str(dtype)
