"""Take a call of a function apart: its differentiable arrays, their names, its scalar value and its aux.

Every transform that takes a function asks here what it got. `scalar` sees a call as a function of its floating
arrays, `scalar_and_aux` checks what a function returned, `with_hint` explains a loss of one example that meets a
batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradfn.core.devices import replicated, split_like
from gradfn.core.names import ParameterError
from gradfn.jaxpr.program import (
    hide_objects,
    is_array,
    leaf_name,
    parameters_of,
    pure,
    show_objects,
    traced_leaves,
    without_fixed,
)
from gradfn.jaxpr.varying import as_varying, varying_axes

MEAN = "gf.batch_mean(loss) averages a loss of one example over a batch."


def value_and_aux(out: PyTree) -> tuple[PyTree, PyTree]:
    """Split what a function returned into value and aux; aux is None where it returned a value alone."""
    return out if isinstance(out, tuple) and len(out) == 2 else (out, None)


def scalar_and_aux(out: PyTree, what: str, of: str = "function", remedy: str = MEAN) -> tuple[PyTree, PyTree]:
    """Split what a function returned, arrays or their shapes, into a floating scalar and aux.

    Raises:
        TypeError: it is something else; `what` names the caller, `of` the function, `remedy` says what to do.
    """
    value, aux = value_and_aux(out)
    is_scalar = (is_array(value) or hasattr(value, "shape")) and jnp.shape(value) == ()
    if not is_scalar or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        got = jax.tree.map(_describe, value)
        raise TypeError(
            f"{what}: the {of} must return a floating scalar or (scalar, aux), got {got!s:.200}. {remedy}"
        )
    return value, aux


def with_hint(f: Callable, hint: str = MEAN) -> Callable:
    """Return `f`; where shapes inside it do not fit, the error carries a hint as a note.

    Without a hint where `f` averages over a batch already (`gf.batch_mean`).
    """
    if _averages(f):
        return f

    @functools.wraps(f)
    def hinted(*args: PyTree, **kwargs: PyTree) -> PyTree:
        try:
            return f(*args, **kwargs)
        except (TypeError, ValueError, IndexError) as error:
            of_shapes = isinstance(error, IndexError) or any(word in str(error) for word in _OF_SHAPES)
            texts = [str(error), *getattr(error, "__notes__", ())]
            if of_shapes and not any("gf.batch_mean" in text for text in texts):
                error.add_note(hint)
            raise

    return hinted


def _averages(f: Callable) -> bool:
    """Tell whether a function, or one that it wraps, is a `gf.batch_mean`: that alone has `.example`."""
    return hasattr(f, "example") or (hasattr(f, "__wrapped__") and _averages(f.__wrapped__))


# The last is in the errors of gradfn's own layers.
_OF_SHAPES = ("shape", "dimension", "rank", "axis", "axes", "broadcast", "For a batch")


class Leaves(NamedTuple):
    """The floating arrays of a tree.

    Attributes:
        values: the arrays.
        names: a name for each, such as `W1`, `layers/0/W`.
        numbers: their indices among all leaves of the tree.
        all_leaves: all leaves of the tree, in order.
        structure: of the tree.
        what: names the caller in errors.
    """

    values: list[PyTree]
    names: tuple[str, ...]
    numbers: tuple[int, ...]
    all_leaves: list[PyTree]
    structure: Any
    what: str

    def fill(self, values: Sequence[PyTree]) -> PyTree:
        """Return the tree with other arrays; everything else stays as it is."""
        known = dict(zip(self.numbers, values, strict=True))
        return jax.tree.unflatten(
            self.structure, [known.get(i, leaf) for i, leaf in enumerate(self.all_leaves)]
        )

    def tree(self, values: Sequence[PyTree]) -> PyTree:
        """Return a tree of one value per array, None where a leaf is not a floating array."""
        known = dict(zip(self.numbers, values, strict=True))
        return jax.tree.unflatten(self.structure, [known.get(i) for i in range(len(self.all_leaves))])

    def match(self, other: PyTree) -> list[PyTree]:
        """Return one value per array from a tree of the same structure, or of that which `tree` makes.

        Raises:
            ParameterError: the tree has another structure.
        """
        try:
            parts = self.structure.flatten_up_to(other)
        except (ValueError, TypeError, KeyError):
            raise self._other_structure(other) from None
        return [parts[i] for i in self.numbers]

    def _other_structure(self, other: PyTree) -> ParameterError:
        got, expected = (
            [leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
            for tree in (other, self.fill(self.values))
        )
        missing = [name for name in expected if name not in got]
        extra = [name for name in got if name not in expected]
        return ParameterError(
            (missing or extra or ["params"])[0],
            f"{self.what}: expected the parameters' structure, {', '.join(expected):.200}; "
            f"got {', '.join(got) or 'nothing':.200}",
        )

    @property
    def size(self) -> int:
        """The number of elements of all arrays."""
        return sum(jnp.size(value) for value in self.values)

    @property
    def dtype(self) -> PyTree:
        """The dtype of the flat vector: the arrays' most precise, float32 at least."""
        dtypes = [jnp.dtype(jnp.float32), *map(jnp.result_type, self.values)]
        return max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)

    def flat(self, values: Sequence[PyTree]) -> jax.Array:
        """Concatenate one array per leaf into a vector `[size]`."""
        # On every device, if axes are explicit: the type has no way to say how parts of a vector are split.
        arrays = [replicated(jnp.asarray(value)) for value in values]
        return jnp.concatenate([jnp.ravel(array).astype(self.dtype) for array in arrays])

    def split(self, vector: jax.Array) -> list[jax.Array]:
        """Split a vector `[size]` into one array per leaf, of its shape and dtype."""
        parts, start = [], 0
        for value in self.values:
            stop = start + jnp.size(value)
            part = jax.lax.slice(vector, (start,), (stop,))
            parts.append(split_like(part.reshape(jnp.shape(value)).astype(jnp.result_type(value)), value))
            start = stop
        return parts


