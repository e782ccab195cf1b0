"""Checkpoints of a state that is split over devices: folders that orbax writes and reads.

Each process writes the parts that are on its devices, and reads the parts that its devices need, which may be other
devices than those that the state was on. The JSON file beside a folder says what it holds, with a checksum of each of
its files (`gradfn.stored` describes it).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradfn.core.params import named_leaves
from gradfn.files import BLOCK, FileError, inner_folder, open_regular, parse_json, replace_file
from gradfn.layout import DIGITS
from gradfn.stored import Array, Content, Stored, described, description
from gradfn.train.checkpoint import (
    CheckpointError,
    check_names,
    finite,
    is_key,
    placed,
    sharding_of,
    unreadable,
    untyped,
)
from gradfn.train.processes import agreed, is_first, largest

# What is in a folder of checkpoints: folders and descriptions, whole and unfinished ones.
OURS = re.compile(rf"\.?(\d{{{DIGITS}}})(\..*)?")


def is_split(state: PyTree) -> bool:
    """Return whether an array of a state is split over devices, so that none of them has all of it."""
    return any(
        isinstance(leaf, jax.Array) and not leaf.is_fully_replicated for leaf in jax.tree.leaves(state)
    )


def require() -> Any:
    """Return the module `orbax.checkpoint`.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            "checkpoints of a state that is split over devices need orbax: pip install 'gradfn[distributed]'"
        ) from error
    return orbax.checkpoint


def begin(folder: Path, step: int, state: PyTree, notes: Mapping[str, Any]) -> Callable[[], None]:
    """Start to write a state that is split over devices; every process calls this.

    When this returns, the state may change: its arrays were copied to the host.

    Args:
        folder: of such checkpoints, which is made; `<step>` and `<step>.json` are written in it.
        step: the number of steps taken.
        state: a pytree of arrays and typed keys.
        notes: JSON values.

    Returns:
        A function that waits until everything is on the disk; another thread may call it.

    Raises:
        OSError: it cannot be written; it names the folder. The returned function raises it too.
        FileError: `folder` is a link.
    """
    orbax = require()
    target = inner_folder(folder.absolute().parent, folder.name) / f"{step:0{DIGITS}}"
    file = target.with_name(f"{target.name}.json")
    arrays = {name: jnp.asarray(untyped(leaf)) for name, leaf in named_leaves(state)}
    kinds = {name: Array(dtype=array.dtype.name, shape=list(array.shape)) for name, array in arrays.items()}
    # A run that has taken no step since it was resumed has the same state under the same name.
    exists = bool(agreed(is_first() and _holds(file, kinds)))
    writer = None
    if not exists:
        with _writing(target):
            if is_first():
                remove(target)
            writer = orbax.AsyncCheckpointer(orbax.PyTreeCheckpointHandler())
            # Arrays without values are in the description alone: orbax does not write them.
            values = {name: array for name, array in arrays.items() if array.size}
            writer.save(target, args=orbax.args.PyTreeSave(values))

    def finish() -> None:
        with _writing(target):
            if writer is not None:
                writer.close()
            if is_first():
                files = description(file)["files"] if exists else _synced(target)
                replace_file(file, json.dumps(described(finite(notes), kinds, files)).encode())

    return finish


def _holds(file: Path, arrays: Mapping[str, Array]) -> bool:
    """Return whether a description exists, and is of such arrays."""
    with contextlib.suppress(FileError):
        return description(file)["arrays"] == arrays
    return False


def remove(folder: Path) -> None:
    """Remove a folder of orbax, its description first, if it is there."""
    folder.with_name(f"{folder.name}.json").unlink(missing_ok=True)
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Remove what was written of a folder after an error, which is raised as an OSError that names the folder."""
    try:
        yield
    except Exception as error:
        for unfinished in target.parent.glob(f"{target.name}.orbax-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        reason = str(error).partition("\n")[0][:1000] or type(error).__name__
        raise OSError(errno.EIO, f"the checkpoint cannot be written: {reason}", str(target)) from error


def tidy(folder: Path, keep: int | None = None) -> None:
    """Remove checkpoints from a folder of them, each one's description first; other files stay.

    Args:
        folder: of checkpoints.
        keep: the number of finished ones to keep, the newest; None for all of them.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    entries = {entry: match for entry in folder.iterdir() if (match := OURS.fullmatch(entry.name))}
    complete = sorted(match[1] for match in entries.values() if f"{match[1]}.json" == match[0])
    stay = set(complete if keep is None else complete[max(len(complete) - keep, 0) :])
    # First the descriptions: a folder that is removed in part has no description.
    for entry, match in sorted(entries.items(), key=lambda item: not item[0].name.endswith(".json")):
        if match[1] in stay and match[0] in (match[1], f"{match[1]}.json"):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif match[2] != ".safetensors":  # of parameters that were kept
            entry.unlink(missing_ok=True)


