"""Gradients of each example of a batch: their norms, their noise, the angles between them."""

from typing import TYPE_CHECKING

from gradfn._missing import namespace
from gradfn.per_example._cosines import Cosines, cosines, grad_cosines
from gradfn.per_example._norms import ClippedGrads, ExampleNorms, clipped_grads, grads, norms
from gradfn.per_example.noise import NoiseScale, NormTest, noise_scale, norm_test

__all__ = [
    "ClippedGrads",
    "Cosines",
    "ExampleNorms",
    "NoiseScale",
    "NormTest",
    "clipped_grads",
    "cosines",
    "grad_cosines",
    "grads",
    "noise_scale",
    "norm_test",
    "norms",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = namespace(__name__, __all__)
