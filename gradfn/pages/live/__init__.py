"""The networks that run in the page of a run: what each gets as JSON, and why one is left out."""

from __future__ import annotations

from collections.abc import Callable

from gradfn.pages.live._cnn import cnn
from gradfn.pages.live._described import described
from gradfn.pages.live._digits import digits
from gradfn.pages.live._gpt import gpt
from gradfn.pages.live._train import train
from gradfn.pages.live.part import Live
from gradfn.runs.kept import Kept

# Each takes a run and the bytes that are left. It returns a part of the page; None where the run has no such network;
# or a sentence, where it has one that is left out.
KINDS: tuple[Callable[[Kept, int], Live | str | None], ...] = (digits, cnn, gpt, train, described)


def live_parts(run: Kept, room: int) -> tuple[list[Live], list[str]]:
    """Return the networks of a run that run in its page.

    Args:
        run: the run.
        room: bytes that they may take together.

    Returns:
        The networks; and a sentence for each that is left out.
    """
    found, left_out = [], []
    for kind in KINDS:
        part = kind(run, room)
        if isinstance(part, str):
            left_out.append(part)
        elif part:
            found.append(part)
            room -= len(part.content)
    return found, left_out
