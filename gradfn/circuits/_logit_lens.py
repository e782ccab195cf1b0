"""The logit lens: what each layer's residual stream says about the output."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from gradfn.circuits._jacobian_lens import JacobianLens
from gradfn.circuits._stream import find_stream, stacked
from gradfn.core.precision import widen
from gradfn.core.signature import transform_of
from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.jaxpr.call import jit_arrays
from gradfn.jaxpr.sites import Selection


@functools.partial(jax.tree_util.register_dataclass, data_fields=["logits"], meta_fields=["layers", "ndim"])
@dataclass(frozen=True, repr=False)
class LogitLens(ShowsTable):
    """What each layer says about the output: one distribution over the vocabulary per layer and position.

    A pytree of arrays. `print` shows a table.

    Attributes:
        logits: `[layer, ..., vocab]`; those of the last layer are the model's own.
        layers: the name of each layer's site (static).
        ndim: the number of axes of `logits` (static).
    """

    logits: Float[Array, "layer ... vocab"]
    layers: tuple[str, ...]
    ndim: int

    @property
    def log_probabilities(self) -> Float[Array, "layer ... vocab"]:
        """The logarithms of the probabilities, in float32 or wider."""
        if self.logits.ndim != self.ndim:
            raise ValueError(
                f"LogitLens: expected logits with {self.ndim} axes, got {list(self.logits.shape)}: it has the results "
                "of several inputs. Use jax.vmap: jax.vmap(lambda lens: lens.entropy)(lens)."
            )
        return jax.nn.log_softmax(widen(self.logits))

    @property
    def entropy(self) -> Float[Array, "layer ..."]:
        """The entropy of each distribution, in nats."""
        log_p = self.log_probabilities
        return -_expectation(log_p, log_p)

    @property
    def kl(self) -> Float[Array, "layer ..."]:
        """The Kullback-Leibler divergence KL(last layer || layer), in nats: 0 in the last layer."""
        log_p = self.log_probabilities
        return _expectation(log_p[-1:], log_p[-1:] - log_p)

    def top(self, k: int = 1) -> Int[Array, "layer ... k"]:
        """Return the k most probable tokens, the most probable first."""
        return jax.lax.top_k(self.log_probabilities, k)[1]

    def log_probability(self, targets: Int[Array, "..."]) -> Float[Array, "layer ..."]:
        """Return the log-probability of a token at each position; that of a negative token is 0.

        Raises:
            ValueError: the targets do not have one token per position.
        """
        log_p, targets = self.log_probabilities, self._checked(targets)
        index = jnp.maximum(targets, 0)[None, ..., None]  # [1, ..., 1]
        found = jnp.take_along_axis(log_p, index, -1, mode="fill", fill_value=jnp.nan)[..., 0]
        return jnp.where((targets >= 0)[None], found, 0)

    def rank(self, targets: Int[Array, "..."]) -> Int[Array, "layer ..."]:
        """Return how many tokens are more probable than a token, at each position; -1 for a negative token.

        Raises:
            ValueError: the targets do not have one token per position.
        """
        log_p, targets = self.log_probabilities, self._checked(targets)
        own = self.log_probability(targets)
        rank = jnp.sum(log_p > own[..., None], -1)
        return jnp.where(((targets >= 0) & (targets < log_p.shape[-1]))[None], rank, -1)

    def cross_entropy(self, targets: Int[Array, "..."]) -> Float[Array, " layer"]:
        """Return the cross-entropy of each layer, averaged over positions; negative targets do not count.

        Raises:
            ValueError: the targets do not have one token per position.
        """
        found, targets = self.log_probability(targets), self._checked(targets)
        return -found.sum(tuple(range(1, found.ndim))) / jnp.sum(targets >= 0).astype(found.dtype)

    def _checked(self, targets: Any) -> jax.Array:
        targets = jnp.asarray(targets)
        if targets.shape != self.logits.shape[1:-1] or not jnp.issubdtype(targets.dtype, jnp.integer):
            raise ValueError(
                f"LogitLens: expected one token per position, int{list(self.logits.shape[1:-1])}, got "
                f"{targets.dtype}{list(targets.shape)}"
            )
        return targets

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per layer, averaged over positions, and its prediction at the last position."""
        log_p, top = self.log_probabilities, self.top()[..., 0]
        agrees = (top == top[-1:]).reshape(len(top), -1).mean(1)
        # [layer, ..., vocab] -> [layer, vocab]
        at_the_end = log_p.reshape(len(log_p), -1, log_p.shape[-1])[:, -1]
        out = TextTable(
            "Logit lens", "averaged over positions; the token is the prediction at the last position"
        )
        out.add_column("layer", shorten=True)
        for header, form in (("entropy", ".3f"), ("KL to last", ".3f"), ("same top", ".0%")):
            out.add_column(header, form)
        out.add_column("token")
        out.add_column("probability", ".1%")
        entropy, kl = (x.reshape(len(x), -1).mean(1) for x in (self.entropy, self.kl))
        for i, name in enumerate(self.layers):
            token = int(at_the_end[i].argmax())
            share = float(jnp.exp(at_the_end[i, token]))
            out.add_row(name, float(entropy[i]), float(kl[i]), float(agrees[i]), token, share)
        return out.folded(rows, "lens.table(rows=None)")


