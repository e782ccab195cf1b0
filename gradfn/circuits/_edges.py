"""`gf.circuits.edge_attribution_patch`: a score for every edge between the parts of a transformer."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gradfn.circuits._attribution_patch import middles
from gradfn.circuits._gradients import gradients
from gradfn.circuits._model import scalar_metric, trace_model
from gradfn.circuits._parts import READS, Parts, labels, parts_of, precedes
from gradfn.circuits._stream import saved
from gradfn.circuits._sweep import Into, check_into
from gradfn.core.precision import is_narrow, widen
from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.jaxpr.call import jit_arrays

WHAT = "edge_attribution_patch"
# Above these shares, what flows does not do so through the edges alone. Rounding in bfloat16 is much of a small change.
UNEXPLAINED, UNEXPLAINED_NARROW = 1e-2, 0.5


class Edge(NamedTuple):
    """One edge: what `sender` writes into the residual stream, as read by `receiver`, and its score."""

    sender: str
    receiver: str
    score: float


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scores", "clean", "corrupt", "unexplained"],
    meta_fields=["senders", "receivers", "into"],
)
@dataclass(frozen=True, repr=False)
class EdgeAttribution(ShowsTable):
    """Scores of the edges of a transformer; a pytree of arrays. `print` shows the largest.

    Senders are `embedded`, heads such as `a0.h1` (layer 0, head 1) and MLPs `m0`. Receivers are the queries, keys and
    values of heads, `a1.h0.q`, `a1.h0.k`, `a1.h0.v`, MLPs `m1`, and `final`, the stream after the last layer.

    Attributes:
        scores: `[senders, receivers]`, the estimated change of the metric; 0 where there is no edge.
        clean: the metric of the clean run.
        corrupt: the metric of the corrupt run.
        unexplained: the share of the change of the stream, or of its gradient, that is not due to the edges: 0 up to
            rounding if the parts are connected by the residual stream alone.
        senders: names of the rows (static).
        receivers: names of the columns (static).
        into: which run the other's values are put into (static).
    """

    scores: Float[Array, "senders receivers"]
    clean: Float[Array, ""]
    corrupt: Float[Array, ""]
    unexplained: Float[Array, ""]
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    into: Into

    @property
    def exists(self) -> np.ndarray:
        """Whether there is an edge: booleans `[senders, receivers]`."""
        return np.array([[precedes(s, r) for r in self.receivers] for s in self.senders])

    @property
    def edges(self) -> list[Edge]:
        """All edges with their scores, by sender; of several pairs (from `vmap`), averaged."""
        scores = np.asarray(self.scores, np.float64)
        scores = scores.mean(tuple(range(scores.ndim - 2)))
        pairs = zip(*np.nonzero(self.exists), strict=True)
        return [Edge(self.senders[s], self.receivers[r], float(scores[s, r])) for s, r in pairs]

    def top(self, n: int) -> list[Edge]:
        """Return the `n` edges of the largest magnitude, the largest first."""
        return sorted(self.edges, key=lambda edge: -abs(edge.score))[:n]

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return the edges as a table, the largest first; None for all rows."""
        out = TextTable(
            "Edges, the largest first", f"metric: clean {self.clean:.4g}, corrupt {self.corrupt:.4g}"
        )
        for header in ("sender", "receiver"):
            out.add_column(header)
        out.add_column("score", "+.4g")
        edges = self.top(len(self.senders) * len(self.receivers))
        for i, edge in enumerate(edges):
            out.add_row(*edge, weight=-i)
        return out.folded(rows, "edges.table(rows=None)")


