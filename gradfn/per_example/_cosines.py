"""Cosines between the gradients of examples, classes, tasks or steps, of each parameter and in total."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from gradfn.core.devices import explicit_spec, replicated, whole_sharding
from gradfn.core.params import describe, path_name
from gradfn.core.precision import divided, sum_of, unit_of, widen
from gradfn.core.signature import transform_of
from gradfn.display import ROWS, ShowsTable, TextTable, array_table
from gradfn.per_example.traced_loss import TracedLoss


@functools.partial(jax.tree_util.register_dataclass, data_fields=["total", "leaves"], meta_fields=[])
@dataclass(frozen=True, repr=False)
class Cosines(ShowsTable):
    """Cosines between n gradients. `print` shows a table.

    Attributes:
        total: `[n, n]`, of whole gradients, in [-1, 1]; NaN beside a gradient that is zero.
        leaves: like the parameters, `[n, n]` for each: layer by layer.
    """

    total: Float[Array, "n n"]
    leaves: PyTree

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per parameter and one for whole gradients: the cosines of all pairs."""
        if jnp.ndim(self.total) > 2:
            return array_table("Cosines, batched by vmap", self)
        n = len(self.total)
        out = TextTable(f"Cosines of {n * (n - 1) // 2:,} pairs of {n:,} gradients")
        out.add_column("path", shorten=True)
        for header in ("mean", "smallest", "largest"):
            out.add_column(header, ".3f")
        out.add_column("negative", ".1%")
        out.add_column("undefined", drop=1)
        named = [(path_name(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(self.leaves)]
        for name, leaf in [*named, ("all", self.total)]:
            pairs = np.asarray(leaf)[np.triu_indices(n, 1)]
            # A gradient that is zero has no direction.
            known = pairs[~np.isnan(pairs)]
            numbers = (
                (known.mean(), known.min(), known.max(), (known < 0).mean()) if known.size else [None] * 4
            )
            out.add_row(
                name,
                *numbers,
                len(pairs) - len(known),
                weight=2 if name == "all" else known.std() if known.size else 0,
            )
        return out.folded(rows, "cosines.table(rows=None)")


def cosines(grads: PyTree) -> Cosines:
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


def _between(grads: PyTree) -> Cosines:
    """Return the cosines between the gradients `[n, ...]` in a tree, which may be a list or tuple of parameters."""
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(grads)}
    if len(lengths) != 1 or None in lengths:
        actual = ", ".join(map(describe, jax.tree.leaves(grads))) or "nothing"
        raise ValueError(f"cosines: expected gradients with one leading axis, got {actual:.200}")

    def measured(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the largest magnitude of each gradient, `[n]`, and their products in these units, `[n, n]`."""
        size = math.prod(leaf.shape[1:])
        # Axes that are split over devices in the type cannot be merged.
        flat = widen(leaf if explicit_spec(leaf) else leaf.reshape(leaf.shape[0], size))
        axes = tuple(range(1, flat.ndim))
        largest = jnp.max(jnp.abs(flat), axes, initial=0)
        scaled = divided(flat, jnp.expand_dims(unit_of(largest), axes))
        # Every device gets all products.
        out: PyTree = whole_sharding(scaled)
        gram = jnp.tensordot(scaled, scaled.conj(), (axes, axes), precision="highest", out_sharding=out)
        return replicated(largest), gram.real

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


def grad_cosines(loss: Callable, groups: int | None = None) -> Callable[..., Cosines]:
    """Return a function that compares the gradients of the examples of a batch, or of groups of them.

    Negative cosines are conflicts: a step for one is a step against the other (Yu et al., *Gradient Surgery for
    Multi-Task Learning*, 2020).

    Args:
        loss: `(params, *example) -> scalar` or `(scalar, aux)`, of one example; or its `gf.batch_mean`. Its floating
            parameters are compared; the result is None for other leaves (integers, keys, functions).
        groups: the number of groups that `by` distinguishes; needed inside `jit`, else the largest of `by` plus one.

    Returns:
        `(params, *batch, by=None, key=None) -> Cosines`. `by` is integers `[B]`, the group of each example (its class,
        its task): the mean gradients of the groups are compared, which takes one backward pass per group. Groups
        without examples have NaN. Without `by`, single examples are compared, whose gradients are all in memory at
        once. `key` is as in `gf.per_example.grads`.

    Raises:
        ValueError: `by` is not one integer per example in [0, groups), or is traced and `groups` is not given.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> def loss(params, x):
    ...     return params["w"] @ x
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    >>> cosines = gf.per_example.grad_cosines(loss)
    >>> cosines({"w": jnp.ones(2)}, x).total
    Array([[ 1.,  0., -1.],
           [ 0.,  1.,  0.],
           [-1.,  0.,  1.]], dtype=float32)
    >>> cosines({"w": jnp.ones(2)}, x, by=jnp.array([0, 0, 1])).total.round(3)
    Array([[ 1.   , -0.707],
           [-0.707,  1.   ]], dtype=float32)
    """

    @transform_of(loss, "grad_cosines")
    def compare(
        params: PyTree,
        /,
        *batch: PyTree,
        by: Int[Array, " B"] | ArrayLike | None = None,
        key: PyTree = None,
    ) -> Cosines:
        """Return the cosines between the gradients of the examples, or of the groups that `by` gives."""
        call = TracedLoss("grad_cosines", loss, params, batch, key)

        def of_one(example: list[PyTree]) -> list[PyTree]:
            return jax.grad(lambda floating: call.run(floating, example)[0])(call.floating)

        if by is None:
            return _between(call.tree(jax.vmap(of_one)(call.batch)))
        member = _members(by, groups, call.size)

        def means(floating: list[PyTree]) -> jax.Array:
            values = widen(jax.vmap(lambda example: call.run(floating, example)[0])(call.batch))  # [B]
            weights = member.astype(values.dtype)  # [groups, B]
            weights /= jnp.maximum(weights.sum(1, keepdims=True), 1)
            return weights @ values  # [groups]

        return _between(call.tree(jax.jacrev(means)(call.floating)))

    return compare


def _members(by: ArrayLike, groups: int | None, size: int) -> jax.Array:
    """Return `[groups, B]`, whether an example belongs to a group."""
    traced = isinstance(by, jax.core.Tracer)
    labels: jax.Array | np.ndarray = jnp.asarray(by) if traced else np.asarray(by)
    fits = labels.shape == (size,) and labels.dtype.kind in "iu"
    if fits and not traced:
        fits = bool(labels.min(initial=0) >= 0) and (groups is None or bool(labels.max(initial=0) < groups))
    if not fits:
        limit = groups or "the number of groups"
        raise ValueError(f"grad_cosines: expected by as {size} integers in [0, {limit}), got {describe(by)}")
    if traced and groups is None:
        raise ValueError(
            "grad_cosines: by is traced; give the number of groups: grad_cosines(loss, groups=...)"
        )
    indices = jnp.arange(int(labels.max()) + 1 if groups is None else groups)
    return jnp.asarray(labels)[None] == indices[:, None]  # [1, B] == [groups, 1]
