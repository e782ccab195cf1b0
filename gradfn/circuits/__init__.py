"""Circuits: which parts of a model compute an output, by lenses, patching and attribution."""

from typing import TYPE_CHECKING

from gradfn._missing import namespace
from gradfn.circuits._head_scores import HeadScores, head_scores
from gradfn.circuits._head_weights import (
    Composition,
    HeadWeights,
    SingularValues,
    composition,
    head_weights,
    singular_values,
)

__all__ = [
    "Composition",
    "HeadScores",
    "HeadWeights",
    "SingularValues",
    "composition",
    "head_scores",
    "head_weights",
    "singular_values",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = namespace(__name__, __all__)