def load(stored: Stored, like: PyTree, rest: bool = False, form: type = dict) -> tuple[PyTree, PyTree]:
    """Read a state that was split over devices onto the devices of another one; every process calls this.

    See `gradfn.train.checkpoint.load`, whose `file` is here the folder and its description.

    Raises:
        CheckpointError: the folder cannot be read, is damaged, or does not fit `like`; it names the array.
        ImportError: orbax is not installed.
    """
    orbax = require()
    named = {name: _abstract(leaf) for name, leaf in named_leaves(like)}
    try:
        content = description(stored.file)
        notes: Any = parse_json(json.dumps(content["notes"]), form, "its notes")
    except FileError as error:
        raise unreadable(stored.file, error) from error
    arrays = content["arrays"]
    check_names(stored.file, set(arrays), set(named), rest)
    for name, leaf in named.items():
        _check(stored.file, name, arrays[name]["dtype"], arrays[name]["shape"], leaf)
    assert stored.folder
    _verify(stored.folder, content["files"])
    found = _read(orbax, stored.folder, {name: leaf for name, leaf in named.items() if leaf.size})
    empty = {name: leaf for name, leaf in named.items() if not leaf.size}
    found |= {name: placed(np.zeros(leaf.shape, leaf.dtype), leaf) for name, leaf in empty.items()}

    def typed(named_leaf: tuple[str, PyTree]) -> jax.Array:
        name, leaf = named_leaf
        if hasattr(leaf, "dtype") and is_key(leaf):
            return jax.random.wrap_key_data(found[name], impl=jax.random.key_impl(leaf))
        return found[name]

    return jax.tree.unflatten(jax.tree.structure(like), map(typed, named_leaves(like))), notes


def _read(orbax: Any, folder: Path, named: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Return the arrays of these names, shapes, dtypes and shardings in a folder."""
    options = {
        name: orbax.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        if leaf.sharding is None
        else orbax.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
        for name, leaf in named.items()
    }
    try:
        with orbax.Checkpointer(orbax.PyTreeCheckpointHandler()) as reader:
            known = reader.metadata(folder.absolute()).item_metadata.tree
            for name, leaf in named.items():
                _check(folder, name, known[name].dtype, known[name].shape, leaf)
                # Parts are read whole, so none may claim to be larger than the array.
                part = known[name].storage.chunk_shape
                if any(n > size for n, size in zip(part, leaf.shape, strict=True)):
                    raise CheckpointError(f"{folder}: {name}: has parts of shape {list(part)}; it is damaged")
            found = reader.restore(
                folder.absolute(),
                args=orbax.args.PyTreeRestore(item=dict(named), restore_args=options, partial_restore=True),
            )
    except CheckpointError:
        raise
    except Exception as error:  # of orbax, of tensorstore, of JSON
        raise unreadable(folder, error) from error
    return {name: jnp.asarray(array) for name, array in found.items()}


def _abstract(leaf: PyTree) -> jax.ShapeDtypeStruct:
    """Return the shape, dtype and sharding of an array, or of the data of keys."""
    data = untyped(leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding_of(data))


def _check(file: Path, name: str, dtype: Any, shape: Any, leaf: jax.ShapeDtypeStruct) -> None:
    """Raise a CheckpointError for an array of a different dtype or shape."""
    actual, expected = (f"{list(map(int, s))} {d}" for s, d in ((shape, dtype), (leaf.shape, leaf.dtype)))
    if actual != expected:
        raise CheckpointError(f"{file}: {name}: expected {expected}, got {actual}")


def _verify(folder: Path, files: Mapping[str, Content]) -> None:
    """Compare the files in a folder with their sizes and checksums; each of several processes reads some of them.

    Raises:
        CheckpointError: they differ, or one is a link; it is raised in every process.
    """
    names = sorted(files)
    try:
        found = _names(folder)
        different = sorted(found ^ files.keys())[:1]
        for name in names[jax.process_index() :: jax.process_count()] if not different else ():
            if different := [name] * (_content(folder / name) != files[name]):
                break
    except (OSError, FileError) as error:
        different = [str(error)]
    if largest(len(different)) and not different:
        different = ["a file that another process read"]
    if different:
        raise CheckpointError(f"{folder}: damaged: {different[0]} is not as {folder.name}.json describes it")


def _synced(folder: Path) -> dict[str, Content]:
    """Return what is in the files of a folder, once all of it is on the disk."""
    found = {name: _content(folder / name, sync=True) for name in sorted(_names(folder))}
    if os.name != "nt":  # Windows does not open folders
        for parent in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            handle = os.open(parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    return found


def _names(folder: Path) -> set[str]:
    """Return the paths of everything in a folder that is not a folder itself; links are not followed."""
    paths = (os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)
    links = (os.path.join(parent, name) for parent, folders, _ in os.walk(folder) for name in folders)
    return {Path(path).relative_to(folder).as_posix() for path in (*paths, *filter(os.path.islink, links))}


def _content(file: Path, sync: bool = False) -> Content:
    """Return the size of a file and its checksum, with `sync` once it is on the disk."""
    size, crc = 0, 0
    with open_regular(file) as content:
        if sync:
            os.fsync(content.fileno())
        while data := content.read(BLOCK):
            size, crc = size + len(data), zlib.crc32(data, crc)
    return {"bytes": size, "crc": crc}