def edge_attribution_patch(
    f: Callable,
    clean: tuple,
    corrupt: tuple,
    metric: Callable,
    *,
    steps: int | None = None,
    axes: Mapping[str, int] = {"head": 1},
    into: Into = "corrupt",
) -> EdgeAttribution:
    """Estimate the effect of patching each edge between the parts of a transformer.

    Edge attribution patching (Syed et al., *Attribution Patching Outperforms Automated Circuit Discovery*, 2023): the
    score of an edge is the difference of what the sender writes into the residual stream in the two runs, times the
    gradient of the metric with respect to the receiver's input, through this receiver alone. With `steps` the
    gradients are averaged over inputs on the straight line between the two runs' embeddings (EAP-IG; Hanna et al.,
    *Have Faith in Faithfulness*, 2024), which is slower by that factor and does not fail where the gradient at one
    end is zero.

    The scores of all edges out of a part add up to that of the part itself (`gf.circuits.attribution_patch`).

    Args:
        f: a pre-norm transformer whose values are named as in gradfn's GPTs (`embedded`, and per layer `queries`,
            `keys`, `values`, `mixed`, `attention_out`, `residual_mid`, `feed_out`, `residual`; without MLPs, no
            `residual_mid` and no `feed_out`); in other models name
            them with `gf.tap`. The layers may be in one `lax.scan`.
        clean: all arguments of `f`, parameters first.
        corrupt: other arguments, of the same shapes.
        metric: of the output of `f`, a floating scalar.
        steps: how many points of the line to average over (at the middles of equal parts); None for the gradient of
            the base run alone.
        axes: the axis of the heads in `queries`, `keys`, `values` and `mixed`; `{"head": 2}` with a batch in front.
        into: the base run: `"corrupt"` puts clean values into the corrupt run (denoising), `"clean"` the opposite.

    Returns:
        An `EdgeAttribution`.

    Raises:
        ValueError: a value that is not named, arguments of unlike shapes, parts that are not connected by a residual
            stream alone.
        TypeError: a metric that is not a scalar.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> net = gf.gpt(gf.GPTConfig(vocab=11, context=8, n_layers=2, n_heads=2, width=8))
        >>> params = net.init(jax.random.key(0))
        >>> clean, corrupt = (params, jnp.array([1, 2, 3, 1])), (params, jnp.array([4, 2, 3, 1]))
        >>> edges = gf.circuits.edge_attribution_patch(net.apply, clean, corrupt, lambda out: out[-1, 2] - out[-1, 5])
        >>> edges.scores.shape, len(edges.edges), len(edges.top(3))
        ((7, 15), 46, 3)
    """
    check_into(into, WHAT)
    if steps is not None and steps < 1:
        raise ValueError(f"{WHAT}: steps must be an integer >= 1 or None, got {steps}")
    if list(axes) != ["head"]:
        raise ValueError(
            f"{WHAT}: axes must be the axis of heads alone, such as {{'head': 1}}, got {dict(axes)}"
        )

    limit = UNEXPLAINED

    def compute(clean: tuple, corrupt: tuple) -> EdgeAttribution:
        nonlocal limit
        model = trace_model(f, clean, WHAT)
        parts = parts_of(model, axes["head"])
        limit = UNEXPLAINED_NARROW if is_narrow(parts.embedded.dtype) else UNEXPLAINED
        return _edges(parts, model.program.inputs, model.inputs(corrupt, "corrupt"), metric, steps, into)

    result = jit_arrays(compute)(clean, corrupt)
    if not isinstance(result.unexplained, jax.core.Tracer) and result.unexplained > limit:
        raise ValueError(
            f"{WHAT}: {float(result.unexplained):.0%} of what flows from the embedding to the output is not due to "
            "edges between the named values: the stream is not the sum of embedded, attention_out and feed_out, or a "
            "part reads something else. Edges are defined for pre-norm transformers with one residual stream; "
            "gf.circuits.attribution_patch works for any function."
        )
    return result


def _edges(
    parts: Parts,
    clean: Sequence[Any],
    corrupt: Sequence[Any],
    metric: Callable,
    steps: int | None,
    into: Into,
) -> EdgeAttribution:
    model, roles = parts.model, parts.roles
    keep = [
        parts.embedded.name,
        *(n for role in ("mixed", "feed_out", "residual") if role in roles for n in roles[role].names),
    ]
    ends = {}
    for name, inputs in (("clean", clean), ("corrupt", corrupt)):
        out, kept = model.run(inputs, keep=keep)
        ends[name] = scalar_metric(metric, out, WHAT), kept
    base, (_, start) = (clean, ends["clean"]) if into == "clean" else (corrupt, ends["corrupt"])
    _, stop = ends["corrupt" if into == "clean" else "clean"]

    embedded = parts.embedded.name
    change = {name: stop[name] - start[name] for name in keep}
    written = _written(parts, base, start, change)

    def read_at(share: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        return _read(
            parts, base, metric, None if share is None else start[embedded] + share * change[embedded]
        )

    if steps is None:
        read, whole = read_at(None)
    else:
        shares = middles(steps).astype(change[embedded].dtype)
        # [steps, ...] would hold the gradients of all receivers at each point.
        shapes = jax.eval_shape(read_at, shares[0])
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        sums, _ = jax.lax.scan(
            lambda sums, share: (jax.tree.map(jnp.add, sums, read_at(share)), None), zeros, shares
        )
        read, whole = jax.tree.map(lambda total: total / steps, sums)

    senders, receivers = labels(parts)
    exists = np.array([[precedes(s, r) for r in receivers] for s in senders])
    # [senders, ..., features] and [receivers, ..., features] -> [senders, receivers]
    scores = jnp.einsum("sd,rd->sr", _flat(widen(written)), _flat(widen(read)), precision="highest")
    end = roles["residual"].stacked(change)[-1]
    return EdgeAttribution(
        scores=jnp.where(exists, scores, jnp.zeros((), scores.dtype)),
        clean=ends["clean"][0],
        corrupt=ends["corrupt"][0],
        unexplained=jnp.maximum(_share(end, jnp.sum(written, 0)), _share(whole, jnp.sum(read, 0))),
        senders=senders,
        receivers=receivers,
        into=into,
    )


def _flat(values: jax.Array) -> jax.Array:
    return values.reshape(len(values), -1)  # [n, ..., features] -> [n, all]


def _share(whole: jax.Array, explained: jax.Array) -> jax.Array:
    """Return the norm of what is not explained, relative to the whole."""
    norms = [jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)))) for x in (whole - explained, whole)]
    return norms[0] / jnp.maximum(norms[1], jnp.finfo(jnp.float32).tiny)


