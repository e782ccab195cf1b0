"""A model taken apart: what is trained, what is carried from step to step, and what stays constant.

Floating (and complex) arrays are trained. Other arrays, and everything that is not an array (functions, strings, the
Python numbers that a module holds), are configuration: an Equinox model can be trained as it is. Of a Flax NNX module
the `nnx.Param`s are trained and all other variables, such as running means and counters of random numbers, are carried.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradfn.core.params import named_leaves
from gradfn.flatten import BatchMean, Loss, batch_mean, flat_products
from gradfn.jaxpr.call import MEAN, scalar_and_aux, value_and_aux, with_hint
from gradfn.jaxpr.program import traced_leaves
from gradfn.losses import of_net

SPLIT = (
    "Write graphdef, params, rest = nnx.split(model, nnx.Param, ...), train params, and pass rest as state: "
    "fit(loss, params, ..., state=rest), where loss(params, batch, state) returns (value, {'state': new rest})"
)


class Fixed(tuple[PyTree, ...]):
    """Objects of any kind that compiled programs may depend on."""

    def __hash__(self) -> int:
        return hash(tuple(map(type, self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fixed) or len(other) != len(self):
            return False
        return all(a is b or (type(a) is type(b) and bool(a == b)) for a, b in zip(self, other, strict=True))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["structure", "trained", "fixed"]
)
@dataclass(frozen=True)
class Rest:
    """The part of a tree that is not trained.

    Attributes:
        arrays: integers, booleans, keys.
        structure: of the tree.
        trained: for each leaf, whether it is trained.
        fixed: the leaves that are not arrays; None for each leaf that is one.
    """

    arrays: list[PyTree]
    structure: Any
    trained: tuple[bool, ...]
    fixed: Fixed

    def model(self, params: PyTree, state: PyTree = None) -> PyTree:
        """Return the whole tree, with these trained arrays."""
        leaves = self.structure.flatten_up_to(params)
        arrays = iter(self.arrays)
        for i, (trained, fixed) in enumerate(zip(self.trained, self.fixed, strict=True)):
            if not trained:
                leaves[i] = next(arrays) if fixed is None else fixed
        return jax.tree.unflatten(self.structure, leaves)

    def loss(self, loss: Loss) -> Loss:
        """Return a loss as a function of the trained arrays."""

        @functools.wraps(loss)
        def of_trained(params: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree:
            return loss(self.model(params), *args, **kwargs)

        return of_trained


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["graphdef"])
@dataclass(frozen=True)
class Graph:
    """The part of a Flax NNX module that is neither trained nor carried: its structure."""

    graphdef: Any

    def model(self, params: PyTree, state: PyTree = None) -> PyTree:
        """Return a module with copies of these variables, which may be changed in place."""
        from flax import nnx

        return nnx.merge(self.graphdef, params, state, copy=True)

    def loss(self, loss: Loss) -> Loss:
        """Return a loss as a function of the `Param`s, whose aux holds the other variables after the forward pass."""
        from flax import nnx

        @functools.wraps(loss)
        def of_variables(params: PyTree, *args: PyTree, state: PyTree, **kwargs: PyTree) -> PyTree:
            model = self.model(params, state)
            value, aux = value_and_aux(loss(model, *args, **kwargs))
            aux = {} if aux is None else aux
            if not isinstance(aux, Mapping):
                raise TypeError(f"aux beside an NNX module must be a dict, got {type(aux).__name__}")
            parts: PyTree = nnx.split(model, nnx.Param, ...)
            return value, {"state": parts[2], **aux}

        return of_variables


def take_apart(model: PyTree) -> tuple[PyTree, Rest | Graph | None, PyTree]:
    """Return the trained part of a model, the constant part (None if there is none), and the part that is carried.

    Raises:
        TypeError: nothing in it can be trained, or it holds state that must not be trained.
    """
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is not None and any(isinstance(node, nnx.Module) for node in _nodes(model, nnx.Module)):
        graphdef, params, state = nnx.split(model, nnx.Param, ...)
        return jax.tree.map(strong, params), Graph(graphdef), jax.tree.map(strong, state)
    _refuse_state(model, nnx)
    leaves, structure = jax.tree.flatten(model)
    abstract = jax.ShapeDtypeStruct
    traced = traced_leaves(model)
    known = [array or isinstance(leaf, abstract) for leaf, array in zip(leaves, traced, strict=True)]
    leaves = [strong(leaf) if array else leaf for leaf, array in zip(leaves, known, strict=True)]
    trained = tuple(
        array and jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf, array in zip(leaves, known, strict=True)
    )
    if not any(trained):
        raise TypeError(f"there is no floating array in the parameters to train, got {type(model).__name__}")
    kinds = list(zip(leaves, known, trained, strict=True))
    params = jax.tree.unflatten(structure, [leaf if chosen else None for leaf, _, chosen in kinds])
    if all(trained):
        return params, None, None
    arrays = [leaf for leaf, array, chosen in kinds if array and not chosen]
    fixed = Fixed(None if array else leaf for leaf, array, _ in kinds)
    return params, Rest(arrays, structure, trained, fixed), None


def strong(leaf: PyTree) -> PyTree:
    """Return a number or an array as an array that is not weakly typed, like those restored from a checkpoint."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    array = jnp.asarray(leaf)
    # Arrays made of Python numbers promote like Python numbers; arrays from a file do not.
    return array.astype(array.dtype) if getattr(array, "weak_type", False) else array


