"""Real weights: language models in the folders that Hugging Face's `transformers` writes and reads.

A folder holds `config.json` and `model.safetensors`, or several such files and `model.safetensors.index.json`.
Pickled weights are never read, because unpickling a file can run arbitrary code. What the config describes
is compared with the files' headers before anything is built or loaded, and tensors are loaded one at a time.
What differs between families of models is in `gradfn/nets/families/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from gradfn.core.params import Params, check, path_name
from gradfn.files import IDLE, FileError, beside, read_json, remove_parts, replacing
from gradfn.nets._gpt import GPTConfig, gpt
from gradfn.nets.families import FAMILIES, REFUSED, Family
from gradfn.nets.families.family import Entry, choose, normalized
from gradfn.nets.families.fields import Fields, shown
from gradfn.tensors import NAMES, Tensor, is_stored, open_rows, open_tensors, write_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {NAMES[name]: name for name in ("float16", "bfloat16", "float32", "float64")}

PART = 1 << 22  # bytes that are read at a time


class Stored(NamedTuple):
    """A tensor in a file: what the file's header says of it, and a function that reads some of its rows."""

    file: Path
    dtype: str  # as the format calls it
    shape: tuple[int, ...]
    rows: Callable[[int, int], np.ndarray]

    def load(self) -> np.ndarray:
        """Return the whole tensor."""
        return self.rows(0, self.shape[0]) if self.shape else self.rows(0, 1)[0]


class Index(TypedDict):
    """What `model.safetensors.index.json` contains."""

    weight_map: dict[str, str]  # the file of each tensor


def load_pretrained(
    folder: str | os.PathLike[str], dtype: str | None = "float32"
) -> tuple[GPTConfig, Params]:
    """Load a language model from a Hugging Face folder: GPT-2, Llama, Qwen 2 and 3, Mistral, Gemma, GPT-NeoX.

    `model_type` in `config.json` selects the family; `docs/pretrained.md` lists them, and what is not supported. The
    files are read tensor by tensor, and large tensors in parts: the peak of memory is little above the size of the
    parameters.

    Args:
        folder: contains `config.json` and safetensors files, in one piece or in shards.
        dtype: of the parameters; None for that of the files (float32, float16 or bfloat16).

    Returns:
        `(config, params)`. `gf.gpt(config)` is the net; `dataclasses.replace(config, scan=True)` and
        `gf.stack_blocks(params)` run its blocks under `lax.scan`.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: another `model_type`; a field of `config.json` that asks for something that `gf.gpt` does not
            do; a tensor that is missing, unexpected, of another shape or not of floats; a damaged file. The
            message names it, and nothing is loaded before headers and config agree. Fields of training,
            generation and bookkeeping change no result and are ignored; unknown fields that are null, false or
            empty are ignored with a warning.

    >>> import jax, tempfile, gradfn as gf
    >>> config = gf.GPTConfig(vocab=65, context=8, n_layers=1, n_heads=2, width=4)
    >>> folder = tempfile.mkdtemp()
    >>> gf.save_pretrained(folder, config, gf.gpt(config).init(jax.random.key(0)))
    >>> loaded, params = gf.load_pretrained(folder)
    >>> loaded == config, gf.count(params)
    (True, 544)
    """
    folder = Path(folder)
    file = folder / "config.json"
    fields = Fields(file)
    if (refused := REFUSED.get(str(fields.left.get("model_type")))) is not None:
        raise FileError(f"{file}: model_type: {fields.left['model_type']} is {refused}")
    family = FAMILIES[fields.choice("model_type", FAMILIES)]
    config = family.read(fields)
    fields.end()
    try:
        gpt(dataclasses.replace(config, n_layers=1))
    except ValueError as error:
        # Sizes that do not fit together.
        raise FileError(f"{file}: {error}") from error
    with _opened(folder) as tensors:
        tensors = _without_buffers(tensors, family, config, file)
        _check_depth(family, config, len(tensors), file)
        entries = family.entries(config)
        _check_names([entry.name for entry in entries], tensors, folder)
        spec = gpt(config).spec
        shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(spec)}
        for entry in entries:
            _check_tensor(entry, tensors[entry.name], shapes)
        leaves: dict[str, jax.Array] = {}
        for entry in entries:
            loaded = _load(entry, tensors[entry.name], shapes, dtype and jnp.dtype(dtype))
            # Otherwise the arrays of a file wait in memory until a slower device has copied them.
            leaves |= jax.block_until_ready(loaded)
    return config, jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], spec)


