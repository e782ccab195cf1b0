"""Circuits: which parts of a model compute an output, by lenses, patching and attribution."""

from typing import TYPE_CHECKING

from gradfn._missing import namespace

__all__: list[str] = []

if not TYPE_CHECKING:
    __getattr__, __dir__ = namespace(__name__, __all__)