def _expectation(log_p: jax.Array, x: jax.Array) -> jax.Array:
    """Return the mean of `x` under a distribution; what has probability 0 does not count."""
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * jnp.where(p > 0, x, 0), 0), -1)


def logit_lens(
    f: Callable, *, sites: Selection = None, transport: JacobianLens | None = None
) -> Callable[..., LogitLens]:
    """Return a function that computes the logits that the model's tail makes of each layer's residual stream.

    nostalgebraist, *interpreting GPT: the logit lens*, 2020. The tail is what lies behind the last of the streams:
    the final normalization and the unembedding. It is given the stream of each layer instead. With `transport`, the
    stream is first multiplied by the mean Jacobian of all layers between (`gf.circuits.jacobian_lens`).

    The tail is found by tracing, so any architecture will do: a GPT with unrolled or scanned blocks, pretrained
    weights, modules of Flax or Equinox.

    Args:
        f: `(params, *args) -> logits [..., vocab]`, any JAX function.
        sites: the values of the residual stream, one per layer, all of one shape: names or globs of
            `gf.sites(f)(*args)`, or a function of a site. By default `embedded` and each block's `residual`, as
            gradfn's networks name them. What lies behind the last one is the tail.
        transport: a lens that was fitted with the same `sites`; None for the identity.

    Returns:
        A function of the arguments of `f` that returns a `LogitLens`. It compiles itself, and works inside `jit`
        and `vmap`.

    Raises:
        ValueError: an unknown site (similar names are listed), streams of several shapes, or a `transport` with other
            layers.
        TypeError: `f` does not return one floating array.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> net = gf.gpt(gf.GPTConfig(vocab=11, context=8, n_layers=2, n_heads=2, width=8))
        >>> lens = gf.circuits.logit_lens(net.apply)(net.init(jax.random.key(0)), jnp.array([7, 1, 3]))
        >>> lens.logits.shape, lens.layers
        ((3, 3, 11), ('embedded', 'blocks/0/residual', 'blocks/1/residual'))
        >>> lens.kl.shape, lens.top(2).shape, lens.cross_entropy(jnp.array([1, 3, 5])).shape
        ((3, 3), (3, 3, 2), (3,))
    """

    @jit_arrays
    def run(*args: PyTree) -> LogitLens:
        stream = find_stream(f, args, sites, "logit_lens")
        inputs = stream.model.program.inputs
        output, kept = stream.model.run(inputs, keep=stream.names)
        checked_logits(output, "logit_lens")
        x = stacked(stream.layers, kept)
        if transport is not None:
            x = transport.transported(x, stream.labels)
        # One layer at a time: what is not returned is then in memory for one layer only.
        logits = jax.lax.map(lambda x: stream.tail(inputs, x)[0], x)
        return LogitLens(logits, stream.labels, logits.ndim)

    @transform_of(f, "logit_lens", own=0)
    def lens(*args: PyTree) -> LogitLens:
        """Return the logits that the model's tail makes of each layer's residual stream."""
        return run(*args)

    return lens


def checked_logits(output: PyTree, what: str) -> jax.Array:
    """Return a function's output.

    Raises:
        TypeError: it is not one floating array with an axis for the vocabulary.
    """
    leaves = jax.tree.leaves(output)
    if len(leaves) != 1 or jnp.ndim(leaves[0]) == 0 or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        got = ", ".join(f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for leaf in leaves[:8])
        raise TypeError(
            f"{what}: the function must return logits [..., vocab], one floating array, got {got or 'nothing'}. Pass "
            "the network instead of its loss, such as net.apply, or lambda params, tokens: f(params, tokens)[0]."
        )
    return leaves[0]
