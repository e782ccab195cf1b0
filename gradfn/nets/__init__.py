"""Whole networks."""

from gradfn.nets.cnn import cnn
from gradfn.nets.generate import LanguageModel, generate, stream
from gradfn.nets.gpt import GPTConfig, gpt
from gradfn.nets.mlp import hidden_width, mlp
from gradfn.nets.pretrained import load_gpt2, load_llama, save_pretrained
from gradfn.nets.rnn import rnn
from gradfn.nets.transformer import stack_blocks, unstack_blocks
from gradfn.nets.vit import ViTConfig, vit

__all__ = [
    "GPTConfig",
    "LanguageModel",
    "ViTConfig",
    "cnn",
    "generate",
    "gpt",
    "hidden_width",
    "load_gpt2",
    "load_llama",
    "mlp",
    "rnn",
    "save_pretrained",
    "stack_blocks",
    "stream",
    "unstack_blocks",
    "vit",
]
