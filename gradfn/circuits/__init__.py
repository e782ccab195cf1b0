"""Circuits: which parts of a model compute an output, by lenses, patching and attribution."""

from typing import TYPE_CHECKING

from gradfn._missing import namespace
from gradfn.circuits._attribution_patch import NodeAttribution, attribution_patch
from gradfn.circuits._backward_lens import BackwardLens, backward_lens
from gradfn.circuits._direct_effects import DirectEffects, direct_effects
from gradfn.circuits._edges import Edge, EdgeAttribution, edge_attribution_patch
from gradfn.circuits._faithfulness import Faithfulness, faithfulness
from gradfn.circuits._head_scores import HeadScores, head_scores
from gradfn.circuits._head_weights import (
    Composition,
    HeadWeights,
    SingularValues,
    composition,
    head_weights,
    singular_values,
)
from gradfn.circuits._jacobian_lens import JacobianLens, jacobian_lens
from gradfn.circuits._logit_lens import LogitLens, logit_lens
from gradfn.circuits._path_patch import path_patch
from gradfn.circuits._sweep import PatchSweep, patch_sweep
from gradfn.circuits.edits import (
    at,
    interchange,
    mean_ablate,
    project_off,
    resample,
    splice,
    steer,
    swap,
    zero,
)
from gradfn.inspection._patch import Using

__all__ = [
    "BackwardLens",
    "Composition",
    "DirectEffects",
    "Edge",
    "EdgeAttribution",
    "Faithfulness",
    "HeadScores",
    "HeadWeights",
    "JacobianLens",
    "LogitLens",
    "NodeAttribution",
    "PatchSweep",
    "SingularValues",
    "Using",
    "at",
    "attribution_patch",
    "backward_lens",
    "composition",
    "direct_effects",
    "edge_attribution_patch",
    "faithfulness",
    "head_scores",
    "head_weights",
    "interchange",
    "jacobian_lens",
    "logit_lens",
    "mean_ablate",
    "patch_sweep",
    "path_patch",
    "project_off",
    "resample",
    "singular_values",
    "splice",
    "steer",
    "swap",
    "zero",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = namespace(__name__, __all__)
