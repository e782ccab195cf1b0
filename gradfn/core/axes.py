"""Logical names of the axes of parameters: what an axis is, apart from the devices that may share it.

Every `Param` of gradfn names its axes with these words; rules map them to the axes of a mesh (`gf.train.shardings`).
None stands for an axis that is never split: the window of a convolution, classes, the gates of a recurrent layer.
"""

from __future__ import annotations

import dataclasses

import jax

from gradfn.core.params import Axis, Spec

AXES = {
    "vocab": "the tokens of a vocabulary",
    "positions": "the positions of a sequence or an image",
    "embed": "the features of a position, those of the residual stream",
    "heads": "the features of all query heads; a head is never split",
    "kv_heads": "the features of all key or value heads; a head is never split",
    "mlp": "the hidden nodes of a feed-forward layer, or the outputs of a dense layer",
    "mlp_in": "the inputs of a dense layer",
    "channels": "the output channels of a convolution",
    "channels_in": "the input channels of a convolution",
    "layers": "the layers of a stack, in front of the axes of one layer",
}


def with_axes(spec: Spec, *axes: Axis) -> Spec:
    """Return a layer's spec with other axis names: of its matrices `axes`, of its vectors the first of them.

    >>> import gradfn as gf
    >>> with_axes(gf.layers.dense(4, 8).spec, "vocab", "embed")["b"].axes
    ('vocab',)
    """
    return jax.tree.map(lambda param: dataclasses.replace(param, axes=axes[: param.ndim]), spec)
