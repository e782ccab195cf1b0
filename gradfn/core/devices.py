"""On which devices a value is, as far as its type shows while a function is traced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def on_several_devices(x: PyTree) -> bool:
    """Return whether a value may be split over devices, so that a sum over it makes them wait for each other.

    A type has the mesh of its value also where the axes are automatic, but for values made from nothing. Inside a
    `jax.shard_map` every device has a value of its own: its axes do not count.
    """
    meshes = [jax.typeof(x).sharding.mesh, jax.sharding.get_abstract_mesh()]
    return any(math.prod(_sizes(mesh)) > 1 for mesh in meshes)


def _sizes(mesh: Any) -> list[int]:
    return [
        mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    ]


def explicit_spec(x: PyTree) -> PartitionSpec | None:
    """Return how a value's axes are split over explicit mesh axes; None where no axis is."""
    spec: PartitionSpec = jax.typeof(x).sharding.spec
    return spec if any(part is not None for part in spec) else None


def replicated(x: jax.Array) -> jax.Array:
    """Return a value with all of it on every device, where its type says that it is split."""
    return x if (sharding := whole_sharding(x)) is None else jax.sharding.reshard(x, sharding)


def whole_sharding(x: jax.Array) -> NamedSharding | None:
    """Return the sharding of all of a value on every device, where its type says that it is split; else None.

    With its mesh: outside of `jax.set_mesh` a spec alone is not enough.
    """
    return NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec()) if explicit_spec(x) else None


def split_like(x: jax.Array, other: PyTree) -> jax.Array:
    """Return an array split over explicit mesh axes as another one of its shape is."""
    spec = explicit_spec(other)
    return replicated(x) if spec is None else jax.sharding.reshard(x, jax.typeof(other).sharding)


def elements_of(x: jax.Array, indices: Sequence[PyTree]) -> jax.Array:
    """Return elements of an array, `[n]`, on every device; `indices` are one array `[n]` per axis."""
    return x.at[tuple(indices)].get(out_sharding=whole_sharding(x))


def examples_spec(x: PyTree) -> tuple[PyTree, Any]:
    """Return over which explicit mesh axes the first axis of a value is split, and the mesh; None where it is not."""
    spec = explicit_spec(x)
    return (spec[0], jax.typeof(x).sharding.mesh) if spec and spec[0] is not None else (None, None)


def rows_sharding(x: jax.Array, indices: jax.Array) -> NamedSharding | None:
    """Return how `x[indices]` is split over explicit mesh axes, which jax asks for; None where there are none.

    It is split like the indices, and like the axes of `x` behind the first.
    """
    for value in (indices, x):
        mesh = jax.typeof(value).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            spec = PartitionSpec(*jax.typeof(indices).sharding.spec, *jax.typeof(x).sharding.spec[1:])
            return NamedSharding(mesh, spec)
    return None
