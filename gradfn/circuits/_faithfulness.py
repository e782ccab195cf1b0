"""`gf.circuits.faithfulness`: how much of the metric the best k parts of a model recover on their own."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from gradfn.circuits._attribution_patch import NodeAttribution
from gradfn.circuits._edge_circuit import edge_circuit
from gradfn.circuits._edges import EdgeAttribution
from gradfn.circuits._model import Model, always_computed, scalar_metric, trace_model
from gradfn.circuits._over import LAYER, Grid, grid
from gradfn.circuits._parts import parts_of
from gradfn.circuits._sweep import mapped
from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.jaxpr.call import jit_arrays

WHAT = "faithfulness"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["metric", "clean", "corrupt"],
    meta_fields=["counts", "total", "kind"],
)
@dataclass(frozen=True, repr=False)
class Faithfulness(ShowsTable):
    """The metric of circuits of growing size; a pytree of arrays. `print` shows a table.

    Attributes:
        metric: `[counts]`, of the run in which only that many parts are intact.
        clean: the metric of the clean run, in which all are.
        corrupt: the metric of the corrupt run.
        counts: how many parts are intact (static).
        total: how many parts there are (static).
        kind: what the parts are, `nodes` or `edges` (static).
    """

    metric: Float[Array, " counts"]
    clean: Float[Array, ""]
    corrupt: Float[Array, ""]
    counts: tuple[int, ...]
    total: int
    kind: str

    @property
    def normalized(self) -> Float[Array, " counts"]:
        """The metric on a scale where the corrupt run is 0 and the clean run is 1.

        Not finite where both runs have the same metric.
        """
        low, high = (jnp.expand_dims(jnp.asarray(x), -1) for x in (self.corrupt, self.clean))
        return (self.metric - low) / (high - low)

    @property
    def area(self) -> Float[Array, ""]:
        """The area under the normalized metric over the share of intact parts, by the trapezoidal rule.

        1 for a circuit that recovers the metric with no part at all.
        """
        shares = jnp.asarray(np.array(self.counts) / self.total, self.metric.dtype)
        curve = self.normalized
        return jnp.sum((curve[..., 1:] + curve[..., :-1]) / 2 * jnp.diff(shares), -1)

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return the curve as a table; None for all rows. Results of several pairs (from `vmap`) are averaged."""
        mean = jax.tree.map(lambda x: np.mean(np.asarray(x, np.float64), tuple(range(np.ndim(x)))), self)
        metric, curve = (np.asarray(x, np.float64) for x in (self.metric, self.normalized))
        batch = tuple(range(metric.ndim - 1))
        out = TextTable(
            f"Metric with the first k of {self.total:,} {self.kind} intact",
            f"clean {mean.clean:.4g}, corrupt {mean.corrupt:.4g}; area under the curve {np.mean(self.area):.3f}",
        )
        out.add_column("k", ",")
        out.add_column("metric", ".4g")
        out.add_column("normalized", ".3f")
        for i, row in enumerate(zip(self.counts, metric.mean(batch), curve.mean(batch), strict=True)):
            out.add_row(*row, weight=-i)
        return out.folded(rows, "curve.table(rows=None)")


