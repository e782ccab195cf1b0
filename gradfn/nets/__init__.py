"""Complete networks: MLP, CNN, RNN, GPT and vision transformer, with generation and pretrained weights."""

from gradfn.nets._cnn import cnn
from gradfn.nets._generate import LanguageModel, generate, stream
from gradfn.nets._gpt import GPTConfig, gpt
from gradfn.nets._mlp import hidden_width, mlp
from gradfn.nets._rnn import rnn
from gradfn.nets._vit import ViTConfig, vit
from gradfn.nets.pretrained import load_pretrained, save_pretrained
from gradfn.nets.transformer import stack_blocks, unstack_blocks

__all__ = [
    "GPTConfig",
    "LanguageModel",
    "ViTConfig",
    "cnn",
    "generate",
    "gpt",
    "hidden_width",
    "load_pretrained",
    "mlp",
    "rnn",
    "save_pretrained",
    "stack_blocks",
    "stream",
    "unstack_blocks",
    "vit",
]
