"""Class labels: integers in [0, classes). A label out of range raises where its value is known, else gives NaN."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


def label_of(y: PyTree, classes: int, what: str) -> tuple[jax.Array, jax.Array]:
    """Return the label of one example as a scalar, and a term to add to the net's outputs.

    Args:
        y: an integer (or bool) scalar, or such an array `[1]`.
        classes: the number of classes.
        what: the caller's name, for errors.

    Returns:
        The label, and float32 0, or NaN where the label is not in [0, classes): compiled code cannot raise, and a
        label out of range must not count as another class. XLA fuses the addition with what follows.

    Raises:
        ValueError: several labels, or fewer than two classes.
        TypeError: a label that is not an integer.

    >>> label_of(jnp.array([2]), 3, "loss")[1], label_of(-1, 3, "loss")[1]
    (Array(0., dtype=float32), Array(nan, dtype=float32))
    """
    y = jnp.asarray(y)
    _check_form(y, classes, what, 1)
    label = counting(y).reshape(())  # [] or [1] -> []
    return label, jnp.where((label >= 0) & (label < classes), jnp.float32(0), jnp.float32(jnp.nan))


def labels_of(y: PyTree, n: int, classes: int, what: str) -> jax.Array:
    """Return the labels of a batch of `n` examples as `[n]`, checked: see `label_of`.

    Raises:
        ValueError: also where the labels' values are known and not all in [0, classes).
    """
    y = y if hasattr(y, "dtype") else np.asarray(y)
    _check_form(y, classes, what, n)
    check_range(y, classes, what)
    return counting(y).reshape(n)  # [n] or [n, 1] -> [n]


def counting(y: PyTree) -> jax.Array:
    """Return integers (or bools) in a dtype that holds any class index: in uint8, 300 would wrap around to 44."""
    y = jnp.asarray(y)
    return y.astype(jnp.int32) if y.dtype.itemsize < 4 else y


def check_range(y: PyTree, classes: int, what: str, padding: bool = False) -> None:
    """Raise a ValueError if labels are known and not all in [0, classes); `padding` allows negative ones."""
    if isinstance(y, jax.core.Tracer) or not getattr(y, "is_fully_addressable", True) or not np.size(y):
        return
    y = np.asarray(y)
    low, high = int(y.min()), int(y.max())
    if high < classes and (low >= 0 or padding):
        return
    if low == 1 and high == classes:
        hint = ". Pass labels - 1: the first class is 0"
    elif low < 0 and high < classes:
        hint = ". Leave out the examples without a label: negative labels are not padding here"
    else:
        hint = f". Give the net {high + 1:,} outputs, or renumber the classes"
    some = "non-negative targets" if padding else "labels"
    raise ValueError(f"{what}: {some} must be in [0, {classes:,}), got {low:,} to {high:,}{hint}")


def _check_form(y: PyTree, classes: int, what: str, n: int) -> None:
    """Check what is known even of traced labels: their dtype and shape, and the number of classes."""
    if jnp.issubdtype(y.dtype, jnp.floating) and y.size == n:
        raise TypeError(f"{what}: labels must be integers, got {y.dtype}. Cast them: labels.astype(int)")
    if y.size != n or y.ndim > 2:
        labels = "one label per example" if n != 1 else "one label"
        hint = ""
        if y.ndim and y.shape[-1] == classes and classes > 1:
            hint = ". Are they one-hot? Pass labels.argmax(-1)"
        elif n == 1:
            hint = ". gf.batch_mean(loss) is the loss of a batch"
        raise ValueError(f"{what}: expected {labels}, got shape {list(y.shape)} for {n:,} example(s){hint}")
    if not (jnp.issubdtype(y.dtype, jnp.integer) or y.dtype == bool):
        raise TypeError(f"{what}: labels must be integers, got {y.dtype}")
    if classes < 2:
        raise ValueError(
            f"{what}: integer labels need a net with one output per class, got 1 output. Give it 2 outputs, or train "
            "the one output on float targets (gf.quadratic_loss, gf.regression_loss)"
        )
