"""`gf.inspect`: every gradient and activation of any JAX function, in one forward and backward pass."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from gradfn.core.precision import norm
from gradfn.core.signature import transform_of
from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.flatten import BatchMean, flat_products
from gradfn.inspection import flow
from gradfn.inspection.observe import ByName, Wanted, checked_stats, trace_sites_and_rules, wanted
from gradfn.inspection.rule_sites import RuleSite
from gradfn.inspection.summaries import DEFAULT_STATS, Stats
from gradfn.jaxpr import (
    Equation,
    Program,
    Site,
    interpret,
    probe,
)
from gradfn.jaxpr.backward_rules import value_grads_and_logs, with_rule
from gradfn.jaxpr.call import scalar_and_aux, value_and_aux, with_hint
from gradfn.jaxpr.interpreter import Evaluate, Path
from gradfn.jaxpr.program import hide_objects, params_first, show_objects
from gradfn.jaxpr.sites import Selection
from gradfn.jaxpr.varying import shapes_of


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("value", "aux", "grads", "input_grads", "stats", "grad_stats", "values", "value_grads"),
        *("update_ratios", "logs"),
    ],
    meta_fields=["sites", "param_order"],
)
@dataclass(frozen=True, repr=False)
class Inspection(ByName, ShowsTable):
    """The result of one forward and one backward pass; a pytree of arrays. `print` shows a table.

    `inspection["a1"]` is what was recorded at the site `a1`: `.stats`, `.grad_stats` and, where `keep` selected it,
    `.value` and `.grad`: see `Observation`.

    Attributes:
        value: the loss.
        aux: the second thing that the loss returned, or None.
        grads: gradients of the parameters, in their tree; None where a leaf has no gradient (integers, functions).
        input_grads: a tuple with one tree per further argument, None where a leaf is not floating.
        stats: statistics (`Stats`) of the values by site name.
        grad_stats: statistics of the gradients of the loss with respect to the values, by site name.
        values: the values of the sites that `keep` selected, by name.
        value_grads: the gradients of the loss with respect to those.
        update_ratios: rms of the optimizer's update over rms of the parameter, in the tree of the parameters,
            once `with_updates` has set it.
        sites: the sites, in the order of computation (static).
        param_order: the names of the parameters, in the order in which the loss first uses each (static).
        logs: what backward rules logged (`jax.custom_vjp.defvjp_with_logs`, from jax 0.12 on), as
            `jax.vjp(...)[1].with_logs` returns it; in a scan with the iterations in front.
    """

    value: Float[Array, ""]
    aux: PyTree
    grads: PyTree
    input_grads: tuple[PyTree, ...]
    stats: dict[str, Stats]
    grad_stats: dict[str, Stats]
    values: dict[str, jax.Array]
    value_grads: dict[str, jax.Array]
    update_ratios: PyTree
    sites: tuple[Site, ...]
    param_order: tuple[str, ...] = ()
    logs: dict[str, PyTree] = field(default_factory=dict)

    def with_updates(self, params: PyTree, updates: PyTree) -> "Inspection":
        """Return the same with `update_ratios` of an optimizer's updates; about 1e-3 is usual.

        The rule of thumb is Karpathy's (CS231n notes, "Ratio of weights:updates").

        Args:
            params: the parameters, before the update.
            updates: the updates, in the same tree.
        """
        return replace(self, update_ratios=jax.tree.map(_ratio, params, updates))

    def flags(self) -> dict[str, list[str]]:
        """Return, by site name, what looks wrong there; sites with nothing wrong are left out.

        The flags are `vanishing`, `exploding`, `dead`, `saturated` and `non-finite`; `gradfn.inspection.flow` states
        their thresholds.
        """
        return flow.flags(self)

    def to_dict(self) -> dict[str, Any]:
        """Return values and statistics as plain Python numbers and lists by name, ready for JSON.

        Values that were kept and the gradients of the parameters are left out; of the latter, rms, largest magnitude
        and number of non-finite elements are included.
        """
        return flow.to_dict(self)

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per site, from the inputs to the loss.

        Args:
            rows: at most that many. In a longer table, all iterations of a loop share one row, and the rows that
                stay are those with flags, then those where the gradient's norm changes most. None: every
                iteration of every site.
        """
        return flow.table(self, rows, "inspection.table(rows=None)")

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
    input_grads: bool = True,
) -> Callable[..., Inspection]:
    """Return a function that computes a loss together with all its gradients and activations.

    One forward and one backward pass. The gradients are those of `jax.value_and_grad`: operation by operation the
    same. Under `jit`, XLA may fuse the two programs differently; they then differ by rounding, in float32 by less
    than 1e-5 of the largest gradient on every net of `tests/test_laws.py`. It works as it is and inside `jit`,
    `scan`, `vmap` and `shard_map` (there, statistics are per device). Statistics are taken where values are
    produced, so no large array is kept alive for them. The result can be differentiated, as a penalty on a gradient
    or an activation requires. Gradients of complex values are those of `jax.grad`: d/dRe - i d/dIm.

    A backward rule of your own (`jax.custom_vjp`) can be inspected too: what `gf.tap` names in it is a site, with a
    value and no gradient, that `gf.sites` does not list. What it logs with jax's `defvjp_with_logs` is in `logs`.

    Args:
        loss: any JAX function `(params, *args) -> scalar` or `-> (scalar, aux)`.
        sites: which values to inspect: names or globs of `gf.sites(loss)(...)`, or a function of a site; None
            is all.
        keep: which of those to return themselves, not only their statistics, selected in the same way; None is
            all.
        stats: which statistics to take, out of `mean`, `rms`, `max`, `zeros`, `saturated`, `dead`,
            `nonfinite` and `histogram`; all but the last by default. `("rms", "nonfinite")` at one site per layer
            adds 6 to 17 % to a small network's step, all at all sites 30 to 50 % (`docs/inspection.md`, "What it
            costs").
        input_grads: also differentiate with respect to the floating arrays in `args`. It costs the backward
            pass of the first layer; training loops leave it out.

    Returns:
        `(params, *args) -> Inspection`.

    Raises:
        ValueError: an unknown site (similar names are listed) or statistic.
        TypeError: a loss that is not a floating scalar.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gradfn.inspection import inspect
        >>> def loss(params, x):
        ...     return jnp.mean(jnp.tanh(x @ params["W"]) ** 2)
        >>> inspection = jax.jit(inspect(loss, keep="W"))({"W": jnp.eye(2)}, jnp.ones((3, 2)))
        >>> inspection["W"].value.shape, inspection["W"].grad.shape
        ((3, 2), (3, 2))
        >>> round(float(inspection["W:tanh"].stats.mean), 4), inspection.input_grads[0].shape
        (0.7616, (3, 2))
    """
    stats = checked_stats(stats, "inspect")

    @transform_of(loss, "inspect", own=0)
    def inspected(*args: PyTree, **kwargs: PyTree) -> Inspection:
        """Return the value of the loss, its gradients, and what the sites show."""
        args, kwargs = params_first(loss, args, kwargs, "inspect")
        traced, rules = trace_sites_and_rules(with_hint(loss), args, kwargs, sites)
        program = traced.program
        scalar_and_aux(program.rebuild(program.jaxpr.out_avals), "inspect")
        want = wanted(traced, sites, keep, stats, rules)
        variables = _differentiable(program, input_grads)
        flat = _is_flattened(loss)

        def run(consts: Sequence[PyTree], inputs: Sequence[PyTree], cut: bool) -> Inspection:
            closed = program.jaxpr.replace(consts=list(consts))
            return _run(replace(program, jaxpr=closed), flat, want, variables, cut, inputs)

        inspection = _differentiably(run, program)(program.jaxpr.consts, program.inputs)
        return replace(inspection, aux=show_objects(inspection.aux), param_order=traced.order)

    return inspected


