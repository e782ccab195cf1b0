"""`gf.circuits.attribution_patch`: what patching would do, estimated from gradients."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from gradfn.attribution.randomize import rank_correlation
from gradfn.circuits._gradients import Values, check_differentiable, gradients
from gradfn.circuits._model import Model, always_computed, scalar_metric, trace_model
from gradfn.circuits._over import LAYER, Grid, grid
from gradfn.circuits._softmax_change import attention_of, through_probabilities
from gradfn.circuits._sweep import Into, PatchSweep, check_into
from gradfn.core.precision import wide, widen
from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.jaxpr import Site
from gradfn.jaxpr.call import jit_arrays
from gradfn.jaxpr.sites import Selection

WHAT = "attribution_patch"
Method = Literal["atp", "atp_qk", "atp_grad_drop", "atp_star", "ig_inputs", "ig_values"]
METHODS = ("atp", "atp_qk", "atp_grad_drop", "atp_star", "ig_inputs", "ig_values")
STEPS = 8
# Their scores are sums of magnitudes.
UNSIGNED = ("atp_grad_drop", "atp_star")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scores", "clean", "corrupt"],
    meta_fields=["words", "labels", "sites", "axes", "into", "method"],
)
@dataclass(frozen=True, repr=False)
class NodeAttribution(ShowsTable):
    """Estimated effects of patches; a pytree of arrays. `print` shows the largest.

    Attributes:
        scores: the estimated change of the metric, with one axis per word of `over`.
        clean: the metric of the clean run.
        corrupt: the metric of the corrupt run.
        words: the words of `over`, which name the axes of `scores` (static).
        labels: for each axis, a label for every index (static).
        sites: the names of the sites (static).
        axes: for the words that name an axis of the values, which one that is (static).
        into: which run the other's values are put into (static).
        method: how the effects were estimated (static).
    """

    scores: Float[Array, " ..."]
    clean: Float[Array, ""]
    corrupt: Float[Array, ""]
    words: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    sites: tuple[str, ...]
    axes: tuple[tuple[str, int], ...]
    into: Into
    method: Method

    def top(self, n: int) -> list[tuple[tuple[str, ...], float]]:
        """Return the labels and scores of the `n` parts of the largest magnitude, the largest first.

        Results of several pairs (from `vmap`) are averaged.
        """
        scores = _mean(self.scores, len(self.words))
        order = np.argsort(-np.abs(scores), axis=None, kind="stable")[:n]
        indices = zip(*np.unravel_index(order, scores.shape), strict=True)
        return [
            (tuple(of[i] for of, i in zip(self.labels, at, strict=True)), float(scores[at])) for at in indices
        ]

    def compare(self, sweep: PatchSweep) -> float:
        """Return Spearman's rank correlation with the exact effects: 1 is the same order, 0 an unrelated one.

        Magnitudes are compared if the scores have no sign (methods that drop gradients).

        Args:
            sweep: what `patch_sweep` returned for the same inputs, metric, sites, `over` and `into`.

        Raises:
            ValueError: a sweep of other parts, or in the other direction.
        """
        for name in ("words", "labels", "into"):
            if getattr(self, name) != getattr(sweep, name):
                raise ValueError(
                    f"compare: expected a sweep with the same {name}, {getattr(self, name)!s:.200}, got "
                    f"{getattr(sweep, name)!s:.200}. Pass the same sites, over and into to patch_sweep."
                )
        if jnp.shape(self.scores) != jnp.shape(sweep.metric):
            raise ValueError(
                f"compare: expected a sweep of as many pairs, of shape {list(jnp.shape(self.scores))}, got "
                f"{list(jnp.shape(sweep.metric))}"
            )
        return rank_correlation(
            self.scores, jnp.abs(sweep.effect) if self.method in UNSIGNED else sweep.effect
        )

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return the parts as a table, the largest first; None for all rows."""
        clean, corrupt = float(np.mean(self.clean)), float(np.mean(self.corrupt))
        out = TextTable(
            "Estimated effect of patches, the largest first",
            f"metric: clean {clean:.4g}, corrupt {corrupt:.4g}",
        )
        for word in self.words:
            out.add_column(word, shorten=word == LAYER)
        out.add_column("score", ".4g" if self.method in UNSIGNED else "+.4g")
        for i, (label, score) in enumerate(self.top(math.prod(map(len, self.labels)))):
            out.add_row(*label, score, weight=-i)
        return out.folded(rows, "scores.table(rows=None)")


def _mean(x: jax.Array, n: int) -> np.ndarray:
    """Return the mean over all axes but the last `n`."""
    return np.mean(np.asarray(x, np.float64), axis=tuple(range(jnp.ndim(x) - n)))


