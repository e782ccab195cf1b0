"""What the attribution methods share: the one number to explain, and the value to explain it by."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradfn.jaxpr import Equation, Program, Site, find_sites, interpret, select, trace_as_written
from gradfn.jaxpr.interpreter import Evaluate

# None: the function's one number. Else an index into its answer (an int, a tuple, slices and ... in it), or a
# site and an index into its value: ("a1", 3). Integers may be traced, so that vmap can go over classes.
Target = Any
PART = 16  # evaluations that run side by side where a method takes many: more fill the memory


class Entry(NamedTuple):
    """The value that a map is of (the input, or a named site), and the score as a function of it.

    Attributes:
        zero: zeros in the shape and dtype of the value; a site in loops has the iterations in front.
        shifted: `what to add to the value -> (score, value before that)`; in loops, what is added goes on.
        replaced: `what to put in its place -> score`; in loops, each iteration has its value put in.
    """

    zero: jax.Array
    shifted: Callable[[Any], tuple[jax.Array, jax.Array]]
    replaced: Callable[[Any], jax.Array]


def score(f: Callable, target: Target, what: str) -> Callable[..., jax.Array]:
    """Return `(*args) -> scalar`: what `target` picks out of the answer, its mean if that is several numbers.

    `what` names the caller in errors. An answer `(answer, aux)` counts without its aux.
    """
    site, index = target if _names_a_site(target) else (None, target)

    def scored(*args: Any) -> jax.Array:
        if site is None:
            answer = f(*args)
            value = jnp.asarray(answer[0] if isinstance(answer, tuple) and len(answer) == 2 else answer)
        else:
            value = _site_value(f, site, args, what)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{what}: expected a floating answer, came {_kind(value)}")
        picked = value if index is None else value[_checked(index, value.shape, what)]
        if index is None and picked.size != 1:
            raise ValueError(f"{what}: {_kind(value)} came; say which of them to explain: target=an index")
        return picked.mean()

    return scored


def entry(f: Callable, at: str | None, params: Any, x: Any, rest: Sequence[Any], what: str) -> Entry:
    """Return the `Entry` of a call of a scalar function, at its input `x` or at the site named `at`."""
    if at is None:
        value = floating(x, what)
        return Entry(
            jnp.zeros_like(value),
            lambda delta: (f(params, value + delta, *rest), value),
            lambda other: f(params, other, *rest),
        )
    program = trace_as_written(f, params, x, *rest)
    site, equation = _one_site(program, at, what)
    if not site.differentiable:
        raise ValueError(f"{what}: site {at!r} ({site.dtype}{list(site.shape)}) has no gradient")
    if site.reaches != "result":
        raise ValueError(f"{what}: the score is not computed from site {at!r} ({site.line})")

    def run(token: Any, change: Callable) -> tuple[jax.Array, jax.Array]:
        def visit(
            _: Equation, evaluate: Evaluate, inputs: Sequence[Any], token: Any
        ) -> tuple[list[Any], Any]:
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


def floating(x: Any, what: str) -> jax.Array:
    """Return an input as an array; raise where it has no gradient."""
    if not isinstance(x, (jax.Array, np.ndarray)) or not jnp.issubdtype(x.dtype, jnp.floating):
        came = jax.tree.map(lambda leaf: _kind(jnp.asarray(leaf)), x)
        raise TypeError(
            f"{what}: the input x must be one floating array, came {came}. Other things, such as a label, go "
            "behind it: (params, x, label). Of tokens, ask for a site: at='...'"
        )
    return jnp.asarray(x)


def as_image(x: jax.Array, shape: Sequence[int] | None, what: str) -> tuple[int, ...]:
    """Return the shape `[height, width, ...]` of an input that may be flat; raise where it does not fit."""
    found = tuple(x.shape if shape is None else shape)
    if len(found) < 2 or np.prod(found) != x.size:
        hint = "name its height and width: shape=(28, 28)" if shape is None else f"shape={found} does not fit"
        raise ValueError(f"{what}: the input is {_kind(x)}; {hint}")
    return found


def _names_a_site(target: Target) -> bool:
    return isinstance(target, tuple) and len(target) == 2 and isinstance(target[0], str)


def _checked(index: Any, shape: tuple[int, ...], what: str) -> Any:
    """Return the index; raise where it is known to lie outside, which jax itself would not."""
    if not any(isinstance(part, jax.core.Tracer) for part in jax.tree.leaves(index)):
        known = jax.tree.map(lambda part: np.asarray(part) if isinstance(part, jax.Array) else part, index)
        try:
            np.broadcast_to(0, shape)[known]
        except IndexError as error:
            raise ValueError(f"{what}: target {index} of values {list(shape)}: {error}") from None
    return index


def _one_site(program: Program, name: str, what: str) -> tuple[Site, Equation]:
    chosen = select(find_sites(program), name, what)
    if len(chosen) > 1:
        names = ", ".join(site.name for site in chosen)
        raise ValueError(f"{what}: {name!r} stands for {len(chosen)} sites, and one is wanted: {names}")
    (site,) = chosen
    return site, program.equations()[site.path]


def _site_value(f: Callable, name: str, args: Sequence[Any], what: str) -> jax.Array:
    program = trace_as_written(f, *args)
    site, equation = _one_site(program, name, what)

    def visit(_: Equation, evaluate: Evaluate, inputs: Sequence[Any], token: Any) -> tuple[list[Any], Any]:
        outs = evaluate(inputs)
        return outs, outs[site.index]

    _, captures = interpret(program.jaxpr, visit, {site.path: equation}, program.inputs)
    return captures[site.path]


def _kind(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"
