"""The Jacobian lens: what each layer's residual stream does to the last one, averaged over a corpus."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from gradfn.circuits._stream import find_stream, stacked
from gradfn.core.precision import widen
from gradfn.core.signature import transform_of
from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.jaxpr.call import jit_arrays
from gradfn.jaxpr.sites import Selection


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["jacobians", "relative_error"], meta_fields=["layers"]
)
@dataclass(frozen=True, repr=False)
class JacobianLens(ShowsTable):
    """The mean Jacobian from each layer's residual stream to the last one; a pytree of arrays.

    `print` shows a table. `gf.circuits.logit_lens(f, transport=lens)` reads other inputs through it.

    Attributes:
        jacobians: `[layer, width, width]`, rows are features of the last stream; the last one is the identity.
        relative_error: `[layer]`, the standard error of the mean over sequences divided by the mean, both as Frobenius
            norms; NaN for a single sequence.
        layers: the name of each layer's site (static).
    """

    jacobians: Float[Array, "layer width width"]
    relative_error: Float[Array, " layer"]
    layers: tuple[str, ...]

    def transported(
        self, streams: Float[Array, "layer ... width"], layers: tuple[str, ...]
    ) -> Float[Array, "layer ... width"]:
        """Return each layer's stream multiplied by its Jacobian.

        Raises:
            ValueError: the streams are those of other layers, or of another width.
        """
        if layers != self.layers or streams.shape[-1] != self.jacobians.shape[-1]:
            raise ValueError(
                f"JacobianLens: expected streams of width {self.jacobians.shape[-1]} of the layers "
                f"{', '.join(self.layers)}, got width {streams.shape[-1]} of {', '.join(layers)}. Fit the lens with "
                "the same sites."
            )
        moved = jnp.einsum("lij,l...j->l...i", self.jacobians, widen(streams))  # [layer, ..., width]
        return moved.astype(streams.dtype)

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per layer: how far its Jacobian is from the identity."""
        n = self.jacobians.shape[-1]
        norm = jnp.linalg.norm(self.jacobians, axis=(1, 2))
        away = jnp.linalg.norm(self.jacobians - jnp.eye(n, dtype=self.jacobians.dtype)[None], axis=(1, 2))
        largest = jnp.linalg.norm(self.jacobians, 2, axis=(1, 2))
        columns = (
            ("norm", norm / n**0.5),
            ("from identity", away / n**0.5),
            ("diagonal", jnp.trace(self.jacobians, axis1=1, axis2=2) / n),
            ("stable rank", (norm / largest) ** 2),
            ("error", self.relative_error),
        )
        out = TextTable(
            "Jacobian lens",
            "norm: Frobenius norm / that of the identity; from identity: the same of J - I; diagonal: its mean; stable "
            "rank: (Frobenius norm / largest singular value)²; error: relative standard error over sequences",
        )
        out.add_column("layer", shorten=True)
        for header, _ in columns:
            out.add_column(header, ".3g")
        for i, name in enumerate(self.layers):
            out.add_row(name, *[float(values[i]) for _, values in columns])
        return out.folded(rows, "lens.table(rows=None)")


