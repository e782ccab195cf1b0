"""`gf.capture`: the values inside any JAX function by name, without a backward pass; and their tangents."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import jax
from jaxtyping import PyTree

from gradfn.core.models import function_of
from gradfn.core.signature import transform_of
from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.inspection import flow
from gradfn.inspection.observe import ByName, checked_stats, trace_sites, wanted
from gradfn.inspection.summaries import DEFAULT_STATS, Stats
from gradfn.inspection.tangents import Along, with_tangents
from gradfn.jaxpr import Equation, Site, interpret
from gradfn.jaxpr.interpreter import Evaluate
from gradfn.jaxpr.sites import Selection


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["output", "stats", "values", "output_tangent", "tangent_stats", "tangents"],
    meta_fields=["sites"],
)
@dataclass(frozen=True, repr=False)
class Capture(ByName, ShowsTable):
    """The output of a function and the values computed for it; a pytree of arrays. `print` shows a table.

    `captured["a1"].value` and `captured["a1"].stats` are what was recorded at the site `a1`: see `Observation`.

    Attributes:
        output: what the function returned.
        stats: statistics (`Stats`) by site name.
        values: the values of the sites that `keep` selected, by name.
        sites: the sites, in the order of computation (static).
        output_tangent: with `along`, the derivative of the output along it, None where a leaf is not floating.
        tangent_stats: with `along`, statistics of the derivatives of the values, by site name; their count is 0
            where a value does not depend on what `along` changes.
        tangents: with `along`, the derivatives of the values that `keep` selected.
    """

    output: PyTree
    stats: dict[str, Stats]
    values: dict[str, jax.Array]
    sites: tuple[Site, ...]
    output_tangent: PyTree = None
    tangent_stats: dict[str, Stats] = field(default_factory=dict)
    tangents: dict[str, jax.Array] = field(default_factory=dict)

    # There is no backward pass, so no site has a gradient.
    grad_stats = MappingProxyType[str, Stats]({})
    value_grads = MappingProxyType[str, jax.Array]({})

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per site, of at most that many rows: see `Inspection.table`."""
        return flow.table(self, rows, "captured.table(rows=None)")


def capture(
    f: Callable,
    *,
    sites: Selection = None,
    keep: Selection = (),
    stats: Sequence[str] = DEFAULT_STATS,
    along: Along | None = None,
) -> Callable[..., Capture]:
    """Return a function that computes `f` and records the values inside it.

    The forward pass alone, so `f` may return anything; for gradients use `gf.inspect`. It works inside `jit`,
    `vmap`, `scan` and `grad` (gradients pass through what was recorded), and in a `scan` the recorded values have
    the iterations in front.

    Args:
        f: any JAX function; its first argument counts as the parameters. Or a model, as in `gf.sites`.
        sites: which values to record: names or globs of `gf.sites(f)(*args)`, or a function of a site; None is
            all.
        keep: which of those to return themselves, not only their statistics, selected in the same way.
        stats: which statistics to take, as for `gf.inspect`.
        along: also differentiate each value along a direction, by forward mode in the same pass. A tuple with one
            tangent per positional argument: a tree of arrays like that argument, None for an argument or a leaf that
            stays as it is. Or a dict from names of sites to directions that enter there: the derivative with respect
            to a value inside. (In a scan, with the iterations in front, or the same for all of them.)

    Returns:
        A function of the same arguments that returns a `Capture`. With `along`, `captured["a1"].tangent_stats` and,
        where `keep` selected it, `.tangent` are the derivatives.

    Raises:
        ValueError: an unknown site (similar names are listed) or statistic; a direction of another structure or
            shape, or for a value that is not floating.
        TypeError: `along`, and a function inside has only a backward rule (`jax.custom_vjp`).

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> net = gf.mlp([4, 3, 2])
        >>> captured = gf.capture(net.apply, keep="a1")(net.init(jax.random.key(0)), jnp.ones(4))
        >>> captured.output.shape, captured["a1"].value.shape, list(captured)
        ((2,), (3,), ['W1', 'z1', 'a1', 'W2', 'z2'])
        >>> f = lambda w, x: gf.tap(w * x, "product") ** 2
        >>> captured = gf.capture(f, keep="product", along=(1.0, None))(3.0, 2.0)  # with respect to w
        >>> float(captured["product"].tangent), float(captured.output_tangent)
        (2.0, 24.0)
    """
    stats = checked_stats(stats, "capture")

    function, first = function_of(f)

    @transform_of(f if first else function, "capture", own=0)
    def captured(*args: PyTree, **kwargs: PyTree) -> Capture:
        """Return the output of the function, and the values at its sites."""
        args = (*first, *args)
        traced = trace_sites(function, args, kwargs, sites)
        program, want = traced.program, wanted(traced, sites, keep, stats)
        if along is not None:
            directions = (*(None for _ in first), *along) if isinstance(along, tuple) else along
            dual = with_tangents(traced, want, args, directions)
            values, tangents = (want.by_name(found, dual.same) for found in (dual.recorded, dual.tangents))
            output = program.rebuild(dual.outs)
            return Capture(output, *values, tuple(want.sites), dual.output_tangent, *tangents)
        at = want.by_path()

        def visit(
            equation: Equation, evaluate: Evaluate, inputs: Sequence[PyTree], token: None
        ) -> tuple[list[PyTree], Mapping[str, PyTree]]:
            outs = evaluate(inputs)
            own = [site for site in at[equation.path] if site.name not in want.same_values]
            return outs, {site.name: want.of(site, outs[site.index], site.kind) for site in own}

        outs, recorded = interpret(program.jaxpr, visit, program.equations(at), program.inputs)
        return Capture(
            program.rebuild(outs), *want.by_name(recorded, want.same_values), sites=tuple(want.sites)
        )

    return captured
