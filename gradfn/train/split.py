"""How the work of a training step is split over a mesh: what each device holds, and what it gathers to compute.

Batches are split over one axis of the mesh, called `data`. Parameters may be split over it too (FSDP): each device
holds a part of them and of the optimizer's state, but needs all of a parameter to compute its share of the batch. So a
step gathers them where the loss uses them (`gradfn.train.gathering`), and splits the
gradients again. Over the other axes of the mesh parameters stay split; the compiler splits the products with them
(tensor parallelism).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from gradfn.core.params import named_leaves, path_name
from gradfn.train.placing import automatic, describe, mesh_of, replicated, same_mesh

# The axis of a mesh that batches are split over.
DATA = "data"


@dataclass(frozen=True)
class Split:
    """How a step is split over a mesh; hashable, so that a compiled function can depend on it.

    Attributes:
        mesh: with axes of type Auto.
        axis: of the mesh, that batches are split over; None if they are not.
        specs: of each parameter, in the order of the tree's leaves.
    """

    mesh: Mesh
    axis: str | None
    specs: tuple[PartitionSpec, ...]

    def gather(self, params: PyTree) -> PyTree:
        """Return parameters that are whole along the axis of the batch."""
        return self._constrain(params, lambda spec: without(spec, self.axis))

    def scatter(self, grads: PyTree) -> PyTree:
        """Return gradients that are split like their parameters."""
        return self._constrain(grads, lambda spec: spec)

    def stay(self, params: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree]:
        """Return new parameters, and the optimizer's new state, split like the old ones."""
        shardings = self._shardings(params)
        constrain = jax.lax.with_sharding_constraint
        return constrain(params, shardings), constrain(opt_state, follow(opt_state, params, shardings))

    def _shardings(self, params: PyTree) -> PyTree:
        return jax.tree.unflatten(
            jax.tree.structure(params), [NamedSharding(self.mesh, spec) for spec in self.specs]
        )

    def _constrain(self, tree: PyTree, wanted: Any) -> PyTree:
        leaves, structure = jax.tree.flatten(tree)
        split = [
            jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, wanted(spec)))
            if spec != without(spec, self.axis)
            else leaf
            for leaf, spec in zip(leaves, self.specs, strict=True)
        ]
        return jax.tree.unflatten(structure, split)

    def share(self, batch: PyTree) -> PyTree:
        """Return a batch whose arrays `[examples, ...]` are split over the axis; other leaves are on every device.

        Raises:
            ValueError: the examples cannot be split evenly.
        """
        examples = examples_of(batch)
        self.check_batch(examples)
        if self.axis is None or examples is None:
            return batch
        shared, alone = (NamedSharding(self.mesh, PartitionSpec(*axes)) for axes in ((self.axis,), ()))
        shardings = jax.tree.map(lambda leaf: shared if jnp.shape(leaf)[:1] == (examples,) else alone, batch)
        return jax.lax.with_sharding_constraint(batch, shardings)

    def check_batch(self, examples: int | None) -> None:
        """Raise a ValueError for a batch that cannot be split evenly."""
        size = 1 if self.axis is None else self.mesh.shape[self.axis]
        if examples is not None and examples % size:
            raise ValueError(
                f"the batch size must be a multiple of {size}, the size of the mesh's axis {self.axis}, "
                f"got {examples:,}. The next one is {math.ceil(examples / size) * size:,}"
            )


def examples_of(batch: PyTree) -> int | None:
    """Return the number of examples of a batch: the length of the first array with axes, None where there is none."""
    return next((leaf.shape[0] for leaf in jax.tree.leaves(batch) if getattr(leaf, "ndim", 0)), None)


def split_of(params: PyTree) -> Split | None:
    """Return how a step is split whose parameters lie on a mesh; None if they do not, or while they are traced."""
    mesh = mesh_of(params)
    if mesh is None:
        return None
    specs = tuple(_spec(leaf) for leaf in jax.tree.leaves(params))
    return Split(automatic(mesh), _data_axis(mesh, specs), specs)


def check_mesh(params: PyTree, mesh: Mesh | None) -> Mesh | None:
    """Return the mesh that a run uses: the one that its parameters lie on, else the given one.

    Raises:
        ValueError: both exist and differ; or the parameters are on two; or batches cannot be split over it.
    """
    on = mesh_of(params)
    if on is not None and mesh is not None and not same_mesh(on, mesh):
        raise ValueError(
            f"fit: the parameters are on {describe(on)}, but mesh= is {describe(mesh)}. Leave mesh= out, or move "
            "them: jax.device_put(params, shardings)"
        )
    mesh = mesh if on is None else on
    if mesh is not None and _data_axis(mesh, [_spec(leaf) for leaf in jax.tree.leaves(params)]) is None:
        names, sizes = tuple(mesh.axis_names), tuple(mesh.shape.values())
        # Its only axis splits parameters: add one. Otherwise rename one.
        names, sizes = ((DATA, *names), (1, *sizes)) if len(names) == 1 else ((DATA, *names[1:]), sizes)
        raise ValueError(
            f"fit: batches are split over the mesh's axis {DATA!r}, but {describe(mesh)} has no axis of that name. "
            f"Make the mesh with one, such as jax.make_mesh({sizes}, {names})"
        )
    return mesh


def follow(tree: PyTree, params: PyTree, shardings: PyTree) -> PyTree:
    """Return the sharding of each array of an optimizer's state: that of its parameter.

    An array belongs to the parameter whose path its own path ends with, if it has the same shape, or that shape behind
    one more axis (L-BFGS keeps a history of updates). All others are whole on every device.

    Args:
        tree: the optimizer's state, or its shapes.
        params: the parameters, or their shapes.
        shardings: of the parameters, in the same tree: `NamedSharding`s of one mesh.
    """
    where: list[NamedSharding] = jax.tree.leaves(shardings)
    known = {
        name: (leaf.shape, there) for (name, leaf), there in zip(named_leaves(params), where, strict=True)
    }
    alone = replicated(where[0].mesh)  # type: ignore[arg-type]

    def sharding(path: tuple[PyTree, ...], leaf: PyTree) -> NamedSharding:
        for start in range(len(path) + 1):
            shape, there = known.get(path_name(path[start:]), (None, alone))
            if leaf.shape == shape:
                return there
            if leaf.shape[1:] == shape:
                return NamedSharding(there.mesh, PartitionSpec(None, *there.spec))
        return alone

    return jax.tree_util.tree_map_with_path(sharding, tree)


def without(spec: PartitionSpec, axis: str | None) -> PartitionSpec:
    """Return a spec that does not use an axis of the mesh.

    >>> without(PartitionSpec("data", ("model", "data")), "data") == PartitionSpec(None, ("model",))
    True
    """
    if axis not in _axes([spec]):
        return spec
    rest = (tuple(name for name in _names(entry) if name != axis) for entry in spec)
    return PartitionSpec(*(names or None for names in rest))


def _spec(leaf: Any) -> PartitionSpec:
    sharding = getattr(leaf, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _axes(specs: Any) -> set[str]:
    return {name for spec in specs for entry in spec for name in _names(entry)}


def _data_axis(mesh: Mesh, specs: Any) -> str | None:
    """Return the axis that batches are split over: `data`, or the only one if no parameter is split over it."""
    if DATA in mesh.axis_names:
        return DATA
    (only, *others) = mesh.axis_names
    return None if others or only in _axes(specs) else only
