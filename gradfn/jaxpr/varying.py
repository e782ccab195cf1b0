"""The mesh axes that a value varies along inside a `jax.shard_map`, as jax types it with `check_vma=True`.

A value that starts a loop, stands for a branch that did not run, or replaces another value must be typed like it.
"""

from typing import Any

import jax
import jax.numpy as jnp
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


def zeros(shapes: Any, axes: tuple[int, ...] = ()) -> PyTree:
    """Return zeros like a tree of shapes (from `jax.eval_shape`), with further axes in front."""
    return jax.tree.map(lambda s: as_varying(jnp.zeros(axes + s.shape, s.dtype), varying_axes(s)), shapes)


def any_device(flag: jax.Array) -> jax.Array:
    """Tell whether a boolean is true on any device of the enclosing shard_maps, so that all take the same branch."""
    axes = manual_axes()
    if not axes:
        return flag
    return jax.lax.psum(as_varying(flag.astype(jnp.int32), axes), tuple(sorted(axes))) > 0
