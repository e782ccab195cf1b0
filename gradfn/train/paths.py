"""Parameters chosen by their paths: those to freeze, to adapt, to train at another rate."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Sequence

import jax
from jaxtyping import PyTree

from gradfn.core.params import path_name

Where = str | Sequence[str] | Callable[[str], bool]


def path_mask(params: PyTree, where: Where) -> PyTree:
    """Return which parameters have one of some paths: a mask for optax.

    `optax.freeze` takes it, `optax.masked`, and, as labels, `optax.partition`; each also takes a function of the
    parameters, which a model with leaves that are not arrays needs: `lambda params: gf.train.path_mask(params, where)`.

    Args:
        params: a tree of arrays, or a spec.
        where: a path as `gf.table` shows it (`blocks/0/attention/query/W`), a glob (`*attention*`), several of them,
            or a predicate of the path.

    Returns:
        The same tree of booleans.

    Raises:
        ValueError: a path or a glob that matches nothing; the message lists similar paths.

    >>> path_mask({"embed": {"W": 1.0}, "head": {"W": 1.0, "b": 0.0}}, "head/*")
    {'embed': {'W': False}, 'head': {'W': True, 'b': True}}
    """
    chosen = matching(names_of(params), where, "path_mask")
    names = iter(names_of(params))
    return jax.tree.map(lambda _: next(names) in chosen, params)


def names_of(params: PyTree) -> list[str]:
    """Return the path of each leaf, without the `value` that Flax NNX puts at the end of those of its variables.

    >>> names_of({"blocks": [{"W": 1.0}]})
    ['blocks/0/W']
    """
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    nnx = [name.endswith("/value") for name in names]
    return [name.removesuffix("/value") for name in names] if all(nnx) else names


def matching(names: Sequence[str], where: Where, what: str) -> set[str]:
    """Return the names that are chosen.

    Args:
        names: of all parameters.
        where: see `path_mask`.
        what: the caller's name, for errors.
    """
    if callable(where):
        return {name for name in names if where(name)}
    chosen: set[str] = set()
    for pattern in [where] if isinstance(where, str) else where:
        found = [pattern] if pattern in names else fnmatch.filter(names, pattern)
        if not found:
            near = difflib.get_close_matches(pattern, names, 5, 0.4)
            hint = f"Did you mean {', '.join(near)}?" if near else f"The paths are {', '.join(names):.300}"
            raise ValueError(f"{what}: no parameter has the path {pattern!r}. {hint}")
        chosen.update(found)
    return chosen
