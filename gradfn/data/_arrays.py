"""Conversion of data frames, lists and tensors to arrays, with an error for what cannot be converted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

MOST_EXAMPLES = 2**31 - 1  # the largest int32


def as_arrays(data: PyTree, name: str = "data", scalars: bool = False) -> PyTree:
    """Convert every leaf of a tree to an array with a leading axis of examples.

    Tuples, dicts and other containers form the tree. Leaves may be numpy or jax arrays (returned as they are),
    pandas data frames and series (rows are taken by position, never by label), PyTorch tensors, anything with
    `__array__`, and lists of numbers, of rows, or of arrays of one shape, which are stacked.

    Args:
        data: the tree.
        name: its name in errors.
        scalars: whether a leaf may be a number shared by all examples.

    Returns:
        The same tree with arrays as leaves.

    Raises:
        ValueError: a leaf with missing or masked values, columns that are not numeric, or rows of different
            lengths; the message names the leaf and never contains the data.

    >>> as_arrays(([[1, 2], [3, 4]], [0, 1]))
    (array([[1, 2],
           [3, 4]]), array([0, 1]))
    """

    def is_part(node: PyTree) -> bool:
        return isinstance(node, list) and not (node is data and _is_tree(node, name))

    def convert(path: tuple[PyTree, ...], part: PyTree) -> PyTree:
        return as_array(part, name + jax.tree_util.keystr(path), scalars)

    return jax.tree_util.tree_map_with_path(convert, data, is_leaf=is_part)


def as_array(part: PyTree, name: str, scalars: bool = False) -> PyTree:
    """Convert one leaf to a numeric array `[examples, ...]`: see `as_arrays`."""
    array = part if isinstance(part, jax.Array) else _to_numpy(part, name)
    if not array.ndim and not scalars:
        raise ValueError(f"{name} must be an array [examples, ...], got {part!r:.60}")
    return array


def on_device(data: PyTree, name: str = "data") -> PyTree:
    """Convert data to jax arrays: see `checked`."""
    return jax.tree.map(jnp.asarray, checked(data, name))


def checked(data: PyTree, name: str = "data") -> PyTree:
    """Convert data to arrays of jax's dtypes, which stay on the host where they are there: see `as_arrays`.

    Raises:
        ValueError: also for an array that is not numeric, for integers that would wrap around in jax's dtype, and for
            more examples than int32 can index.
    """

    def check(path: tuple[PyTree, ...], array: PyTree) -> PyTree:
        if isinstance(array, np.ndarray):
            _numeric(array, name + jax.tree_util.keystr(path))
        if array.ndim and array.shape[0] > MOST_EXAMPLES:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)}: expected at most {MOST_EXAMPLES:,} examples, got "
                f"{array.shape[0]:,}. Use gf.train.from_host"
            )
        dtype = jax.dtypes.canonicalize_dtype(array.dtype) if isinstance(array, np.ndarray) else array.dtype
        if dtype != array.dtype and array.size and jnp.issubdtype(dtype, jnp.integer):
            low, high, bounds = int(array.min()), int(array.max()), jnp.iinfo(dtype)
            if low < bounds.min or high > bounds.max:
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)}: integers must fit {dtype}, got {low:,} to {high:,}. "
                    "Renumber them, or enable jax's 64-bit mode (jax_enable_x64)"
                )
        return array if isinstance(array, jax.Array) else array.astype(dtype, copy=False)

    return jax.tree_util.tree_map_with_path(check, as_arrays(data, name))


def _is_tree(items: list[PyTree], name: str) -> bool:
    """Return whether the outermost list is a container of several arrays, like a tuple."""
    shapes = [tuple(item.shape) for item in items if hasattr(item, "shape")]
    if len(shapes) < len(items) or not shapes:
        return any(isinstance(item, (tuple, dict)) for item in items)
    if len(items) > 1 and len(set(shapes)) == 1 and () not in shapes:
        raise ValueError(
            f"{name} is a list of {len(items):,} arrays {list(shapes[0])}, which is ambiguous. Pass np.stack(...) if "
            "they are examples, a tuple if they are the arrays of one batch"
        )
    return () not in shapes


def _to_numpy(part: PyTree, name: str) -> np.ndarray:
    library = type(part).__module__.partition(".")[0]
    if library == "pandas":
        return _from_pandas(part, name)
    if library == "torch":
        return _from_torch(part, name)
    if isinstance(part, list):
        return _from_list(part, name)
    if isinstance(part, np.ma.MaskedArray) and np.ma.is_masked(part):
        raise ValueError(
            f"{name}: {np.ma.count_masked(part):,} of {part.size:,} values are masked. Fill them in first"
        )
    if isinstance(part, np.ndarray):
        return part
    if not hasattr(part, "__array__") and not np.isscalar(part):
        raise ValueError(f"{name} must be an array [examples, ...], got {type(part).__name__}")
    return _numeric(np.asarray(part), name)


def _numeric(array: np.ndarray, name: str) -> np.ndarray:
    """Return a numeric array as it is; raise for any other."""
    dtype = array.dtype
    if jnp.issubdtype(dtype, np.number) or dtype.kind == "b":
        return array
    kinds = {"U": "text", "S": "text", "M": "dates", "m": "durations", "O": "Python objects"}
    what = kinds.get(dtype.kind, str(dtype))
    if dtype.kind == "O" and array.size:
        what += f" (such as {type(array.reshape(-1)[0]).__name__})"
    raise ValueError(
        f"{name} must be numeric, got {what} of shape {list(array.shape)}. Encode them as numbers"
    )


def _from_list(items: Sequence[PyTree], name: str) -> np.ndarray:
    if any(hasattr(item, "shape") for item in items):
        arrays = [
            np.asarray(item if isinstance(item, jax.Array) else _to_numpy(item, name)) for item in items
        ]
        shapes = sorted({array.shape for array in arrays}, key=str)
        if len(shapes) > 1:
            raise ValueError(
                f"{name} is a list of arrays of different shapes, such as {list(shapes[0])} and {list(shapes[1])}. "
                "Pad or crop them to one shape"
            )
        return np.stack(arrays)
    try:
        array = np.asarray(items)
    except ValueError:
        raise ValueError(f"{name} is a list of rows of different lengths. Pad them to one length") from None
    return _numeric(array, name) if array.dtype.kind == "O" else array


def _from_pandas(part: PyTree, name: str) -> np.ndarray:
    if not hasattr(part, "columns"):
        return _column(part, name)
    columns = [_column(part.iloc[:, i], f"{name}[{label!r:.40}]") for i, label in enumerate(part.columns)]
    return np.stack(columns, axis=1) if columns else np.empty([len(part), 0])


def _column(series: Any, name: str) -> np.ndarray:
    dtype = getattr(series.dtype, "numpy_dtype", series.dtype)  # nullable dtypes wrap one of numpy
    if getattr(dtype, "name", "") == "category":
        raise ValueError(f"{name} is categorical. Pass its codes: .cat.codes")
    if str(dtype).startswith("Sparse"):
        return _numeric(np.asarray(series), name)
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biufc":
        raise ValueError(
            f"{name} must be numeric, got dtype {series.dtype}. Encode it as numbers (pandas.get_dummies, "
            "pandas.factorize, pandas.to_numeric)"
        )
    if series.dtype is not dtype and series.isna().any():
        raise ValueError(
            f"{name}: {int(series.isna().sum()):,} of {len(series):,} values are missing. Use .fillna or .dropna first"
        )
    return np.asarray(series.to_numpy(dtype))


def _from_torch(part: PyTree, name: str) -> np.ndarray:
    if not hasattr(part, "detach"):
        raise ValueError(f"{name} must be an array [examples, ...], got {type(part).__name__}")
    if str(part.layout) != "torch.strided" or part.is_quantized:
        raise ValueError(f"{name} is a sparse or quantized tensor. Pass .to_dense() or .dequantize()")
    part = part.detach().cpu().resolve_conj().resolve_neg()
    dtype = str(part.dtype).removeprefix("torch.")
    if dtype in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):  # numpy lacks these dtypes
        return part.float().numpy().astype(jnp.dtype(dtype))
    return _numeric(part.numpy(), name)
