"""Single layers. Each is a `Net`: a spec and a pure function of one example.

Features are the last axis of an array; a layer applies along any axes before it (time, height and width):
sequences are `[T, features]`, images `[H, W, channels]`.
"""

from typing import TYPE_CHECKING

from gradfn._missing import namespace
from gradfn.core.attention_form import attention_form
from gradfn.layers._activations import activation, activations
from gradfn.layers._attention import attend, attention, kv_cache
from gradfn.layers._conv import avg_pool, conv, max_pool
from gradfn.layers._dense import affine, dense
from gradfn.layers._dropout import dropout
from gradfn.layers._embed import embed, sinusoidal
from gradfn.layers._feed_forward import feed_forward, geglu, swiglu
from gradfn.layers._rope import rope
from gradfn.layers.norms import group_norm, layer_norm, rms_norm
from gradfn.layers.recurrent import gru, lstm, recurrent_state, vanilla_rnn

__all__ = [
    "activation",
    "activations",
    "affine",
    "attend",
    "attention",
    "attention_form",
    "avg_pool",
    "conv",
    "dense",
    "dropout",
    "embed",
    "feed_forward",
    "geglu",
    "group_norm",
    "gru",
    "kv_cache",
    "layer_norm",
    "lstm",
    "max_pool",
    "recurrent_state",
    "rms_norm",
    "rope",
    "sinusoidal",
    "swiglu",
    "vanilla_rnn",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = namespace(__name__, __all__)
