"""A network that describes itself in the folder of its run, read back without jax, for the page to compute with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradfn.files import FileError, inside
from gradfn.layout import MODEL
from gradfn.runs.language_net import NETS as LANGUAGE_NETS
from gradfn.stored import model_file, newest, parameter_shapes
from gradfn.tensors import CHECKSUM, open_tensors

LIMIT = 16 << 20  # bytes of the parameters, of which a page holds fewer
PREFIX = "params/"


class DescribedNet(NamedTuple):
    """What a run of `gf.fit` trained, where its loss is gradfn's own.

    Attributes:
        net: the function of gradfn that made it: mlp, cnn, ...
        settings: its arguments.
        loss: the function of gradfn that made its loss.
        params: by path, float32.
        examples: inputs `[n, ...]` and targets `[n, ...]` to show in the page; None for none.
    """

    net: str
    settings: dict[str, Any]
    loss: str
    params: dict[str, np.ndarray]
    examples: tuple[np.ndarray, np.ndarray] | None = None


def load_described_net(folder: Path) -> DescribedNet | str | None:
    """Read the network that `gf.fit` has trained so far in a folder.

    Returns:
        The network; None where none describes itself, or `gradfn.runs.language_net` reads it; or a sentence that
        says why it cannot run in a page.

    Raises:
        FileError: the checkpoint cannot be read, or leads out of the folder.
    """
    try:
        content = model_file(folder)
    except FileError:
        return f"The network does not run in the page, because its {MODEL} is not a description that gradfn wrote."
    if content is None or content["net"] in LANGUAGE_NETS:
        return None
    net = content["net"]
    if net not in ("mlp", "cnn"):
        return (
            f"The network does not run in the page: gf.mlp, gf.cnn and gf.gpt do, and this is gf.{net:.20}."
        )
    stored = newest(folder)
    if stored is None:
        return None  # the run has only just started
    if stored.folder:
        return "The network does not run in the page, because its checkpoint is split over devices."
    size = sum(math.prod(shape) for shape in parameter_shapes(stored).values())
    if 4 * size > LIMIT:
        return too_large(size, LIMIT)
    params = {}
    with open_tensors(inside(folder, stored.file.name)) as tensors:
        for name in sorted(set(tensors.keys()) - {CHECKSUM}):
            if name.startswith(PREFIX):
                params[name.removeprefix(PREFIX)] = np.asarray(tensors.get_tensor(name)).astype(np.float32)
    if not all(np.isfinite(array).all() for array in params.values()):
        return "The network does not run in the page, because it has parameters that are not finite."
    return DescribedNet(net, content["settings"], content.get("loss", ""), params)


def too_large(n: int, room: float) -> str:
    """Return the sentence for a network of `n` parameters where there are `room` bytes.

    >>> too_large(3_000_000, 1e6)
    'The network is too large to run in the page: its 3,000,000 parameters take 12.0 MB, and there is room for 1.0 MB.'
    """
    return (
        f"The network is too large to run in the page: its {n:,} parameters take {4 * n / 1e6:,.1f} MB, and there is "
        f"room for {room / 1e6:,.1f} MB."
    )
