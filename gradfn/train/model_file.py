"""`model.json` in the folder of a run of `fit`: what its network was made with, so that a page can compute with it."""

from __future__ import annotations

from pathlib import Path

from gradfn.display import to_json
from gradfn.files import FileError, replace_file
from gradfn.flatten import Loss
from gradfn.layout import MODEL
from gradfn.losses import description_of
from gradfn.stored import ModelFile, model_file


def check_model_file(folder: Path, loss: Loss) -> None:
    """Check that a description with a tokenizer in a folder, which is not from `fit`, is that of the loss's network.

    Raises:
        FileError: it is that of another one.
    """
    found, description = _found(folder), description_of(loss)
    if not isinstance(found, dict) or not found["tokenizer"] or description is None:
        return
    settings = {name: description["settings"].get(name) for name in found["settings"]}
    if (found["net"], found["settings"]) != (description["net"], settings):
        raise FileError(f"{folder / MODEL} belongs to another model or text. Use another folder")


def write_model_file(folder: Path, loss: Loss) -> None:
    """Write what the network of a loss was made with, or remove what an earlier run of `fit` wrote.

    Files of others stay as they are: those with a tokenizer, which `fit` does not know, and those of another form.
    """
    found, description = _found(folder), description_of(loss)
    if found == "of others" or (isinstance(found, dict) and found["tokenizer"]):
        return
    if description is None:
        (folder / MODEL).unlink(missing_ok=True)
        return
    content = {**description, "tokenizer": None, "lines": False}
    replace_file(folder / MODEL, (to_json(content, indent=2) + "\n").encode())


def _found(folder: Path) -> ModelFile | str | None:
    """Return the description in a folder; `"of others"` where it has another form, None where there is none."""
    try:
        return model_file(folder)
    except FileError:
        return "of others"
