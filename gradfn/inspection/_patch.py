"""`gf.patch`: the same function with named intermediate values replaced."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradfn.inspection.observe import trace_sites
from gradfn.jaxpr import Equation, Site, interpret, select
from gradfn.jaxpr.interpreter import Evaluate
from gradfn.jaxpr.varying import as_varying, varying_axes


def patch(f: Callable, edits: Mapping[str, Any]) -> Callable:
    """Return the same function with named intermediate values replaced.

    For ablation (`{"a1": 0.0}`), activation patching (`{"a1": the activation from another input}`) and
    editing (`{"a1": lambda a: a.at[3].set(0)}`). The result is differentiable and works in `jit`, `vmap` and
    `scan`; gradients flow into a value given as an array, and through a function.

    Args:
        f: any JAX function; its first argument counts as the parameters.
        edits: for each site (a name or glob of `gf.sites(f)(*args)`), a function of the value, or its replacement:
            an array that broadcasts to the value's shape. In a scan, an array with a leading axis over the
            iterations replaces each iteration's value by its own; without that axis, all by the same.

    Returns:
        A function with the signature of `f`.

    Raises:
        ValueError: a site that the function does not have (similar names are listed), a site that no output of
            the function depends on, or a replacement of a shape that does not broadcast to the value's.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gradfn.inspection import patch
        >>> def f(params, x):
        ...     return jnp.sum(jnp.tanh(x @ params["W"]) @ params["V"])
        >>> params = {"W": jnp.ones((3, 2)), "V": jnp.ones((2, 1))}
        >>> float(patch(f, {"W:tanh": lambda a: 0.5 * jnp.ones_like(a)})(params, jnp.ones((5, 3))))
        5.0
    """

    @functools.wraps(f)
    def patched(*args: PyTree, **kwargs: PyTree) -> PyTree:
        program, offered, _ = trace_sites(f, args, kwargs, list(edits), "patch")
        at: dict[tuple[int, ...], list[tuple[Site, PyTree]]] = {}
        for name, edit in edits.items():
            for site in select(offered, name, "patch"):
                if site.reaches == "nothing":
                    raise ValueError(
                        f"patch: no output of the function depends on site {site.name!r} "
                        f"({site.line}), so a patch there would have no effect. Use what gf.tap returns: "
                        f"x = gf.tap(x, ...)."
                    )
                at.setdefault(site.path, []).append((site, edit))
        tokens = {
            path: [None if callable(edit) else _stacked(site, edit) for site, edit in pairs]
            for path, pairs in at.items()
        }

        def visit(
            equation: Equation, evaluate: Evaluate, inputs: Sequence[PyTree], token: list[PyTree]
        ) -> tuple[list[PyTree], None]:
            outs = evaluate(inputs)
            for (site, edit), value in zip(at[equation.path], token, strict=True):
                old = outs[site.index]
                outs[site.index] = _fitted(site, edit(old) if callable(edit) else value, old)
            return outs, None

        equations = program.equations(at)
        outs, _ = interpret(program.jaxpr, visit, equations, program.inputs, tokens)
        return program.rebuild(outs)

    return patched


def _stacked(site: Site, value: PyTree) -> jax.Array:
    """Return a replacement with one value per iteration of the loops around its site, as tokens have them."""
    value = jnp.asarray(value)
    if value.shape != site.axes + site.shape:
        _check(site, value.shape)
        value = jnp.broadcast_to(value, site.axes + value.shape)
    return value


def _fitted(site: Site, value: PyTree, old: jax.Array) -> jax.Array:
    value = jnp.asarray(value)
    _check(site, value.shape)
    return as_varying(jnp.broadcast_to(value.astype(old.dtype), old.shape), varying_axes(old))


def _check(site: Site, shape: tuple[int, ...]) -> None:
    try:
        fits = jnp.broadcast_shapes(shape, site.shape) == site.shape
    except ValueError:
        fits = False
    if not fits:
        stacked = (
            f", or one with a leading axis over the iterations, {list(site.axes + site.shape)}"
            if site.axes
            else ""
        )
        raise ValueError(
            f"patch: site {site.name!r} has shape {site.dtype}{list(site.shape)}, got {list(shape)}. "
            f"Pass that shape, or one that broadcasts to it{stacked}."
        )
