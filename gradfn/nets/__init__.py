"""Whole networks."""

from gradfn.nets.generate import LanguageModel, generate, stream
from gradfn.nets.gpt import GPTConfig, gpt
from gradfn.nets.mlp import hidden_width, mlp
from gradfn.nets.transformer import stack_blocks, unstack_blocks

__all__ = [
    "GPTConfig",
    "LanguageModel",
    "generate",
    "gpt",
    "hidden_width",
    "mlp",
    "stack_blocks",
    "stream",
    "unstack_blocks",
]
