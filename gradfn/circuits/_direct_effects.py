"""Direct effects: a logit, or another metric, as the sum of what each part of a model writes toward it."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from gradfn.circuits._model import scalar_metric
from gradfn.circuits._stream import (
    Stream,
    find_stream,
    is_affine,
    labels,
    layers_of,
    named,
    saved,
    select_entered,
    select_parts,
    stacked,
)
from gradfn.core.precision import widen
from gradfn.core.signature import transform_of
from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.jaxpr import Site, select
from gradfn.jaxpr.call import jit_arrays
from gradfn.jaxpr.sites import Selection


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "constant", "parts", "heads", "biases", "rest", "remainder", "unexplained"],
    meta_fields=["names", "with_heads"],
)
@dataclass(frozen=True, repr=False)
class DirectEffects(ShowsTable):
    """A metric as a sum over the parts of a model; a pytree of arrays. `print` shows a table.

    `value` is `constant + parts.sum() + rest + remainder`, and the effect of a part with heads, `parts[with_heads[i]]`,
    is `heads[i].sum() + biases[i]`.

    Attributes:
        value: the metric.
        constant: the metric of an empty stream, the final normalization's scale being that of the stream: what the
            biases of the final normalization and of the unembedding do.
        parts: `[part]`, the effect of what each part adds to the stream.
        heads: `[layer, head]`, of that the effect of each attention head.
        biases: `[layer]`, and of the bias of the projection behind the heads.
        rest: the effect of what is in the stream and not the sum of the parts; rounding if the parts are complete.
        remainder: what numerical integration misses if the metric is not affine in the stream; otherwise rounding.
        unexplained: the norm of what is in the stream and not the sum of the parts, divided by that of the stream.
        names: of the parts, in the order of computation (static).
        with_heads: the index in `parts` of each layer of `heads` (static).
    """

    value: Float[Array, ""]
    constant: Float[Array, ""]
    parts: Float[Array, " part"]
    heads: Float[Array, "layer head"]
    biases: Float[Array, " layer"]
    rest: Float[Array, ""]
    remainder: Float[Array, ""]
    unexplained: Float[Array, ""]
    names: tuple[str, ...]
    with_heads: tuple[int, ...]

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per part or head; of many, the rows with the largest effects stay."""
        complete = float(self.unexplained) < 0.01
        caption = (
            ""
            if complete
            else (
                f"The parts do not add up to the stream: {float(self.unexplained):.0%} of its norm is missing: see "
                "the row rest. Name the others by parts=[...]."
            )
        )
        out = TextTable("Direct effects", caption)
        out.add_column("part", footer="sum", shorten=True)
        out.add_column("effect", ".4g", footer=f"{float(self.value):.4g}")
        for name, effect in self.rows():
            out.add_row(name, effect, weight=abs(effect))
        return out.folded(rows, "effects.table(rows=None)")

    def rows(self) -> list[tuple[str, float]]:
        """Return the names and effects of all summands: heads instead of the parts that consist of them."""
        out = [("constant", float(self.constant))]
        layer = {part: i for i, part in enumerate(self.with_heads)}
        for k, name in enumerate(self.names):
            if k not in layer:
                out.append((name, float(self.parts[k])))
                continue
            heads = np.asarray(self.heads[layer[k]])
            out += [(f"{name}, head {j}", float(effect)) for j, effect in enumerate(heads)]
            out.append((f"{name}, bias", float(self.biases[layer[k]])))
        return [*out, ("rest", float(self.rest)), ("remainder", float(self.remainder))]


