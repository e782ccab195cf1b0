"""What a user asks about gradients and activations, of any JAX function."""

from gradfn.inspection._backprop import Backward, Step, backprop
from gradfn.inspection._chain_rule import ChainRule, chain_rule
from gradfn.inspection._inspect import Inspection, inspect
from gradfn.inspection._patch import patch
from gradfn.inspection._sites import sites
from gradfn.inspection.check import GradCheck, LeafCheck, check_grads
from gradfn.inspection.origin import NanRecord, NanReport, nan_guard, nan_origin

__all__ = [
    "Backward",
    "ChainRule",
    "GradCheck",
    "Inspection",
    "LeafCheck",
    "NanRecord",
    "NanReport",
    "Step",
    "backprop",
    "chain_rule",
    "check_grads",
    "inspect",
    "nan_guard",
    "nan_origin",
    "patch",
    "sites",
]
