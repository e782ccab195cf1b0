"""Checkpoints in one safetensors file that is replaced atomically, so that a readable one always exists.

`gradfn.train.sharded` writes those of a state that is split over devices, `gradfn.train.restore` reads either.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradfn.core.params import named_leaves, path_name
from gradfn.files import FileError, parse_json, replacing
from gradfn.tensors import CHECKSUM, NAMES, Tensor, is_stored, open_tensors, verify, write_tensors

Number = float | Literal["nan", "inf", "-inf"]  # in notes; `float` converts it


class CheckpointError(FileError):
    """A checkpoint that cannot be read, or that belongs to another run."""


def save(file: Path, state: PyTree, notes: Mapping[str, Any]) -> None:
    """Write a state and some JSON notes to a file; after any interruption either the old or the new file exists.

    Arrays are copied from the device one at a time.

    Args:
        file: the path, `checkpoint.safetensors`.
        state: a pytree of arrays and typed keys.
        notes: JSON values; NaN and infinities become `"nan"`, `"inf"` and `"-inf"`.

    Raises:
        OSError: it cannot be written; it names the file.
    """
    content = tensors(state), metadata(notes, state)
    with replacing(file) as out:
        write_tensors(out, *content, checksum=True)


def load(file: Path, like: PyTree, rest: bool = False, form: type = dict) -> tuple[PyTree, PyTree]:
    """Read a state and its notes back.

    Arrays are read and copied to the device one at a time.

    Args:
        file: written by `save`.
        like: a state of the same structure, whose shapes and dtypes the file must have, and on whose shardings the
            arrays are put; except for keys, `jax.ShapeDtypeStruct` suffices.
        rest: whether the file may hold more than that, which is not read.
        form: the type of the notes: see `gradfn.files.read_json`.

    Returns:
        The state, and the notes.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or does not fit `like`; it names the array.
    """
    wanted = dict(named_leaves(like))
    try:
        verify(file)
        with open_tensors(file) as content:
            notes: Any = parse_json((content.metadata() or {})["notes"], form, "its notes")
            check_names(file, set(content.keys()) - {CHECKSUM}, set(wanted), rest)
            for name, leaf in wanted.items():
                _check(file, name, content.get_slice(name), leaf)

            def restore(path: tuple[PyTree, ...], leaf: PyTree) -> jax.Array:
                # Wait, so that the host's copy is freed before the next array is read.
                return jax.block_until_ready(_restored(content.get_tensor(path_name(path)), leaf))

            return jax.tree_util.tree_map_with_path(restore, like), notes
    except CheckpointError:
        raise
    except FileError as error:
        raise unreadable(file, error) from error


def check_names(file: Path, names: Set[str], wanted: Set[str], rest: bool) -> None:
    """Raise a CheckpointError where a checkpoint has not the arrays that are wanted, or others as well.

    Args:
        file: the checkpoint.
        names: of its arrays.
        wanted: the names that it should have.
        rest: whether it may have more.
    """
    of_another = "it is of another network or optimizer"
    for name in sorted(wanted - names):
        raise CheckpointError(f"{file}: does not contain {name}; {of_another}")
    if not rest and (more := sorted(names - wanted)):
        few = ", ".join(f"{name!r:.100}" for name in more[:3]) + ", ..." * (len(more) > 3)
        raise CheckpointError(f"{file}: also contains {few}; {of_another}")


def unreadable(file: Path, error: Exception) -> CheckpointError:
    """Return the error for a checkpoint that cannot be read, with the first line of the reason."""
    reason = str(error).removeprefix(f"{file}: ").partition("\n")[0]
    return CheckpointError(f"{file}: not a readable checkpoint ({reason or type(error).__name__})")


def tensors(state: PyTree) -> dict[str, Tensor]:
    """Return the arrays of a state by path, each copied from the device when it is written."""
    found = {}
    for name, leaf in named_leaves(state):
        leaf = untyped(leaf)
        dtype, shape = _stored_as(leaf)
        found[name] = Tensor(dtype, shape, functools.partial(_stored, leaf))
    return found


def host_copy(state: PyTree) -> PyTree:
    """Return a copy of a state in the host's memory; of keys, their data."""
    return jax.tree.map(lambda leaf: np.array(untyped(leaf)), state)


def metadata(notes: Mapping[str, Any], state: PyTree) -> dict[str, str]:
    """Return the metadata of a file with these notes: they, and the dtypes that the format lacks, by path."""
    dtypes = {name: np.dtype(untyped(leaf).dtype) for name, leaf in named_leaves(state)}
    other = {name: dtype.name for name, dtype in dtypes.items() if not is_stored(dtype)}
    return {"notes": json.dumps(finite(notes), allow_nan=False)} | (
        {"dtypes": json.dumps(other)} if other else {}
    )


def _stored_as(leaf: PyTree) -> tuple[np.dtype, tuple[int, ...]]:
    """Return the dtype and shape of an array in a file: complex numbers are pairs, dtypes unknown to it bytes."""
    dtype = np.dtype(leaf.dtype)
    if dtype.kind == "c":
        return np.dtype(f"f{dtype.itemsize // 2}"), (*leaf.shape, 2)
    return (dtype if is_stored(dtype) else np.dtype(np.uint8)), tuple(leaf.shape)


def _stored(leaf: PyTree) -> np.ndarray:
    """Return an array in the form that a file holds; on a CPU it shares the memory."""
    if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
        # Of `leaf` itself jax would keep the host's copy as long as `leaf` lives.
        leaf = leaf.addressable_data(0)
    dtype, shape = _stored_as(leaf)
    return np.asarray(leaf).reshape(-1).view(dtype).reshape(shape)  # [...] -> [..., 2] where it is complex


def _restored(array: np.ndarray, like: PyTree) -> jax.Array:
    """Return an array of a file with the dtype, shape and sharding of `like`; keys are wrapped again."""
    like = like if hasattr(like, "dtype") else np.asarray(like)
    if is_key(like):
        return jax.random.wrap_key_data(placed(array, like), impl=jax.random.key_impl(like))
    # [..., 2] -> [...] if complex
    return placed(array.reshape(-1).view(like.dtype).reshape(like.shape), like)


def placed(array: np.ndarray, like: PyTree) -> jax.Array:
    """Return an array of the host on the devices of another; of several processes, each has the whole."""
    sharding = sharding_of(like)
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def sharding_of(leaf: PyTree) -> jax.sharding.Sharding | None:
    """Return how an array, or its `jax.ShapeDtypeStruct`, lies on devices; None for the default device."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return None if sharding.device_set == jnp.zeros([]).devices() else sharding
    return sharding


def _check(file: Path, name: str, found: PyTree, like: PyTree) -> None:
    """Raise a CheckpointError for an array of a different dtype or shape."""
    dtype, shape = _stored_as(untyped(like))
    actual = (tuple(found.get_shape()), found.get_dtype())
    if actual != (shape, NAMES[dtype.name]):
        known = {stored: known for known, stored in NAMES.items()}
        fits = f"expected {list(shape)} {dtype}, got {list(actual[0])} {known.get(actual[1], actual[1])}"
        raise CheckpointError(f"{file}: {name}: {fits}")


def untyped(leaf: PyTree) -> PyTree:
    """Return the data of a key, a Python number as an array, and an array as it is."""
    if isinstance(leaf, jax.Array) and is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else np.asarray(leaf)


def is_key(leaf: PyTree) -> bool:
    """Return whether an array holds typed keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def finite(value: PyTree) -> PyTree:
    """Return a value that JSON can hold: NaN and infinities become text."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