def _differentiably(run: Callable, program: Program) -> Callable[..., Inspection]:
    """Return the inspection as a function that is cheap to run and can be differentiated correctly.

    The forward statistics are cut off from the inspection's own differentiation, which would otherwise keep their
    residuals, in a scan once per iteration. That cuts them off from a differentiation around the inspection (a
    penalty on a gradient or an activation) as well, so there the inspection is replaced by one that cuts off
    nothing.
    """
    # A function with a derivative rule of its own must not have some of the effects.
    if program.jaxpr.effects:
        return functools.partial(run, cut=False)
    inspection = jax.custom_jvp(functools.partial(run, cut=True))
    inspection.defjvp(functools.partial(jax.jvp, functools.partial(run, cut=False)))
    return inspection


def _is_flattened(f: Callable) -> bool:
    """Tell whether a function, or one that it wraps (as `jax.jit` does), computes its products in two dimensions."""
    while not isinstance(f, BatchMean) and hasattr(f, "__wrapped__"):
        f = f.__wrapped__
    return isinstance(f, BatchMean) or hasattr(f, "flat")


def _differentiable(program: Program, input_grads: bool) -> list[int]:
    """Return the indices of the inputs to differentiate: floating parameters and, if requested, arguments."""
    return [
        i
        for i, (owner, aval) in enumerate(zip(program.owners, program.jaxpr.in_avals, strict=True))
        if jnp.issubdtype(aval.dtype, jnp.inexact) and (owner == 0 or (input_grads and owner > 0))
    ]


