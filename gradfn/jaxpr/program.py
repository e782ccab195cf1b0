"""Trace any function into a jaxpr, and restore its arguments and results to their trees."""

import functools
import inspect
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from jax.tree_util import SequenceKey
from jaxtyping import PyTree

from gradfn.core.attention_form import differentiable_attention, requested
from gradfn.core.params import path_name
from gradfn.jaxpr.interpreter import Equation, Path, walk


@dataclass(frozen=True)
class Program:
    """A traced call of a function: `jaxpr` takes `inputs`, the array leaves of all arguments in order.

    `owners[i]` is the index of the positional argument that input i belongs to (-1 for a keyword argument),
    `names[i]` its path in that argument, such as `layers/0/W`. Leaves that are not arrays (functions, strings: some
    frameworks keep them in their models) are fixed at tracing. `objects` contains what the function returned that
    is not an array, and None for each output of `jaxpr`. With `fixed_data`, data are among the constants of `jaxpr`,
    because the function needs their values.
    """

    jaxpr: ClosedJaxpr
    inputs: list[PyTree]
    owners: tuple[int, ...]
    names: tuple[str, ...]
    out_tree: Any
    in_tree: Any
    is_array: tuple[bool, ...]
    objects: tuple[PyTree, ...]
    fixed_data: bool = False

    def rebuild(self, outs: Sequence[PyTree]) -> PyTree:
        """Return flat outputs in the tree that the function returned."""
        rest = iter(outs)
        return jax.tree.unflatten(self.out_tree, [next(rest) if x is None else x for x in self.objects])

    def equations(
        self,
        paths: Container[Path] | None = None,
        *,
        enter_custom: bool = False,
        enter_choices: bool = False,
    ) -> dict[Path, Equation]:
        """Return the equations by path, nested ones included: all of them, or those at some paths."""
        return {
            equation.path: equation
            for equation in walk(self.jaxpr, enter_custom, enter_choices)
            if paths is None or equation.path in paths
        }

    def like_arguments(self, values: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """Return one value per input in the trees of the positional arguments, None for leaves that are not arrays."""
        rest = iter(values)
        args, _ = jax.tree.unflatten(self.in_tree, [next(rest) if known else None for known in self.is_array])
        return args


# True while a function is traced as it was written: rewrites such as `flat_products` then do nothing. It is part of
# the key of jit's cache.
as_written = jax.make_user_context(False)


def is_array(leaf: PyTree) -> bool:
    """Tell whether jax traces and differentiates a leaf: an array of numbers, or a Python float."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        # Objects, texts and times are not numbers.
        return leaf.dtype.kind not in "OSUMm"
    return isinstance(leaf, (jax.Array, float))


def traced_leaves(tree: PyTree) -> list[bool]:
    """Tell which leaves of a tree are traced, and differentiated if they are floating; the rest is configuration.

    Arrays of jax and numpy are traced everywhere. A Python float is traced where `jax.grad` would differentiate it:
    as an argument, in dicts, lists and tuples, and in the boxes of Flax NNX that declare it a parameter. In any other
    object, such as an Equinox module, it is configuration that code branches on and checks: `eqx.nn.Dropout.p`.
    Python integers, booleans, strings and functions are configuration everywhere. So are floating variables of NNX that
    are not an `nnx.Param`: the gradient with respect to a running mean is not one of the parameters.
    """
    leaves, structure = jax.tree.flatten(tree)
    pairs = zip(leaves, _in_objects(structure), _in_state(structure), strict=True)
    return [
        is_array(leaf) and (hasattr(leaf, "dtype") or not in_object) and not (in_state and _is_float(leaf))
        for leaf, in_object, in_state in pairs
    ]


def _is_float(leaf: PyTree) -> bool:
    return isinstance(leaf, float) or jnp.issubdtype(leaf.dtype, jnp.inexact)


def _in_state(structure: Any) -> list[bool]:
    """Tell which leaves of a structure are in a variable of NNX that is not a parameter."""
    kind, _ = structure.node_data() or (None, None)
    if kind is None:
        return [False] * structure.num_leaves
    if _is_nnx_variable(kind):
        return [not any(base.__name__ == "Param" for base in kind.__mro__)] * structure.num_leaves
    return [in_state for child in structure.children() for in_state in _in_state(child)]


def _in_objects(structure: Any) -> list[bool]:
    """Tell which leaves of a structure are inside an object that is not a plain container."""
    kind, _ = structure.node_data() or (None, None)
    if kind is not None and not issubclass(kind, (Mapping, list, tuple)) and not _is_nnx_variable(kind):
        return [True] * structure.num_leaves
    children = [in_object for child in structure.children() for in_object in _in_objects(child)]
    return children if kind is not None else [False] * structure.num_leaves


def _is_nnx_variable(kind: type) -> bool:
    names = [(base.__module__, base.__name__) for base in kind.__mro__]
    return any(module.startswith("flax.nnx") and name == "Variable" for module, name in names)


def leaf_name(path: Any, default: str = "params") -> str:
    """Return a leaf's path as users write it: `layers/0/W`; `default` for an argument that is a leaf."""
    # nnx keeps each array in a box.
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return path_name(path) or default


def parameters_of(f: Callable) -> list[inspect.Parameter]:
    """Return the parameters of a function's signature; none where it has no signature."""
    try:
        return list(inspect.signature(f).parameters.values())
    # Some built-in callables have no signature.
    except (TypeError, ValueError):
        return []


def params_first(
    f: Callable, args: tuple[PyTree, ...], kwargs: Mapping[str, Any], what: str
) -> tuple[tuple[PyTree, ...], dict[str, Any]]:
    """Return the arguments of a call, with the first one (the parameters) passed by position.

    Raises:
        TypeError: the call has no first argument; `what` names the caller.
    """
    kwargs = dict(kwargs)
    if args:
        return args, kwargs
    first = next(iter(parameters_of(f)), None)
    if first is None or first.name not in kwargs:
        raise TypeError(f"{what}: expected the parameters as the first argument, got {sorted(kwargs)}")
    return (kwargs.pop(first.name),), kwargs


def by_position(
    f: Callable, args: tuple[PyTree, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[PyTree, ...], dict[str, Any]]:
    """Return the arguments of a call, with keyword arguments passed by position as far as possible."""
    kwargs = dict(kwargs)
    for parameter in parameters_of(f)[len(args) :]:
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD or parameter.name not in kwargs:
            break
        args = (*args, kwargs.pop(parameter.name))
    return args, kwargs


def pure(f: Callable) -> Callable:
    """Return `f`, which raises where it changes a Flax NNX module it is given: tracing would lose the change."""
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is None:
        return f

    def is_module(node: PyTree) -> bool:
        return isinstance(node, nnx.Module)

    @functools.wraps(f)
    def checked(*args: PyTree, **kwargs: PyTree) -> PyTree:
        if not any(map(is_module, jax.tree.leaves((args, kwargs), is_leaf=is_module))):
            return f(*args, **kwargs)
        before = jax.tree.leaves((args, kwargs))
        out = f(*args, **kwargs)
        after = jax.tree_util.tree_leaves_with_path((args, kwargs))
        pairs = zip(before, after, strict=False)
        changed = [leaf_name(path[2:]) for old, (path, new) in pairs if new is not old]
        if changed or len(before) != len(after):
            raise TypeError(
                f"the function changes the NNX module ({', '.join(changed[:3]) or 'its structure'}), and the change "
                "would be lost. Call model.eval() first, or write graphdef, params, rest = nnx.split(model, nnx.Param, "
                "...), inspect a function of (params, rest, ...) that merges them with copy=True, and return its new "
                "rest as aux"
            )
        return out

    return checked


def trace(f: Callable, /, *args: PyTree, **kwargs: PyTree) -> Program:
    """Trace `f(*args, **kwargs)`.

    A fresh closure each time: `make_jaxpr` caches on the identity of the function, and would return a stale jaxpr
    once something that the function closes over has changed.

    Values that the function needs while it is traced (it indexes with a numpy mask, or branches on a Python float) are
    not traced, as under `jax.grad`: if tracing everything fails, they are left out in a second attempt.
    """
    traced = traced_leaves((args, kwargs))
    fewer = without_fixed(traced, args, kwargs)
    try:
        return _trace(f, args, kwargs, traced)
    except (TypeError, ValueError, IndexError):
        if fewer == traced:
            raise
    n_params = len(jax.tree.leaves(args[:1]))
    return replace(_trace(f, args, kwargs, fewer), fixed_data=fewer[n_params:] != traced[n_params:])


def without_fixed(traced: Sequence[bool], args: Sequence[PyTree], kwargs: Mapping[str, Any]) -> list[bool]:
    """Return `traced` without the leaves whose values a function may need and whose gradients nobody asks for.

    These are integers and booleans of numpy and, outside the first argument, single floats of Python and numpy.
    """

    def stays(path: Any, leaf: PyTree) -> bool:
        if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind in "biu":
            return False
        is_parameter = (path[0].idx, path[1]) == (0, SequenceKey(0))
        return is_parameter or not isinstance(leaf, (float, np.floating))

    with_paths = jax.tree_util.tree_leaves_with_path((tuple(args), dict(kwargs)))
    return [known and stays(path, leaf) for known, (path, leaf) in zip(traced, with_paths, strict=True)]


def _trace(f: Callable, args: Sequence[PyTree], kwargs: Mapping[str, Any], traced: Sequence[bool]) -> Program:
    with_paths, in_tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
    leaves = [leaf for _, leaf in with_paths]
    # A path is (0, i, ...) for the i-th positional argument, (1, name, ...) for a keyword.
    owners = [path[1].idx if path[0].idx == 0 else -1 for path, _ in with_paths]
    names = [
        leaf_name(path[2:], "params" if owner == 0 else "x")
        for (path, _), owner in zip(with_paths, owners, strict=True)
    ]
    out_tree = None
    objects: tuple[PyTree, ...] = ()

    def flat(*arrays: PyTree) -> list[PyTree]:
        nonlocal out_tree, objects
        rest = iter(arrays)
        args, kwargs = jax.tree.unflatten(
            in_tree, [next(rest) if k else x for k, x in zip(traced, leaves, strict=True)]
        )
        outs, out_tree = jax.tree.flatten(pure(f)(*args, **kwargs))
        objects = tuple(None if _is_output(x) else x for x in outs)
        return [x for x in outs if _is_output(x)]

    inputs = [leaf for leaf, k in zip(leaves, traced, strict=True) if k]
    jaxpr = jax.make_jaxpr(flat)(*inputs)
    return Program(
        jaxpr=jaxpr,
        inputs=inputs,
        owners=tuple(o for o, k in zip(owners, traced, strict=True) if k),
        names=tuple(n for n, k in zip(names, traced, strict=True) if k),
        out_tree=out_tree,
        in_tree=in_tree,
        is_array=tuple(traced),
        objects=objects,
    )


def _is_output(leaf: PyTree) -> bool:
    """Tell whether jax can return a leaf from what it compiles: an array, or a Python number."""
    return is_array(leaf) or isinstance(leaf, (bool, int, complex))


class _Object:
    """An object that is not an array, as a pytree without leaves, which passes through jax's transforms."""

    def __init__(self, value: PyTree) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


jax.tree_util.register_static(_Object)


def hide_objects(tree: PyTree) -> PyTree:
    """Return a tree whose leaves are all arrays: strings and other objects pass through `jit`, `vmap` and `cond`."""
    return jax.tree.map(lambda leaf: leaf if _is_output(leaf) else _Object(leaf), tree)


def show_objects(tree: PyTree) -> PyTree:
    """Undo `hide_objects`."""
    hidden = lambda leaf: isinstance(leaf, _Object)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.value if hidden(leaf) else leaf, tree, is_leaf=hidden)


def trace_as_written(f: Callable, /, *args: PyTree, **kwargs: PyTree) -> Program:
    """Trace `f(*args, **kwargs)` without the rewrite of `flat_products`, so that values keep their own shapes.

    Attention is plain, with all of its probabilities.
    """
    with as_written(True), requested("plain"):
        return trace(f, *args, **kwargs)


def trace_without_probabilities(f: Callable, /, *args: PyTree, **kwargs: PyTree) -> Program:
    """Do the same as `trace_as_written`, but with long attention in blocks, unless its form is already requested."""
    with as_written(True), differentiable_attention():
        return trace(f, *args, **kwargs)
