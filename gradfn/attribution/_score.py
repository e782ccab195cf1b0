"""What the attribution methods share: the scalar to explain, and the value to explain it by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PyTree

from gradfn.inspection.observe import trace_sites
from gradfn.jaxpr import Equation, Site, interpret, select
from gradfn.jaxpr.interpreter import Evaluate

One: TypeAlias = int | jax.Array | slice | EllipsisType
Index: TypeAlias = One | tuple[One, ...]
# None: the output of the function, a scalar. Else an index into its output, or a site and an index into its value:
# ("a1", 3). Integers may be traced, so that vmap can run over classes.
Target: TypeAlias = Index | tuple[str, Index] | None
PART = 16  # evaluations that run in parallel: more take more memory


class Entry(NamedTuple):
    """The value that a map is of (the input, or a named site), and the score as a function of it.

    Attributes:
        zero: zeros of the shape and dtype of the value; a site in loops has the iterations as leading axes.
        shifted: `delta -> (score, value before delta is added)`; in loops, it propagates to later iterations.
        replaced: `value -> score` with another value; in loops, the value of each iteration is replaced.
    """

    zero: jax.Array
    shifted: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    replaced: Callable[[jax.Array], jax.Array]


def score(f: Callable, target: Target, what: str) -> Callable[..., jax.Array]:
    """Return `(*args) -> scalar`: the mean of what `target` selects from the output.

    `what` names the caller in errors. The aux of an output `(output, aux)` is ignored.
    """
    site, index = _site_and_index(target)

    def scored(*args: PyTree) -> jax.Array:
        if site is None:
            output = f(*args)
            value = jnp.asarray(output[0] if isinstance(output, tuple) and len(output) == 2 else output)
        else:
            value = _site_value(f, site, args, what)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{what}: expected a floating output, got {_kind(value)}")
        selected = value if index is None else value[_checked(index, value.shape, what)]
        if index is None and selected.size != 1:
            raise ValueError(
                f"{what}: expected a scalar output, got {_kind(value)}. Select an element of it: target=index"
            )
        return selected.mean()

    return scored


def entry(
    f: Callable, at: str | None, params: PyTree, x: ArrayLike, rest: Sequence[PyTree], what: str
) -> Entry:
    """Return the `Entry` of a call of a scalar function, at its input `x` or at the site named `at`."""
    if at is None:
        value = floating(x, what)
        return Entry(
            jnp.zeros_like(value),
            lambda delta: (f(params, value + delta, *rest), value),
            lambda other: f(params, other, *rest),
        )
    program, offered, _ = trace_sites(f, (params, x, *rest), {}, at, what)
    site = explained_site(offered, at, what)
    equation = program.equations()[site.path]

    def run(token: jax.Array, change: Callable) -> tuple[jax.Array, jax.Array]:
        def visit(
            _: Equation, evaluate: Evaluate, inputs: Sequence[PyTree], token: PyTree
        ) -> tuple[list[PyTree], PyTree]:
            outs = evaluate(inputs)
            old = outs[site.index]
            outs[site.index] = change(old, token)
            return outs, old

        outs, captures = interpret(
            program.jaxpr, visit, {site.path: equation}, program.inputs, {site.path: token}
        )
        return program.rebuild(outs), captures[site.path]

    return Entry(
        jnp.zeros(site.axes + site.shape, site.dtype),
        lambda delta: run(delta, jnp.add),
        lambda other: run(other, lambda old, new: new)[0],
    )


def floating(x: PyTree, what: str) -> jax.Array:
    """Return an input as an array; raise an error if it has no gradient."""
    if not isinstance(x, (jax.Array, np.ndarray)) or not jnp.issubdtype(x.dtype, jnp.floating):
        actual = jax.tree.map(lambda leaf: _kind(jnp.asarray(leaf)), x)
        raise TypeError(
            f"{what}: expected a floating array as input x, got {actual}. Pass further arguments, such as a label, "
            "after it: (params, x, label). For tokens, name a site: at='...'"
        )
    return jnp.asarray(x)


def as_image(x: jax.Array, shape: Sequence[int] | None, what: str) -> tuple[int, ...]:
    """Return the shape `[height, width, ...]` of an input that may be flat; raise an error if it does not fit."""
    full = tuple(x.shape if shape is None else shape)
    if len(full) < 2 or np.prod(full) != x.size:
        expected = "an image (for a flat one pass shape=(28, 28))" if shape is None else f"shape {list(full)}"
        raise ValueError(f"{what}: expected {expected}, got {_kind(x)}")
    return full


def _site_and_index(target: Target) -> tuple[str | None, Index | None]:
    if isinstance(target, tuple) and len(target) == 2 and isinstance(target[0], str):
        return target[0], target[1]
    return None, target


def _checked(index: Index, shape: tuple[int, ...], what: str) -> Index:
    """Return the index; raise an error if it is known to be out of range, which jax would not."""
    if not any(isinstance(part, jax.core.Tracer) for part in jax.tree.leaves(index)):
        known = jax.tree.map(lambda part: np.asarray(part) if isinstance(part, jax.Array) else part, index)
        try:
            np.broadcast_to(0, shape)[known]
        except IndexError as error:
            raise ValueError(f"{what}: target {index} of an output of shape {list(shape)}: {error}") from None
    return index


def explained_site(offered: Sequence[Site], name: str, what: str) -> Site:
    """Return the site of a name that a score is to be explained by; raise an error if it cannot be."""
    site = _one_site(offered, name, what)
    if not site.differentiable:
        raise ValueError(f"{what}: site {name!r} ({site.dtype}{list(site.shape)}) has no gradient")
    if site.reaches != "result":
        raise ValueError(f"{what}: the score is not computed from site {name!r} ({site.line})")
    return site


def _one_site(offered: Sequence[Site], name: str, what: str) -> Site:
    chosen = select(offered, name, what)
    if len(chosen) > 1:
        names = ", ".join(site.name for site in chosen)
        raise ValueError(f"{what}: expected one site, got {name!r}, which matches {len(chosen)}: {names}")
    (site,) = chosen
    return site


def _site_value(f: Callable, name: str, args: Sequence[PyTree], what: str) -> jax.Array:
    program, offered, _ = trace_sites(f, args, {}, name, what)
    site = _one_site(offered, name, what)
    equation = program.equations()[site.path]

    def visit(
        _: Equation, evaluate: Evaluate, inputs: Sequence[PyTree], token: PyTree
    ) -> tuple[list[PyTree], PyTree]:
        outs = evaluate(inputs)
        return outs, outs[site.index]

    _, captures = interpret(program.jaxpr, visit, {site.path: equation}, program.inputs)
    return captures[site.path]


def _kind(x: jax.Array) -> str:
    return f"{x.dtype}{list(x.shape)}"
