"""Head detectors: how much of a head's attention follows a known pattern."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from gradfn.circuits._model import trace_model
from gradfn.core.signature import transform_of
from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.jaxpr import Site
from gradfn.jaxpr.sites import Selection


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["previous_token", "duplicate_token", "induction"],
    meta_fields=["layers"],
)
@dataclass(frozen=True, repr=False)
class HeadScores(ShowsTable):
    """The share of each head's attention that follows each pattern; a pytree of arrays.

    Attributes:
        previous_token: `[layer, head]`, attention to the position before.
        duplicate_token: `[layer, head]`, attention to earlier positions with the same token.
        induction: `[layer, head]`, attention to the positions right after earlier ones with the same token.
        layers: the name of each layer's attention probabilities (static).
    """

    previous_token: Float[Array, "layer head"]
    duplicate_token: Float[Array, "layer head"]
    induction: Float[Array, "layer head"]
    layers: tuple[str, ...]

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per head; of many heads, those that follow a pattern most closely."""
        out = TextTable(caption="the share of a head's attention that follows each pattern")
        out.add_column("layer", shorten=True)
        for header in ("head", "previous token", "duplicate token", "induction"):
            out.add_column(header)
        for i, name in enumerate(self.layers):
            for head in range(self.induction.shape[1]):
                scores = [
                    float(score[i, head])
                    for score in (self.previous_token, self.duplicate_token, self.induction)
                ]
                out.add_row(name, head, *scores, weight=max(scores))
        return out.folded(rows, "scores.table(rows=None)")


def head_scores(f: Callable, *, sites: Selection = "*probabilities") -> Callable[..., HeadScores]:
    """Return a function that measures how closely each attention head follows three known patterns.

    For each position the attention to the positions of the pattern is summed; the score is the mean over the
    positions for which the pattern has any: 1 for a head that always follows it. The patterns are those of the
    previous token, of duplicate tokens (earlier positions with the same token), and of induction (positions right
    after those; a head completes `A B ... A` with `B`). Elhage et al., *A Mathematical Framework for Transformer
    Circuits*, 2021; Olsson et al., *In-context Learning and Induction Heads*, 2022. Random tokens repeated once or
    more show them best, because nothing else is to be predicted.

    Args:
        f: any JAX function `(params, tokens, ...)`.
        sites: its attention probabilities, `[heads, T, T]` (`[kv_heads, group, T, T]` with shared heads), or with a
            batch of sequences in front; rows are queries. One per layer, or one in a scan over layers.

    Returns:
        A function of the same arguments, with tokens `[T]` or `[batch, T]` integers, that returns `HeadScores`. Where
        no token repeats, the last two scores are NaN: there is nothing to measure.

    Raises:
        ValueError: an unknown site (similar names are listed), or one that does not have the shape of attention.
        TypeError: tokens that are not integers.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> net = gf.gpt(gf.GPTConfig(vocab=9, context=8, n_layers=2, n_heads=2, width=8))
        >>> tokens = jnp.array([3, 1, 4, 0, 3, 1, 4, 0])
        >>> scores = gf.circuits.head_scores(net.apply)(net.init(jax.random.key(0)), tokens)
        >>> scores.induction.shape, scores.layers[1]
        ((2, 2), 'blocks/1/attention/probabilities')
    """

    @transform_of(f, "head_scores", own=2)
    def scored(params: PyTree, tokens: PyTree, /, *args: PyTree) -> HeadScores:
        """Return how closely each head follows the patterns."""
        tokens = jnp.asarray(tokens)
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"head_scores: expected integer tokens, got {tokens.dtype}{list(tokens.shape)}")
        model = trace_model(f, (params, tokens, *args), "head_scores", sites)
        chosen = model.select(sites)
        _, kept = model.run(model.program.inputs, keep=[site.name for site in chosen])
        layers, names = [], []
        for site in chosen:
            of_site = _by_head(site, kept[site.name], tokens)
            layers.append(of_site)
            names += [f"{site.name}[{i}]" for i in range(len(of_site))] if site.axes else [site.name]
        n_heads = {of_site.shape[1] for of_site in layers}
        if len(n_heads) > 1:
            raise ValueError(
                f"head_scores: layers have {' and '.join(map(str, sorted(n_heads)))} heads. Select layers with "
                "equally many: sites=..."
            )
        # [layers, heads, ..., T, T]
        attention = jnp.concatenate(layers)
        previous, duplicate, induction = (_share(attention, pattern) for pattern in _patterns(tokens))
        return HeadScores(previous, duplicate, induction, tuple(names))

    return scored


def _by_head(site: Site, value: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return attention as `[layers, heads, batch..., T, T]`, where a scan is several layers."""
    T, batch = tokens.shape[-1], tokens.shape[:-1]
    n_loops = len(site.axes)
    heads = value.shape[n_loops + len(batch) : -2]
    if site.shape != (*batch, *heads, T, T) or not heads or n_loops > 1:
        raise ValueError(
            f"head_scores: site {site.name!r} has shape {list(site.axes + site.shape)}, expected attention "
            f"probabilities {[*batch, 'heads', T, T]} for tokens {list(tokens.shape)}. gf.sites(f)(*args) lists all "
            "sites."
        )
    # [iterations, batch..., kv_heads, group, T, T] -> [iterations, batch..., heads, T, T]
    value = value.reshape(*(site.axes or (1,)), *batch, -1, T, T)
    return jnp.moveaxis(value, 1 + len(batch), 1)


def _patterns(tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the pattern of each score, booleans that broadcast to `[batch..., T, T]`."""
    same = tokens[..., :, None] == tokens[..., None, :]
    # Position s + 1 follows a position s with the same token: the columns move by one.
    after = jnp.roll(same, 1, -1).at[..., 0].set(False)
    previous = jnp.eye(tokens.shape[-1], k=-1, dtype=bool)
    return previous, jnp.tril(same, -1), jnp.tril(after, -1)


def _share(attention: jax.Array, pattern: jax.Array) -> jax.Array:
    """Return the mean attention to a pattern over the positions that have any of it: `[layers, heads]`."""
    own = (1,) * (attention.ndim - pattern.ndim)
    pattern = pattern.reshape(own + pattern.shape)  # [batch..., T, T] -> [1, 1, batch..., T, T]
    on = jnp.where(pattern, attention, 0).sum(-1)  # [layers, heads, batch..., T]
    has_any = jnp.broadcast_to(pattern.any(-1), (1, 1, *on.shape[2:]))
    return on.sum(tuple(range(2, on.ndim))) / has_any.sum().astype(on.dtype)