def _written(
    parts: Parts, base: Sequence[Any], start: Mapping[str, jax.Array], change: Mapping[str, jax.Array]
) -> jax.Array:
    """Return the change of what each sender writes: `[senders, ..., features]`."""
    model, mixed, out = parts.model, parts.roles["mixed"], parts.roles["attention_out"]

    def project(values: jax.Array) -> jax.Array:
        _, kept = model.run(base, {name: saved for name in mixed.names}, out.names, mixed.split(values))
        return out.stacked(kept)

    _, along = jax.linearize(project, mixed.stacked(start))
    # [heads, layers, ..., features]
    heads = jax.vmap(along)(parts.one_head("mixed", mixed.stacked(change)))
    by_layer = jnp.moveaxis(heads, 0, 1)
    if parts.has_mlps:
        feeds = parts.roles["feed_out"].stacked(change)
        by_layer = jnp.concatenate([by_layer, feeds[:, None]], 1)
    # [layers, senders of a layer, ..., features] -> [layers * senders of a layer, ..., features]
    written = by_layer.reshape(-1, *by_layer.shape[2:])
    return jnp.concatenate([change[parts.embedded.name][None], written])


def _read(
    parts: Parts, base: Sequence[Any], metric: Callable, embedded: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of the metric with respect to the input of each receiver, and to the embedding.

    Args:
        parts: the model.
        base: its inputs.
        metric: of its output.
        embedded: the embedding instead of that of the inputs, or None.

    Returns:
        `[receivers, ..., features]`, through that receiver alone, and `[..., features]`.
    """
    model, roles = parts.model, parts.roles
    first, streams = parts.embedded.name, roles["residual"]
    reads = [roles[role] for role in READS]
    of_mlps = [roles["feed_out"], roles["residual_mid"]] if parts.has_mlps else []
    probed = [parts.embedded, *(site for role in (*reads, *of_mlps, streams) for site in role.sites)]
    _, values, grads = gradients(model, base, metric, probed, {} if embedded is None else {first: embedded})

    # With the input of every layer held fixed, a layer's reads depend on its own input alone: all layers at once.
    def read(inputs: jax.Array) -> list[jax.Array]:
        tokens = {first: inputs[0]} | streams.split(jnp.concatenate([inputs[1:], inputs[-1:]]))
        names = [name for role in reads for name in role.names]
        _, kept = model.run(base, dict.fromkeys(tokens, saved), names, tokens)
        return [role.stacked(kept) for role in reads]

    inputs = jnp.concatenate([values[first][None], streams.stacked(values)[:-1]])
    _, back = jax.vjp(read, inputs)
    cotangents = [role.stacked(grads) for role in reads]
    through_each = []
    for k, role in enumerate(READS):
        others = [jnp.zeros_like(cotangent) for cotangent in cotangents]

        def through(cotangent: jax.Array, k: int = k, others: list[jax.Array] = others) -> jax.Array:
            return back([*others[:k], cotangent, *others[k + 1 :]])[0]

        # [heads, layers, ..., features]
        through_each.append(jax.vmap(through)(parts.one_head(role, cotangents[k])))
    if parts.has_mlps:
        feeds, mids = of_mlps

        def feed(inputs: jax.Array) -> jax.Array:
            tokens = mids.split(inputs)
            _, kept = model.run(base, dict.fromkeys(tokens, saved), feeds.names, tokens)
            return feeds.stacked(kept)

        _, back_feed = jax.vjp(feed, mids.stacked(values))
        through_each.append(back_feed(feeds.stacked(grads))[0][None])
    # [receivers of a layer, layers, ..., features] -> [layers * receivers of a layer, ..., features]
    by_layer = jnp.moveaxis(jnp.concatenate(through_each), 0, 1).reshape(-1, *inputs.shape[1:])
    return jnp.concatenate([by_layer, streams.stacked(grads)[-1:]]), grads[first]
