"""The folder of a run of `fit`: its owner, and the files that an earlier run left in it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from gradfn.files import inner_folder, owned, remove_parts
from gradfn.layout import CHECKPOINT, CHECKPOINTS, DIGITS, ENDED, EVENTS, KEPT, LOGGED, LOGS, PROFILE
from gradfn.train import sharded


@contextlib.contextmanager
def own(folder: Path | None) -> Iterator[None]:
    """Create a folder, and own it while the block runs: see `gradfn.files.owned`."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with owned(folder):
        yield


def prepare(folder: Path, resume: bool, keep: bool) -> None:
    """Prepare a folder for a run: remove the files of an earlier one, or only its unfinished ones to resume it.

    Args:
        folder: of the run, owned by this process.
        resume: whether the run continues from the folder's checkpoint.
        keep: whether the run keeps parameters.

    Raises:
        FileError: a folder in it is a link.
    """
    inner_folder(folder, EVENTS)
    (folder / ENDED).unlink(missing_ok=True)  # of the process before
    if keep:
        inner_folder(folder, KEPT)
    if not resume:
        clear(folder)
    remove_parts(folder, CHECKPOINT)
    for inner in (CHECKPOINTS, KEPT):
        sharded.tidy(folder / inner)
    for part in _within(folder, KEPT, f".{'[0-9]' * DIGITS}.safetensors.*"):
        remove_parts(folder / KEPT, f"{part.name[1 : DIGITS + 1]}.safetensors")


def clear(folder: Path) -> None:
    """Remove the files of an earlier run of `fit` from a folder, the checkpoint first; other files stay."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    for inner in (CHECKPOINTS, KEPT):
        sharded.tidy(folder / inner, keep=0)
    for name in (*LOGS, LOGGED):
        (folder / name).unlink(missing_ok=True)
    patterns = {EVENTS: "events.out.tfevents.*", KEPT: f"{'[0-9]' * DIGITS}.safetensors"}
    for inner, pattern in patterns.items():
        for file in _within(folder, inner, pattern):
            file.unlink()
    for trace in _within(folder, PROFILE, "plugins"):  # as jax's profiler calls it
        shutil.rmtree(trace)


def _within(folder: Path, inner: str, pattern: str) -> list[Path]:
    """Return files in a folder inside a run's; none if that folder is a link, which may lead anywhere."""
    return [] if (folder / inner).is_symlink() else list((folder / inner).glob(pattern))