def faithfulness(
    f: Callable,
    clean: tuple,
    corrupt: tuple,
    metric: Callable,
    scores: NodeAttribution | EdgeAttribution | Sequence[NodeAttribution],
    *,
    counts: Sequence[int] | None = None,
    axes: Mapping[str, int] = {"head": 1},
    batch_size: int = 32,
) -> Faithfulness:
    """Measure how much of the metric the parts with the largest scores recover on their own.

    For each k, the function runs on the clean arguments with the k parts of the largest magnitude intact, and all
    others as in the corrupt run. Intact parts compute their values in this run, from what reaches them. A circuit is
    faithful if a few parts suffice (Wang et al., *Interpretability in the Wild*, 2023; Hanna et al., *Have Faith in
    Faithfulness*, 2024; Marks et al., *Sparse Feature Circuits*, 2024).

    Values that are not among `scores` are always computed in the run: for a circuit of a transformer, score its heads
    and its MLPs, not the residual stream. Between edges nothing else is left.

    Args:
        f: the function that the scores are for.
        clean: all arguments of `f`, parameters first.
        corrupt: other arguments, of the same shapes.
        metric: of the output of `f`, a floating scalar.
        scores: of nodes (`attribution_patch`), such as heads, or several such, `[heads, feeds]`, which are ranked
            together; or of edges (`edge_attribution_patch`). Layers in a `lax.scan` are for nodes alone.
        counts: how many parts are intact; by default 0, 1, 2, 4, ... and all.
        axes: for edges, the axis of the heads, as in `edge_attribution_patch`.
        batch_size: how many runs to compute at a time. More take more memory.

    Returns:
        A `Faithfulness`; `gradfn.pages.attribution_patch` draws it.

    Raises:
        ValueError: scores of another function, a site that is scored twice, counts that are not in increasing order
            between 0 and the number of parts, arguments of unlike shapes.
        TypeError: a metric that is not a scalar.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> net = gf.gpt(gf.GPTConfig(vocab=11, context=8, n_layers=2, n_heads=2, width=8))
        >>> params = net.init(jax.random.key(0))
        >>> clean, corrupt = (params, jnp.array([1, 2, 3, 1])), (params, jnp.array([4, 2, 3, 1]))
        >>> pair = net.apply, clean, corrupt, lambda out: out[-1, 2] - out[-1, 5]
        >>> heads = gf.circuits.attribution_patch(*pair, over="layer x head")
        >>> feeds = gf.circuits.attribution_patch(*pair, sites="*feed_out", over="layer")
        >>> curve = gf.circuits.faithfulness(*pair, [heads, feeds])
        >>> curve.counts, curve.total, abs(float(curve.normalized[-1]) - 1) < 1e-4
        ((0, 1, 2, 4, 6), 6, True)
    """
    of_edges = scores if isinstance(scores, EdgeAttribution) else None
    nodes = _nodes(scores)
    names = [name for each in nodes for name in each.sites]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{WHAT}: scores contain {', '.join(twice)} twice. Pass each site once.")
    ranked = [of_edges.scores[of_edges.exists]] if of_edges else [each.scores.ravel() for each in nodes]
    total = sum(len(each) for each in ranked)
    counts = _counts(total) if counts is None else tuple(counts)
    if list(counts) != sorted(set(counts)) or not counts or counts[0] < 0 or counts[-1] > total:
        raise ValueError(f"{WHAT}: counts must increase from 0 at least to {total} at most, got {counts}")

    def compute(clean: tuple, corrupt: tuple, ranked: Sequence[jax.Array]) -> Faithfulness:
        model = trace_model(f, clean, WHAT, names or None)
        inputs = model.program.inputs, model.inputs(corrupt, "corrupt")
        if of_edges:
            run = _of_edges(model, of_edges, axes, *inputs, metric)
        else:
            run = _of_nodes(model, nodes, *inputs, metric)
        magnitudes = jnp.abs(jnp.concatenate(ranked))
        rank = jnp.argsort(jnp.argsort(-magnitudes))
        sizes = jnp.asarray(np.array(counts))
        curve = mapped(lambda index: run(rank < sizes[index[0]]), (len(counts),), batch_size)
        of_clean, of_corrupt = (scalar_metric(metric, model.run(each)[0], WHAT) for each in inputs)
        return Faithfulness(curve, of_clean, of_corrupt, counts, total, "edges" if of_edges else "nodes")

    return jit_arrays(compute)(clean, corrupt, ranked)