def jacobian_lens(
    f: Callable, *, sites: Selection = None, skip: int = 0, chunk: int = 64
) -> Callable[..., JacobianLens]:
    """Return a function that computes the mean Jacobian from each layer's residual stream to the last one.

    Gurnee et al., *Verbalizable Representations Form a Global Workspace in Language Models*, 2026. For the stream
    h_l of layer l and the last one h, of which the tail makes logits,

        J_l = mean over sequences and positions t of the sum over positions s of dh[s] / dh_l[t],

    so it includes what a position does to later ones by attention; in a causal model, earlier ones contribute
    nothing. The logits of the lens are those that the tail makes of J_l h_l: `gf.circuits.logit_lens(f,
    transport=lens)`. In a model whose layers are linear and do not mix positions they are the model's own.

    One forward pass, and `width` backward passes that all layers share, per sequence.

    Args:
        f: `(params, *example) -> logits [..., vocab]` of one sequence, any JAX function.
        sites: the values of the residual stream, one per layer, `[..., T, width]`, as for `gf.circuits.logit_lens`.
        skip: how many positions to leave out at the start of each sequence, as sources and as targets: there,
            attention has little to choose from, and Jacobians differ from those of other positions.
        chunk: how many of the `width` backward passes to compute at a time.

    Returns:
        `(params, *batch) -> JacobianLens`, where the batch has a leading axis over sequences. It compiles itself,
        and works inside `jit`.

    Raises:
        ValueError: an unknown site (similar names are listed), streams of several shapes, no position left, or a batch
            without a common leading axis.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> net = gf.gpt(gf.GPTConfig(vocab=11, context=8, n_layers=2, n_heads=2, width=8))
        >>> params, batch = net.init(jax.random.key(0)), jnp.array([[7, 1, 3], [2, 7, 1]])
        >>> lens = gf.circuits.jacobian_lens(net.apply)(params, batch)
        >>> lens.jacobians.shape, lens.layers
        ((3, 8, 8), ('embedded', 'blocks/0/residual', 'blocks/1/residual'))
        >>> gf.circuits.logit_lens(net.apply, transport=lens)(params, batch[0]).logits.shape
        (3, 3, 11)
    """
    if skip < 0 or chunk < 1:
        raise ValueError(f"jacobian_lens: skip must be >= 0 and chunk >= 1, got {skip} and {chunk}")

    def of_one(params: PyTree, example: PyTree) -> tuple[jax.Array, tuple[str, ...]]:
        """Return the Jacobians of one sequence, `[layer, width, width]`, and the names of the layers."""
        stream = find_stream(f, (params, *example), sites, "jacobian_lens")
        model, inputs = stream.model, stream.model.program.inputs
        own = [site for site in model.sites if site.name in stream.names]
        shape, dtype, inner = own[0].shape, own[0].dtype, stream.layers[:-1]
        if not inner:
            raise ValueError(f"jacobian_lens: expected two or more layers, got only {stream.labels[0]}")
        if len(shape) < 2 or shape[-2] <= skip:
            raise ValueError(
                f"jacobian_lens: expected a stream [..., T, width] with T > skip = {skip}, got {list(shape)}"
            )

        def end(added: dict[str, jax.Array]) -> jax.Array:
            edits = {name: lambda x, more: x + more for name in added}
            return model.run(inputs, edits, [stream.end], added)[1][stream.end]

        zeros = {site.name: jnp.zeros(site.axes + shape, dtype) for site in own if site.name != stream.end}
        # [T] -> [1, ..., T, 1]
        counts = (jnp.arange(shape[-2]) >= skip).reshape((1,) * (len(shape) - 2) + (-1, 1))
        _, pull = jax.vjp(end, zeros)

        def row(i: jax.Array) -> jax.Array:
            """Return row i of every layer's Jacobian, `[layer, width]`."""
            direction = jnp.zeros(shape, dtype).at[..., i].set(1) * counts.astype(dtype)  # [..., T, width]
            (grads,) = pull(direction)
            of_layers = widen(stacked(inner, grads))  # [layer, ..., T, width]
            of_layers = jnp.where(counts[None], of_layers, 0)
            return of_layers.sum(tuple(range(1, of_layers.ndim - 1)))

        n_sources = (shape[-2] - skip) * max(1, _product(shape[:-2]))
        rows = jax.lax.map(row, jnp.arange(shape[-1]), batch_size=min(chunk, shape[-1])) / n_sources
        jacobians = jnp.moveaxis(rows, 0, 1)  # [width, layer, width] -> [layer, width, width]
        last = jnp.eye(shape[-1], dtype=jacobians.dtype)[None]
        return jnp.concatenate([jacobians, last]), stream.labels

    @jit_arrays
    def run(params: PyTree, *batch: PyTree) -> JacobianLens:
        n = _batch_size(batch)
        names: list[tuple[str, ...]] = []

        def add(total: PyTree, example: PyTree) -> tuple[PyTree, None]:
            jacobians, labels = of_one(params, example)
            names.append(labels)
            return jax.tree.map(jnp.add, total, (jacobians, _squares(jacobians))), None

        shapes = jax.eval_shape(lambda: of_one(params, jax.tree.map(lambda x: x[0], batch))[0])
        start = jnp.zeros(shapes.shape, shapes.dtype), jnp.zeros(shapes.shape[:1], shapes.dtype)
        (total, squares), _ = jax.lax.scan(add, start, batch)
        mean = total / n
        # The sum over entries of their variance over sequences.
        variance = jnp.maximum(squares - n * _squares(mean), 0) / (n - 1) if n > 1 else jnp.nan * squares
        error = jnp.sqrt(variance / n / _squares(mean))
        return JacobianLens(mean, error, names[-1])

    @transform_of(f, "jacobian_lens", own=1)
    def lens(params: PyTree, /, *batch: PyTree) -> JacobianLens:
        """Return the mean Jacobian from each layer's residual stream to the last one, over a batch of sequences."""
        return run(params, *batch)

    return lens


def _squares(matrices: jax.Array) -> jax.Array:
    """Return the sum of squares of each matrix, `[layer]`."""
    return jnp.sum(matrices**2, (1, 2))


def _product(sizes: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, sizes, 1)


def _batch_size(batch: PyTree) -> int:
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        raise ValueError(
            "jacobian_lens: expected arrays with one leading axis over sequences, got shapes "
            f"{[list(jnp.shape(leaf)) for leaf in jax.tree.leaves(batch)]}"
        )
    return next(iter(sizes))[0]
