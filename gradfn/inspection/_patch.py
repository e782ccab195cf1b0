"""`gf.patch`: the same function with named intermediate values, or their gradients, edited."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradfn.core.models import function_of
from gradfn.inspection.observe import trace_sites
from gradfn.jaxpr import Equation, Site, interpret, select
from gradfn.jaxpr.interpreter import Evaluate, Path, operation, within_scope_of
from gradfn.jaxpr.sites import unknown_site
from gradfn.jaxpr.varying import as_varying, varying_axes

_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Using:
    """An edit that also uses the value of a site of the same run, for `gf.patch`.

    In a scan, that is the value of the same iteration. It includes what the edits of its own site made of it.

    Attributes:
        site: the name of the site that is read. It must be computed before the edited one, in the same loop body or
            outside of the loop.
        edit: `(value, value of the site) -> value`; as an edit of a gradient,
            `(cotangent, value of the site) -> cotangent`.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> def f(params, x):
        ...     return jnp.sum(gf.tap(jnp.tanh(x @ params), "a"))
        >>> rectified = gf.circuits.Using("a", lambda cotangent, a: jnp.where(a > 0, cotangent, 0))
        >>> guided = gf.patch(f, backward={"a": rectified})
        >>> jax.grad(guided)(jnp.array([[1.0, -1.0]]), jnp.ones(1)).round(2)
        Array([[0.42, 0.  ]], dtype=float32)
    """

    site: str
    edit: Callable[[jax.Array, jax.Array], jax.Array]


class _Edit(NamedTuple):
    """What becomes of the value at a site, or of its cotangent: a function, or None for a token that replaces it."""

    site: Site
    function: Callable | None
    reads: Site | None
    backward: bool

    def __call__(self, value: jax.Array, token: jax.Array | None, read: Sequence[jax.Array]) -> jax.Array:
        """Return the edited value or cotangent."""
        new = token if self.function is None else self.function(value, *read)
        return _fitted(self.site, new, value, self.backward)


def patch(f: Callable, edits: Mapping[str, Any] = _NONE, *, backward: Mapping[str, Any] = _NONE) -> Callable:
    """Return the same function with named intermediate values, or the gradients that flow through them, edited.

    For ablation (`{"a1": 0.0}`), activation patching (`{"a1": the activation from another input}`) and
    editing (`{"a1": lambda a: a.at[3].set(0)}`); `gf.circuits` has the usual edits by name. The result is
    differentiable and works in `jit`, `vmap` and `scan`; gradients flow into a value given as an array, and through a
    function.

    `backward` edits the cotangent of a value where the backward pass reaches it, and leaves the value alone:
    `{"a1": 0.0}` stops the gradient, `{"a1": lambda g: -g}` reverses it, `{"a1": lambda g: g.clip(-1, 1)}` clips it.
    Everything computed before the site receives the edited gradient, and so does `gf.inspect` of the patched
    function at the site itself. The function then has reverse-mode derivatives only: jax raises for `jax.jvp`,
    since an edited cotangent belongs to no tangent.

    Args:
        f: any JAX function; its first argument counts as the parameters.
        edits: for each site (a name or glob of `gf.sites(f)(*args)`), a function of the value, or its replacement:
            an array that broadcasts to the value's shape. In a scan, an array with a leading axis over the
            iterations replaces each iteration's value by its own; without that axis, all by the same. Several edits
            of one site apply in this order. `gf.circuits.Using` also reads another site.
        backward: the same for the cotangent of each site, after the edits of its value.

    Returns:
        A function with the signature of `f`.

    Raises:
        ValueError: a site that the function does not have (similar names are listed), a site that no output of
            the function depends on, a replacement of a shape that does not broadcast to the value's, or `backward`
            at a site that has no gradient: integers, and values inside a while loop.
        TypeError: edits that are not in a dict, or a replacement of a dtype that the value's cannot represent.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gradfn.inspection import patch
        >>> def f(params, x):
        ...     return jnp.sum(jnp.tanh(x @ params["W"]) @ params["V"])
        >>> params = {"W": jnp.ones((3, 2)), "V": jnp.ones((2, 1))}
        >>> float(patch(f, {"W:tanh": lambda a: 0.5 * jnp.ones_like(a)})(params, jnp.ones((5, 3))))
        5.0
        >>> grads = jax.grad(patch(f, backward={"W:tanh": 0.0}))(params, jnp.ones((5, 3)))
        >>> float(jnp.max(grads["W"])), round(float(jnp.max(grads["V"])), 2)
        (0.0, 4.98)
    """

    for given in (edits, backward):
        if not isinstance(given, Mapping):
            raise TypeError(
                f"patch: expected a dict of edits by the name of a site, got {type(given).__name__}. "
                'Pass {"a1": 0.0}, for instance.'
            )

    function, first = function_of(f)

    @functools.wraps(f if first else function, updated=())
    def patched(*args: PyTree, **kwargs: PyTree) -> PyTree:
        args = (*first, *args)
        wanted = [*edits, *backward, *(e.site for e in _values(edits, backward) if isinstance(e, Using))]
        program, offered, _ = trace_sites(function, args, kwargs, wanted, "patch")
        pairs = [
            *_resolved(edits, offered, backward=False),
            # The cotangent passes the last of them first.
            *reversed(_resolved(backward, offered, backward=True)),
        ]
        at: dict[Path, list[_Edit]] = {}
        for edit, _ in pairs:
            at.setdefault(edit.site.path, []).append(edit)
        tokens: dict[Path, list[PyTree]] = {}
        for edit, value in pairs:
            tokens.setdefault(edit.site.path, []).append(
                None if edit.function else _stacked(edit.site, value)
            )
        read = {(edit.reads.path, edit.reads.index) for edit, _ in pairs if edit.reads}
        equations = program.equations({*at, *(path for path, _ in read)})
        for edit, _ in pairs:
            _check_order(edit, equations)
        # The values at the sites that edits read, as far as they are computed.
        known_values: dict[tuple[Path, int], jax.Array] = {}

        def visit(
            equation: Equation, evaluate: Evaluate, inputs: Sequence[PyTree], token: list[PyTree] | None
        ) -> tuple[list[PyTree], None]:
            # What names a value is an identity: edited before it, the edited value has the name.
            named = operation(equation.eqn) == "name"
            outs = list(inputs) if named else evaluate(inputs)
            of = list(zip(at.get(equation.path, []), token or [], strict=True))

            def record() -> None:
                known_values.update({(path, k): outs[k] for path, k in read if path == equation.path})

            def apply(backward: bool) -> None:
                record()
                for edit, value in of:
                    if edit.backward == backward:
                        others = (known_values[edit.reads.path, edit.reads.index],) if edit.reads else ()
                        change = _with_edited_gradient if backward else _Edit.__call__
                        outs[edit.site.index] = change(edit, outs[edit.site.index], value, others)
                        record()

            # Edits of what a scope returns are part of the scope.
            with within_scope_of(equation.eqn):
                apply(backward=False)
            outs = evaluate(outs) if named else outs
            with within_scope_of(equation.eqn):
                apply(backward=True)
            return outs, None

        outs, _ = interpret(program.jaxpr, visit, equations, program.inputs, tokens)
        return program.rebuild(outs)

    return patched


def _values(*edits: Mapping[str, Any]) -> Iterator[Any]:
    for each in edits:
        yield from each.values()


def _resolved(
    edits: Mapping[str, Any], offered: Sequence[Site], backward: bool
) -> list[tuple[_Edit, PyTree]]:
    """Return the edit of each selected site, with its replacement if it is not a function."""
    out: list[tuple[_Edit, PyTree]] = []
    by_name = {site.name: site for site in offered}
    for name, given in edits.items():
        reads = given.site if isinstance(given, Using) else None
        if reads is not None and reads not in by_name:
            raise ValueError(unknown_site(reads, list(by_name), "patch"))
        function = given.edit if isinstance(given, Using) else given if callable(given) else None
        for site in select(offered, name, "patch"):
            if site.reaches == "nothing":
                raise ValueError(
                    f"patch: no output of the function depends on site {site.name!r} "
                    f"({site.line}), so a patch there would have no effect. Use what gf.tap returns: "
                    f"x = gf.tap(x, ...)."
                )
            if backward and not site.differentiable:
                why = (
                    "it is inside a while loop, which jax cannot differentiate in reverse; write the loop as "
                    "jax.lax.scan"
                    if jnp.issubdtype(site.dtype, jnp.inexact)
                    else f"it is {site.dtype}"
                )
                raise ValueError(
                    f"patch: site {site.name!r} ({site.line}) has no gradient to edit: {why}. Select other sites in "
                    "backward."
                )
            out.append((_Edit(site, function, by_name.get(reads or ""), backward), given))
    return out


def _check_order(edit: _Edit, equations: Mapping[Path, Equation]) -> None:
    """Check that the site that an edit reads is computed before, where its value is still known.

    Raises:
        ValueError: it is not.
    """
    if edit.reads is None:
        return
    at, source = edit.site.path, equations[edit.reads.path]
    # A call is inlined, so what it contains is known after it; a loop or a branch keeps its values to itself.
    known = all(
        frame.kind == "jit" or at[: len(frame.path) + 1] == source.path[: len(frame.path) + 1]
        for frame in source.frames
    )
    if source.path > at or not known:
        why = (
            "is computed after it"
            if source.path > at
            else "is inside another loop, branch or checkpointed function"
        )
        raise ValueError(
            f"patch: the edit of site {edit.site.name!r} reads site {edit.reads.name!r}, which {why} "
            f"({edit.reads.line}). Read a site that is computed before {edit.site.name!r}, in the same loop body or "
            "outside of loops."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _identity(edit: Callable, x: jax.Array, residuals: PyTree) -> jax.Array:
    """Return `x`, whose cotangent becomes `edit(cotangent, *residuals)`."""
    return x


_identity.defvjp(
    lambda edit, x, residuals: (x, residuals),
    lambda edit, residuals, cotangent: (edit(cotangent, *residuals), None),
)


def _with_edited_gradient(
    edit: _Edit, x: jax.Array, token: jax.Array | None, read: Sequence[jax.Array]
) -> jax.Array:
    """Return a value whose cotangent is edited."""
    residuals = [*read, *(() if token is None else (token,))]

    def edited(cotangent: jax.Array, *residuals: jax.Array) -> jax.Array:
        return edit(cotangent, residuals[-1] if token is not None else None, residuals[: len(read)])

    # What the user's function closes over, such as an argument of a loss, may be differentiated as well.
    converted, closed_over = jax.closure_convert(edited, x, *residuals)
    return _identity(converted, x, [*residuals, *closed_over])


def _stacked(site: Site, value: PyTree) -> jax.Array:
    """Return a replacement with one value per iteration of the loops around its site, as tokens have them."""
    value = jnp.asarray(value)
    if value.shape != site.axes + site.shape:
        _check(site, value)
        value = jnp.broadcast_to(value, site.axes + value.shape)
    return value


def _fitted(site: Site, value: PyTree, old: jax.Array, backward: bool) -> jax.Array:
    value = jnp.asarray(value)
    _check(site, value, "gradient" if backward else "value")
    return as_varying(jnp.broadcast_to(value.astype(old.dtype), old.shape), varying_axes(old))


def _check(site: Site, value: jax.Array, what: str = "value") -> None:
    try:
        fits = jnp.broadcast_shapes(value.shape, site.shape) == site.shape
    except ValueError:
        fits = False
    if not fits:
        stacked = (
            f", or one with a leading axis over the iterations, {list(site.axes + site.shape)}"
            if site.axes
            else ""
        )
        raise ValueError(
            f"patch: site {site.name!r} has shape {site.dtype}{list(site.shape)}, got {list(value.shape)}. "
            f"Pass that shape, or one that broadcasts to it{stacked}."
        )
    kinds = [jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating]
    new, old = (
        next((k for k, kind in enumerate(kinds) if jnp.issubdtype(dtype, kind)), len(kinds))
        for dtype in (value.dtype, jnp.dtype(site.dtype))
    )
    if new > old:
        raise TypeError(
            f"patch: the {what} at site {site.name!r} is {site.dtype}, which cannot represent {value.dtype}. "
            f"Convert it: .astype({str(site.dtype)!r})."
        )