def _nodes(scores: NodeAttribution | EdgeAttribution | Sequence[NodeAttribution]) -> list[NodeAttribution]:
    """Return the scores of nodes as a list, which is empty for edges."""
    given: list = list(scores) if isinstance(scores, (list, tuple)) else [scores]
    kinds = {type(each) for each in given}
    if kinds != {NodeAttribution} and not (kinds == {EdgeAttribution} and len(given) == 1):
        raise TypeError(
            f"{WHAT}: scores must be what attribution_patch or edge_attribution_patch returns, or a list of the "
            f"former, got {', '.join(sorted(kind.__name__ for kind in kinds)) or 'an empty list'}"
        )
    for each in given:
        of_nodes = isinstance(each, NodeAttribution)
        expected = list(map(len, each.labels if of_nodes else (each.senders, each.receivers)))
        if list(each.scores.shape) != expected:
            raise ValueError(
                f"{WHAT}: expected scores of one pair of inputs, {expected}, got {list(each.scores.shape)}. Average "
                "those of several pairs: jax.tree.map(lambda x: x.mean(0), scores)."
            )
    return [each for each in given if isinstance(each, NodeAttribution)]


def _counts(total: int) -> tuple[int, ...]:
    """Return 0, 1, 2, 4, ... and the total."""
    return (0, *(2**i for i in range(total.bit_length()) if 2**i < total), total)


def _of_edges(
    model: Model,
    scores: EdgeAttribution,
    axes: Mapping[str, int],
    clean: Sequence[PyTree],
    corrupt: Sequence[PyTree],
    metric: Callable,
) -> Callable[[jax.Array], jax.Array]:
    """Return the metric as a function of which edges are intact, booleans in the order of `scores.edges`."""
    run = edge_circuit(parts_of(model, axes["head"]), clean, corrupt, metric)
    where = np.nonzero(scores.exists)
    return lambda intact: run(jnp.zeros(scores.exists.shape, bool).at[where].set(intact))


def _of_nodes(
    model: Model,
    nodes: Sequence[NodeAttribution],
    clean: Sequence[PyTree],
    corrupt: Sequence[PyTree],
    metric: Callable,
) -> Callable[[jax.Array], jax.Array]:
    """Return the metric as a function of which nodes are intact, booleans in the order of the scores."""
    grids = []
    for each in nodes:
        own = grid(always_computed(model, each.sites), " x ".join(each.words), dict(each.axes), WHAT)
        if own.labels != each.labels:
            raise ValueError(
                f"{WHAT}: the function has parts {own.labels!s:.200}, and the scores are of {each.labels!s:.200}. Pass "
                "the function and arguments that were scored."
            )
        grids.append(own)
    _, old = model.run(corrupt, keep=[site.name for of in grids for site in of.sites])

    def edit(value: jax.Array, token: tuple[jax.Array, jax.Array]) -> jax.Array:
        intact, other = token
        return jnp.where(intact, value, other)

    def run(intact: jax.Array) -> jax.Array:
        masks, start = dict[str, jax.Array](), 0
        for of in grids:
            size = int(np.prod(of.shape))
            masks |= _masks(of, intact[start : start + size].reshape(of.shape))  # [n] -> [*sizes of over]
            start += size
        tokens = {name: (mask, old[name]) for name, mask in masks.items()}
        output, _ = model.run(clean, dict.fromkeys(tokens, edit), (), tokens)
        return scalar_metric(metric, output, WHAT)

    return run


def _masks(of: Grid, chosen: jax.Array) -> dict[str, jax.Array]:
    """Return an array with the axes of `over` by site: `[*axes, ...]`, which broadcasts to the site's value."""
    if LAYER in of.words:
        rows = jnp.moveaxis(chosen, of.words.index(LAYER), 0)
    else:
        rows = jnp.broadcast_to(chosen, (len(of.layers), *chosen.shape))
    out = {}
    for site in of.sites:
        own = [i for i, layer in enumerate(of.layers) if layer.site.name == site.name]
        own.sort(key=lambda i: of.layers[i].iteration)
        by_axis = sorted(range(len(of.axes)), key=lambda k: list(of.axes.values())[k])
        mask = jnp.transpose(rows[jnp.array(own)], (0, *(1 + k for k in by_axis)))
        shape = [1] * len(site.shape)
        for axis in of.axes.values():
            shape[axis] = site.shape[axis]
        # [iterations, *sizes] -> [*axes, ..., 1 where no word names the axis]
        out[site.name] = mask.reshape(*site.axes, *shape)
    return out
