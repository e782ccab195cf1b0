"""gradfn: networks as pure functions over plain dicts of arrays, with every gradient visible.

Importing it imports nothing else: what a name stands for is imported when the name is first used. So the command line
can tell of Ctrl-C while jax is still being imported.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own takes longer to import than all else here

if TYPE_CHECKING:
    from typing import Any

    from gradfn._public import *
    from gradfn.inspection import (
        ClippedGrads,
        Cosines,
        Eigs,
        Estimate,
        ExampleNorms,
        Inspection,
        IntegratedGradients,
        Landscape,
        Maximized,
        NoiseScale,
        NormTest,
        Randomised,
        Regions,
        Sharpness,
        Spectrum,
        backprop,
        chain_rule,
        check_grads,
        clipped_grads,
        cosines,
        curvature_product,
        fisher_vp,
        ggn_vp,
        grad_cosines,
        grad_times_input,
        grid_regions,
        hessian_diagonal,
        hessian_eigs,
        hessian_spectrum,
        hessian_trace,
        hvp,
        inspect,
        integrated_gradients,
        loss_landscape,
        maximize,
        nan_guard,
        nan_origin,
        noise_scale,
        norm_test,
        occlusion,
        patch,
        per_example_grads,
        per_example_norms,
        randomise_labels,
        randomise_weights,
        regions,
        saliency,
        sharpness,
        sites,
        smooth_grad,
        tracin,
    )

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ClippedGrads",
    "Cosines",
    "Eigs",
    "Estimate",
    "ExampleNorms",
    "Fit",
    "GPTConfig",
    "Inspection",
    "IntegratedGradients",
    "Landscape",
    "LanguageModel",
    "Maximized",
    "Net",
    "NoiseScale",
    "NormTest",
    "Param",
    "ParameterError",
    "Randomised",
    "Regions",
    "Sharpness",
    "Spectrum",
    "TrainState",
    "ViTConfig",
    "accuracy",
    "backprop",
    "batch_mean",
    "chain_rule",
    "check",
    "check_grads",
    "classification_loss",
    "clipped_grads",
    "cnn",
    "cosines",
    "count",
    "curvature_product",
    "data",
    "fisher_vp",
    "fit",
    "generate",
    "ggn_vp",
    "gpt",
    "grad_cosines",
    "grad_times_input",
    "grid_regions",
    "hessian_diagonal",
    "hessian_eigs",
    "hessian_spectrum",
    "hessian_trace",
    "hidden_width",
    "hvp",
    "init",
    "inspect",
    "integrated_gradients",
    "layers",
    "load_gpt2",
    "load_llama",
    "loss_landscape",
    "maximize",
    "mlp",
    "nan_guard",
    "nan_origin",
    "next_token_loss",
    "noise_scale",
    "norm_test",
    "occlusion",
    "patch",
    "per_example_grads",
    "per_example_norms",
    "quadratic_loss",
    "randomise_labels",
    "randomise_weights",
    "regions",
    "regression_loss",
    "repeat",
    "residual",
    "rnn",
    "saliency",
    "save_pretrained",
    "serial",
    "shapes",
    "sharpness",
    "sites",
    "smooth_grad",
    "stack_blocks",
    "stalled",
    "stream",
    "table",
    "tap",
    "tracin",
    "train_state",
    "train_step",
    "unstack_blocks",
    "vit",
]


def __getattr__(name: str) -> Any:
    """Import what a name stands for: a module, or what one has."""
    from importlib import import_module
    from importlib.util import find_spec

    if name.isidentifier() and not name.startswith("_") and find_spec(f"gradfn.{name}"):
        return import_module(f"gradfn.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'gradfn' has no attribute {name!r}")
    public = import_module("gradfn._public")
    home = public if hasattr(public, name) else import_module("gradfn.inspection")
    return globals().setdefault(name, getattr(home, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING", "annotations"})
