"""What a run of `fit` left in its folder, read back: its state, its parameters, and those that it kept."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradfn.core.params import is_param
from gradfn.files import FileError, parse_json
from gradfn.layout import CHECKPOINTS, DIGITS, KEPT
from gradfn.stored import STEP, Stored, description, finished, newest
from gradfn.tensors import NAMES, open_tensors
from gradfn.train import checkpoint, sharded
from gradfn.train.checkpoint import CheckpointError
from gradfn.train.model import take_apart
from gradfn.train.processes import from_first, gathered, is_first


def find(folder: Path) -> Stored | None:
    """Return the newest checkpoint in a run's folder, as process 0 finds it; None where there is none."""

    def names() -> list[str]:
        found = newest(folder)
        return [path.relative_to(folder).as_posix() for path in found or () if path]

    return Stored(*paths) if (paths := [folder / name for name in from_first(names)]) else None


def load(stored: Stored, like: PyTree, rest: bool = False, form: type = dict) -> tuple[PyTree, PyTree]:
    """Read a state and its notes from a checkpoint of either kind: see `gradfn.train.checkpoint.load`."""
    if stored.folder:
        return sharded.load(stored, like, rest, form)
    return checkpoint.load(stored.file, like, rest, form)


def keep(folder: Path, step: int, params: PyTree, state: PyTree = None) -> None:
    """Write the parameters after a step, and a model's state, into `kept` in a run's folder."""
    content = {"params": params, "model_state": state}
    stem = folder / KEPT / f"{step:0{DIGITS}}"
    file = stem.with_suffix(".safetensors")
    if sharded.is_split(content):
        sharded.begin(folder / KEPT, step, content, {"step": step})()
        if is_first():
            file.unlink(missing_ok=True)
    elif is_first():
        checkpoint.save(file, gathered(content), {"step": step})
        sharded.remove(stem)


def kept(folder: str | os.PathLike[str], like: PyTree, state: PyTree = None) -> dict[int, PyTree]:
    """Read the parameters that `gf.fit(keep_every=...)` kept.

    Args:
        folder: the folder of the run.
        like: parameters (a model) of the same structure, shapes and dtypes; arrays are put on its shardings.
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
    folder = Path(folder)
    files = (folder / KEPT).glob(f"{STEP}.safetensors")
    found = {int(stored.file.stem): stored for stored in (*map(Stored, files), *finished(folder, KEPT))}
    if not found:
        raise CheckpointError(
            f"{folder}: does not contain kept parameters; train with gf.fit(..., keep_every=100)"
        )
    return {step: _load_model(found[step], like, state) for step in sorted(found)}


def load_params(folder: str | os.PathLike[str], like: PyTree = None, shardings: PyTree = None) -> PyTree:
    """Read the parameters alone from the checkpoint of a run.

    The checkpoint may be of any number of devices: its arrays are put on those that are there. Of several processes,
    each must call this.

    Args:
        folder: of the run of `gf.fit(..., folder=...)`; or one checkpoint: `checkpoint.safetensors`,
            `kept/0000001000.safetensors`, `checkpoint/0000001000`.
        like: parameters, a spec, a net or a model of the same structure, shapes and dtypes; arrays are put on its
            shardings. By default nested dicts are returned, as their paths say.
        shardings: where to put the parameters instead: a tree of `jax.sharding.Sharding`s like the parameters, such as
            `gf.train.shardings` returns, or one for all of them.

    Returns:
        The parameters, of the type of `like`.

    Raises:
        CheckpointError: there is none, it is damaged, or it does not fit `like`; it names the array.
        ImportError: it is of a state that was split over devices, and orbax is not installed.
        ValueError: `shardings` are not like the parameters, or do not divide them.

    >>> import jax.numpy as jnp, optax, tempfile, gradfn as gf
    >>> start, folder = {"w": jnp.array(1.0)}, tempfile.mkdtemp()
    >>> data, loss = jnp.ones(8), lambda params, x: (params["w"] * x).mean()
    >>> options = {"batch_size": 2, "folder": folder, "progress": False}
    >>> fitted = gf.fit(loss, start, data, optax.sgd(0.25), 4, **options)
    >>> gf.train.load_params(folder)
    {'w': Array(0., dtype=float32)}
    """
    stored = _find(Path(folder))
    if like is None:
        like = _nested(_parameters(stored))
    elif hasattr(like, "spec") and hasattr(like, "apply"):
        like = like.spec
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_param(leaf) else leaf,
        like,
        is_leaf=is_param,
    )
    return _load_model(stored, like, None, shardings)


def _load_model(stored: Stored, like: PyTree, state: PyTree, shardings: PyTree = None) -> PyTree:
    """Return the parameters in a checkpoint as a model like another one; and a state, if there is one like it."""
    params, rest, carried = take_apart(like)
    if shardings is not None:
        params = _sharded(params, shardings)
    carried = carried if state is None else state
    wanted = {"params": params} | ({} if carried is None else {"model_state": carried})
    loaded, _ = load(stored, wanted, rest=True)
    new = loaded.get("model_state")
    model = loaded["params"] if rest is None else rest.model(loaded["params"], new)
    return model if state is None else (model, new)


def _sharded(params: PyTree, shardings: PyTree) -> PyTree:
    """Return the shapes and dtypes of parameters, with shardings."""
    try:
        shardings = jax.tree.broadcast(shardings, params)
    except ValueError as error:
        raise ValueError(f"load_params: shardings must be a tree like the parameters: {error}") from error
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        shardings,
    )


def _find(path: Path) -> Stored:
    """Return the newest checkpoint in a run's folder, or the one that a path names.

    Raises:
        CheckpointError: there is none.
    """
    file = path.with_suffix(".json")
    if re.fullmatch(f"{STEP}(.json)?", path.name) and file.is_file():
        return Stored(file, path.with_suffix(""))
    if path.is_file():
        return Stored(path)
    if found := newest(path):
        return found
    if path.name in (CHECKPOINTS, KEPT) and (complete := finished(path.parent, path.name)):
        return complete[-1]
    raise CheckpointError(f"{path}: does not contain a checkpoint; train with gf.fit(..., folder=...)")


def _parameters(stored: Stored) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of the parameters in a checkpoint by path."""
    found = {}
    try:
        if stored.folder:
            for name, array in description(stored.file)["arrays"].items():
                found[name] = jax.ShapeDtypeStruct(tuple(array["shape"]), jnp.dtype(array["dtype"]))
        else:
            known = {stored: known for known, stored in NAMES.items()}
            with open_tensors(stored.file) as content:
                other = parse_json(
                    (content.metadata() or {}).get("dtypes", "{}"), dict[str, str], "its dtypes"
                )
                for name in content.keys():  # noqa: SIM118
                    part = content.get_slice(name)
                    dtype = jnp.dtype(other.get(name, known.get(part.get_dtype(), "float32")))
                    shape = tuple(part.get_shape())
                    found[name] = jax.ShapeDtypeStruct(shape[:-1] if dtype.kind == "c" else shape, dtype)
    except (FileError, TypeError) as error:
        raise checkpoint.unreadable(stored.file, error) from error
    params = {name: leaf for name, leaf in found.items() if name.partition("/")[0] == "params"}
    if not params or not all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in params.values()):
        raise CheckpointError(f"{stored.file}: does not contain parameters of gf.fit")
    return params


def _nested(named: dict[str, Any]) -> PyTree:
    """Return nested dicts of leaves, as their paths say, below `params`."""
    root: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return root["params"]
