"""A scalar function seen from its floating leaves: what `backprop`, `nan_origin` and `check_grads` share."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradfn.jaxpr.program import (
    hide_objects,
    is_array,
    leaf_name,
    pure,
    show_objects,
    traced_leaves,
    without_fixed,
)


class Scalar(NamedTuple):
    """A call of a scalar function as a function of some of its floating leaves.

    Attributes:
        leaves: the floating arrays to differentiate with respect to, in order.
        names: a name for each, such as `W1`, `layers/0/W`, `batch/0`.
        numbers: which of all leaves of the positional arguments they are.
        call: `leaves -> (value, aux)`; aux is None where the function returns a scalar alone.
        tree: `one thing per leaf -> those things in the trees of the chosen arguments`, None elsewhere.
    """

    leaves: list[Any]
    names: tuple[str, ...]
    numbers: tuple[int, ...]
    call: Callable[[Sequence[Any]], tuple[Any, Any]]
    tree: Callable[[Sequence[Any]], tuple[Any, ...]]


def scalar(
    f: Callable,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    argnums: Sequence[int],
    what: str,
    singles: bool = True,
) -> Scalar:
    """Take a call of `f(*args) -> scalar` or `(scalar, aux)` apart; `what` names the caller in errors.

    Without `singles`, single floats of Python and numpy outside of the first argument are not among the leaves: the
    function needs their values.
    """
    if args and any(not -len(args) <= n < len(args) for n in argnums):
        raise ValueError(f"{what}: argnums {tuple(argnums)} of a call with {len(args)} positional arguments")
    chosen = [n % len(args) for n in argnums] if args else []
    labels = _argument_names(f, len(args))
    with_paths, structure = jax.tree_util.tree_flatten_with_path(tuple(args))
    leaves = [leaf for _, leaf in with_paths]
    places = zip(with_paths, traced_leaves(tuple(args)), strict=True)
    floating = [
        i
        for i, ((path, leaf), traced) in enumerate(places)
        if path[0].idx in chosen
        and traced
        and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        and (singles or path[0].idx == 0 or not isinstance(leaf, (float, np.floating)))
    ]
    if not floating:
        raise TypeError(
            f"{what}: there is no floating array in the arguments to differentiate with respect to; "
            f"got {[jax.tree.map(_describe, args[n]) for n in chosen]!s:.200}"
        )

    def call(values: Sequence[Any]) -> tuple[Any, Any]:
        filled = list(leaves)
        for i, value in zip(floating, values, strict=True):
            filled[i] = value
        out = pure(f)(*jax.tree.unflatten(structure, filled), **kwargs)
        value, aux = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
        if (
            not is_array(value)
            or jnp.shape(value)
            or not jnp.issubdtype(jnp.result_type(value), jnp.floating)
        ):
            raise TypeError(
                f"{what}: the function must return a floating scalar, or (scalar, aux); "
                f"got {jax.tree.map(_describe, value)!s:.200}. "
                "For a loss of one example, gf.batch_mean(loss) makes the mean over a batch."
            )
        return value, aux

    def tree(values: Sequence[Any]) -> tuple[Any, ...]:
        known = dict(zip(floating, values, strict=True))
        full = jax.tree.unflatten(structure, [known.get(i) for i in range(len(leaves))])
        return tuple(full[n] for n in chosen)

    def name(path: Any) -> str:
        inside = leaf_name(path[1:], "")
        label = labels[path[0].idx]
        return inside if inside and path[0].idx == 0 else "/".join(filter(None, [label, inside]))

    names = tuple(name(with_paths[i][0]) for i in floating)
    return Scalar([leaves[i] for i in floating], names, tuple(floating), call, tree)


def jit_arrays(f: Callable) -> Callable:
    """Return `jax.jit(f)` for arguments and results whose trees may hold things that are no arrays.

    Numbers that the function needs while it is traced are left as they are, as in `gradfn.jaxpr.trace`.
    """

    def filled(structure: Any, others: Sequence[Any], arrays: Sequence[Any]) -> Any:
        rest = iter(arrays)
        args, kwargs = jax.tree.unflatten(structure, [next(rest) if x is None else x for x in others])
        return hide_objects(f(*args, **kwargs))

    run = jax.jit(filled, static_argnums=(0, 1))

    @functools.wraps(f)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))

        def split(traced: Sequence[bool]) -> tuple[tuple[Any, ...], list[Any]]:
            pairs = list(zip(leaves, traced, strict=True))
            return tuple(None if t else leaf for leaf, t in pairs), [leaf for leaf, t in pairs if t]

        traced = traced_leaves((args, kwargs))
        fewer = without_fixed(traced, args, kwargs)
        try:
            return show_objects(run(structure, *split(traced)))
        except (TypeError, ValueError, IndexError):
            if fewer == traced:
                raise
        others, arrays = split(fewer)  # what is fixed is not hashable, so this is compiled anew for each call
        return show_objects(jax.jit(functools.partial(filled, structure, others))(arrays))

    return compiled


def _argument_names(f: Callable, n: int) -> list[str]:
    try:
        parameters = list(inspect.signature(f).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [names[i] if i < len(names) else f"arg{i}" for i in range(n)]


def _describe(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" if is_array(leaf) else type(leaf).__name__
