"""gradfn: networks as pure functions over plain dicts of arrays, with every gradient visible."""

from typing import TYPE_CHECKING, Any

from gradfn import data, layers
from gradfn.losses import (
    accuracy,
    batch_mean,
    classification_loss,
    next_token_loss,
    quadratic_loss,
    regression_loss,
)
from gradfn.names import ParameterError, tap
from gradfn.net import Net, repeat, residual, serial
from gradfn.nets import (
    GPTConfig,
    LanguageModel,
    ViTConfig,
    cnn,
    generate,
    gpt,
    hidden_width,
    load_gpt2,
    load_llama,
    mlp,
    rnn,
    save_pretrained,
    stack_blocks,
    stream,
    unstack_blocks,
    vit,
)
from gradfn.params import Param, check, count, init, shapes, table
from gradfn.train import CheckpointError, Fit, TrainState, fit, stalled, train_state, train_step

if TYPE_CHECKING:
    from gradfn.inspection import (
        Inspection,
        IntegratedGradients,
        Maximized,
        Randomised,
        Regions,
        backprop,
        chain_rule,
        check_grads,
        grad_times_input,
        grid_regions,
        inspect,
        integrated_gradients,
        maximize,
        nan_guard,
        nan_origin,
        occlusion,
        patch,
        randomise_labels,
        randomise_weights,
        regions,
        saliency,
        sites,
        smooth_grad,
        tracin,
    )

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Fit",
    "GPTConfig",
    "Inspection",
    "IntegratedGradients",
    "LanguageModel",
    "Maximized",
    "Net",
    "Param",
    "ParameterError",
    "Randomised",
    "Regions",
    "TrainState",
    "ViTConfig",
    "accuracy",
    "backprop",
    "batch_mean",
    "chain_rule",
    "check",
    "check_grads",
    "classification_loss",
    "cnn",
    "count",
    "data",
    "fit",
    "generate",
    "gpt",
    "grad_times_input",
    "grid_regions",
    "hidden_width",
    "init",
    "inspect",
    "integrated_gradients",
    "layers",
    "load_gpt2",
    "load_llama",
    "maximize",
    "mlp",
    "nan_guard",
    "nan_origin",
    "next_token_loss",
    "occlusion",
    "patch",
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

_INSPECTION = {
    "Inspection",
    "IntegratedGradients",
    "Maximized",
    "Randomised",
    "Regions",
    "backprop",
    "chain_rule",
    "check_grads",
    "grad_times_input",
    "grid_regions",
    "inspect",
    "integrated_gradients",
    "maximize",
    "nan_guard",
    "nan_origin",
    "occlusion",
    "patch",
    "randomise_labels",
    "randomise_weights",
    "regions",
    "saliency",
    "sites",
    "smooth_grad",
    "tracin",
}


def __getattr__(name: str) -> Any:
    """Import inspection when it is first asked for: it takes a third of the time that all of gradfn does."""
    if name in _INSPECTION:
        from importlib import import_module

        return getattr(import_module("gradfn.inspection"), name)
    raise AttributeError(f"module 'gradfn' has no attribute {name!r}")
