"""The vision transformer: a transformer over the patches of an image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from gradfn.core.axes import with_axes
from gradfn.core.names import ParameterError, scope, tap
from gradfn.core.net import Net, fold, with_or_without_key
from gradfn.core.params import Param, Params, Spec
from gradfn.core.precision import widen
from gradfn.layers._attention import attention
from gradfn.layers._dense import dense
from gradfn.layers._dropout import dropout
from gradfn.layers._feed_forward import feed_forward
from gradfn.layers.norms import layer_norm
from gradfn.nets._description import described
from gradfn.nets.transformer import block, cast, gpt2_init, stack_of


@dataclass(frozen=True)
class ViTConfig:
    """The architecture of a vision transformer. The defaults are a small one for MNIST.

    Attributes:
        image: `[height, width, channels]` of an image.
        patch: height and width of a patch; it must divide the image's.
        classes: the number of classes.
        n_layers: the number of blocks.
        n_heads: attention heads.
        width: features per patch (`d_model`).
        hidden: hidden nodes of the feed-forward layers (`d_ff`); None for `4 * width`.
        pool: what the head reads: the `"mean"` over patches, or the final value of a learned `"class"` token.
        feed: the feed-forward layers' activation.
        dropout: the fraction of the embedding's and the blocks' outputs that training drops.
        scan: stack the blocks under `lax.scan`.
        remat: recompute the insides of blocks in the backward pass.
        compute: the dtype to compute in, such as `"bfloat16"`; None for that of the parameters.

    >>> import gradfn as gf
    >>> gf.count(gf.vit(gf.ViTConfig()).spec)
    204938
    """

    image: tuple[int, int, int] = (28, 28, 1)
    patch: int = 7
    classes: int = 10
    n_layers: int = 4
    n_heads: int = 4
    width: int = 64
    hidden: int | None = None
    pool: Literal["mean", "class"] = "mean"
    feed: str = "gelu"
    dropout: float = 0.0
    scan: bool = False
    remat: bool = False
    compute: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image", tuple(self.image))
        height, width, _ = self.image
        if self.patch < 1 or height % self.patch or width % self.patch:
            raise ValueError(f"ViTConfig: patch must divide the image's {height} x {width}, got {self.patch}")
        if self.pool not in ("mean", "class"):
            raise ValueError(f"ViTConfig: pool must be 'mean' or 'class', got {self.pool!r}")


def vit(config: ViTConfig) -> Net:
    """Return a vision transformer, which classifies an image as a sequence of patches.

    Dosovitskiy et al., *An Image is Worth 16x16 Words*, 2020. Values are named as in `gf.gpt`.

    Args:
        config: see `gf.ViTConfig`.

    Returns:
        A net from an image of the declared shape, flat (`[784]`), or without its single channel (`[28, 28]`), to
        logits `[classes]` in the parameters' dtype. `patches/W` `[width, patch * patch * channels]` are its filters.

    Raises:
        ParameterError: parameters or an image of other shapes.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.vit(gf.ViTConfig(n_layers=1))
    >>> net.apply(net.init(jax.random.key(0)), jnp.zeros([28, 28])).shape
    (10,)
    """
    height, width, channels = config.image
    rows, columns, size = height // config.patch, width // config.patch, config.patch
    dtype = None if config.compute is None else jnp.dtype(config.compute)
    patches = dense(size * size * channels, config.width)
    head, final_norm = dense(config.width, config.classes), layer_norm(config.width)
    drop = dropout(config.dropout)
    feed = feed_forward(config.width, config.hidden or 4 * config.width, config.feed)
    norms = {name: layer_norm(config.width) for name in ("attention_norm", "feed_norm")}
    block_spec, run_block = block(attention(config.width, config.n_heads), feed, norms, config.dropout)
    block_spec = gpt2_init(block_spec, config.n_layers)
    blocks_spec, run_blocks = stack_of(block_spec, run_block, config.n_layers, config.scan, config.remat)
    with_token = config.pool == "class"
    shape, draw = (rows * columns + with_token, config.width), jax.nn.initializers.normal(0.02)
    positions = Param(shape, draw, axes=("positions", "embed"))
    spec: Spec = {
        "patches": with_axes(patches.spec, "embed", None),
        "positions": {"W": positions},
        "blocks": blocks_spec,
        "final_norm": final_norm.spec,
        "head": with_axes(head.spec, None, "embed"),
    }
    if with_token:
        spec["token"] = Param((config.width,), axes=("embed",))

    def run(params: Params, image: jax.Array, key: jax.Array | None) -> jax.Array:
        image = jnp.asarray(image)
        shape, flat = config.image, math.prod(config.image)
        if image.size != flat or image.shape not in (shape, shape[:2], (flat,)):
            message = f"expected an image of {list(shape)} or [{flat}], got {list(image.shape)}"
            raise ParameterError("patches/W", message)
        output_dtype = params["head"]["W"].dtype
        params, image = cast((params, image), dtype)
        x = image.reshape(rows, size, columns, size, channels)
        # [rows, size, columns, size, channels] -> [patches, size * size * channels]
        x = x.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
        with scope("patches"):
            x = patches.apply(params["patches"], x)  # [patches, width]
        if with_token:
            x = jnp.concatenate([params["token"][None], x])
        x = tap(drop.apply({}, x + params["positions"]["W"], key=fold(key, 0)), "embedded")
        with scope("blocks"):
            x, _ = run_blocks(params["blocks"], x, fold(key, 1), None, 0)
        with scope("final_norm"):
            x = tap(final_norm.apply(params["final_norm"], x), "final_norm")
        x = tap(x[0] if with_token else widen(x).mean(0).astype(x.dtype), "pooled")
        with scope("head"):
            return tap(head.apply(params["head"], x).astype(output_dtype), "logits")

    apply = with_or_without_key(run, bool(config.dropout))
    return Net(spec, apply, description=described("vit", vars(config)))
