"""The optimizer that transformers are trained with, put together from optax's parts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def adamw_warmup_cosine(
    steps: int,
    rate: float = 1e-3,
    *,
    final_rate: float = 1e-4,
    warmup: int = 100,
    b1: float = 0.9,
    b2: float = 0.99,
    decay: float = 0.1,
    clip: float = 1.0,
    accumulate: int = 1,
) -> optax.GradientTransformation:
    """Return AdamW with warm-up, a cosine, clipped gradients, and decay on matrices only.

    Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, 2019 and *SGDR*, 2017. The defaults are those
    that nanoGPT trains with on a processor.

    Args:
        steps: updates in all. With `accumulate`, train for `steps * accumulate` batches.
        rate: the learning rate after warm-up.
        final_rate: that at the end of the cosine.
        warmup: updates in which the rate grows from nearly nothing.
        b1: decay of the mean of gradients.
        b2: decay of the mean of their squares.
        decay: share of a matrix, times the rate, that each update takes off.
        clip: longest gradient, over all parameters together.
        accumulate: batches an update, whose gradients are meant.

    Raises:
        ValueError: a warm-up that is not shorter than the training.

    >>> import gradfn as gf
    >>> params = gf.mlp([784, 16, 10]).init(jax.random.key(0))
    >>> state = adamw_warmup_cosine(1000).init(params)
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup: from 0 up and below the {steps} steps, came {warmup}")
    rates = optax.warmup_cosine_decay_schedule(rate / (warmup + 1), rate, warmup, steps, final_rate)
    optimizer = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(rates, b1, b2, weight_decay=decay, mask=is_matrix),
    )
    if accumulate == 1:
        return optimizer
    return optax.MultiSteps(optimizer, accumulate).gradient_transformation()


def is_matrix(params: Any) -> Any:
    """Tell which parameters are matrices (or filters): those that decay; biases and gains do not.

    Under `gf.repeat` vectors have two axes too; what tells matrices apart is that their names begin with W.

    Args:
        params: a tree of arrays.

    Returns:
        The same tree of booleans.

    >>> is_matrix({"norm": {"gain": jnp.ones([24, 8])}, "W": jnp.ones([8, 8]), "b": jnp.ones(8)})
    {'W': True, 'b': False, 'norm': {'gain': False}}
    """

    def tell(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        name = getattr(path[-1], "key", "") if path else ""
        return jnp.ndim(leaf) >= 2 and str(name).startswith("W")

    return jax.tree_util.tree_map_with_path(tell, params)
