"""`gf.curvature.loss_landscape`: the loss around some parameters, along a line or over a plane."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradfn.core.precision import norm, wide
from gradfn.inspection.leaves import Leaves, floating_leaves, tangents
from gradfn.inspection.scalar import jit_arrays, scalar


class Landscape(NamedTuple):
    """The loss around some parameters.

    Attributes:
        losses: `[points]` or `[points, points]`: `losses[i, j]` is at `params + steps[i] d0 + steps[j] d1`.
        steps: `[points]`, how far along a direction; 1 is a direction's length.
        directions: a tree like the parameters, with a leading axis of 1 or 2.
    """

    losses: jax.Array
    steps: jax.Array
    directions: Any


def loss_landscape(
    loss: Callable,
    dims: int = 2,
    *,
    span: float = 1.0,
    points: int = 25,
    directions: Any = None,
    filter_axis: int = 0,
    key: jax.Array | None = None,
) -> Callable[..., Landscape]:
    """Return a function for the loss along one or two directions around some parameters.

    Directions are random, and normalised filter by filter: each row of a `[out, in]` matrix, each kernel of a
    convolution, gets the length that it has in the parameters, so that landscapes of different nets compare, and
    a step of 1 changes every filter by as much as there is of it. Biases and gains (vectors) stay as they are.
    Li et al., *Visualizing the loss landscape of neural nets*, 2018.

    Args:
        loss: any JAX function `(params, *args) -> scalar` or `(scalar, aux)`.
        dims: 1 or 2.
        span: from `-span` to `span` along each direction.
        points: along each direction; the loss is computed `points ** dims` times, one after the other, so
            memory stays that of one.
        directions: a tree like the parameters with a leading axis of `dims`, taken as it is, in the place of
            random ones: `eigs.vectors` of `gf.curvature.hessian_eigs`.
        filter_axis: the axis of a matrix or kernel that counts its outputs: 0 for gradfn, -1 for Flax and Haiku.
        key: for the directions; `jax.random.key(0)` if None.

    Returns:
        `(params, *args) -> Landscape`, compiled at its first call; it can be called inside `jit`.

    Raises:
        ValueError: dims that are not 1 or 2, fewer than 2 points.
        ParameterError: directions of another structure or shape.
        TypeError: a loss that is not a floating scalar, or no floating parameter.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> seen = gf.curvature.loss_landscape(lambda W: jnp.sum(W**2), dims=1, points=3)(jnp.array([[3.0, 4.0]]))
    >>> seen.losses.shape, float(seen.losses[1]), round(float(jnp.linalg.norm(seen.directions)), 4)
    ((3,), 25.0, 5.0)
    """
    if dims not in (1, 2) or points < 2:
        raise ValueError(f"loss_landscape: dims is 1 or 2, points from 2 up, came {dims} and {points}")

    def landscape(params: Any, /, *args: Any, **kwargs: Any) -> Landscape:
        leaves = floating_leaves(params, "loss_landscape")
        call = scalar(loss, (params, *args), kwargs, (0,), "loss_landscape").call
        if directions is None:
            ways = _filter_normalised(leaves, dims, filter_axis, jax.random.key(0) if key is None else key)
        else:
            ways = _given(leaves, directions, dims)
        steps = jnp.linspace(-span, span, points, dtype=leaves.dtype)
        grid = jnp.stack(jnp.meshgrid(*[steps] * dims, indexing="ij"), -1).reshape(
            -1, dims
        )  # [points ** dims, dims]

        def at(where: jax.Array) -> jax.Array:
            moved = [
                jnp.asarray(value) + jnp.tensordot(where.astype(way.dtype), way, 1)  # [dims], [dims, ...]
                for value, way in zip(leaves.values, ways, strict=True)
            ]
            return call(moved)[0]

        losses = jax.lax.map(at, grid).reshape([points] * dims)
        return Landscape(losses, steps, leaves.tree(ways))

    return functools.wraps(loss, updated=())(jit_arrays(landscape))


def _filter_normalised(leaves: Leaves, dims: int, axis: int, key: jax.Array) -> list[jax.Array]:
    ways = []
    for i, value in enumerate(map(jnp.asarray, leaves.values)):
        if value.ndim < 2:
            ways.append(jnp.zeros([dims, *value.shape], value.dtype))
            continue
        # Normal numbers of narrow dtypes have few values and are off centre.
        way = jax.random.normal(jax.random.fold_in(key, i), [dims, *value.shape], wide(value.dtype))
        way = way.astype(value.dtype)
        ways.append(way * _lengths(value, axis)[None] / jax.vmap(lambda w: _lengths(w, axis))(way))
    return ways


def _lengths(value: jax.Array, axis: int) -> jax.Array:
    """Return each filter's length, the other axes kept as 1."""
    axes = tuple(i for i in range(value.ndim) if i != axis % value.ndim)
    return jnp.expand_dims(norm(value, axes), axes).astype(value.dtype)


def _given(leaves: Leaves, directions: Any, dims: int) -> list[jax.Array]:
    found: Sequence[Any] = leaves.match(directions)
    each = [tangents(leaves, leaves.tree([part[i] for part in found]), "loss_landscape") for i in range(dims)]
    return [jnp.stack(parts) for parts in zip(*each, strict=True)]
