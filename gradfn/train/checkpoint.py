"""Checkpoints: one safetensors file that is replaced atomically, so that a readable one always exists."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradfn.core.params import named_leaves, path_name
from gradfn.files import FileError, parse_json, replacing
from gradfn.layout import DIGITS, KEPT
from gradfn.tensors import CHECKSUM, NAMES, Tensor, is_stored, open_tensors, verify, write_tensors
from gradfn.train.model import take_apart

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
    content = tensors(state), metadata(notes)
    with replacing(file) as out:
        write_tensors(out, *content, checksum=True)


def load(file: Path, like: PyTree, rest: bool = False, form: type = dict) -> tuple[PyTree, PyTree]:
    """Read a state and its notes back.

    Arrays are read and copied to the device one at a time.

    Args:
        file: written by `save`.
        like: a state of the same structure, whose shapes and dtypes the file must have; except for keys,
            `jax.ShapeDtypeStruct` suffices.
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
            names = set(content.keys()) - {CHECKSUM}
            for name, leaf in wanted.items():
                if name not in names:
                    raise CheckpointError(
                        f"{file}: does not contain {name}; it is of another network or optimizer"
                    )
                _check(file, name, content.get_slice(name), leaf)
            if not rest and (more := sorted(names - wanted.keys())):
                few = ", ".join(f"{name!r:.100}" for name in more[:3]) + ", ..." * (len(more) > 3)
                raise CheckpointError(f"{file}: also contains {few}; it is of another network or optimizer")

            def restore(path: tuple[PyTree, ...], leaf: PyTree) -> jax.Array:
                # Wait, so that the host's copy is freed before the next array is read.
                return jax.block_until_ready(_restored(content.get_tensor(path_name(path)), leaf))

            return jax.tree_util.tree_map_with_path(restore, like), notes
    except CheckpointError:
        raise
    except FileError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise CheckpointError(f"{file}: not a readable checkpoint ({reason})") from error


def keep(folder: Path, step: int, params: PyTree, state: PyTree = None) -> None:
    """Write the parameters after a step, and a model's state, to `kept/<step>.safetensors` in a run's folder."""
    save(folder / KEPT / f"{step:0{DIGITS}}.safetensors", _together(params, state), {"step": step})


def kept(folder: str | os.PathLike[str], like: PyTree, state: PyTree = None) -> dict[int, PyTree]:
    """Read the parameters that `gf.fit(keep_every=...)` kept.

    Args:
        folder: the folder of the run.
        like: parameters (a model) of the same structure, shapes and dtypes.
        state: a state like the one that `gf.fit` was given, if it was.

    Returns:
        The parameters by the number of steps taken, in that order; pairs `(params, state)` where there is a state.

    Raises:
        CheckpointError: there are none, or they do not fit `like`.

    >>> import jax.numpy as jnp, optax, tempfile, gradfn as gf
    >>> start, folder = {"w": jnp.array(1.0)}, tempfile.mkdtemp()
    >>> data, loss = jnp.ones(8), lambda params, x: (params["w"] * x).mean()
    >>> options = {"batch_size": 2, "folder": folder, "progress": False}
    >>> fitted = gf.fit(loss, start, data, optax.sgd(0.25), 4, keep_every=2, **options)
    >>> gf.train.kept(folder, like=start)
    {2: {'w': Array(0.5, dtype=float32)}, 4: {'w': Array(0., dtype=float32)}}
    """
    files = sorted((Path(folder) / KEPT).glob(f"{'[0-9]' * DIGITS}.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder}: does not contain kept parameters; train with gf.fit(..., keep_every=100)"
        )
    params, rest, carried = take_apart(like)
    carried = carried if state is None else state
    expected = _together(params, carried)
    found = {}
    for file in files:
        loaded, _ = load(file, expected)
        params, new = (loaded["params"], loaded["state"]) if carried is not None else (loaded, None)
        model = params if rest is None else rest.model(params, new)
        found[int(file.stem)] = model if state is None else (model, new)
    return found


def _together(params: PyTree, state: PyTree) -> PyTree:
    return params if state is None else {"params": params, "state": state}


def tensors(state: PyTree) -> dict[str, Tensor]:
    """Return the arrays of a state by path, each copied from the device when it is written."""
    found = {}
    for name, leaf in named_leaves(state):
        leaf = _without_type(leaf)
        dtype, shape = _stored_as(leaf)
        found[name] = Tensor(dtype, shape, functools.partial(_stored, leaf))
    return found


def host_copy(state: PyTree) -> PyTree:
    """Return a copy of a state in the host's memory; of keys, their data."""
    return jax.tree.map(lambda leaf: np.array(_without_type(leaf)), state)


def metadata(notes: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a file with these notes."""
    return {"notes": json.dumps(_finite(notes), allow_nan=False)}


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
    """Return an array of a file with the dtype and shape of `like`; keys are wrapped again."""
    like = like if hasattr(like, "dtype") else np.asarray(like)
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    return jnp.asarray(array.reshape(-1).view(like.dtype).reshape(like.shape))  # [..., 2] -> [...] if complex


def _check(file: Path, name: str, found: PyTree, like: PyTree) -> None:
    """Raise a CheckpointError for an array of a different dtype or shape."""
    dtype, shape = _stored_as(_without_type(like))
    actual = (tuple(found.get_shape()), found.get_dtype())
    if actual != (shape, NAMES[dtype.name]):
        known = {stored: known for known, stored in NAMES.items()}
        fits = f"expected {list(shape)} {dtype}, got {list(actual[0])} {known.get(actual[1], actual[1])}"
        raise CheckpointError(f"{file}: {name}: {fits}")


def _without_type(leaf: PyTree) -> PyTree:
    """Return the data of a key, a Python number as an array, and an array as it is."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else np.asarray(leaf)


def _finite(value: PyTree) -> PyTree:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