def attribution_patch(
    f: Callable,
    clean: tuple,
    corrupt: tuple,
    metric: Callable,
    *,
    sites: Selection = None,
    over: str = "layer x position",
    axes: Mapping[str, int] | None = None,
    into: Into = "corrupt",
    method: Method = "atp",
    steps: int | None = None,
    path: str | None = None,
    layers: Selection = ("*attention_out", "*feed_out"),
) -> NodeAttribution:
    """Estimate the effect of every patch that `patch_sweep` would make, from two forward and one backward pass.

    The estimate is the difference between the values of the two runs, times the gradient of the metric in the run that
    they are put into: exact to first order (Nanda, *Attribution Patching*, 2023). Kramár et al. (*AtP: An Efficient and
    Scalable Method*, 2024) fix two of its failures. Where attention is saturated, queries
    and keys have almost no gradient: `"atp_qk"` computes the change of the attention probabilities exactly, and is
    linear after them. Where the direct and the indirect effect of a part cancel, a small error of one hides the part:
    `"atp_grad_drop"` computes one gradient per layer that does not pass through what this layer adds to the stream,
    and adds up the magnitudes of the scores, divided by the number of layers L minus 1, as a part has no gradient when
    its own layer is dropped. (A value of the stream itself has one in every pass: its score is larger by L / (L - 1).)

    For a batch of pairs use `jax.vmap` and average. Each call compiles; for many calls, compile once:
    `jax.jit(lambda a, b: gf.circuits.attribution_patch(f, (params, a), (params, b), metric))`.

    Args:
        f: any JAX function; its first argument counts as the parameters.
        clean: all arguments of `f`, parameters first.
        corrupt: other arguments, of the same shapes.
        metric: of the output of `f`, a floating scalar.
        sites: which values, as for `gf.capture`. By default those that gradfn's GPTs name: `*mixed` if `over` has
            heads, else `*residual`.
        over: the axes of the result, as for `patch_sweep`: `layer` for the sites (and iterations of a `lax.scan`), and
            words for axes of the values. What is not named is patched whole.
        axes: by word, the axis of the values: `{"position": 0, "head": 1}` by default.
        into: `"corrupt"` puts clean values into the corrupt run (denoising), `"clean"` the opposite.
        method: `"atp"`; `"atp_qk"` or `"atp_grad_drop"`, or both fixes with `"atp_star"`; `"ig_inputs"`, with the
            gradients averaged over the straight line between the two runs' inputs, as in EAP-IG (Hanna et al., *Have
            Faith in Faithfulness*, 2024); `"ig_values"`, over the line between the two values of a layer, one layer at
            a time: the scores of a layer then add up to the exact effect of patching all of it, for one pass per
            layer and step.
        steps: how many points of that line, the middles of equal parts; 8 by default.
        path: the site whose value is on the line for `"ig_inputs"`. By default the arguments themselves or, if there
            are integers among them, the site `embedded`. The parameters stay those of the base run.
        layers: for the gradients to drop, the sites with what layers add to the stream. Sites whose names differ only
            in the last part belong to one layer; each iteration of a `lax.scan` is one.

    Returns:
        A `NodeAttribution`, with the shape of the corresponding `patch_sweep`; positive where the patch raises the
        metric, and without a sign where gradients are dropped.

    Raises:
        ValueError: an unknown site, one without a gradient or in a while loop, arguments of unlike shapes, words of
            `over` that do not fit the values.
        TypeError: a metric that is not a scalar.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> net = gf.gpt(gf.GPTConfig(vocab=11, context=8, n_layers=2, n_heads=2, width=8))
        >>> params = net.init(jax.random.key(0))
        >>> clean, corrupt = (params, jnp.array([1, 2, 3, 1])), (params, jnp.array([4, 2, 3, 1]))
        >>> heads = gf.circuits.attribution_patch(
        ...     net.apply, clean, corrupt, lambda out: out[-1, 2] - out[-1, 5], over="layer x head"
        ... )
        >>> heads.scores.shape, heads.labels[0]
        ((2, 2), ('blocks/0/attention/mixed', 'blocks/1/attention/mixed'))
    """
    check_into(into, WHAT)
    if method not in METHODS:
        raise ValueError(f"{WHAT}: method must be one of {', '.join(METHODS)}, got {method!r}")
    integrates = method in ("ig_inputs", "ig_values")
    if steps is not None and not (integrates and steps >= 1):
        raise ValueError(
            f"{WHAT}: steps must be an integer >= 1, for ig_inputs and ig_values alone; got {steps} for {method!r}"
        )
    if path is not None and method != "ig_inputs":
        raise ValueError(f"{WHAT}: path is for the method ig_inputs, got {path!r} with {method!r}")
    fixes_attention = method in ("atp_qk", "atp_star")
    if sites is None:
        sites = "*mixed" if "head" in over.split(" x ") else "*residual"

    def compute(clean: tuple, corrupt: tuple) -> NodeAttribution:
        # The probabilities of long attention are traced only if they are requested.
        model = trace_model(f, clean, WHAT, "*probabilities" if fixes_attention else sites)
        chosen = always_computed(model, sites)
        check_differentiable(chosen, WHAT)
        attention = attention_of(model, chosen) if fixes_attention else {}
        if method == "atp_qk" and not attention:
            raise ValueError(
                f"{WHAT}: method 'atp_qk' is for queries and keys, and none of the sites is one. Select them, such as "
                "sites='*queries', or use method 'atp', which is the same for other sites."
            )
        inputs = {"clean": model.program.inputs, "corrupt": model.inputs(corrupt, "corrupt")}
        base, source = inputs[into], inputs["clean" if into == "corrupt" else "corrupt"]
        of = grid(chosen, over, axes, WHAT)

        on_path = _path(model, path) if method == "ig_inputs" else None
        others = [site for layer in attention.values() for site in layer] + ([on_path] if on_path else [])
        probed = list({site.name: site for site in (*chosen, *others)}.values())
        names = [site.name for site in probed]
        outs = model.run(source, keep=names)
        source_metric, stop = scalar_metric(metric, outs[0], WHAT), outs[1]
        if method in ("atp", "atp_qk"):
            base_metric, start, once = gradients(model, base, metric, probed)
            grads = {name: grad[None] for name, grad in once.items()}
        else:
            outs = model.run(base, keep=names)
            base_metric, start = scalar_metric(metric, outs[0], WHAT), outs[1]
            if method == "ig_inputs":
                grads = _along_inputs(
                    model, base, source, metric, probed, on_path, start, stop, steps or STEPS
                )
            elif method == "ig_values":
                grads = _along_values(model, base, metric, of, start, stop, steps or STEPS)
            else:
                grads = _dropped(model, base, metric, probed, layers)

        scores = {}
        for site in chosen:
            if site.name not in attention:
                change = widen(stop[site.name]) - widen(start[site.name])
                scores[site.name] = _reduced(of, site, change[None] * widen(grads[site.name]))
        for role in ("queries", "keys"):
            of_role = {name: layer for name, layer in attention.items() if getattr(layer, role).name == name}
            if of_role:
                scores |= through_probabilities(model, base, of, of_role, start, stop, grads)
        by_gradient = jax.vmap(functools.partial(_arranged, of))(scores)
        if method in UNSIGNED:
            # A part has no gradient where its own layer is dropped, so that one of the terms is 0.
            total = jnp.sum(jnp.abs(by_gradient), 0) / (len(by_gradient) - 1)
        else:
            total = by_gradient[0]
        ends = {"clean": source_metric, "corrupt": base_metric}
        if into == "clean":
            ends = {"clean": base_metric, "corrupt": source_metric}
        return NodeAttribution(
            scores=total,
            clean=ends["clean"],
            corrupt=ends["corrupt"],
            words=of.words,
            labels=of.labels,
            sites=tuple(site.name for site in of.sites),
            axes=tuple(of.axes.items()),
            into=into,
            method=method,
        )

    return jit_arrays(compute)(clean, corrupt)


