"""Inspect the gradients and activations of any JAX function."""

from typing import TYPE_CHECKING

from gradfn._missing import namespace
from gradfn.inspection._backprop import Backward, Cotangent, Step, StepList, backprop
from gradfn.inspection._capture import Capture, capture
from gradfn.inspection._chain_rule import ChainRule, chain_rule
from gradfn.inspection._inspect import Inspection, inspect
from gradfn.inspection._patch import patch
from gradfn.inspection._sites import SiteList, sites
from gradfn.inspection.causes import Operand
from gradfn.inspection.check import GradCheck, LeafCheck, check_grads
from gradfn.inspection.event import Event, NanReport
from gradfn.inspection.guard import NanRecord, nan_guard
from gradfn.inspection.observe import Observation
from gradfn.inspection.origin import nan_origin
from gradfn.inspection.summaries import Stats
from gradfn.inspection.where import Loop
from gradfn.jaxpr import Site
from gradfn.jaxpr.costs import Costs

__all__ = [
    "Backward",
    "Capture",
    "ChainRule",
    "Costs",
    "Cotangent",
    "Event",
    "GradCheck",
    "Inspection",
    "LeafCheck",
    "Loop",
    "NanRecord",
    "NanReport",
    "Observation",
    "Operand",
    "Site",
    "SiteList",
    "Stats",
    "Step",
    "StepList",
    "backprop",
    "capture",
    "chain_rule",
    "check_grads",
    "inspect",
    "nan_guard",
    "nan_origin",
    "patch",
    "sites",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = namespace(__name__, __all__)
