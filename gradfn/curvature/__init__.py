"""Curvature of a loss: products with its Hessian, its eigenvalues, its spectrum, its landscape."""

from typing import TYPE_CHECKING

from gradfn._missing import namespace
from gradfn.curvature._kfac import KroneckerCurvature, ekfac, ggn_diagonal, kfac
from gradfn.curvature.eigenvalues import Eigs, Sharpness, hessian_eigs, sharpness
from gradfn.curvature.landscape import Landscape, loss_landscape
from gradfn.curvature.products import fisher_vp, ggn_vp, hvp, product
from gradfn.curvature.spectrum import Estimate, Spectrum, hessian_diagonal, hessian_spectrum, hessian_trace

__all__ = [
    "Eigs",
    "Estimate",
    "KroneckerCurvature",
    "Landscape",
    "Sharpness",
    "Spectrum",
    "ekfac",
    "fisher_vp",
    "ggn_diagonal",
    "ggn_vp",
    "hessian_diagonal",
    "hessian_eigs",
    "hessian_spectrum",
    "hessian_trace",
    "hvp",
    "kfac",
    "loss_landscape",
    "product",
    "sharpness",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = namespace(__name__, __all__)
