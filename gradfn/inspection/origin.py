"""`gf.nan_origin`: where the first NaN and the first infinity came from.

The value and the gradients of a function are traced into one program, which runs with the visitor of `search`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from gradfn.core.signature import transform_of
from gradfn.inspection.causes import explain
from gradfn.inspection.event import Event, NanReport
from gradfn.inspection.operands import Details, details_of
from gradfn.inspection.search import Found, Spot, nonfinite, search
from gradfn.jaxpr import Program, trace_without_probabilities
from gradfn.jaxpr.call import jit_arrays, scalar
from gradfn.jaxpr.program import by_position


def nan_origin(f: Callable, argnums: int | Sequence[int] = 0) -> Callable[..., NanReport]:
    """Return a function that finds where the first NaN and the first infinity of `f` and its gradients come from.

    For one call, outside `jit` (inside, use `gf.nan_guard`). Every operation of the forward and the backward pass is
    inspected, including those inside `jit`, `scan`, `cond`, `while`, `vmap`, `jax.checkpoint` and custom derivatives.
    (The backward rule of a `custom_vjp` has the line of the call: jax records no other.) The program runs equation by
    equation, so jax compiles each operation once per shape, which takes seconds for a network of any depth; if
    something is found, it runs once more to record the operands. Where the arguments lie on several devices, it is
    compiled as a whole instead, which takes three to five times as long as compiling the gradient.

    Args:
        f: any JAX function `(*args) -> scalar` or `-> (scalar, aux)`.
        argnums: which positional arguments to differentiate with respect to, as in `jax.grad`; leaves that are not
            floating are skipped.

    Returns:
        A function of the same arguments that returns a `NanReport`.

    Raises:
        TypeError: a function that does not return a floating scalar; a call inside `jit`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gradfn.inspection import nan_origin
        >>> def f(x):
        ...     return jnp.sqrt(jnp.sum(x**2))
        >>> found = nan_origin(f)(jnp.zeros(3))
        >>> found.value, found.nonfinite_grads, found.nan.phase, found.nan.cause
        (0.0, ('x',), 'backward', '0 × inf')
        >>> nan_origin(f)(jnp.ones(3)).nan is None
        True
    """

    compiled = jit_arrays(functools.partial(_searched, f, argnums))

    @transform_of(f, "nan_origin", own=0)
    def find(*args: PyTree, **kwargs: PyTree) -> NanReport:
        """Return where the first NaN and the first infinity come from."""
        args, kwargs = by_position(f, args, kwargs) if not args else (args, kwargs)
        leaves = jax.tree.leaves((args, kwargs))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            raise TypeError(
                "nan_origin: inside jit, use gf.nan_guard, or return the arguments and call it outside"
            )
        # Equation by equation, devices would wait for each other after every one.
        several = any(isinstance(leaf, jax.Array) and len(leaf.devices()) > 1 for leaf in leaves)
        return origin_of(f, argnums, args, kwargs, compiled if several else None)[0]

    return find


def origin_of(
    f: Callable,
    argnums: int | Sequence[int],
    args: Sequence[PyTree],
    kwargs: Mapping[str, Any],
    compiled: Callable | None = None,
) -> tuple[NanReport, Found]:
    """Search a call for the first NaN and the first infinity, equation by equation or with a compiled `_searched`."""
    run = compiled or functools.partial(_searched, f, argnums)
    # They would stop at what is searched for.
    with jax.debug_nans(False), jax.debug_infs(False):
        value, nonfinite_grads, found = jax.device_get(run(*args, **kwargs))
        firsts = {kind: found.first(kind) for kind in ("nan", "inf")}
        details: dict[str, Details] = {}
        if any(spot is not None for spot, _ in firsts.values()):
            program = traced(f, argnums, args, kwargs, "nan_origin")
            details = {
                kind: details_of(program, kind, spot, iteration, compiled is not None)
                for kind, (spot, iteration) in firsts.items()
                if spot is not None
            }
    names = scalar(f, args, kwargs, _numbers(argnums), "nan_origin").names
    return report_of(value, nonfinite_grads, names, found, details), found


def _searched(
    f: Callable, argnums: int | Sequence[int], /, *args: PyTree, **kwargs: PyTree
) -> tuple[PyTree, jax.Array, Found]:
    """Return the value of a call, which gradients are not finite, and what was found."""
    program = traced(f, argnums, args, kwargs, "nan_origin")
    found, outs = search(program, program.inputs)
    value, _, grads = program.rebuild(outs)
    return value, nonfinite(grads), found


def traced(
    f: Callable,
    argnums: int | Sequence[int],
    args: Sequence[PyTree],
    kwargs: Mapping[str, Any],
    what: str,
) -> Program:
    """Trace `(value, aux, gradients by leaf)` of a call, as written; `what` names the caller in errors."""

    def value_and_grads(*args: PyTree, **kwargs: PyTree) -> tuple[PyTree, PyTree, list[PyTree]]:
        of = scalar(f, args, kwargs, _numbers(argnums), what)
        (value, aux), grads = jax.value_and_grad(of.call, has_aux=True)(of.leaves.values)
        return value, aux, grads

    return trace_without_probabilities(value_and_grads, *args, **kwargs)


def _numbers(argnums: int | Sequence[int]) -> tuple[int, ...]:
    return (argnums,) if isinstance(argnums, int) else tuple(argnums)


def report_of(
    value: PyTree,
    nonfinite_grads: PyTree,
    names: Sequence[str],
    found: Found,
    details: Mapping[str, Details],
) -> NanReport:
    """Return the report of a search.

    Args:
        value: of the function.
        nonfinite_grads: per leaf, whether its gradient is not finite.
        names: of the leaves.
        found: by the search, on the host.
        details: of the first NaN and the first infinity, as far as they are known.
    """
    nan, inf = (_event(kind, *found.first(kind), details.get(kind, Details())) for kind in ("nan", "inf"))
    inputs = np.asarray(found.nonfinite_inputs)
    if inputs[:, 0].any():
        nan = Event("nan", "argument", scope=found.input_names[int(inputs[:, 0].argmax())])
    if not found.inf_was_computed:
        if inf is not None:
            inf = inf._replace(cause="a constant in the program, as in a mask")
        if inputs[:, 1].any():
            inf = Event("inf", "argument", scope=found.input_names[int(inputs[:, 1].argmax())])
    bad = tuple(name for name, is_bad in zip(names, nonfinite_grads, strict=True) if is_bad)
    return NanReport(float(value), bad, nan, inf)


def _event(kind: str, spot: Spot | None, iteration: tuple[int, ...], details: Details) -> Event | None:
    if spot is None:
        return None
    return Event(
        kind=kind,
        operation=spot.operation,
        within=spot.within,
        phase=spot.phase,
        scope=spot.scope,
        line=spot.line,
        iteration=iteration,
        loops=spot.loops,
        element=details.element,
        operands=details.operands,
        cause=explain(spot.operation, kind, details.operands, spot.dtype, spot.slope_of),
    )