def _reduced(of: Grid, site: Site, product: jax.Array) -> jax.Array:
    """Return `[n, *site.axes, *site.shape]`, summed over what `over` does not name: `[n, *site.axes, *sizes]`."""
    first = product.ndim - len(site.shape)
    own = [first + axis for axis in of.axes.values()]
    summed = jnp.sum(product, [axis for axis in range(first, product.ndim) if axis not in own], keepdims=True)
    moved = jnp.moveaxis(summed, own, range(first, first + len(own)))
    # [n, *axes, *sizes, 1, ...] -> [n, *axes, *sizes]
    return moved.reshape(moved.shape[: first + len(own)])


def _arranged(of: Grid, scores: Mapping[str, jax.Array]) -> jax.Array:
    """Return scores by site, `[*site.axes, *sizes]`, as one array with the axes of `over`."""
    if LAYER in of.words:
        return of.arrange(scores)
    return functools.reduce(jnp.add, (scores[layer.site.name][layer.iteration] for layer in of.layers))


def _path(model: Model, path: str | None) -> Site | None:
    """Return the site whose value is on the line between the two runs; None for the arguments themselves."""
    if path is None:
        own = [i for i, owner in enumerate(model.program.owners) if owner != 0]
        dtypes = [model.program.jaxpr.in_avals[i].dtype for i in own]
        if dtypes and all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
            return None
        if not any(site.name == "embedded" for site in model.sites):
            raise ValueError(
                f"{WHAT}: arguments of dtypes {', '.join(map(str, dtypes)) or '(there are none)'} cannot be "
                "interpolated, and there is no site 'embedded'. Pass path=, the site of the embedded inputs "
                "(gf.sites(f)(*args) lists them)."
            )
    chosen = model.select(path or "embedded")
    check_differentiable(chosen, WHAT)
    if len(chosen) > 1 or chosen[0].axes:
        raise ValueError(
            f"{WHAT}: path must be one site outside of loops, got {[site.name for site in chosen]}"
        )
    return chosen[0]


