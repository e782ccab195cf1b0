"""Single layers. Each is a `Net`: a spec and a pure function of one example.

Arrays carry features along their last axis; any axes before it (time, height and width) are carried along.
"""

from gradfn.layers.activations import activation, activations
from gradfn.layers.dense import affine, dense
from gradfn.layers.dropout import dropout
from gradfn.layers.norms import layer_norm, rms_norm

__all__ = ["activation", "activations", "affine", "dense", "dropout", "layer_norm", "rms_norm"]
