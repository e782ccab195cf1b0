"""Single layers. Each is a `Net`: a spec and a pure function of one example.

Arrays carry features along their last axis; any axes before it (time, height and width) are carried along.
"""

from gradfn.layers.activations import activation, activations
from gradfn.layers.attention import attend, attention, kv_cache
from gradfn.layers.dense import affine, dense
from gradfn.layers.dropout import dropout
from gradfn.layers.embed import embed, rope, sinusoidal
from gradfn.layers.feed_forward import feed_forward, swiglu
from gradfn.layers.norms import layer_norm, rms_norm

__all__ = [
    "activation",
    "activations",
    "affine",
    "attend",
    "attention",
    "dense",
    "dropout",
    "embed",
    "feed_forward",
    "kv_cache",
    "layer_norm",
    "rms_norm",
    "rope",
    "sinusoidal",
    "swiglu",
]
