"""How parameters are split over devices: rules from logical axes to the axes of a mesh.

A `Param` names its axes (`gradfn.core.axes`), a rule says which axis of the mesh shares an axis of that name:
`{"mlp": "model", "embed": "data"}`. Rules are data, so a net knows nothing of devices.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from gradfn.core.axes import AXES
from gradfn.core.net import Net
from gradfn.core.params import describe, is_param, named_leaves
from gradfn.display import TextTable, reading_order

MeshAxes = str | Sequence[str] | None
Rules = Mapping[str, MeshAxes] | Sequence[tuple[str, MeshAxes]]

DATA_PARALLEL: Rules = ()
"""Every device holds all parameters; only batches are split."""

FSDP: Rules = (("embed", "data"), ("mlp_in", "data"), ("channels_in", "data"), ("channels", "data"))
"""Parameters, and with them gradients and the optimizer's state, are split over `data` (Rajbhandari et al., *ZeRO*,
2020, stage 3; PyTorch's FSDP)."""

TENSOR_PARALLEL: Rules = tuple((name, "model") for name in ("heads", "kv_heads", "mlp", "vocab", "channels"))
"""Heads, hidden nodes, tokens and channels are split over `model` (Shoeybi et al., *Megatron-LM*, 2019)."""

FSDP_TENSOR_PARALLEL: Rules = (*TENSOR_PARALLEL, *FSDP)
"""Both: the axes that `TENSOR_PARALLEL` leaves are split over `data`."""


def shardings(tree: PyTree, mesh: Mesh, rules: Rules | PyTree) -> PyTree:
    """Return a sharding for each parameter, by rules for the names of its axes.

    Args:
        tree: a net, or its spec; with `PartitionSpec`s instead of rules also parameters, or any tree of arrays.
        mesh: from `jax.make_mesh`. Batches are split over its axis `data`.
        rules: from the name of an axis to the axis of the mesh that splits it, to several of them, or to None, which
            leaves it whole. In a sequence of pairs, the first that fits is taken, and a name may occur again. An axis
            of the mesh splits at most one axis of an array. Ready ones are `DATA_PARALLEL`, `FSDP`, `TENSOR_PARALLEL`
            and `FSDP_TENSOR_PARALLEL`. Or a tree of `PartitionSpec`, where one may stand for a subtree.

    Returns:
        A `NamedSharding` for each leaf, in the same tree: for `net.init(key, shardings=...)`, `jax.device_put` and
        `jax.jit`. An axis that rules cannot divide stays whole, and a UserWarning names it.

    Raises:
        ValueError: an axis that the mesh does not have; a name that is not a logical axis; no names where rules need
            them; a `PartitionSpec` that does not fit its array.

    >>> import jax, gradfn as gf
    >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
    >>> found = gf.train.shardings(gf.mlp([784, 16, 10]), mesh, {"mlp": "model", "mlp_in": "data"})
    >>> tuple(found["W1"].spec), tuple(found["W2"].spec)
    (('model', 'data'), (None, 'data'))
    """
    tree = tree.spec if isinstance(tree, Net) else tree
    named = named_leaves(tree, is_param)
    for name, leaf in named:
        if not hasattr(leaf, "shape"):
            raise ValueError(
                f"shardings: expected a net, a spec or arrays, got {describe(leaf)} at {name or 'its root'}"
            )
    if any(map(_is_spec, jax.tree.leaves(rules, is_leaf=_is_spec))):
        return _from_specs(tree, mesh, rules)
    pairs = _pairs(rules, mesh, [leaf for _, leaf in named])
    whole: dict[tuple[str, int, tuple[str, ...]], list[str]] = {}
    specs = []
    for name, leaf in named:
        spec, missed = _split(leaf, mesh, pairs)
        specs.append(NamedSharding(mesh, spec))
        for miss in missed:
            whole.setdefault(miss, []).append(name)
    if whole:
        warnings.warn(_report(whole, mesh), stacklevel=2)
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_param), specs)


def sharding_table(tree: PyTree, shardings: PyTree = None) -> TextTable:
    """Return a table of how arrays are split: path, shape, the axes of the mesh, and bytes on each device.

    Args:
        tree: a net, its spec, or arrays.
        shardings: of each leaf; by default those of the arrays.

    Raises:
        ValueError: a leaf without a sharding.

    >>> import jax, gradfn as gf
    >>> net, mesh = gf.mlp([2, 1]), jax.make_mesh((1,), ("data",))
    >>> print(gf.train.sharding_table(net, gf.train.shardings(net, mesh, gf.train.FSDP)))
      path    shape    split            bytes per device
     ────────────────────────────────────────────────────
      W1      [1, 2]   (None, 'data')                  8
      b1      [1]      (None,)                         4
     ────────────────────────────────────────────────────
      total            2 arrays                       12
    """
    tree = tree.spec if isinstance(tree, Net) else tree
    named = named_leaves(tree, is_param)
    if shardings is None:
        each: list[Any] = [getattr(leaf, "sharding", None) for _, leaf in named]
    else:
        each = jax.tree.leaves(shardings)
    if len(each) != len(named) or None in each:
        raise ValueError(
            "sharding_table: expected a sharding for each array. Pass those of gf.train.shardings"
        )
    rows = []
    for (name, leaf), sharding in zip(named, each, strict=True):
        local = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        rows.append((name, list(leaf.shape), str(tuple(getattr(sharding, "spec", ()))), local))
    rows.sort(key=lambda row: reading_order(row[0]))
    out = TextTable()
    out.add_column("path", footer="total", shorten=True)
    out.add_column("shape")
    out.add_column("split", footer=f"{len(rows)} arrays")
    out.add_column("bytes per device", footer=f"{sum(row[3] for row in rows):,}")
    for row in rows:
        out.add_row(*row)
    return out


