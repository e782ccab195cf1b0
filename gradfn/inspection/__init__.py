"""What a user asks about gradients and activations, of any JAX function."""

from gradfn.inspection.attribution import (
    IntegratedGradients,
    grad_times_input,
    integrated_gradients,
    saliency,
    smooth_grad,
)
from gradfn.inspection.backprop import Backward, Step, backprop
from gradfn.inspection.chain_rule import ChainRule, chain_rule
from gradfn.inspection.check import GradCheck, LeafCheck, check_grads
from gradfn.inspection.cosines import Cosines, cosines, grad_cosines
from gradfn.inspection.curvature import curvature_product, fisher_vp, ggn_vp, hvp
from gradfn.inspection.eigenvalues import Eigs, Sharpness, hessian_eigs, sharpness
from gradfn.inspection.influence import tracin
from gradfn.inspection.inspect import Inspection, inspect
from gradfn.inspection.landscape import Landscape, loss_landscape
from gradfn.inspection.maximize import Maximized, maximize
from gradfn.inspection.noise import NoiseScale, NormTest, noise_scale, norm_test
from gradfn.inspection.occlusion import occlusion
from gradfn.inspection.origin import NanRecord, NanReport, nan_guard, nan_origin
from gradfn.inspection.patch import patch
from gradfn.inspection.per_example import (
    ClippedGrads,
    ExampleNorms,
    clipped_grads,
    per_example_grads,
    per_example_norms,
)
from gradfn.inspection.randomise import Randomised, randomise_labels, randomise_weights
from gradfn.inspection.regions import Regions, grid_regions, regions
from gradfn.inspection.sites import sites
from gradfn.inspection.spectrum import Estimate, Spectrum, hessian_diagonal, hessian_spectrum, hessian_trace

__all__ = [
    "Backward",
    "ChainRule",
    "ClippedGrads",
    "Cosines",
    "Eigs",
    "Estimate",
    "ExampleNorms",
    "GradCheck",
    "Inspection",
    "IntegratedGradients",
    "Landscape",
    "LeafCheck",
    "Maximized",
    "NanRecord",
    "NanReport",
    "NoiseScale",
    "NormTest",
    "Randomised",
    "Regions",
    "Sharpness",
    "Spectrum",
    "Step",
    "backprop",
    "chain_rule",
    "check_grads",
    "clipped_grads",
    "cosines",
    "curvature_product",
    "fisher_vp",
    "ggn_vp",
    "grad_cosines",
    "grad_times_input",
    "grid_regions",
    "hessian_diagonal",
    "hessian_eigs",
    "hessian_spectrum",
    "hessian_trace",
    "hvp",
    "inspect",
    "integrated_gradients",
    "loss_landscape",
    "maximize",
    "nan_guard",
    "nan_origin",
    "noise_scale",
    "norm_test",
    "occlusion",
    "patch",
    "per_example_grads",
    "per_example_norms",
    "randomise_labels",
    "randomise_weights",
    "regions",
    "saliency",
    "sharpness",
    "sites",
    "smooth_grad",
    "tracin",
]
