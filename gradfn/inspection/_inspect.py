"""`gf.inspect`: every gradient and activation of any JAX function, in one forward and backward pass."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from gradfn.core.precision import norm
from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.flatten import flat_products
from gradfn.inspection import flow
from gradfn.inspection.summaries import DEFAULT_STATS, STATS, Stats, summarize
from gradfn.jaxpr import (
    Equation,
    Program,
    Site,
    find_sites,
    interpret,
    parameter_order,
    probe,
    select,
    trace_as_written,
)
from gradfn.jaxpr.interpreter import Evaluate, Path
from gradfn.jaxpr.program import hide_objects, params_first, show_objects, takes_keyword
from gradfn.jaxpr.sites import Selection
from gradfn.jaxpr.varying import as_varying, varying_axes, zeros


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("value", "aux", "grads", "input_grads", "stats", "grad_stats", "kept", "kept_grads"),
        *("update_ratios", "inspected"),
    ],
    meta_fields=["sites", "param_order"],
)
@dataclass(frozen=True, repr=False)
class Inspection(ShowsTable):
    """What one forward and backward pass showed; a pytree of arrays. `print` shows it as a table.

    Attributes:
        value: the loss.
        aux: the second thing that the loss returned, or None.
        grads: gradients of the parameters, in their tree; None where a leaf has none (integers, functions).
        input_grads: a tuple with one tree per further argument, None where a leaf is not floating.
        stats: forward statistics (`Stats`) by site name.
        grad_stats: statistics of the gradient of the loss with respect to each site, by name.
        kept: raw values of the sites that `keep` asked for.
        kept_grads: raw gradients of those.
        update_ratios: rms of the optimizer's update over rms of the parameter, in the tree of the parameters,
            once `with_updates` was given them.
        inspected: whether the sites were looked at: false on the steps that `every` leaves out.
        sites: the sites, in the order of computation (static).
        param_order: the names of the parameters, in the order in which the loss first uses each (static).
    """

    value: Any
    aux: Any
    grads: Any
    input_grads: Any
    stats: dict[str, Stats]
    grad_stats: dict[str, Stats]
    kept: dict[str, Any]
    kept_grads: dict[str, Any]
    update_ratios: Any
    inspected: Any
    sites: tuple[Site, ...]
    param_order: tuple[str, ...] = ()

    @property
    def activations(self) -> dict[str, Any]:
        """By site name: the raw value where `keep` asked for it, else its statistics."""
        return {**self.stats, **self.kept}

    @property
    def activation_grads(self) -> dict[str, Any]:
        """By site name: the raw gradient where `keep` asked for it, else its statistics."""
        return {**self.grad_stats, **self.kept_grads}

    def with_updates(self, params: Any, updates: Any) -> "Inspection":
        """Return the same with `update_ratios` of an optimizer's updates; about 1e-3 is usual.

        The rule of thumb is Karpathy's (CS231n notes, "Ratio of weights:updates").

        Args:
            params: the parameters, before the update.
            updates: the updates, in the same tree.
        """
        return replace(self, update_ratios=jax.tree.map(_ratio, params, updates))

    def flags(self) -> dict[str, list[str]]:
        """Return, by site name, what looks wrong there; sites with nothing wrong are left out.

        Flags are `vanishing`, `exploding`, `dead`, `saturated` and `non-finite`; thresholds stand in
        `gradfn.inspection.flow`.
        """
        return flow.flags(self)

    def to_dict(self) -> dict[str, Any]:
        """Return values and statistics as plain Python numbers and lists by name, ready for JSON.

        Raw arrays and the gradients of the parameters stay behind; of the latter, rms, largest magnitude and
        number of non-finite elements are given.
        """
        return flow.to_dict(self)

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per site, from the inputs to the loss.

        Args:
            rows: at most that many. In a longer table, all iterations of a loop share one row, and the rows that
                stay are those with flags, then those where the gradient's norm changes most. None: every
                iteration of every site.
        """
        return flow.table(self, rows)

    def parameter_table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per parameter: its gradient, and its update if `with_updates` was given it."""
        return flow.parameter_table(self, rows)

    def tables(self) -> list[TextTable]:
        """Return the table of the sites and that of the parameters."""
        return [self.table(), self.parameter_table()]


def _ratio(param: jax.Array, update: jax.Array) -> jax.Array:
    sizes = [
        norm(x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)) for x in (update, param)
    ]
    return sizes[0] / jnp.maximum(sizes[1], jnp.finfo(sizes[1].dtype).tiny)


def inspect(
    loss: Callable,
    *,
    sites: Selection = None,
    keep: Selection = (),
    stats: Sequence[str] = DEFAULT_STATS,
    every: int = 1,
    input_grads: bool = True,
) -> Callable[..., Inspection]:
    """Make a function that returns a loss's value together with all its gradients and activations.

    One forward and one backward pass; the gradients are those of `jax.value_and_grad`: the same operation by
    operation. Under `jit`, XLA may fuse the two programs differently; they then differ by rounding, in float32 by
    less than 1e-5 of the largest gradient on every net of `tests/test_laws.py`. Call it as it is, or inside
    `jit`, `scan`, `vmap` and `shard_map` (there, statistics are each device's own). Statistics sit where values
    are produced, so nothing large is kept alive for them. What it returns can be differentiated, as a penalty on
    a gradient or an activation is. Gradients of complex values are those of `jax.grad`: d/dRe - i d/dIm.

    Args:
        loss: any JAX function `(params, *args) -> scalar` or `-> (scalar, aux)`.
        sites: which values to look at: names or globs of `gf.sites(loss)(...)`, or a function of a site; None
            is all.
        keep: which of those to return raw as well, chosen in the same way; None is all.
        stats: which statistics to take, out of `mean`, `rms`, `max`, `zeros`, `saturated`, `dead`,
            `nonfinite` and `histogram`; all but the last by default.
        every: inspect the sites only on every Nth step; the others cost what plain gradients cost. The
            returned function then has a keyword `step=` of its own, which is not passed to the loss, and what
            is not inspected is zero (the input gradients too). With 1, every keyword goes to the loss.
        input_grads: also differentiate with respect to the floating arrays in `args`. It costs the backward
            pass of the first layer; training loops leave it out.

    Returns:
        `(params, *args) -> Inspection`.

    Raises:
        ValueError: an unknown site (near names are listed) or statistic, `every` without `step=`, `every` for
            a loss that has a parameter `step` of its own.
        TypeError: a loss that is not a floating scalar.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gradfn.inspection import inspect
        >>> def loss(params, x):
        ...     return jnp.mean(jnp.tanh(x @ params["W"]) ** 2)
        >>> seen = jax.jit(inspect(loss, keep="W"))({"W": jnp.eye(2)}, jnp.ones((3, 2)))
        >>> seen.activations["W"].shape, seen.activation_grads["W"].shape
        ((3, 2), (3, 2))
        >>> round(float(seen.activations["W:tanh"].mean), 4), seen.input_grads[0].shape
        (0.7616, (3, 2))
    """
    stats = _checked_stats(stats)
    if every < 1:
        raise ValueError(f"inspect: every must be an integer >= 1, got {every}")
    if every > 1 and takes_keyword(loss, "step"):
        raise ValueError(
            f"inspect: with every={every} the returned function has a keyword step of its own, and the loss has "
            "a parameter step too; rename the loss's, or call gf.inspect without every on the steps you choose"
        )

    @functools.wraps(loss)
    def inspected(*args: Any, **kwargs: Any) -> Inspection:
        step = kwargs.pop("step", None) if every > 1 else None
        if every > 1 and step is None:
            raise ValueError(
                f"inspect: with every={every}, pass the number of the step: inspected(..., step=i)"
            )
        args, kwargs = params_first(loss, args, kwargs, "inspect")
        program = trace_as_written(loss, *args, **kwargs)
        _check_scalar(program)
        chosen = select(find_sites(program), sites)
        kept = select(chosen, keep, "keep")
        grown = _differentiable(program, input_grads)
        flat = hasattr(loss, "flat")

        def run(consts: Sequence[Any], inputs: Sequence[Any], step: Any, still: bool) -> Inspection:
            closed = program.jaxpr.replace(consts=list(consts))
            look = functools.partial(
                _look, replace(program, jaxpr=closed), flat, chosen, kept, stats, grown, still
            )
            if every == 1:
                return look(False, inputs)
            return lax.cond(
                jnp.asarray(step) % every == 0, *[functools.partial(look, b) for b in (False, True)], inputs
            )

        seen = _differentiably(run, program)(program.jaxpr.consts, program.inputs, step)
        return replace(seen, aux=show_objects(seen.aux))

    return inspected


def _differentiably(run: Callable, program: Program) -> Callable[..., Inspection]:
    """Return the inspection as a function that is cheap to run, and right to differentiate.

    The forward statistics are cut off from the differentiation that the inspection consists of, which would
    otherwise keep what it takes to differentiate them, in a scan once per iteration. That cuts them off from a
    differentiation around the inspection (a penalty on a gradient or an activation) as well, so there the
    inspection is replaced by one that cuts off nothing.
    """
    if (
        program.jaxpr.effects
    ):  # those that are not allowed in a function with a rule of its own are among them
        return functools.partial(run, still=False)
    inspection = jax.custom_jvp(functools.partial(run, still=True))
    inspection.defjvp(functools.partial(jax.jvp, functools.partial(run, still=False)))
    return inspection


def _checked_stats(stats: Sequence[str]) -> tuple[str, ...]:
    stats = (stats,) if isinstance(stats, str) else tuple(stats)
    for name in stats:
        if name not in STATS:
            raise ValueError(f"inspect: there is no statistic {name!r}; there are {', '.join(STATS)}")
    return tuple(name for name in STATS if name in stats)


def _check_scalar(program: Program) -> None:
    """Raise unless the function returned a floating scalar, or that and something else."""
    tree = program.rebuild(program.jaxpr.out_avals)
    aval = tree[0] if _has_aux(program) else tree
    if not hasattr(aval, "shape") or aval.shape != () or not jnp.issubdtype(aval.dtype, jnp.floating):
        came = jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", aval)
        raise TypeError(
            f"inspect: the function must return a floating scalar, or (scalar, aux); got {came!s:.200}. "
            "For a loss of one example, gf.batch_mean(loss) makes the mean over a batch."
        )


def _has_aux(program: Program) -> bool:
    shapes = program.rebuild(program.jaxpr.out_avals)
    return isinstance(shapes, tuple) and len(shapes) == 2


def _differentiable(program: Program, input_grads: bool) -> list[int]:
    """Return the numbers of the inputs to differentiate: floating parameters, and arguments if asked."""
    return [
        i
        for i, (owner, aval) in enumerate(zip(program.owners, program.jaxpr.in_avals, strict=True))
        if jnp.issubdtype(aval.dtype, jnp.inexact) and (owner == 0 or (input_grads and owner > 0))
    ]


def _look(
    program: Program,
    flat: bool,
    chosen: list[Site],
    kept: list[Site],
    stats: tuple[str, ...],
    grown: list[int],
    still: bool,
    params_only: bool,
    inputs: Sequence[Any],
) -> Inspection:
    """Run the program forward and backward.

    Args:
        program: the program; `flat` tells whether its products are to be flattened.
        chosen: the sites; `kept` those whose raw values are returned.
        stats: the names of the statistics.
        grown: the numbers of the inputs to differentiate with respect to.
        still: no gradient passes through the forward statistics and raw values.
        params_only: inspect nothing on the way, and differentiate with respect to the parameters only.
        inputs: the program's.
    """
    by_path: dict[Path, list[Site]] = {}
    for site in chosen:
        by_path.setdefault(site.path, []).append(site)
    raw = {site.name for site in kept}
    backward = {site.name: _backward(site, stats, site.name in raw) for site in chosen if site.differentiable}

    def visit(
        equation: Equation, evaluate: Evaluate, inputs: Sequence[Any], token: Any
    ) -> tuple[list[Any], Any]:
        outs, capture = evaluate(inputs), {}
        for site in by_path[equation.path]:
            x = outs[site.index]
            seen = lax.stop_gradient(x) if still else x
            capture[site.name] = {"stats": summarize(seen, stats, site.kind)} | (
                {"raw": seen} if site.name in raw else {}
            )
            if site.differentiable:
                outs[site.index] = probe(backward[site.name], x, token[site.name])
        return outs, capture

    def run(leaves: list[Any], tokens: dict[Path, Any], looking: bool) -> tuple[Any, Any]:
        full = list(inputs)
        for i, leaf in zip(grown, leaves, strict=True):
            full[i] = leaf
        outs, captures = interpret(program.jaxpr, visit, equations if looking else {}, full, tokens)
        out = program.rebuild(outs)
        value, aux = out if _has_aux(program) else (out, None)
        return value, (hide_objects(aux), captures)

    # A loss whose products were flattened is looked at as it was written, and runs as it would without us.
    run_it = flat_products(run) if flat else run
    equations = program.equations(by_path)
    tokens = {
        path: {
            site.name: _token(site, backward[site.name], equations[path].eqn.outvars[site.index].aval)
            for site in group
            if site.differentiable
        }
        for path, group in by_path.items()
    }
    leaves = [inputs[i] for i in grown]
    if params_only:
        ours = [k for k, i in enumerate(grown) if program.owners[i] == 0]

        def of_params(mine: list[Any]) -> tuple[Any, Any]:
            merged = list(leaves)
            for k, leaf in zip(ours, mine, strict=True):
                merged[k] = leaf
            return run_it(merged, {}, looking=False)

        (value, (aux, _)), some = jax.value_and_grad(of_params, has_aux=True)([leaves[k] for k in ours])
        shapes = jax.eval_shape(functools.partial(run, looking=True), leaves, tokens)
        captures = zeros(shapes[1][1])
        leaf_grads = [jnp.zeros_like(leaf) for leaf in leaves]
        for k, g in zip(ours, some, strict=True):
            leaf_grads[k] = g
        token_grads = tokens
    else:
        differentiated = jax.value_and_grad(
            functools.partial(run_it, looking=True), argnums=(0, 1), has_aux=True
        )
        (value, (aux, captures)), (leaf_grads, token_grads) = differentiated(leaves, tokens)

    grads = dict(zip(grown, leaf_grads, strict=True))
    of_args = program.like_arguments([grads.get(i) for i in range(len(program.inputs))])
    forward = {name: c for group in captures.values() for name, c in group.items()}
    cotangents = {name: c for group in token_grads.values() for name, c in group.items()}
    in_order = [site.name for site in chosen]
    return Inspection(
        value=value,
        aux=aux,
        grads=of_args[0],
        input_grads=of_args[1:],
        stats={name: forward[name]["stats"] for name in in_order},
        grad_stats={name: cotangents[name]["stats"] for name in in_order if name in cotangents},
        kept={name: forward[name]["raw"] for name in in_order if name in raw},
        kept_grads={name: cotangents[name]["raw"] for name in in_order if name in raw and name in cotangents},
        update_ratios=None,
        inspected=jnp.asarray(not params_only),
        sites=tuple(chosen),
        param_order=parameter_order(program),
    )


def _backward(site: Site, stats: tuple[str, ...], raw: bool) -> Callable[[Any, Any], dict[str, Any]]:
    """Return what is taken of a site's cotangent."""

    def summary(g: Any, residual: Any) -> dict[str, Any]:
        return {"stats": summarize(g, stats)} | ({"raw": g} if raw else {})

    return summary


def _token(site: Site, summary: Callable, aval: Any) -> Any:
    """Return zeros shaped, and sharded, like a summary, with a leading axis for each loop around the site."""

    def of(shape: Any) -> jax.Array:
        sharding = shape.sharding  # known only where the shardings are part of the types
        if sharding is not None:
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*[None] * len(site.axes), *sharding.spec))
        return as_varying(
            jnp.zeros(site.axes + shape.shape, shape.dtype, device=sharding), varying_axes(shape)
        )

    return jax.tree.map(of, jax.eval_shape(summary, aval, None))
