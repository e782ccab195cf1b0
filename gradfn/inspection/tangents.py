"""Forward mode at sites: the derivative of each value inside a function along one direction, in one pass.

The program is interpreted under `jax.jvp`: every value carries its derivative (dual numbers). A site's derivative, and
its statistics, leave the program as the tangent of zeros that `tangent_probe` returns there. In a scan that happens in
each iteration, and nothing large is kept for the statistics.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradfn.core.devices import split_like
from gradfn.inspection.observe import Traced, Wanted
from gradfn.jaxpr import Equation, Program, Site, interpret, select, trace
from gradfn.jaxpr._probe import entering, tangent_probe
from gradfn.jaxpr.interpreter import Evaluate, Path
from gradfn.jaxpr.varying import as_varying, varying_axes

Along = tuple[PyTree, ...] | list[PyTree] | Mapping[str, PyTree]
"""One tangent per positional argument, or directions by the names of the sites that they enter at."""


class Dual(NamedTuple):
    """What a run with tangents returns.

    Attributes:
        outs: the program's outputs, flat.
        output_tangent: their tangents in the tree that the function returned, None where a leaf is not floating.
        recorded: what was recorded of the values, by equation.
        tangents: what was recorded of their tangents.
        same: the sites that have the same values and tangents as another one, whose name is given.
    """

    outs: list[PyTree]
    output_tangent: PyTree
    recorded: dict[Path, Mapping[str, Any]]
    tangents: dict[Path, Mapping[str, Any]]
    same: Mapping[str, str]


def with_tangents(traced: Traced, want: Wanted, args: Sequence[PyTree], along: Along) -> Dual:
    """Run a program once, and record the values at its sites and their derivatives along a direction.

    Raises:
        ValueError: a direction of another structure or shape, or for a value that is not floating; an unknown site.
        TypeError: a function inside has only a backward rule.
    """
    program = traced.program
    by_site = isinstance(along, Mapping)
    entries = _entries(traced.sites, along) if isinstance(along, Mapping) else {}
    inputs = {} if by_site else _of_inputs(program, args, tuple(along))
    at = want.by_path()
    equations = program.equations({*at, *entries})
    # Where a direction enters, the tangent is another than that of the values it is made of.
    same = {} if by_site else want.same_values

    def visit(
        equation: Equation, evaluate: Evaluate, operands: Sequence[PyTree], token: Mapping[str, jax.Array]
    ) -> tuple[list[PyTree], tuple[dict[str, Any], dict[str, Any]]]:
        outs = evaluate(operands)
        for site, _ in entries.get(equation.path, ()):
            outs[site.index] = entering(outs[site.index], token[site.name])
        own = [site for site in at.get(equation.path, ()) if site.name not in same]
        values = {site.name: want.of(site, outs[site.index], site.kind) for site in own}
        slots = {
            site.name: tangent_probe(functools.partial(want.of, site), outs[site.index])
            for site in own
            if jnp.issubdtype(outs[site.index].dtype, jnp.inexact)
        }
        return outs, (values, slots)

    def run(moved: list[PyTree], tokens: Mapping[Path, PyTree]) -> tuple[PyTree, PyTree]:
        full = list(program.inputs)
        for i, value in zip(inputs, moved, strict=True):
            full[i] = value
        outs, recorded = interpret(program.jaxpr, visit, equations, full, tokens)
        floating = [out for out in outs if _is_floating(out)]
        slots = {path: slots for path, (_, slots) in recorded.items()}
        return (floating, slots), (outs, {path: values for path, (values, _) in recorded.items()})

    directions = {path: {site.name: value for site, value in pairs} for path, pairs in entries.items()}
    primals = [program.inputs[i] for i in inputs], jax.tree.map(jnp.zeros_like, directions)
    tangents = list(inputs.values()), directions
    _refuse_backward_only(program, lambda: jax.jvp(run, primals, tangents, has_aux=True)[:2])
    _, (floating, slots), (outs, recorded) = jax.jvp(run, primals, tangents, has_aux=True)
    rest = iter(floating)
    flat = iter([next(rest) if _is_floating(out) else None for out in outs])
    leaves = [next(flat) if leaf is None else None for leaf in program.objects]
    return Dual(outs, jax.tree.unflatten(program.out_tree, leaves), recorded, slots, same)


def _is_floating(x: PyTree) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _entries(sites: Sequence[Site], along: Mapping[str, PyTree]) -> dict[Path, list[tuple[Site, jax.Array]]]:
    """Return the sites that a direction enters at and the direction, by equation, iterations in front."""
    entries: dict[Path, list[tuple[Site, jax.Array]]] = {}
    for name, direction in along.items():
        for site in select(list(sites), name, "along"):
            if site.reaches == "nothing":
                raise ValueError(
                    f"capture: no output of the function depends on site {site.name!r} ({site.line}), so a "
                    "direction there has no effect. Use what gf.tap returns: x = gf.tap(x, ...)."
                )
            if not jnp.issubdtype(site.dtype, jnp.inexact):
                raise ValueError(f"capture: site {site.name!r} has dtype {site.dtype}, which has no tangent")
            entries.setdefault(site.path, []).append((site, _stacked(site, direction)))
    return entries


def _stacked(site: Site, direction: PyTree) -> jax.Array:
    value, full = jnp.asarray(direction), site.axes + site.shape
    if value.shape not in (site.shape, full):
        iterations = f", or {list(full)} with the iterations in front" if site.axes else ""
        raise ValueError(
            f"capture: along[{site.name!r}] must have the site's shape {list(site.shape)}{iterations}, "
            f"got {list(value.shape)}"
        )
    _check_real(f"along[{site.name!r}]", value, site.dtype)
    return jnp.broadcast_to(value, full).astype(site.dtype)


def _of_inputs(program: Program, args: Sequence[PyTree], along: tuple[PyTree, ...]) -> dict[int, jax.Array]:
    """Return the tangents of a program's inputs by index, without those that stay as they are."""
    if len(along) != len(args):
        raise ValueError(
            f"capture: along must have one tangent per positional argument (None for one that stays as it is): "
            f"expected {len(args)}, got {len(along)}"
        )
    parts: list[PyTree] = []
    for i, (arg, direction) in enumerate(zip(args, along, strict=True)):
        structure: Any = jax.tree.structure(arg)
        if direction is None:
            parts += [None] * structure.num_leaves
            continue
        try:
            parts += structure.flatten_up_to(direction)
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"capture: along[{i}] must have the structure of argument {i}, {structure}; "
                f"got {jax.tree.structure(direction)}"
            ) from None
    # Keyword arguments follow the positional ones.
    known = [part for part, traced in zip(parts, program.is_array, strict=False) if traced]
    found = {}
    for i, part in enumerate(known):
        if part is None or getattr(part, "dtype", None) == jax.dtypes.float0:
            continue
        value, where = program.inputs[i], f"along[{program.owners[i]}] at {program.names[i]}"
        if not _is_floating(value):
            raise ValueError(
                f"capture: {where}: the argument has dtype {jnp.result_type(value)}, which has no tangent. "
                "Put None there."
            )
        if jnp.shape(part) != jnp.shape(value):
            raise ValueError(
                f"capture: {where} must have the argument's shape {list(jnp.shape(value))}, "
                f"got {list(jnp.shape(part))}"
            )
        _check_real(where, part, jnp.result_type(value))
        part = split_like(jnp.asarray(part).astype(jnp.result_type(value)), value)
        found[i] = as_varying(part, varying_axes(value))
    if not found:
        raise ValueError("capture: along has no tangent; at least one must not be None")
    return found


def _check_real(where: str, direction: PyTree, dtype: Any) -> None:
    if jnp.iscomplexobj(direction) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"capture: {where} must be real like the value, got {jnp.result_type(direction)}")


def _refuse_backward_only(program: Program, run: Callable) -> None:
    """Raise an error where forward mode meets a function with a backward rule only: jax traces it all the same."""
    calls = [e for e in program.equations().values() if e.eqn.primitive.name == "custom_vjp_call"]
    if calls and any(e.eqn.primitive.name == "custom_lin" for e in trace(run).equations().values()):
        lines = ", ".join(dict.fromkeys(equation.line for equation in calls))
        raise TypeError(
            f"capture: a function with jax.custom_vjp has no tangents: {lines}. Define it with jax.custom_jvp"
        )
