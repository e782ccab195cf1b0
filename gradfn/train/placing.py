"""Where arrays lie: on one device, or on the devices of a mesh, of one process or of several."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from gradfn.core.params import named_leaves

ARRAYS: Any = (jax.Array, np.ndarray, np.generic)
# The spec of an array that is not split.
WHOLE = PartitionSpec()


def place(tree: PyTree, mesh: Mesh, spec: PartitionSpec = WHOLE) -> PyTree:
    """Return a tree whose arrays lie on the devices of a mesh.

    An array that lies on these devices by a `NamedSharding` keeps its spec; its data are not moved. Any other is split
    by `spec`, or is on every device. Of several processes, each must have the whole array, and puts its part of it
    on its devices.

    Args:
        tree: arrays of numpy and of jax, and typed keys; leaves of other types are returned as they are.
        mesh: the devices.
        spec: how the axes of each array are split over the axes of the mesh.

    >>> import jax, numpy as np
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> place({"x": np.ones([4, 2])}, mesh, PartitionSpec("data"))["x"].sharding.spec == PartitionSpec("data")
    True
    """
    return jax.tree.map(lambda leaf: _place(leaf, mesh, spec), tree)


def _place(leaf: Any, mesh: Mesh, spec: PartitionSpec) -> PyTree:
    if not isinstance(leaf, ARRAYS):
        return leaf
    where = getattr(leaf, "sharding", None)
    if isinstance(where, NamedSharding) and same_mesh(where.mesh, mesh):
        # The axes of the two meshes may be of different types (Auto, Explicit).
        return _with_sharding(leaf, NamedSharding(mesh, where.spec))
    sharding = NamedSharding(mesh, spec)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _place(jax.random.key_data(leaf), mesh, spec)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _with_sharding(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Return an array with a sharding that has the same devices and the same parts; no data are moved."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _with_sharding(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    parts = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def mesh_of(tree: PyTree) -> Mesh | None:
    """Return the mesh that the arrays of a tree lie on; None if none of them lies on a mesh.

    Raises:
        ValueError: they lie on two meshes; it names an array of each.

    >>> import jax.numpy as jnp
    >>> mesh_of({"x": jnp.ones(3)})
    """
    # Steps call this, so names are made for an error alone.
    meshes = [mesh for leaf in jax.tree.leaves(tree) if (mesh := _mesh(leaf)) is not None]
    if all(mesh is meshes[0] or same_mesh(mesh, meshes[0]) for mesh in meshes):
        return meshes[0] if meshes else None
    named = [(name, mesh) for name, leaf in named_leaves(tree) if (mesh := _mesh(leaf)) is not None]
    other = next(each for each in named if not same_mesh(each[1], named[0][1]))
    on = [f"{path or 'one'} is on {describe(mesh)}" for path, mesh in (named[0], other)]
    raise ValueError(
        f"the arrays must be on one mesh, but {on[0]} and {on[1]}. Move them with jax.device_put(tree, shardings)"
    )


def _mesh(leaf: Any) -> Mesh | None:
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return None


def same_mesh(a: Any, b: Any) -> bool:
    """Return whether two meshes have the same axes and devices; the types of the axes may differ."""
    same = a.axis_names == b.axis_names and a.devices.shape == b.devices.shape
    return same and bool((a.devices == b.devices).all())


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is whole on every device of a mesh.

    >>> import jax
    >>> replicated(jax.make_mesh((1,), ("data",))).is_fully_replicated
    True
    """
    return NamedSharding(mesh, WHOLE)


def automatic(mesh: Mesh) -> Mesh:
    """Return the mesh with axes of type Auto: the compiler splits the work, and functions know nothing of devices."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def automatic_axes(tree: PyTree, mesh: Mesh) -> PyTree:
    """Return a tree whose arrays on a mesh with axes of another type are on the same mesh with axes of type Auto."""

    def convert(leaf: Any) -> Any:
        where = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        other = isinstance(where, NamedSharding) and where.mesh != mesh and same_mesh(where.mesh, mesh)
        return _with_sharding(leaf, NamedSharding(mesh, where.spec)) if other else leaf  # type: ignore[union-attr]

    return jax.tree.map(convert, tree)


def mesh_context(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Return a context for programs on a mesh: where the caller has set a mesh, this one takes its place."""
    current = jax.sharding.get_abstract_mesh()
    return contextlib.nullcontext() if current.empty else jax.set_mesh(mesh)


def describe(mesh: Any) -> str:
    """Return a mesh as text, such as `Mesh(data=4, model=2)`."""
    return f"Mesh({', '.join(f'{name}={size}' for name, size in mesh.shape.items())})"
