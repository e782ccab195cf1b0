"""The usual optimizer for transformers, composed of parts of optax."""

from __future__ import annotations

import optax

from gradfn.train.decay import weight_decay_mask
from gradfn.train.measures import scale_by_schedule


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
    """Return AdamW with warm-up, a cosine, clipped gradients, and decay on matrices only, embeddings included.

    Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, 2019 and *SGDR*, 2017. The defaults are those
    of nanoGPT on a CPU. Its state has the learning rate of the last update, which `gf.fit` writes into its rows.

    Args:
        steps: the total number of updates. With `accumulate`, train for `steps * accumulate` batches.
        rate: the learning rate after warm-up.
        final_rate: the learning rate at the end of the cosine.
        warmup: the number of updates in which the rate grows from almost zero.
        b1: decay of the running mean of gradients.
        b2: decay of the running mean of their squares.
        decay: weight decay, of arrays of rank 2 and more: `gf.train.weight_decay_table(params)` shows which.
        clip: maximum global gradient norm.
        accumulate: batches per update, whose gradients are averaged.

    Raises:
        ValueError: a warm-up that is not shorter than the training.

    >>> import jax, gradfn as gf
    >>> params = gf.mlp([784, 16, 10]).init(jax.random.key(0))
    >>> state = adamw_warmup_cosine(1000).init(params)
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup must be in [0, {steps}), the number of steps, got {warmup}")
    rates = optax.warmup_cosine_decay_schedule(rate / (warmup + 1), rate, warmup, steps, final_rate)
    # optax.adamw, whose state does not have the learning rate.
    adamw = optax.chain(
        optax.scale_by_adam(b1, b2),
        optax.add_decayed_weights(decay, weight_decay_mask),
        scale_by_schedule(rates),
    )
    optimizer = optax.chain(optax.clip_by_global_norm(clip), adamw)
    if accumulate == 1:
        return optimizer
    return optax.MultiSteps(optimizer, accumulate).gradient_transformation()