def _pairs(rules: Rules, mesh: Mesh, leaves: list[Any]) -> list[tuple[str, tuple[str, ...] | None]]:
    """Return rules as pairs of a logical axis and a tuple of the mesh's axes (None: the axis stays whole)."""
    entries: Iterable[Any] = rules.items() if isinstance(rules, Mapping) else rules
    pairs = []
    for entry in entries:
        if not (isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(
                f'shardings: a rule must be a pair of names such as ("mlp", "model"), got {entry!r:.80}'
            )
        name, axes = entry
        pairs.append((name, None if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)))
    declared = (_name(axis) for leaf in leaves for axis in getattr(leaf, "axes", None) or ())
    names = {name for name in declared if name is not None}
    known = [*AXES, *sorted(names - AXES.keys())]
    for name, axes in pairs:
        if name not in known:
            raise ValueError(f"shardings: {_unknown('a logical axis', name, known)}")
        _check_mesh(axes or (), mesh)
    if pairs and leaves and not names:
        raise ValueError(
            "shardings: rules need the names of axes, and no parameter has any. Pass the net or its spec, declare "
            "them (gf.Param([16, 784], axes=('mlp', 'mlp_in'))), or pass a tree of PartitionSpec instead of rules"
        )
    return pairs


def _check_mesh(axes: Iterable[str], mesh: Mesh) -> None:
    for axis in axes:
        if axis not in mesh.axis_names:
            raise ValueError(f"shardings: {_unknown('an axis of the mesh', axis, mesh.axis_names)}")


def _unknown(what: str, name: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    return f"expected {what} ({', '.join(map(str, known))}), got {name!r}{hint}"


def _name(axis: Any) -> str | None:
    return axis[0] if isinstance(axis, tuple) else axis


def _split(
    param: Any, mesh: Mesh, pairs: list[tuple[str, tuple[str, ...] | None]]
) -> tuple[PartitionSpec, list[tuple[str, int, tuple[str, ...]]]]:
    """Return how an array is split, and which axes a rule could not divide: (name, units, axes of the mesh)."""
    axes: tuple[Any, ...] = getattr(param, "axes", None) or (None,) * len(param.shape)
    units = [
        axis[1] if isinstance(axis, tuple) else size for axis, size in zip(axes, param.shape, strict=True)
    ]
    chosen: dict[int, tuple[str, ...]] = {}
    used: set[str] = set()
    missed = []
    for name, mesh_axes in pairs:
        for i, axis in enumerate(axes):
            if _name(axis) != name or i in chosen or used & set(mesh_axes or ()):
                continue
            if units[i] % math.prod(mesh.shape[each] for each in mesh_axes or ()):
                missed.append((i, mesh_axes or ()))
            else:
                chosen[i] = mesh_axes or ()
                used |= set(chosen[i])
    # Another rule may have used the axis of the mesh, or split the array's axis; a size of 1 cannot be split.
    still = [
        (str(_name(axes[i])), units[i], mesh_axes)
        for i, mesh_axes in missed
        if i not in chosen and not used & set(mesh_axes) and param.shape[i] > 1
    ]
    entries = (chosen.get(i, ()) for i in range(len(axes)))
    return PartitionSpec(*(each[0] if len(each) == 1 else each or None for each in entries)), still


def _report(whole: dict[tuple[str, int, tuple[str, ...]], list[str]], mesh: Mesh) -> str:
    """Return the text of the warning: what stays whole, in which parameters, and the next size that divides."""
    lines = []
    for (name, units, mesh_axes), paths in whole.items():
        n = math.prod(mesh.shape[each] for each in mesh_axes)
        # blocks/0/attention and blocks/1/attention are listed once, as blocks/*/attention
        short = dict.fromkeys(re.sub(r"(^|/)\d+(?=/)", r"\1*", path) for path in paths)
        over = " x ".join(f"{each}={mesh.shape[each]}" for each in mesh_axes)
        lines.append(f"{name} {units} by {over}: {-(-units // n) * n} would divide ({', '.join(short)})")
    return "shardings: these axes do not divide and are not split:\n  " + "\n  ".join(lines)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def _from_specs(tree: PyTree, mesh: Mesh, specs: PyTree) -> PyTree:
    """Return the shardings of a tree of `PartitionSpec`, each checked against its array."""
    try:
        each = jax.tree.broadcast(specs, tree, is_leaf=_is_spec)
    except ValueError as error:
        raise ValueError(
            f"shardings: the tree of PartitionSpec must have the structure of the parameters: {error}"
        ) from None
    for (name, leaf), spec in zip(
        named_leaves(tree, is_param), jax.tree.leaves(each, is_leaf=_is_spec), strict=True
    ):
        _check_spec(name, leaf, spec, mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), each, is_leaf=_is_spec)


def _check_spec(name: str, leaf: Any, spec: Any, mesh: Mesh) -> None:
    if not _is_spec(spec):
        raise ValueError(f"shardings: {name}: expected a PartitionSpec, got {describe(spec)}")
    shape = tuple(leaf.shape)
    if len(spec) > len(shape):
        raise ValueError(f"shardings: {name} has shape {list(shape)}, too few axes for {spec}")
    for i, entry in enumerate(spec):
        axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        _check_mesh(axes, mesh)
        n = math.prod(mesh.shape[axis] for axis in axes)
        if shape[i] % n:
            raise ValueError(
                f"shardings: {name} has shape {list(shape)}, and {spec} splits its axis {i} by {n}, which does not "
                f"divide {shape[i]}. Use None for this axis"
            )
