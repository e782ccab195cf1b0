"""The checkpoints in a run's folder: which there are, and what they hold beside their arrays. This imports no jax.

A checkpoint is one file, `checkpoint.safetensors`; or, where its arrays were split over devices, a folder that orbax
wrote, `checkpoint/<step>`, and a JSON file beside it that describes it, `checkpoint/<step>.json`. That file is written
last and removed first: where it exists, the folder is complete.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeVar

from gradfn.files import FileError, inside, parse_json, read_json
from gradfn.layout import CHECKPOINT, CHECKPOINTS, DIGITS, MODEL
from gradfn.tensors import CHECKSUM, open_tensors

T = TypeVar("T")
MODEL_LIMIT = 16 << 20  # bytes; a tokenizer of characters is most of them
STEP = "[0-9]" * DIGITS  # in names of files, for `glob`


class Array(TypedDict):
    """What a description says of an array."""

    dtype: str
    shape: list[int]


class Content(TypedDict):
    """What a description says of a file: how many bytes it has, and their CRC-32."""

    bytes: int
    crc: int


class Description(TypedDict):
    """`<step>.json`: what a folder of orbax holds.

    Attributes:
        notes: what `gf.fit` writes beside the state.
        arrays: by path.
        files: in the folder, by their paths in it.
        checksum: of all that.
    """

    notes: dict[str, Any]
    arrays: dict[str, Array]
    files: dict[str, Content]
    checksum: int


class ModelFile(TypedDict):
    """`model.json`: what a network was made with.

    Attributes:
        net: the function of gradfn that made it: mlp, cnn, rnn, gpt or vit.
        settings: its arguments, or the fields of its config.
        loss: the function of gradfn that made the loss; left out where it is `next_token_loss`.
        tokenizer: see `gradfn.data.Tokenizer.to_dict`; None where it is not known.
        lines: whether a language model was trained on lines that are texts of their own.
    """

    net: str
    settings: dict[str, Any]
    loss: NotRequired[str]
    tokenizer: dict[str, Any] | None
    lines: bool


class Stored(NamedTuple):
    """A checkpoint, or parameters that were kept.

    Attributes:
        file: a safetensors file, or the description of a folder.
        folder: orbax's; None where the arrays are in the file.
    """

    file: Path
    folder: Path | None = None


def newest(folder: Path) -> Stored | None:
    """Return the newest checkpoint in a run's folder; None where there is none.

    Raises:
        FileError: it leads out of the folder, or one of two cannot be read.
    """
    file = inside(folder, CHECKPOINT)
    split = finished(folder, CHECKPOINTS)[-1:]
    if not os.path.lexists(file):
        return split[0] if split else None
    # A run that changed from one kind to the other was killed before it removed the older one.
    return split[0] if split and int(split[0].file.stem) > _step(file) else Stored(file)


def model_file(folder: Path) -> ModelFile | None:
    """Return what the network of a run was made with; None where it is not known.

    Raises:
        FileError: the file leads out of the folder, or cannot be read, or has another form.
    """
    file = inside(folder, MODEL)
    return read_json(file, ModelFile, MODEL_LIMIT) if os.path.lexists(file) else None


def finished(folder: Path, name: str) -> list[Stored]:
    """Return the complete folders of orbax in `name` inside a run's folder, by step.

    Raises:
        FileError: one leads out of the folder.
    """
    stems = sorted(file.stem for file in inside(folder, name).glob(f"{STEP}.json"))
    return [Stored(inside(folder, f"{name}/{stem}.json"), inside(folder, f"{name}/{stem}")) for stem in stems]


def notes(stored: Stored, form: type[T]) -> T:
    """Return the notes of a checkpoint, of a form: see `gradfn.files.read_json`.

    Raises:
        FileError: they cannot be read.
    """
    if stored.folder:
        text = json.dumps(description(stored.file)["notes"])
        return parse_json(text, form, f"{stored.file}: notes")
    with open_tensors(stored.file) as content:
        return parse_json((content.metadata() or {})["notes"], form, f"{stored.file}: its notes")


def shapes(stored: Stored) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays in a checkpoint by path, without reading them; complex numbers may be pairs.

    Raises:
        FileError: it cannot be read.
    """
    if stored.folder:
        return {name: tuple(array["shape"]) for name, array in description(stored.file)["arrays"].items()}
    with open_tensors(stored.file) as content:
        names = set(content.keys()) - {CHECKSUM}
        return {name: tuple(content.get_slice(name).get_shape()) for name in sorted(names)}


def parameter_shapes(stored: Stored) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters in a checkpoint by path, without reading them."""
    found = {name: shape for name, shape in shapes(stored).items() if re.match("params(/|$)", name)}
    return {name.removeprefix("params/"): shape for name, shape in found.items()}


def description(file: Path) -> Description:
    """Read the description of a folder of orbax.

    Raises:
        FileError: it cannot be read, or is damaged.
    """
    content = read_json(file, Description)
    if described(content["notes"], content["arrays"], content["files"]) != content:
        raise FileError(f"{file}: damaged: its content does not match its checksum")
    return content


def described(
    notes: Mapping[str, Any], arrays: Mapping[str, Array], files: Mapping[str, Content]
) -> Description:
    """Return the description of a folder with these notes, arrays and files, with its checksum."""
    text = json.dumps([notes, arrays, files], sort_keys=True)
    return {
        "notes": dict(notes),
        "arrays": dict(arrays),
        "files": dict(files),
        "checksum": zlib.crc32(text.encode()),
    }


def _step(file: Path) -> int:
    """Return the step of a checkpoint that is one file."""
    with open_tensors(file) as content:
        return int(content.get_tensor("step"))