def _load(
    entry: Entry, tensor: Stored, shapes: Mapping[str, tuple[int, ...]], dtype: DTypeLike | None
) -> dict[str, jax.Array]:
    """Return the leaves of a tensor, by path. A large one is read in parts, so that it is in memory only once."""
    row = tensor.rows(0, 1).nbytes
    if len(entry.paths) > 1 or entry.transposed or row * tensor.shape[0] <= PART:
        parts = entry.split(tensor.load(), [shapes[path] for path in entry.paths])
        return {path: jnp.asarray(part, dtype) for path, part in zip(entry.paths, parts, strict=True)}
    whole = jnp.zeros(tensor.shape, dtype or jax.dtypes.canonicalize_dtype(FLOATS[tensor.dtype]))
    n, end = max(PART // row, 1), tensor.shape[0]
    for start in range(0, end, n):
        whole = jax.block_until_ready(_put(whole, tensor.rows(start, min(start + n, end)), start))
    return {entry.paths[0]: whole}


@partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """Write some rows into an array in place."""
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, 0)


def save_pretrained(
    folder: str | os.PathLike[str], config: GPTConfig, params: Params, family: str | None = None
) -> None:
    """Write a model as a Hugging Face folder that `transformers` reads.

    Args:
        folder: created if it does not exist. A model in it is replaced, including its shards and their index
            (`model-00001-of-00002.safetensors`, ...). Config and weights are written completely before they
            replace existing ones.
        config: with the features of a family, such as GPT-2 (learned positions, layer norms, no shared heads; absent
            biases are written as zeros) or Llama (RoPE, RMS norms, SwiGLU).
        params: of `gf.gpt(config)`; they are written in their own dtype, one tensor at a time.
        family: the `model_type` to write; None for the first one that has all features of the config.

    Raises:
        ParameterError: parameters that do not fit the config.
        ValueError: a config that no family, or not the named one, can express (the message names the field); a folder
            whose `config.json` or `model.safetensors` does not belong to such a model.

    >>> import jax, tempfile, gradfn as gf, os
    >>> config = gf.GPTConfig(vocab=65, context=8, n_layers=1, n_heads=2, width=4)
    >>> folder = tempfile.mkdtemp()
    >>> gf.save_pretrained(folder, config, gf.gpt(config).init(jax.random.key(0)))
    >>> sorted(os.listdir(folder))
    ['config.json', 'model.safetensors']
    """
    check(gpt(config).spec, params)
    described = normalized(config)
    chosen = choose(FAMILIES, described, family)
    fields = chosen.fields(described)
    given = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    dtype = next(iter(given.values())).dtype
    bias = config.bias or chosen.always_biased
    spec = gpt(dataclasses.replace(config, bias=bias, scan=False)).spec
    shapes = {path_name(path): param.shape for path, param in jax.tree_util.tree_leaves_with_path(spec)}

    def leaf(path: str) -> PyTree:
        block = re.fullmatch(r"blocks/(\d+)/(.+)", path) if config.scan else None
        if block is not None:
            path = f"blocks/{block[2]}"
        if path not in given:
            return np.zeros(shapes[path if block is None else block[0]], dtype)
        return given[path] if block is None else given[path][int(block[1])]

    def tensor(entry: Entry) -> Tensor:
        def load() -> np.ndarray:
            return entry.join([np.asarray(leaf(path)) for path in entry.paths])

        return Tensor(np.dtype(dtype), entry.shape([shapes[path] for path in entry.paths]), load)

    if not is_stored(dtype):
        raise ValueError(f"save_pretrained: expected parameters of a dtype that safetensors has, got {dtype}")
    tensors = {entry.name: tensor(entry) for entry in chosen.entries(config)}
    folder = Path(folder)
    _check_replaceable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", SINGLE):
        remove_parts(folder, name, IDLE)
    fields |= {"dtype": str(dtype)}
    # The config gets its name first: weights without one would not be recognized as ours.
    with replacing(folder / SINGLE) as weights, replacing(folder / "config.json") as text:
        text.write((json.dumps(fields, indent=2) + "\n").encode())
        write_tensors(weights, tensors, {"format": "pt"})
    for stale in [folder / INDEX, *folder.iterdir()]:
        if stale.name == INDEX or re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", stale.name):
            stale.unlink(missing_ok=True)


def _check_replaceable(folder: Path) -> None:
    """Refuse to write over files that are not a model's."""
    file = folder / "config.json"
    if os.path.lexists(file):
        try:
            content = read_json(file, dict[str, Any])
        except FileError:
            content = {}
        if not isinstance(content.get("model_type"), str):
            raise ValueError(
                f"{file}: already exists and is not the config of a Hugging Face model. Name another folder"
            )
    elif os.path.lexists(folder / SINGLE):
        raise ValueError(f"{folder / SINGLE}: already exists without a config.json. Name another folder")


