"""Training images that are shifted at random."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradfn.core.net import takes_key
from gradfn.flatten import Loss


def shift_images(images: jax.Array, key: jax.Array, shape: Sequence[int], pixels: int = 2) -> jax.Array:
    """Return images shifted by up to some pixels along each axis, each image by a random shift of its own.

    Pixels that enter at an edge are 0.

    Args:
        images: `[batch, height * width]`.
        key: from `jax.random.key`.
        shape: height and width.
        pixels: the largest shift along an axis.

    >>> import jax, jax.numpy as jnp
    >>> shift_images(jnp.ones([2, 784]), jax.random.key(0), (28, 28)).shape
    (2, 784)
    """
    margins = [(0, 0), (pixels, pixels), (pixels, pixels)]
    padded = jnp.pad(images.reshape(-1, *shape), margins)  # [batch, h + 2 pixels, w + 2 pixels]
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)
    cut = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, corner, tuple(shape)))
    return cut(padded, corners).reshape(images.shape)  # [batch, h, w] -> [batch, h * w]


def shifted(loss: Loss, shape: Sequence[int], pixels: int = 2) -> Loss:
    """Return a loss of a batch of images and labels that shifts the images first: see `shift_images`.

    Args:
        loss: of a batch of images and labels.
        shape: the images' height and width.
        pixels: the largest shift along an axis.

    Returns:
        `(params, (images [batch, height * width], labels), key) -> scalar`.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.mlp([4, 2])
    >>> loss = shifted(gf.batch_mean(gf.classification_loss(net)), (2, 2), pixels=1)
    >>> batch = jnp.ones([3, 4]), jnp.zeros(3, int)
    >>> loss(net.init(jax.random.key(0)), batch, jax.random.key(1)).shape
    ()
    """
    noisy = takes_key(loss)

    def shifted_loss(params: PyTree, batch: PyTree, key: jax.Array) -> PyTree:
        images, labels = batch
        moved = shift_images(images, key, shape, pixels), labels
        return loss(params, moved, **({"key": jax.random.fold_in(key, 1)} if noisy else {}))

    return shifted_loss