def floating_leaves(params: PyTree, what: str) -> Leaves:
    """Return the floating arrays of a tree of parameters; `what` names the caller in errors.

    Raises:
        ParameterError: complex parameters.
        TypeError: no floating array.
    """
    structure: Any
    with_paths, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in with_paths]
    names = [leaf_name(path) for path, _ in with_paths]
    arrays = [i for i, traced in enumerate(traced_leaves(params)) if traced]
    for i in arrays:
        if jnp.issubdtype(jnp.result_type(leaves[i]), jnp.complexfloating):
            raise ParameterError(
                names[i],
                f"{what}: expected real parameters, got {jnp.result_type(leaves[i])}: "
                "pass real and imaginary parts as two arrays",
            )
    chosen = tuple(i for i in arrays if jnp.issubdtype(jnp.result_type(leaves[i]), jnp.floating))
    if not chosen:
        raise TypeError(f"{what}: there is no floating array in the parameters, got {params!r:.200}")
    values, chosen_names = [leaves[i] for i in chosen], tuple(names[i] for i in chosen)
    return Leaves(values, chosen_names, chosen, leaves, structure, what)


def tangents(leaves: Leaves, vector: Any, what: str) -> list[jax.Array]:
    """Return a vector's arrays, one per leaf, in the leaves' dtypes and split as the leaves are.

    Raises:
        ParameterError: the vector has another structure, or an array another shape.
    """
    found = []
    for name, value, part in zip(leaves.names, leaves.values, leaves.match(vector), strict=True):
        expected = f"{what}: expected a vector of shape {list(jnp.shape(value))}, like the parameter"
        if not isinstance(part, (float, int)) and not is_array(part):
            raise ParameterError(name, f"{expected}, got {'None' if part is None else type(part).__name__}")
        if jnp.shape(part) != jnp.shape(value):
            raise ParameterError(name, f"{expected}, got {list(jnp.shape(part))}")
        if jnp.issubdtype(jnp.result_type(part), jnp.complexfloating):
            raise ParameterError(name, f"{what}: expected a real vector, got {jnp.result_type(part)}")
        part = split_like(jnp.asarray(part).astype(jnp.result_type(value)), value)
        found.append(as_varying(part, varying_axes(value)))
    return found


class Scalar(NamedTuple):
    """A call of a scalar function, as a function of its floating arrays.

    Attributes:
        leaves: the arrays to differentiate with respect to, of the tuple of all positional arguments.
        call: `values -> (value, aux)`; aux is None where the function returns a scalar alone.
    """

    leaves: Leaves
    call: Callable[[Sequence[PyTree]], tuple[PyTree, PyTree]]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the arrays."""
        return self.leaves.names

    def value(self, values: Sequence[PyTree]) -> PyTree:
        """Return the function's value alone."""
        return self.call(values)[0]