def batch_loss(loss: Loss, rest: Rest | Graph | None) -> Loss:
    """Return a loss of a batch as a function of the trained part of a model.

    Its matrix products are two-dimensional, so that models of other frameworks train faster too.

    Raises:
        TypeError: the loss is of one example; the returned loss raises it too, where that shows only in a call.
    """
    if not isinstance(loss, BatchMean) and (one := of_net(loss)):
        raise TypeError(f"training takes the loss of a batch, got gf.{one.name}(net), of one example. {MEAN}")
    if isinstance(loss, BatchMean):
        if rest is None:
            return loss
        if isinstance(rest, Rest):
            return batch_mean(rest.loss(loss.example))
    return flat_products(_scalar(with_hint(loss if rest is None else rest.loss(loss))))


def _scalar(loss: Loss) -> Loss:
    """Return the loss, which raises a TypeError where it does not return a scalar or (scalar, aux)."""

    @functools.wraps(loss)
    def checked(*args: PyTree, **kwargs: PyTree) -> PyTree:
        out = loss(*args, **kwargs)
        scalar_and_aux(out, "training", "loss")
        return out

    return checked


def carry(state: PyTree, aux: PyTree) -> tuple[PyTree, PyTree]:
    """Return a model's new state, which a loss returned in its aux, and the rest of aux.

    Raises:
        TypeError: there is none, or its structure, shapes or dtypes differ from those of the state before.
    """
    if state is None:
        return None, aux
    if not isinstance(aux, Mapping) or "state" not in aux:
        raise TypeError('a loss that takes state must return (scalar, {"state": new_state, ...})')
    new = aux["state"]
    was: PyTree = jax.tree.structure(state)
    now: Any = jax.tree.structure(new)
    if was != now:
        raise TypeError(f"the loss changed the structure of state: expected {was}, got {now}")
    for (name, before), after in zip(named_leaves(state), jax.tree.leaves(new), strict=True):
        expected, actual = (f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for leaf in (before, after))
        if expected != actual:
            raise TypeError(f"the loss changed the state {name}: expected {expected}, got {actual}")
    return jax.tree.map(jnp.asarray, new), {name: value for name, value in aux.items() if name != "state"}


def _refuse_state(model: PyTree, nnx: Any) -> None:
    if nnx is not None:
        for name, node in named_leaves(model, lambda node: isinstance(node, nnx.Variable)):
            if isinstance(node, nnx.Variable) and not isinstance(node, nnx.Param):
                raise TypeError(f"{name}: {type(node).__name__} must not be trained. {SPLIT}")
    if any(map(_is_linen, jax.tree.leaves(model, is_leaf=_is_linen))):
        raise TypeError(
            "batch_stats must not be trained. Train variables['params'] and pass the rest as state: fit(loss, "
            "variables['params'], ..., state={'batch_stats': variables['batch_stats']}), where loss(params, batch, "
            "state) returns (value, {'state': new state})"
        )
    eqx: Any = sys.modules.get("equinox.nn")
    if eqx is not None and any(
        isinstance(node, eqx.StateIndex) and jax.tree.leaves(node) for node in _nodes(model, eqx.StateIndex)
    ):
        raise TypeError(
            "the Equinox model holds its initial state, which must not be trained. Write model, state = "
            "eqx.nn.make_with_state(Model)(...) and fit(loss, model, ..., state=state), where loss(model, batch, "
            "state) returns (value, {'state': new state})"
        )


def _is_linen(node: PyTree) -> bool:
    return isinstance(node, Mapping) and {"params", "batch_stats"} <= set(node)


def _nodes(tree: PyTree, kind: type) -> list[PyTree]:
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