# Files


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[dict[str, Stored]]:
    """Open all tensors of a folder, in one file or else in shards, as `transformers` does."""
    with contextlib.ExitStack() as files:
        tensors: dict[str, Stored] = {}
        for file, names in _files(folder).items():
            content = files.enter_context(open_tensors(file))
            stored = _stored(content, files.enter_context(open_rows(file)), file)
            absent = sorted(names - stored.keys())
            if absent:
                raise FileError(f"{file}: {shown(absent[0])}: missing, though {INDEX} says it is here")
            tensors |= stored
        yield tensors


def _files(folder: Path) -> dict[Path, set[str]]:
    """Return a folder's files of weights, each with the tensors that an index says it contains."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():
        return {single: set()}
    if index.exists():
        files: dict[Path, set[str]] = {}
        for name, file in sorted(read_json(index, Index)["weight_map"].items()):
            files.setdefault(beside(index, file), set()).add(name)
        absent = next((file for file in files if not file.exists()), None)
        if absent is not None:
            raise FileNotFoundError(f"{absent}: not there, though the index names it")
        return files
    pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    hint = (
        f". {shown(pickled[0].name)} is pickled and never read; save the model with safe_serialization=True"
        if pickled
        else ""
    )
    raise FileNotFoundError(f"{folder}: expected {single.name} or {index.name}{hint}")


def _stored(content: PyTree, rows: Callable[[str, int, int], np.ndarray], file: Path) -> dict[str, Stored]:
    """Return what an open file's header says of its tensors."""
    stored = {}
    for name in content.keys():  # noqa: SIM118
        header = content.get_slice(name)
        stored[name] = Stored(file, header.get_dtype(), tuple(header.get_shape()), partial(rows, name))
    return stored


def _without_buffers(
    tensors: dict[str, Stored], family: Family, config: GPTConfig, file: Path
) -> dict[str, Stored]:
    """Drop what older files hold beside the parameters, and give all names their usual prefix."""
    if not any(name.startswith(family.prefix) for name in tensors):  # the bare model, without its head
        tensors = {name if name == family.head else family.prefix + name: t for name, t in tensors.items()}
    tensors = {name: t for name, t in tensors.items() if not re.search(family.buffers, name)}
    head, embedded = tensors.get(family.head), tensors.get(family.embedding)
    if config.tied and head is not None and embedded is not None:
        same = head[1:3] == embedded[1:3] and head.dtype in FLOATS
        if not same or not np.array_equal(head.load(), embedded.load()):
            raise FileError(
                f"{head.file}: {family.head}: differs from {family.embedding}, though {file.name} ties them "
                "(tie_word_embeddings)"
            )
        del tensors[family.head]
    return tensors


def _check_depth(family: Family, config: GPTConfig, n_tensors: int, file: Path) -> None:
    """Refuse far more layers than the files can have the tensors of, before a list of them is made."""
    one, two = (len(family.entries(dataclasses.replace(config, n_layers=n))) for n in (1, 2))
    expected = one + (config.n_layers - 1) * (two - one)
    if expected > n_tensors + 1000:
        raise FileError(
            f"{file}: describes {config.n_layers:,} layers of {two - one} tensors each, but the folder's files contain "
            f"{n_tensors:,} tensors"
        )


def _check_names(expected: list[str], tensors: dict[str, Stored], folder: Path) -> None:
    missing = [name for name in expected if name not in tensors]
    extra = sorted(set(tensors) - set(expected))
    if missing:
        alike = [name for name in extra if len(name) <= 200][:1000]
        near = difflib.get_close_matches(missing[0], alike, 1)
        hint = f". Left over is {shown(near[0])}" if near else ""
        raise FileError(f"{folder}: {missing[0]}: missing ({len(missing)} of {len(expected)} are){hint}")
    if extra:
        raise FileError(
            f"{folder}: {shown(extra[0])}: no parameter of this model ({len(extra)} are left over)"
        )


def _check_tensor(entry: Entry, tensor: Stored, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a tensor of another shape than the config describes, or of a dtype that is not of parameters."""
    expected = entry.shape([shapes[path] for path in entry.paths])
    if tensor.shape != expected or tensor.dtype not in FLOATS:
        raise FileError(
            f"{tensor.file}: {entry.name}: expected {list(expected)} of {', '.join(FLOATS)}, got "
            f"{list(tensor.shape)[:9]} of {tensor.dtype}"
        )