def scalar(
    f: Callable,
    args: Sequence[PyTree],
    kwargs: Mapping[str, Any],
    argnums: Sequence[int],
    what: str,
    singles: bool = True,
) -> Scalar:
    """Return a call of `f(*args) -> scalar` or `(scalar, aux)` as a function of its floating arrays.

    Args:
        f: the function.
        args: its positional arguments.
        kwargs: its keyword arguments, which are not differentiated.
        argnums: which positional arguments to differentiate.
        what: names the caller in errors.
        singles: whether single floats of Python and numpy outside the first argument are differentiated; they
            cannot be where the function needs their values.
    """
    if args and any(not -len(args) <= n < len(args) for n in argnums):
        raise ValueError(
            f"{what}: argnums must be in [{-len(args)}, {len(args)}) for {len(args)} positional arguments, "
            f"got {tuple(argnums)}"
        )
    chosen = [n % len(args) for n in argnums] if args else []
    structure: Any
    with_paths, structure = jax.tree_util.tree_flatten_with_path(tuple(args))
    leaves = [leaf for _, leaf in with_paths]
    floating = tuple(
        i
        for i, ((path, leaf), traced) in enumerate(zip(with_paths, traced_leaves(tuple(args)), strict=True))
        if path[0].idx in chosen
        and traced
        and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        and (singles or path[0].idx == 0 or not isinstance(leaf, (float, np.floating)))
    )
    if not floating:
        raise TypeError(
            f"{what}: there is no floating array in the arguments to differentiate with respect to, "
            f"got {[jax.tree.map(_describe, args[n]) for n in chosen]!s:.200}"
        )
    labels = _argument_names(f, len(args))
    names = tuple(_name(labels, with_paths[i][0]) for i in floating)
    of = Leaves([leaves[i] for i in floating], names, floating, leaves, structure, what)
    run = pure(with_hint(f))

    def call(values: Sequence[PyTree]) -> tuple[PyTree, PyTree]:
        return scalar_and_aux(run(*of.fill(values), **kwargs), what)

    return Scalar(of, call)


def _name(labels: Sequence[str], path: Any) -> str:
    """Return the name of an argument's leaf: its path, behind the argument's name but for the first argument."""
    inside, label = leaf_name(path[1:], ""), labels[path[0].idx]
    return inside if inside and path[0].idx == 0 else "/".join(filter(None, [label, inside]))


def _argument_names(f: Callable, n: int) -> list[str]:
    parameters = parameters_of(f)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [names[i] if i < len(names) else f"arg{i}" for i in range(n)]


def _describe(leaf: PyTree) -> str:
    known = is_array(leaf) or hasattr(leaf, "shape")
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" if known else type(leaf).__name__


def jit_arrays(f: Callable) -> Callable:
    """Return `jax.jit(f)` for arguments and results whose trees may hold things that are not arrays.

    Numbers that the function needs while it is traced are left as they are, as in `gradfn.jaxpr.trace`.
    """

    def filled(structure: Any, others: Sequence[PyTree], arrays: Sequence[PyTree]) -> PyTree:
        rest = iter(arrays)
        args, kwargs = jax.tree.unflatten(structure, [next(rest) if x is None else x for x in others])
        return hide_objects(f(*args, **kwargs))

    run = jax.jit(filled, static_argnums=(0, 1))

    @functools.wraps(f)
    def compiled(*args: PyTree, **kwargs: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten((args, kwargs))

        def split(traced: Sequence[bool]) -> tuple[tuple[PyTree, ...], list[PyTree]]:
            pairs = list(zip(leaves, traced, strict=True))
            return tuple(None if t else leaf for leaf, t in pairs), [leaf for leaf, t in pairs if t]

        traced = traced_leaves((args, kwargs))
        fewer = without_fixed(traced, args, kwargs)
        try:
            return show_objects(run(structure, *split(traced)))
        except (TypeError, ValueError, IndexError):
            if fewer == traced:
                raise
        # What is fixed is not hashable, so this is compiled anew for each call.
        others, arrays = split(fewer)
        return show_objects(jax.jit(functools.partial(filled, structure, others))(arrays))

    return compiled
