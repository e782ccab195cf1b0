"""Which gradients agree: cosines between those of examples, classes, tasks, steps, for each parameter and in all."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradfn.core.params import describe
from gradfn.core.precision import divided, unit_of, widen
from gradfn.per_example.plan import Call, sum_of


@functools.partial(jax.tree_util.register_dataclass, data_fields=["total", "leaves"], meta_fields=[])
@dataclass(frozen=True)
class Cosines:
    """Cosines between n gradients.

    Attributes:
        total: `[n, n]`, of whole gradients, in [-1, 1]; NaN beside a gradient that is zero.
        leaves: like the parameters, `[n, n]` for each: layer by layer.
    """

    total: jax.Array
    leaves: Any


def cosines(grads: Any) -> Cosines:
    """Return the cosines between gradients: of several tasks, or of one loss at several steps.

    Args:
        grads: a tree whose arrays have a leading axis `[n, ...]`, or a list of n trees.

    Raises:
        ValueError: leading axes that differ, or no gradient at all.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> gf.per_example.cosines([{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([3.0, 3.0])}]).total.round(3)
    Array([[1.   , 0.707],
           [0.707, 1.   ]], dtype=float32)
    """
    if isinstance(grads, (list, tuple)) and grads:
        grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    return _between(grads)


def _between(grads: Any) -> Cosines:
    """Return the cosines between the gradients `[n, ...]` in a tree, which may be a list or tuple of parameters."""
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(grads)}
    if len(lengths) != 1 or None in lengths:
        came = ", ".join(map(describe, jax.tree.leaves(grads))) or "nothing"
        raise ValueError(f"cosines: expected gradients with one leading axis, got {came:.200}")

    def measured(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the largest magnitude of each gradient, `[n]`, and their products in these units, `[n, n]`."""
        flat = widen(leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:])))  # [n, ...] -> [n, size]
        largest = jnp.max(jnp.abs(flat), 1, initial=0)
        scaled = divided(flat, unit_of(largest)[:, None])
        return largest, jnp.matmul(scaled, scaled.conj().T, precision="highest").real

    leaves, tree = jax.tree.flatten(grads)
    sizes, grams = zip(*map(measured, leaves), strict=True)
    widest = np.result_type(*[size.dtype for size in sizes])
    unit = unit_of(functools.reduce(jnp.maximum, [size.astype(widest) for size in sizes]))
    shares = [size.astype(widest) / unit for size in sizes]  # [n] each, 1 at most
    total = sum_of(
        gram.astype(widest) * share[:, None] * share[None] for gram, share in zip(grams, shares, strict=True)
    )
    return Cosines(_normed(total), jax.tree.unflatten(tree, map(_normed, grams)))


def _normed(gram: jax.Array) -> jax.Array:
    norms = jnp.sqrt(jnp.diagonal(gram))  # [n]
    return gram / (norms[:, None] * norms[None])


def grad_cosines(loss: Callable, by: Any = None) -> Callable[..., Cosines]:
    """Return the function that compares the gradients of a batch's examples, or of groups of them.

    Negative cosines are conflicts: a step for one is a step against the other (Yu et al., *Gradient Surgery for
    Multi-Task Learning*, 2020).

    Args:
        loss: `(params, *example) -> scalar` or `(scalar, aux)`, of one example. Its floating parameters are
            compared; other leaves (integers, keys, functions) have None.
        by: integers `[B]`, a group for each example (its class, its task); the mean gradients of groups
            0, 1, ... to the largest are compared, a backward pass each. None compares examples, whose gradients
            are all held at once.

    Returns:
        `(params, *batch) -> Cosines`. Groups without examples have NaN.

    Raises:
        ValueError: `by` is not one integer an example.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> def loss(params, x):
    ...     return params["w"] @ x
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    >>> gf.per_example.grad_cosines(loss)({"w": jnp.ones(2)}, x).total
    Array([[ 1.,  0., -1.],
           [ 0.,  1.,  0.],
           [-1.,  0.,  1.]], dtype=float32)
    >>> gf.per_example.grad_cosines(loss, by=[0, 0, 1])({"w": jnp.ones(2)}, x).total.round(3)
    Array([[ 1.   , -0.707],
           [-0.707,  1.   ]], dtype=float32)
    """
    groups = None if by is None else np.asarray(by)
    if groups is not None and (groups.ndim != 1 or groups.dtype.kind not in "iu" or (groups < 0).any()):
        raise ValueError(f"grad_cosines: by is integers [B] from 0 up, came {describe(groups)}")

    def compare(params: Any, *batch: Any) -> Cosines:
        call = Call("grad_cosines", loss, params, batch)

        def of_one(example: list[Any]) -> list[Any]:
            return jax.grad(lambda floating: call.run(floating, example)[0])(call.floating)

        if groups is None:
            return _between(call.tree(jax.vmap(of_one)(call.batch)))
        if len(groups) != call.size:
            raise ValueError(f"grad_cosines: by has {len(groups)} groups for a batch of {call.size} examples")
        members = _members(groups)

        def means(floating: list[Any]) -> jax.Array:
            values = widen(jax.vmap(lambda example: call.run(floating, example)[0])(call.batch))  # [B]
            return jnp.asarray(members, values.dtype) @ values  # [groups]

        return _between(call.tree(jax.jacrev(means)(call.floating)))

    return compare


def _members(groups: np.ndarray) -> np.ndarray:
    """Return `[groups, B]`: one over a group's size at its members, zero elsewhere."""
    member = groups == np.arange(groups.max() + 1)[:, None]
    return member / np.maximum(member.sum(1, keepdims=True), 1)