def direct_effects(
    f: Callable,
    metric: Callable[[PyTree], jax.Array],
    *,
    sites: Selection = None,
    parts: Selection = None,
    heads: Selection = None,
    steps: int = 16,
) -> Callable[..., DirectEffects]:
    """Return a function that decomposes a metric into the direct effects of the embedding, heads, and layers.

    Elhage et al., *A Mathematical Framework for Transformer Circuits*, 2021: the stream before the unembedding is a
    sum of what each part adds to it. With the scale of the final normalization held fixed (the square roots behind the
    stream), a logit, or a difference of logits, is an affine function of the stream, and so the sum of one term for
    each part, exactly.

    A metric that is not affine in the logits, such as a loss, is decomposed by its gradient, averaged over the
    straight line from an empty stream to the stream (integrated gradients, Sundararajan et al., 2017), by
    Gauss-Legendre quadrature. What that misses is reported as `remainder`.

    Args:
        f: `(params, *args) -> output`, any JAX function.
        metric: a scalar function of the output, such as `lambda logits: logits[-1, 5] - logits[-1, 3]`.
        sites: the values of the residual stream, as for `gf.circuits.logit_lens`; the last one is decomposed.
        parts: what is added up to the stream: by default `embedded`, and each block's `attention_out` and
            `feed_out`.
        heads: the outputs of attention heads, `[..., head, size]`, each before the linear projection that makes the
            next part of it; by default the sites named `mixed`, if there are any. `()` is none.
        steps: nodes of the quadrature, if the metric is not affine.

    Returns:
        A function of the arguments of `f` that returns `DirectEffects`. It compiles itself, and works inside `jit`
        and `vmap`.

    Raises:
        ValueError: an unknown site (similar names are listed), a part of another shape than the stream, or heads that
            the next part does not depend on linearly.
        TypeError: the metric does not return a floating scalar.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> net = gf.gpt(gf.GPTConfig(vocab=11, context=8, n_layers=2, n_heads=2, width=8))
        >>> effects = gf.circuits.direct_effects(net.apply, lambda logits: logits[-1, 5] - logits[-1, 3])
        >>> found = effects(net.init(jax.random.key(0)), jnp.array([7, 1, 3]))
        >>> found.names[:3], found.heads.shape
        (('embedded', 'blocks/0/attention_out', 'blocks/0/feed_out'), (2, 2))
        >>> total = found.constant + found.parts.sum() + found.rest + found.remainder
        >>> bool(jnp.allclose(total, found.value, atol=1e-6)), bool(abs(found.rest) < 1e-6)
        (True, True)
    """
    if steps < 1:
        raise ValueError(f"direct_effects: steps must be an integer >= 1, got {steps}")

    @jit_arrays
    def run(*args: PyTree) -> DirectEffects:
        stream = find_stream(f, args, sites, "direct_effects")
        chosen, of_heads = select_parts(stream, parts), _heads(stream, heads)
        names = [site.name for site in (*chosen, *of_heads)]
        output, kept = stream.model.run(stream.model.program.inputs, keep=[*stream.kept, *names])
        value = scalar_metric(metric, output, "direct_effects")
        end, scales = kept[stream.end], {name: kept[name] for name in stream.scales}

        def of_stream(x: jax.Array) -> jax.Array:
            output, _ = stream.tail(stream.model.program.inputs, x, scales)
            return scalar_metric(metric, output, "direct_effects")

        gradient = _mean_gradient(of_stream, end, 1 if is_affine(of_stream, end) else steps)
        order = layers_of(chosen)
        added = widen(stacked(order, kept))  # [part, ..., width]
        missing = widen(end) - added.sum(0)
        constant, explained = widen(of_stream(jnp.zeros_like(end))), jnp.sum(gradient * widen(end))
        by_head, biases, with_heads = _effects_of_heads(stream, kept, chosen, of_heads, gradient)
        return DirectEffects(
            value=value,
            constant=constant,
            parts=jnp.sum(gradient[None] * added, tuple(range(1, added.ndim))),
            heads=by_head,
            biases=biases,
            rest=jnp.sum(gradient * missing),
            remainder=widen(value) - constant - explained,
            unexplained=jnp.linalg.norm(missing.ravel()) / jnp.linalg.norm(widen(end).ravel()),
            names=labels(order),
            with_heads=with_heads,
        )

    @transform_of(f, "direct_effects", own=0)
    def effects(*args: PyTree) -> DirectEffects:
        """Return the metric of the function's output as a sum over the parts of the model."""
        return run(*args)

    return effects


