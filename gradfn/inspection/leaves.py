"""Parameters as curvature sees them: their floating leaves, in order, and all of them as one flat vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradfn.core.names import ParameterError
from gradfn.jaxpr.program import is_array, leaf_name, traced_leaves


class Leaves(NamedTuple):
    """The floating arrays of a tree of parameters.

    Attributes:
        values: the arrays.
        names: a name for each, such as `W1`, `layers/0/W`.
        fill: `values -> parameters`: the tree with these arrays, everything else as it was.
        tree: `one thing a leaf -> tree`, None where a leaf is no floating array.
        match: `tree -> one thing a leaf`; the tree has the parameters' structure, or that which `tree` makes.
    """

    values: list[Any]
    names: tuple[str, ...]
    fill: Callable[[Sequence[Any]], Any]
    tree: Callable[[Sequence[Any]], Any]
    match: Callable[[Any], list[Any]]

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return sum(jnp.size(value) for value in self.values)

    @property
    def dtype(self) -> Any:
        """The dtype of the flat vector: the leaves' most precise, float32 at least."""
        return max(
            [jnp.dtype(jnp.float32), *map(jnp.result_type, self.values)], key=lambda d: jnp.finfo(d).bits
        )

    def flat(self, values: Sequence[Any]) -> jax.Array:
        """Put one array a leaf into one vector `[size]`."""
        return jnp.concatenate([jnp.ravel(jnp.asarray(value)).astype(self.dtype) for value in values])

    def split(self, vector: jax.Array) -> list[jax.Array]:
        """Take a vector `[size]` apart into one array a leaf, of its shape and dtype."""
        parts, start = [], 0
        for value in self.values:
            stop = start + jnp.size(value)
            part = jax.lax.slice(vector, (start,), (stop,))
            parts.append(part.reshape(jnp.shape(value)).astype(jnp.result_type(value)))
            start = stop
        return parts


def floating_leaves(params: Any, what: str) -> Leaves:
    """Find the floating arrays of a tree; `what` names the caller in errors."""
    structure: Any
    with_paths, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in with_paths]
    names = [leaf_name(path) for path, _ in with_paths]
    arrays = [i for i, traced in enumerate(traced_leaves(params)) if traced]
    for i in arrays:
        if jnp.issubdtype(jnp.result_type(leaves[i]), jnp.complexfloating):
            raise ParameterError(
                names[i], f"{what}: complex parameters have no real Hessian; give both parts"
            )
    chosen = [i for i in arrays if jnp.issubdtype(jnp.result_type(leaves[i]), jnp.floating)]
    if not chosen:
        raise TypeError(f"{what}: there is no floating array in the parameters; got {params!r:.200}")

    def fill(values: Sequence[Any]) -> Any:
        known = dict(zip(chosen, values, strict=True))
        return jax.tree.unflatten(structure, [known.get(i, leaf) for i, leaf in enumerate(leaves)])

    def tree(values: Sequence[Any]) -> Any:
        known = dict(zip(chosen, values, strict=True))
        return jax.tree.unflatten(structure, [known.get(i) for i in range(len(leaves))])

    def match(other: Any) -> list[Any]:
        try:
            parts = structure.flatten_up_to(other)
        except (ValueError, TypeError, KeyError):
            raise _other_structure(names, other, what) from None
        return [parts[i] for i in chosen]

    return Leaves([leaves[i] for i in chosen], tuple(names[i] for i in chosen), fill, tree, match)


def tangents(leaves: Leaves, vector: Any, what: str) -> list[jax.Array]:
    """Return a vector's arrays, one a leaf, in the leaves' dtypes.

    Raises:
        ParameterError: it has another structure, or an array another shape.
    """
    found = []
    for name, value, part in zip(leaves.names, leaves.values, leaves.match(vector), strict=True):
        expected = f"{what}: the vector needs {list(jnp.shape(value))}, as the parameter has"
        if not isinstance(part, (float, int)) and not is_array(part):
            raise ParameterError(name, f"{expected}, came {_described(part)}")
        if jnp.shape(part) != jnp.shape(value):
            raise ParameterError(name, f"{expected}, came {list(jnp.shape(part))}")
        if jnp.issubdtype(jnp.result_type(part), jnp.complexfloating):
            raise ParameterError(name, f"{what}: the vector needs real numbers, came {jnp.result_type(part)}")
        found.append(jnp.asarray(part).astype(jnp.result_type(value)))
    return found


def _other_structure(names: Sequence[str], other: Any, what: str) -> ParameterError:
    came = [leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(other)[0]]
    missing = [name for name in names if name not in came]
    extra = [name for name in came if name not in names]
    needed, given = ", ".join(names), ", ".join(came)
    message = f"{what}: the vector needs the parameters' structure, {needed:.200}; got {given:.200}"
    return ParameterError((missing or extra or ["params"])[0], message)


def _described(part: Any) -> str:
    return "None" if part is None else f"a {type(part).__name__}"
