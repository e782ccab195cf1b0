"""The backward lens: what a step of gradient descent writes into the residual stream, in vocabulary."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from gradfn.circuits._stream import find_stream, labels, layers_of, select_parts, stacked
from gradfn.core.precision import widen
from gradfn.core.signature import transform_of
from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.jaxpr.call import jit_arrays, scalar_and_aux
from gradfn.jaxpr.sites import Selection


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["loss", "logits", "norms"], meta_fields=["parts"]
)
@dataclass(frozen=True, repr=False)
class BackwardLens(ShowsTable):
    """What a step of gradient descent writes into the residual stream; a pytree of arrays. `print` shows a table.

    Attributes:
        loss: its value.
        logits: `[part, ..., vocab]`, what the negative gradient of the loss with respect to a part's output does to
            the logits, were it added to the stream.
        norms: `[part, ...]`, the norms of the gradients at each position.
        parts: the name of each part's site (static).
    """

    loss: Float[Array, ""]
    logits: Float[Array, "part ... vocab"]
    norms: Float[Array, "part ..."]
    parts: tuple[str, ...]

    def promoted(self, k: int = 1) -> Int[Array, "part ... k"]:
        """Return the k tokens whose logits the step raises most, the first one most."""
        return jax.lax.top_k(self.logits, k)[1]

    def demoted(self, k: int = 1) -> Int[Array, "part ... k"]:
        """Return the k tokens whose logits the step lowers most, the first one most."""
        return jax.lax.top_k(-self.logits, k)[1]

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per part: the position with the largest gradient, and what is written there."""
        out = TextTable(
            "Backward lens", "at the position (of all, flat) where the part's gradient is largest"
        )
        out.add_column("part", shorten=True)
        for header in ("position", "gradient norm", "promotes", "demotes"):
            out.add_column(header)
        for i, name in enumerate(self.parts):
            at = int(self.norms[i].argmax())
            logits = self.logits[i].reshape(-1, self.logits.shape[-1])[at]
            norm = float(self.norms[i].ravel()[at])
            out.add_row(name, at, norm, int(logits.argmax()), int(logits.argmin()), weight=norm)
        return out.folded(rows, "lens.table(rows=None)")


def backward_lens(
    loss: Callable, *, sites: Selection = None, parts: Selection = None, logits: str = "logits"
) -> Callable[..., BackwardLens]:
    """Return a function that computes what a step of gradient descent writes into the residual stream.

    Katz et al., *Backward Lens: Projecting Language Model Gradients into the Vocabulary Space*, 2024. The gradient
    of a matrix that writes into the stream is the sum over positions of the gradient at its output times its input
    (there, section 4), so the step adds a multiple of the negative gradient at the output wherever the input recurs.
    That is projected to the vocabulary by the derivative of the model's tail, with the final normalization's scale
    held fixed: the unembedding matrix times the gain.

    Args:
        loss: `(params, *args) -> scalar` or `(scalar, aux)`, any JAX function that computes logits.
        sites: the values of the residual stream, as for `gf.circuits.logit_lens`. The tail starts at the last.
        parts: what is added up to the stream: by default `embedded`, and each block's `attention_out` and
            `feed_out`.
        logits: the site of the logits `[..., vocab]`.

    Returns:
        A function of the arguments of `loss` that returns a `BackwardLens`: one forward and one backward pass. It
        compiles itself, and works inside `jit` and `vmap`.

    Raises:
        ValueError: an unknown site (similar names are listed), a part of another shape than the stream, or logits
            that are computed in a loop.
        TypeError: a loss that is not a floating scalar.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> net = gf.gpt(gf.GPTConfig(vocab=11, context=8, n_layers=1, n_heads=2, width=8))
        >>> params, example = net.init(jax.random.key(0)), (jnp.array([7, 1, 3]), jnp.array([1, 3, 5]))
        >>> lens = gf.circuits.backward_lens(gf.next_token_loss(net))(params, example)
        >>> lens.parts, lens.logits.shape
        (('embedded', 'attention_out', 'feed_out'), (3, 3, 11))
        >>> lens.promoted()[-1, :, 0]  # the last layer learns to say the next tokens
        Array([1, 3, 5], dtype=int32)
    """

    @jit_arrays
    def run(*args: PyTree) -> BackwardLens:
        stream = find_stream(loss, args, sites, "backward_lens")
        model, inputs = stream.model, stream.model.program.inputs
        chosen = select_parts(stream, parts)
        (site,) = _one(model.select(logits), logits)
        scalar_and_aux(model.program.rebuild(model.program.jaxpr.out_avals), "backward_lens", "loss")

        def forward(added: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
            edits = {name: lambda x, more: x + more for name in added}
            output, kept = model.run(inputs, edits, [stream.end, *stream.scales], added)
            return scalar_and_aux(output, "backward_lens", "loss")[0], kept

        zeros = {part.name: jnp.zeros(part.axes + part.shape, part.dtype) for part in chosen}
        (value, kept), grads = jax.value_and_grad(forward, has_aux=True)(zeros)
        order = layers_of(chosen)
        directions = -stacked(order, grads)  # [part, ..., width]
        scales = {name: kept[name] for name in stream.scales}

        def logits_at(x: jax.Array) -> jax.Array:
            return stream.tail(inputs, x, scales, [site.name])[1][site.name]

        _, push = jax.linearize(logits_at, kept[stream.end])
        written = jax.lax.map(push, directions.astype(kept[stream.end].dtype))
        norms = jnp.sqrt(jnp.sum(widen(directions) ** 2, -1))
        return BackwardLens(value, written, norms, labels(order))

    @transform_of(loss, "backward_lens", own=0)
    def lens(*args: PyTree) -> BackwardLens:
        """Return what a step of gradient descent writes into the residual stream, in vocabulary."""
        return run(*args)

    return lens


def _one(sites: list, name: str) -> list:
    if len(sites) != 1 or sites[0].axes:
        found = ", ".join(f"{site.name}, {list(site.axes)} iterations" for site in sites)
        raise ValueError(
            f"backward_lens: logits={name!r}: expected one site outside of loops, got {found}. Name the site of the "
            "logits by logits=..., and use a loss that computes all of them at once."
        )
    return sites
