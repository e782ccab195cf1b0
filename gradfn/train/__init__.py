"""Training: a step, a loop of compiled chunks of steps, and checkpoints."""

from typing import TYPE_CHECKING

from gradfn._missing import namespace
from gradfn.train._fit import Fit, fit, stalled
from gradfn.train._lora import Lora, lora
from gradfn.train._lr_range import RateRange, lr_range
from gradfn.train._shardings import (
    DATA_PARALLEL,
    FSDP,
    FSDP_TENSOR_PARALLEL,
    TENSOR_PARALLEL,
    sharding_table,
    shardings,
)
from gradfn.train.bands import Spike
from gradfn.train.checkpoint import CheckpointError
from gradfn.train.decay import weight_decay_mask, weight_decay_table
from gradfn.train.ema import EmaWeights, averaged_weights, ema_weights
from gradfn.train.logged import row_scalars
from gradfn.train.memory import keep_freed_memory
from gradfn.train.optimizer import adamw_warmup_cosine
from gradfn.train.paths import path_mask
from gradfn.train.processes import gathered, initialize, is_first
from gradfn.train.restore import kept, load_params
from gradfn.train.source import Source, from_host, from_loader
from gradfn.train.step import TrainState, train_state, train_step
from gradfn.train.trackers import mlflow_log, wandb_log

# Sorted as `dir` sorts.
__all__ = [  # noqa: RUF022
    "CheckpointError",
    "DATA_PARALLEL",
    "EmaWeights",
    "FSDP",
    "FSDP_TENSOR_PARALLEL",
    "Fit",
    "Lora",
    "RateRange",
    "Source",
    "Spike",
    "TENSOR_PARALLEL",
    "TrainState",
    "adamw_warmup_cosine",
    "averaged_weights",
    "ema_weights",
    "fit",
    "from_host",
    "from_loader",
    "gathered",
    "initialize",
    "is_first",
    "keep_freed_memory",
    "kept",
    "load_params",
    "lora",
    "lr_range",
    "mlflow_log",
    "path_mask",
    "row_scalars",
    "sharding_table",
    "shardings",
    "stalled",
    "train_state",
    "train_step",
    "wandb_log",
    "weight_decay_mask",
    "weight_decay_table",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = namespace(__name__, __all__)
