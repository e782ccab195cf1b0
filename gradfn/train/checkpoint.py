"""Checkpoints: one safetensors file that is replaced in one go, so that a readable one is always there."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradfn.files import FileError, replace_file
from gradfn.params import named_leaves, path_name
from gradfn.train.model import take_apart

KEPT = "kept"  # the folder, in that of a run, of the parameters that stay
FLOATS = tuple(map(jnp.dtype, ("bfloat16", "float16", "float32", "float64")))  # that files have
DIGITS = 10  # of the step in their files' names


class CheckpointError(FileError):
    """A checkpoint that cannot be read, or that is of another run."""


def save(file: Path, state: Any, notes: dict[str, Any]) -> None:
    """Write a state and some JSON notes to a file; whatever interrupts it, the old file or the new one is there.

    Args:
        file: where to, `checkpoint.safetensors`.
        state: a pytree of arrays and typed keys.
        notes: what JSON can hold.
    """
    from safetensors.numpy import save as to_bytes

    arrays = {name: _stored(_plain(leaf)) for name, leaf in named_leaves(state)}
    data = to_bytes(arrays, metadata={"notes": json.dumps(_tagged(notes), allow_nan=False)})
    replace_file(file, data)


def load(file: Path, like: Any, rest: bool = False) -> tuple[Any, dict[str, Any]]:
    """Read a state and its notes back.

    Args:
        file: what `save` wrote.
        like: a state of the same structure, whose shapes and dtypes the file must have (keys apart,
            `jax.ShapeDtypeStruct` will do).
        rest: whether the file may hold more than that, which is not read.

    Returns:
        The state, and the notes.

    Raises:
        CheckpointError: the file cannot be read, or does not fit `like`; it names the array.
    """
    from safetensors import SafetensorError, safe_open

    wanted = {name for name, _ in named_leaves(like)}
    try:
        with safe_open(file, "numpy") as content:
            notes = json.loads(content.metadata()["notes"], object_hook=_untagged)
            names = [name for name in content.keys() if not rest or name in wanted]  # noqa: SIM118
            arrays = {name: content.get_tensor(name) for name in names}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a readable checkpoint ({error})") from error

    def restore(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        name = path_name(path)
        expected = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else _plain(leaf)
        if name not in arrays:
            raise CheckpointError(f"{file}: holds no {name}; it is of another network or optimizer")
        came, stored = arrays.pop(name), _stored(np.empty(expected.shape, expected.dtype))
        if (came.shape, came.dtype) != (stored.shape, stored.dtype):
            fits = f"expected {list(stored.shape)} {stored.dtype}, got {list(came.shape)} {came.dtype}"
            raise CheckpointError(f"{file}: {name}: {fits}")
        came = came.view(expected.dtype).reshape(expected.shape)  # [..., 2] -> [...] where it is complex
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(came), impl=jax.random.key_impl(leaf))
        return jnp.asarray(came)

    state = jax.tree_util.tree_map_with_path(restore, like)
    if arrays:
        raise CheckpointError(f"{file}: holds {', '.join(arrays)} too; it is of another network or optimizer")
    return state, notes


def keep(folder: Path, step: int, params: Any, state: Any = None) -> None:
    """Keep the parameters after a step, and a model's state, among those of a run, `kept/<step>.safetensors`."""
    (folder / KEPT).mkdir(parents=True, exist_ok=True)
    save(folder / KEPT / f"{step:0{DIGITS}}.safetensors", _together(params, state), {"step": step})


def kept(folder: str | os.PathLike[str], like: Any, state: Any = None) -> dict[int, Any]:
    """Read the parameters that `gf.fit(keep_every=...)` kept.

    Args:
        folder: that of the run.
        like: parameters (a model) of the same structure, shapes and dtypes.
        state: where `gf.fit` had one, one like that.

    Returns:
        The parameters by the number of steps taken, in that order; pairs with the state where there is one.

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
        raise CheckpointError(f"{folder}: holds no kept parameters; train with gf.fit(..., keep_every=100)")
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


def _together(params: Any, state: Any) -> Any:
    return params if state is None else {"params": params, "state": state}


def _stored(array: np.ndarray) -> np.ndarray:
    """Return an array as one of a dtype that files have: bytes for eight bits and less, pairs for complex numbers."""
    array = np.array(array, order="C")
    if np.iscomplexobj(array):
        return np.stack([array.real, array.imag], -1)  # [...] -> [..., 2]
    known = array.dtype.kind in "biu" or array.dtype in FLOATS
    return array if known else array.view(np.uint8)


def _plain(leaf: Any) -> np.ndarray:
    typed_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if typed_key else leaf)


def _tagged(value: Any) -> Any:
    """Put floats that JSON does not have into `{"float": "nan"}`."""
    if isinstance(value, dict):
        return {name: _tagged(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tagged(inner) for inner in value]
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _untagged(found: dict[str, Any]) -> Any:
    return float(found["float"]) if list(found) == ["float"] and isinstance(found["float"], str) else found