def _mean_gradient(f: Callable[[jax.Array], jax.Array], x: jax.Array, steps: int) -> jax.Array:
    """Return the gradient of a function, averaged over the line from 0 to `x`."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    points = (jnp.asarray((nodes + 1) / 2, x.dtype), jnp.asarray(weights / 2, widen(x).dtype))

    def add(total: jax.Array, node: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + node[1] * widen(jax.grad(f)(node[0] * x)), None

    return jax.lax.scan(add, jnp.zeros_like(widen(x)), points)[0]


def _heads(stream: Stream, heads: Selection) -> list[Site]:
    wanted = named("mixed") if heads is None else heads
    chosen = select(stream.model.sites, wanted, stream.model.what)
    return select_entered(stream.model, wanted) if chosen else []


def _effects_of_heads(
    stream: Stream,
    kept: dict[str, jax.Array],
    parts: Sequence[Site],
    heads: Sequence[Site],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, tuple[int, ...]]:
    """Return the effects of heads `[layer, head]`, those of their biases `[layer]`, and the part each belongs to.

    Each layer is run with its own stream held fixed, so that its heads have no effect on the layers behind it.
    """
    if not heads:
        return jnp.zeros([0, 0]), jnp.zeros([0]), ()
    if len({site.shape for site in heads}) > 1 or len(heads[0].shape) < 2:
        raise ValueError(
            "direct_effects: expected heads of one shape [..., head, size], got "
            f"{', '.join(f'{site.name} {list(site.shape)}' for site in heads)}. Pass heads=[...], or heads=()."
        )
    with_heads, of_heads = _parts_behind(parts, heads), layers_of(heads)
    behind = [layers_of(parts)[k] for k in with_heads]
    inputs, fixed = stream.model.program.inputs, {name: kept[name] for name in stream.names}

    def written(mixed: dict[str, jax.Array]) -> jax.Array:
        edits = dict.fromkeys([*fixed, *mixed], saved)
        _, values = stream.model.run(inputs, edits, [site.name for site in parts], fixed | mixed)
        return stacked(behind, values)  # [layer, ..., width]

    mixed = {site.name: kept[site.name] for site in heads}
    if not is_affine(written, mixed):
        raise ValueError(
            f"direct_effects: the values of heads, {', '.join(mixed):.200}, do not enter the parts behind them, "
            f"{', '.join(labels(behind)):.200}, linearly. Name the values before the linear "
            "projection by heads=[...], or pass heads=()."
        )
    out, pull = jax.vjp(written, mixed)
    (grads,) = pull(jnp.broadcast_to(gradient[None], out.shape).astype(out.dtype))
    products = widen(stacked(of_heads, grads)) * widen(stacked(of_heads, mixed))  # [layer, ..., head, size]
    by_head = products.sum((*range(1, products.ndim - 2), products.ndim - 1))
    zero = widen(written(jax.tree.map(jnp.zeros_like, mixed)))
    return by_head, jnp.sum(gradient[None] * zero, tuple(range(1, zero.ndim))), with_heads


def _parts_behind(parts: Sequence[Site], heads: Sequence[Site]) -> tuple[int, ...]:
    """Return, for each layer of heads, the index of the first part that is computed after it."""
    own, order = {site.name for site in heads}, layers_of([*parts, *heads])
    found: list[int] = []
    n_parts = 0
    for name, _ in order:
        if name in own:
            found.append(n_parts)
        else:
            n_parts += 1
    if len(set(found)) < len(found) or max(found) >= n_parts:
        raise ValueError(
            "direct_effects: expected one part behind each of the heads' sites, in the order "
            f"{', '.join(labels(order)):.300}. Name them by heads=[...] and parts=[...], or pass heads=()."
        )
    return tuple(found)
