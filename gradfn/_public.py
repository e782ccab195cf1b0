"""The public names, but for those of inspection, which takes a third of the time that all of gradfn does to import."""
# ruff: noqa: F401

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