def _run(
    program: Program, flat: bool, want: Wanted, variables: list[int], cut: bool, inputs: Sequence[PyTree]
) -> Inspection:
    """Run a program forward and backward.

    Args:
        program: the program.
        flat: whether its products are to be flattened.
        want: what to record.
        variables: the indices of the inputs to differentiate with respect to.
        cut: whether no gradient passes through the forward statistics and the values that are kept.
        inputs: the program's.
    """
    at = want.by_path()
    equations = program.equations(at)

    def split(group: Sequence[Site]) -> tuple[list[Site], list[RuleSite]]:
        rules = [want.rules[site.name] for site in group if site.name in want.rules]
        return [site for site in group if site.name not in want.rules], rules

    def visit(
        equation: Equation, evaluate: Evaluate, inputs: Sequence[PyTree], token: PyTree
    ) -> tuple[list[PyTree], PyTree]:
        group, in_rule = split(at[equation.path])
        outs, recorded = _evaluated(want, in_rule, evaluate, inputs, token), {}
        for site in group:
            x = outs[site.index]
            if site.name not in want.same_values:
                recorded[site.name] = want.of(site, lax.stop_gradient(x) if cut else x, site.kind)
            if site.differentiable:
                outs[site.index] = probe(_of_cotangent(want, site), x, token[site.name])
        return outs, recorded

    def forward(leaves: list[PyTree], tokens: dict[Path, PyTree]) -> tuple[PyTree, PyTree]:
        full = list(inputs)
        for i, leaf in zip(variables, leaves, strict=True):
            full[i] = leaf
        outs, recorded = interpret(program.jaxpr, visit, equations, full, tokens)
        value, aux = value_and_aux(program.rebuild(outs))
        return value, (hide_objects(aux), recorded)

    tokens: dict[Path, dict[str, PyTree]] = {}
    for path, sites in at.items():
        group, rules = split(sites)
        tokens[path] = {
            site.name: equations[path].zeros(
                shapes_of(_of_cotangent(want, site), equations[path].eqn.outvars[site.index].aval)
            )
            for site in group
            if site.differentiable
        }
        tokens[path] |= {
            rule.site.name: rule.zeros(
                jax.eval_shape(functools.partial(want.of, rule.site), rule.value.equation.eqn.outvars[0].aval)
            )
            for rule in rules
        }
    # Sites are those of the loss as written; where its products are flattened, they are flattened here too.
    (value, (aux, recorded)), (leaf_grads, token_grads), logs = value_grads_and_logs(
        flat_products(forward) if flat else forward, [inputs[i] for i in variables], tokens
    )
    # What is recorded in a rule leaves it as a gradient, but it is a value.
    in_rules = {
        name: record for group in token_grads.values() for name, record in group.items() if name in want.rules
    }
    recorded = {**recorded, (): in_rules}
    token_grads = {
        path: {name: record for name, record in group.items() if name not in in_rules}
        for path, group in token_grads.items()
    }
    grads = dict(zip(variables, leaf_grads, strict=True))
    of_args = program.like_arguments([grads.get(i) for i in range(len(program.inputs))])
    stats, values = want.by_name(recorded, want.same_values)
    grad_stats, value_grads = want.by_name(token_grads, want.same_gradients)
    return Inspection(
        value=value,
        aux=aux,
        grads=of_args[0],
        input_grads=of_args[1:],
        stats=stats,
        grad_stats=grad_stats,
        values=values,
        value_grads=value_grads,
        update_ratios=None,
        sites=tuple(want.sites),
        logs=logs,
    )


def _evaluated(
    want: Wanted, rules: Sequence[RuleSite], evaluate: Evaluate, inputs: Sequence[PyTree], token: PyTree
) -> list[PyTree]:
    """Evaluate an equation; differentiated, record the values at sites in its backward rule."""
    if not rules:
        return evaluate(inputs)
    by_path = {rule.value.equation.path: rule.site for rule in rules}
    return with_rule(
        evaluate,
        inputs,
        lambda path, value: want.of(by_path[path], value),
        {path: token[site.name] for path, site in by_path.items()},
    )


def _of_cotangent(want: Wanted, site: Site) -> Callable[..., dict[str, Any]]:
    """Return the function of a site's cotangent (and no residual) that its probe evaluates.

    A site with the gradient of another one has a probe too: `flat_products` stops at it, and does not rewrite the
    statistics of the value.
    """
    if site.name in want.same_gradients:
        return lambda cotangent, _=None: {}
    return lambda cotangent, _=None: want.of(site, cotangent)
