"""Models of other frameworks as they are: what in them is a parameter and what is state, and how they are called.

None of the frameworks is imported: there is an object of one only where the user has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from gradfn.core.names import ParameterError

# Collections of Linen that do not hold parameters, where they are beside "params".
COLLECTIONS = ("batch_stats", "cache", "intermediates", "perturbations")


class Leaf(NamedTuple):
    """A leaf of a model.

    Attributes:
        name: its path as text, `layers/0/weight`.
        value: an array, or configuration.
        state: what it is instead of a parameter, as its framework calls it (`BatchStat`, `batch_stats`, `State`); ""
            for parameters and configuration.
    """

    name: str
    value: Any
    state: str = ""


def model_leaves(model: PyTree, function: str) -> list[Leaf]:
    """Return the leaves of parameters, of a net's spec or of a model, in order.

    A variable that several NNX modules share has one leaf, under its first path.

    Args:
        model: any pytree; of a `gf.Net` the spec is taken, of a bound Linen module its variables.
        function: the caller, for errors.

    Raises:
        TypeError: a module without parameters, with what to pass instead.
        ParameterError: two leaves have the same path.
    """
    leaves, variables = [], set()
    for path, node in jax.tree_util.tree_leaves_with_path(_tree_of(model, function), is_leaf=_is_node):
        if _is(node, "flax.nnx", "Variable"):
            if id(node) in variables:
                continue
            variables.add(id(node))
        inner = jax.tree_util.tree_leaves_with_path(node)
        # nnx keeps each array in a box.
        boxed = _is(node, "flax.nnx", "Variable") and len(inner) == 1
        for end, value in inner:
            name = jax.tree_util.keystr(path if boxed else (*path, *end), simple=True, separator="/")
            leaves.append(Leaf(name, value, _state(node, end)))
    known: set[str] = set()
    for name, _, _ in leaves:
        if name in known:
            raise ParameterError(name, "two entries have this path. Rename one: a key must not contain /")
        known.add(name)
    return leaves


def function_of(f: Any) -> tuple[Callable, tuple[PyTree, ...]]:
    """Return the function to trace for what a user passes as one, and the arguments to put in front of the user's.

    A `gf.Net`, a Linen module and what `hk.transform` returns take their parameters as an argument, by `apply`. An
    Equinox or NNX module and a bound Linen module hold theirs: they are the first argument, so that values have names.

    >>> import gradfn as gf
    >>> net = gf.mlp([4, 2])
    >>> function_of(net) == (net.apply, ())
    True
    """
    if _is(f, "flax.linen", "Module") and f.scope is not None:
        module, variables = f.unbind()
        return module.apply, (variables,)
    if _is(f, "flax.linen", "Module") or _is_transformed(f) or (_has_spec(f) and not callable(f)):
        return f.apply, ()
    if _holds_parameters(f):
        return lambda model, *args, **kwargs: model(*args, **kwargs), (f,)
    return f, ()


def _holds_parameters(f: Any) -> bool:
    if not (_is(f, "equinox", "Module") or _is(f, "flax.nnx", "Module")):
        return False
    return any(isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) for leaf in jax.tree.leaves(f))


def _tree_of(model: PyTree, function: str) -> PyTree:
    if _has_spec(model):
        return model.spec
    if _is(model, "flax.linen", "Module"):
        if model.scope is None:
            raise TypeError(
                f"{function}: a Linen module does not contain its parameters. Pass the variables: "
                f"gf.{function}(module.init(key, x))"
            )
        return model.variables
    if _is_transformed(model):
        raise TypeError(
            f"{function}: a transformed Haiku function does not contain its parameters. Pass them: "
            f"gf.{function}(transformed.init(key, x))"
        )
    return model


def _has_spec(model: Any) -> bool:
    return hasattr(model, "spec") and hasattr(model, "apply")


def _is_transformed(f: Any) -> bool:
    return _is(f, "haiku", "Transformed") or _is(f, "haiku", "TransformedWithState")


def _is_node(node: PyTree) -> bool:
    return _is(node, "flax.nnx", "Variable") or _is_equinox_state(node) or _is_linen(node)


def _is_equinox_state(node: PyTree) -> bool:
    return _is(node, "equinox.nn", "State") or _is(node, "equinox.nn", "StateIndex")


def _is_linen(node: PyTree) -> bool:
    return isinstance(node, Mapping) and "params" in node and not set(COLLECTIONS).isdisjoint(node)


def _state(node: PyTree, path: tuple[Any, ...]) -> str:
    """Return what the leaf at a path in a node is, see `Leaf.state`."""
    if _is_linen(node):
        return path[0].key if path[0].key in COLLECTIONS else ""
    if _is_equinox_state(node):
        return "State"
    is_state = _is(node, "flax.nnx", "Variable") and not _is(node, "flax.nnx", "Param")
    return type(node).__name__ if is_state else ""


def _is(node: Any, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(node, kind)
