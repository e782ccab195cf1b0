"""`gf.curvature.loss_landscape`: the loss around given parameters, along a line or over a plane."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from gradfn.core.precision import norm, wide
from gradfn.core.signature import keys_for, transform_of
from gradfn.display import ROWS, ShowsTable, TextTable, array_table
from gradfn.jaxpr.call import Leaves, floating_leaves, jit_arrays, scalar, tangents


class _Landscape(NamedTuple):
    losses: Float[Array, "*points"]
    steps: Float[Array, " points"]
    directions: PyTree


class Landscape(ShowsTable, _Landscape):
    """The loss around given parameters. `print` shows a table.

    Attributes:
        losses: `[points]` or `[points, points]`: `losses[i, j]` is at `params + steps[i] d0 + steps[j] d1`.
        steps: `[points]`, the distance along a direction in units of its length.
        directions: a tree like the parameters, with a leading axis of 1 or 2.
    """

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per array: its shape and range."""
        if self.steps.ndim > 1:
            return array_table("Landscape, batched by vmap", self)
        points = " x ".join(map(str, self.losses.shape))
        return array_table(f"Loss at {points} points", self).folded(rows, "landscape.table(rows=None)")


def loss_landscape(
    loss: Callable,
    dims: int = 2,
    *,
    span: float = 1.0,
    points: int = 25,
    filter_axis: int = 0,
) -> Callable[..., Landscape]:
    """Return a function that computes the loss along one or two directions around given parameters.

    By default the directions are random and normalized filter by filter: each row of an `[out, in]` matrix and
    each kernel of a convolution gets the norm that it has in the parameters. Landscapes of different nets are
    then comparable, and a step of 1 changes every filter by its own norm. Biases and gains (vectors) stay as they
    are. Li et al., *Visualizing the loss landscape of neural nets*, 2018.

    Args:
        loss: any JAX function `(params, *args) -> scalar` or `(scalar, aux)`.
        dims: 1 or 2.
        span: the steps go from `-span` to `span` along each direction.
        points: the number of steps along each direction. The loss is computed `points ** dims` times, one after
            the other, so memory stays that of one.
        filter_axis: the output axis of a matrix or kernel: 0 for gradfn, -1 for Flax and Haiku.

    Returns:
        `(params, *args, directions=None, key=None) -> Landscape`, compiled at its first call; it can be called
        inside `jit`. `directions` is a tree like the parameters with a leading axis of `dims`, used as it is
        instead of random directions, such as `eigs.vectors` of `gf.curvature.hessian_eigs`. `key` draws the
        random ones, `jax.random.key(0)` by default; a loss with a parameter `key` gets a part of it.

    Raises:
        ValueError: dims that are not 1 or 2, fewer than 2 points.
        ParameterError: directions of another structure or shape.
        TypeError: a loss that is not a floating scalar, or no floating parameter.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> line = gf.curvature.loss_landscape(lambda W: jnp.sum(W**2), dims=1, points=3)(jnp.array([[3.0, 4.0]]))
    >>> line.losses.shape, float(line.losses[1]), round(float(jnp.linalg.norm(line.directions)), 4)
    ((3,), 25.0, 5.0)
    """
    if dims not in (1, 2) or points < 2:
        raise ValueError(
            f"loss_landscape: expected dims 1 or 2 and points >= 2, got dims={dims}, points={points}"
        )

    def landscape(
        params: PyTree,
        /,
        *args: PyTree,
        directions: PyTree = None,
        key: Key[Array, ""] | None = None,
        **kwargs: PyTree,
    ) -> Landscape:
        """Return the loss around `params`, along `directions`, or along random ones that `key` draws."""
        leaves = floating_leaves(params, "loss_landscape")
        key, kwargs = keys_for(loss, (params, *args), key, kwargs)
        call = scalar(loss, (params, *args), kwargs, (0,), "loss_landscape").call
        if directions is None:
            vectors = _filter_normalized(leaves, dims, filter_axis, key)
        else:
            vectors = _given(leaves, directions, dims)
        steps = jnp.linspace(-span, span, points, dtype=leaves.dtype)
        grid = jnp.stack(jnp.meshgrid(*[steps] * dims, indexing="ij"), -1)  # [points, ..., dims]
        grid = grid.reshape(-1, dims)  # [points ** dims, dims]

        def at(step: jax.Array) -> jax.Array:
            moved = [
                jnp.asarray(value)
                + jnp.tensordot(step.astype(vector.dtype), vector, 1)  # [dims], [dims, ...]
                for value, vector in zip(leaves.values, vectors, strict=True)
            ]
            return call(moved)[0]

        losses = jax.lax.map(at, grid).reshape([points] * dims)
        return Landscape(losses, steps, leaves.tree(vectors))

    return transform_of(loss, "loss_landscape")(jit_arrays(landscape))


def _filter_normalized(leaves: Leaves, dims: int, axis: int, key: jax.Array) -> list[jax.Array]:
    vectors = []
    for i, value in enumerate(map(jnp.asarray, leaves.values)):
        if value.ndim < 2:
            vectors.append(jnp.zeros([dims, *value.shape], value.dtype))
            continue
        # Normal samples of narrow dtypes take few values and are biased.
        vector = jax.random.normal(jax.random.fold_in(key, i), [dims, *value.shape], wide(value.dtype))
        vector = vector.astype(value.dtype)
        vectors.append(vector * _norms(value, axis)[None] / jax.vmap(lambda v: _norms(v, axis))(vector))
    return vectors


def _norms(value: jax.Array, axis: int) -> jax.Array:
    """Return the norm of each filter; the other axes are kept with size 1."""
    axes = tuple(i for i in range(value.ndim) if i != axis % value.ndim)
    return jnp.expand_dims(norm(value, axes), axes).astype(value.dtype)


def _given(leaves: Leaves, directions: PyTree, dims: int) -> list[jax.Array]:
    found = leaves.match(directions)
    each = [tangents(leaves, leaves.tree([part[i] for part in found]), "loss_landscape") for i in range(dims)]
    return [jnp.stack(parts) for parts in zip(*each, strict=True)]
