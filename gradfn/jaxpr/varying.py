"""The mesh axes that a value varies along inside a `jax.shard_map`, as jax types it with `check_vma=True`.

A value that starts a loop, stands for a branch that did not run, or replaces another value must be typed like it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def manual_axes() -> frozenset[str]:
    """Return the manual axes of the shard_maps around the code being traced."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def varying_axes(x: PyTree) -> frozenset[str]:
    """Return the manual axes that an array, an abstract value or a shape is typed to vary along."""
    aval = x if hasattr(x, "manual_axis_type") else jax.typeof(x)
    # None for some shapes outside any shard_map.
    kind = aval.manual_axis_type
    return frozenset(kind.varying) & manual_axes() if kind is not None else frozenset()


def as_varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Type a value as varying along the axes along which it does not vary yet."""
    missing = axes - varying_axes(x)
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def zeros(
    shapes: Any,
    axes: tuple[int, ...] = (),
    split: tuple[tuple[str, ...] | None, ...] = (),
    mesh: Any = None,
) -> PyTree:
    """Return zeros like a tree of shapes (from `jax.eval_shape`), also in what their types say about devices.

    Args:
        shapes: the tree.
        axes: the sizes of further axes in front.
        split: over which axes of the mesh each of those is split.
        mesh: the mesh to be typed with; None for that of each shape.
    """
    lead = split or (None,) * len(axes)

    def like(s: Any) -> jax.Array:
        return as_varying(
            jnp.zeros(axes + s.shape, s.dtype, device=_sharding(s, lead, mesh)), varying_axes(s)
        )

    return jax.tree.map(like, shapes)


def _sharding(s: Any, lead: Sequence[tuple[str, ...] | None], mesh: Any) -> NamedSharding | None:
    """Return the sharding of a shape with axes in front; None where it is not part of the type."""
    mesh = mesh or (s.sharding.mesh if s.sharding is not None else None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return None
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    parts = [
        tuple(name for name in names or () if kinds[name] == AxisType.Explicit) or None for names in lead
    ]
    own = s.sharding.spec if s.sharding is not None else [None] * len(s.shape)
    return NamedSharding(mesh, PartitionSpec(*parts, *own))


def shapes_of(f: Callable, aval: Any) -> PyTree:
    """Return the shapes of what a function returns for a value, which may be one inside a shard_map."""
    mesh = aval.sharding.mesh if isinstance(aval, jax.core.ShapedArray) else None
    if mesh is None or mesh.empty or mesh == jax.sharding.get_abstract_mesh():
        return jax.eval_shape(f, aval)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.eval_shape(f, aval)


def any_device(flag: jax.Array) -> jax.Array:
    """Tell whether a boolean is true on any device of the enclosing shard_maps, so that all take the same branch."""
    axes = manual_axes()
    if not axes:
        return flag
    return jax.lax.psum(as_varying(flag.astype(jnp.int32), axes), tuple(sorted(axes))) > 0
