"""Attribution: which inputs, regions or training examples explain an output."""

from typing import TYPE_CHECKING

from gradfn._missing import namespace
from gradfn.attribution._grad_cam import grad_cam
from gradfn.attribution._guided_backprop import guided_backprop
from gradfn.attribution._influence import influence
from gradfn.attribution._lrp import Absorbed, Relevance, lrp
from gradfn.attribution._maximize import Maximized, maximize
from gradfn.attribution._occlusion import occlusion
from gradfn.attribution._regions import Regions, grid_regions, regions
from gradfn.attribution._tracin import tracin
from gradfn.attribution.gradients import (
    IntegratedGradients,
    grad_times_input,
    integrated_gradients,
    saliency,
    smooth_grad,
)
from gradfn.attribution.randomize import Randomized, randomize_labels, randomize_weights

__all__ = [
    "Absorbed",
    "IntegratedGradients",
    "Maximized",
    "Randomized",
    "Regions",
    "Relevance",
    "grad_cam",
    "grad_times_input",
    "grid_regions",
    "guided_backprop",
    "influence",
    "integrated_gradients",
    "lrp",
    "maximize",
    "occlusion",
    "randomize_labels",
    "randomize_weights",
    "regions",
    "saliency",
    "smooth_grad",
    "tracin",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = namespace(__name__, __all__)