def middles(steps: int) -> jax.Array:
    """Return the middles of `steps` equal parts of [0, 1]."""
    return jnp.asarray((np.arange(steps) + 0.5) / steps)


def _between(start: jax.Array, stop: jax.Array, share: jax.Array) -> jax.Array:
    return start + share.astype(start.dtype) * (stop - start)


def _mean_over(f: Callable[[PyTree], Values], points: PyTree, n: int) -> Values:
    """Return the sum of `f(point)` over the points, divided by `n`, with a leading axis of one."""
    shapes = jax.eval_shape(f, jax.tree.map(lambda x: x[0], points))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, wide(shape.dtype)), shapes)

    def step(sums: Values, point: PyTree) -> tuple[Values, None]:
        return jax.tree.map(lambda total, x: total + widen(x), sums, f(point)), None

    sums, _ = jax.lax.scan(step, zeros, points)
    return jax.tree.map(lambda total: total[None] / n, sums)


def _along_inputs(
    model: Model,
    base: Sequence[PyTree],
    source: Sequence[PyTree],
    metric: Callable,
    probed: Sequence[Site],
    on_path: Site | None,
    start: Values,
    stop: Values,
    steps: int,
) -> Values:
    """Return the gradients averaged over the line between the two runs' inputs, or their values at a site."""

    def at(share: jax.Array) -> Values:
        if on_path is not None:
            instead = {on_path.name: _between(start[on_path.name], stop[on_path.name], share)}
            return gradients(model, base, metric, probed, instead)[2]
        inputs = [
            old if owner == 0 else _between(jnp.asarray(old), jnp.asarray(new), share)
            for old, new, owner in zip(base, source, model.program.owners, strict=True)
        ]
        return gradients(model, inputs, metric, probed)[2]

    return _mean_over(at, middles(steps), steps)


def _along_values(
    model: Model, base: Sequence[PyTree], metric: Callable, of: Grid, start: Values, stop: Values, steps: int
) -> Values:
    """Return for each layer the gradients averaged over the line between its two values, all else as in the base."""
    together = LAYER not in of.words
    patched: dict[str, np.ndarray] = {}
    for site in of.sites:
        # [layers, *axes]
        patched[site.name] = np.zeros([len(of.layers), *site.axes], bool)
    for i, layer in enumerate(of.layers):
        patched[layer.site.name][(i, *layer.iteration)] = True
    units = {name: jnp.asarray(np.any(x, 0, keepdims=True) if together else x) for name, x in patched.items()}
    n = 1 if together else len(of.layers)

    def at(point: tuple[Values, jax.Array]) -> Values:
        where, share = point
        between = {name: _between(start[name], stop[name], share) for name in where}
        grads = gradients(model, base, metric, of.sites, between, where)[2]
        # [*axes] -> [*axes, 1, ...]
        masks = {
            name: mask.reshape(mask.shape + (1,) * (grads[name].ndim - mask.ndim))
            for name, mask in where.items()
        }
        return {name: jnp.where(masks[name], grad, jnp.zeros((), grad.dtype)) for name, grad in grads.items()}

    # [layers * steps, ...]
    points = (
        {name: jnp.repeat(x, steps, 0) for name, x in units.items()},
        jnp.tile(middles(steps), n),
    )
    return _mean_over(at, points, steps)


def _dropped(
    model: Model, base: Sequence[PyTree], metric: Callable, probed: Sequence[Site], layers: Selection
) -> Values:
    """Return the gradients that do not pass through what one layer adds to the stream: `[layers, ...]`."""
    sites = model.select(layers)
    groups: dict[tuple[str, tuple[int, ...]], list[Site]] = {}
    for site in sites:
        for iteration in itertools.product(*map(range, site.axes)):
            groups.setdefault((site.name.rpartition("/")[0], iteration), []).append(site)
    if len(groups) < 2:
        raise ValueError(
            f"{WHAT}: dropping the gradient of one layer at a time needs two layers at least, and "
            f"layers={layers!r} selects {len(groups)}: {', '.join(site.name for site in sites)}"
        )
    drop = {site.name: np.zeros([len(groups), *site.axes], bool) for site in sites}
    for i, ((_, iteration), group) in enumerate(groups.items()):
        for site in group:
            drop[site.name][(i, *iteration)] = True
    tokens = jax.tree.map(jnp.asarray, drop)
    return jax.lax.map(lambda drop: gradients(model, base, metric, probed, drop=drop)[2], tokens)
