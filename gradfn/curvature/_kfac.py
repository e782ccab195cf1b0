"""`gf.curvature.kfac`, `gf.curvature.ekfac` and `gf.curvature.ggn_diagonal`: curvature of each parameter on its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from gradfn.core.labels import check_range
from gradfn.core.names import ParameterError
from gradfn.core.signature import transform_of
from gradfn.curvature._blocks import Block, EigenBlock, KroneckerBlock
from gradfn.curvature._factors import block_of, corrected, measure_factors, measure_squares
from gradfn.curvature._pairs import Source, described, sums_over
from gradfn.display import ROWS, ShowsTable, TextTable, array_table
from gradfn.flatten import loss_of_example
from gradfn.jaxpr.call import floating_leaves, jit_arrays, with_hint
from gradfn.jaxpr.program import leaf_name
from gradfn.per_example.plan import Plan
from gradfn.per_example.traced_loss import REMEDY, TracedLoss

WeightSharing = Literal["expand", "reduce"]
# Factors that a table computes the eigenvalues of.
SHOWN = 1024


@functools.partial(jax.tree_util.register_dataclass, data_fields=["blocks"], meta_fields=["examples"])
@dataclass(frozen=True, repr=False)
class KroneckerCurvature(ShowsTable):
    """A block-diagonal curvature matrix, one block per parameter; a pytree of arrays. `print` shows a table.

    Attributes:
        blocks: in the tree of the parameters, the block of each: its Kronecker factors `first` and `second` in the
            order of the parameter's axes (of `gf.curvature.kfac`), or eigenvectors `first` and `second` and
            eigenvalues `values` (of `gf.curvature.ekfac`); None where a leaf is not a floating array.
        examples: the number of examples that it is averaged over (static).
    """

    blocks: PyTree
    examples: int

    @property
    def methods(self) -> tuple[tuple[str, str], ...]:
        """`(path, method)` per parameter: how its block was found."""
        return tuple((name, block.method) for name, block in self._named())

    def product(self, vector: PyTree) -> PyTree:
        """Return the matrix times a vector: a tree like the parameters.

        Raises:
            ParameterError: a vector of another structure or shape.
        """
        return self._map(lambda block, v: block.product(v), vector, "product")

    def inverse_product(self, vector: PyTree, damping: PyTree = 0.0) -> PyTree:
        """Return the inverse of the matrix plus `damping` times the identity, times a vector.

        Args:
            vector: a tree like the parameters.
            damping: a scalar, or a tree of one scalar per parameter, such as `relative_damping()`. Without damping
                the result is infinite or NaN where an eigenvalue is 0.

        Raises:
            ParameterError: a vector of another structure or shape.
            ValueError: negative damping.
        """
        dampings = iter(self._dampings(damping, "inverse_product"))

        def solve(block: Block, v: jax.Array) -> jax.Array:
            of = block.eigen()
            return of.map(1 / (of.values + next(dampings)), v)

        return self._map(solve, vector, "inverse_product")

    def log_determinant(self, damping: PyTree = 0.0) -> Float[Array, ""]:
        """Return the logarithm of the determinant of the matrix plus `damping` times the identity."""
        pairs = zip(self._named(), self._dampings(damping, "log_determinant"), strict=True)
        logs = [jnp.sum(jnp.log(block.eigen().values + damping)) for (_, block), damping in pairs]
        return jnp.sum(jnp.stack(logs))

    def diagonal(self) -> PyTree:
        """Return the diagonal of the matrix: a tree like the parameters."""
        return jax.tree.map(lambda block: block.diagonal(), self.blocks, is_leaf=_is_block)

    def trace(self) -> Float[Array, ""]:
        """Return the trace of the matrix."""
        return jnp.sum(jnp.stack([block.trace() for _, block in self._named()]))

    def relative_damping(self, fraction: float = 0.1) -> PyTree:
        """Return a damping per parameter: a fraction of the mean eigenvalue of its block.

        Grosse et al., *Studying Large Language Model Generalization with Influence Functions*, 2023, use 0.1.
        """

        def of(block: Block) -> jax.Array:
            return fraction * block.trace() / max(math.prod(block.layout.shape), 1)

        return jax.tree.map(of, self.blocks, is_leaf=_is_block)

    def decomposed(self) -> KroneckerCurvature:
        """Return the same matrix by eigenvalues, of which inverse products cost less."""
        return KroneckerCurvature(
            jax.tree.map(lambda block: block.eigen(), self.blocks, is_leaf=_is_block), self.examples
        )

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per parameter: the method, the sizes of the factors, the eigenvalues."""
        named = self._named()
        if any(block.is_batched for _, block in named):
            return array_table("KroneckerCurvature, batched by vmap", self)
        out = TextTable(f"Curvature of {len(named)} parameters, averaged over {self.examples:,} examples")
        out.add_column("parameter", shorten=True)
        out.add_column("method", shorten=True)
        out.add_column("factors")
        out.add_column("trace", ".3g")
        out.add_column("largest", ".3g")
        out.add_column("condition", ".2g", drop=1)
        for name, block in named:
            s, k, n = block.layout.sizes
            sizes = " ⊗ ".join(str(size) for size in (k, n) if size > 1) or "1"
            values = _shown_values(block)
            largest = None if values is None else float(values.max())
            condition = (
                None
                if values is None
                else float(values.max() / values.min())
                if values.min() > 0
                else math.inf
            )
            trace = float(block.trace())
            cells = (f"{s} × {sizes}" if s > 1 else sizes, trace, largest, condition)
            out.add_row(name, block.method, *cells, weight=trace)
        return out.folded(rows, "curvature.table(rows=None)")

    def _named(self) -> list[tuple[str, Block]]:
        pairs = jax.tree_util.tree_leaves_with_path(self.blocks, is_leaf=_is_block)
        return [(leaf_name(path), block) for path, block in pairs]

    def _map(self, f: Callable[[Block, jax.Array], jax.Array], vector: PyTree, what: str) -> PyTree:
        structure: Any
        blocks, structure = jax.tree.flatten(self.blocks, is_leaf=lambda x: x is None or _is_block(x))
        try:
            parts = structure.flatten_up_to(vector)
        except (ValueError, TypeError, KeyError) as error:
            names = ", ".join(name for name, _ in self._named())
            first = self._named()[0][0]
            raise ParameterError(
                first, f"{what}: expected the parameters' structure, {names:.200}; got {vector!r:.200}"
            ) from error
        names_of = iter(self._named())
        out: list[jax.Array | None] = []
        for block, part in zip(blocks, parts, strict=True):
            if block is None:
                out.append(None)
                continue
            name, _ = next(names_of)
            if jnp.shape(part) != block.layout.shape:
                raise ParameterError(
                    name,
                    f"{what}: expected a vector of shape {list(block.layout.shape)}, like the parameter, "
                    f"got {list(jnp.shape(part))}",
                )
            part = jnp.asarray(part)
            found = f(block, part.astype(block.dtype))
            out.append(found.astype(part.dtype) if jnp.issubdtype(part.dtype, jnp.floating) else found)
        return jax.tree.unflatten(structure, out)

    def _dampings(self, damping: PyTree, what: str) -> list[jax.Array]:
        leaves = jax.tree.leaves(damping)
        n = len(self._named())
        if len(leaves) not in (1, n) or any(jnp.ndim(x) for x in leaves):
            raise ValueError(
                f"{what}: damping must be a scalar or a tree of one scalar per parameter, got {damping!r:.200}"
            )
        for x in leaves:
            if not isinstance(x, jax.core.Tracer) and float(x) < 0:
                raise ValueError(f"{what}: damping must be >= 0, got {float(x):g}")
        return leaves * n if len(leaves) == 1 else leaves


def _is_block(x: Any) -> bool:
    return isinstance(x, (KroneckerBlock, EigenBlock))


def _shown_values(block: Block) -> np.ndarray | None:
    """Return the eigenvalues of a block; None if there are none or they take long."""
    if not isinstance(block, EigenBlock) and max(block.layout.sizes[1:]) > SHOWN and block.first.ndim == 3:
        return None
    values = np.asarray(block.eigen().values)
    return values if values.size else None


def kfac(
    function: Callable,
    loss: str | Callable | None = None,
    *,
    samples: int | None = None,
    weight_sharing: WeightSharing = "expand",
    batch_size: int = 64,
) -> Callable[..., KroneckerCurvature]:
    """Return a function that approximates a curvature matrix by one Kronecker product per parameter.

    K-FAC: Martens and Grosse, *Optimizing neural networks with Kronecker-factored approximate curvature*, 2015. The
    gradient of a weight is made of its inputs a and the cotangents g of its outputs; its block `E[a a^T (x) g g^T]` is
    approximated by `E[a a^T] (x) E[g g^T]`. Blocks between parameters are 0. Inputs and cotangents are recorded in the
    traced program, so any JAX function works: matrix products, convolutions (Grosse and Martens, 2016), embeddings
    (the factor of the rows is diagonal, how often each is used), attention, tied weights, stacked and recurrent layers.

    The matrix that is approximated, averaged over examples:
        `kfac(loss)`: the empirical Fisher, as `gf.curvature.fisher_vp(loss)`, from the gradients of the loss itself.
        `kfac(outputs, "softmax")`: the Gauss-Newton matrix, as `gf.curvature.ggn_vp(outputs, "softmax")`, which is the
            Fisher information ("type-2" elsewhere), with one backward pass per output.
        `kfac(outputs, "softmax", samples=1)`: an unbiased estimate of its cotangents' second moments, with one backward
            pass per sample: for nets with many outputs, such as one for each token of a vocabulary at each position.

    A weight whose products have several positions (of a sequence, of an image, iterations of a loop that share it) has
    the factors of K-FAC-expand or of K-FAC-reduce: Eschenhagen et al., *Kronecker-Factored Approximate Curvature for
    Modern Neural Network Architectures*, 2023. Expand averages `a a^T` and sums `g g^T` over positions; reduce averages
    a and sums g before the outer products (but for the rows of an embedding). A weight used several times, such as an
    embedding that is also the output layer, has the average of its uses' factors, weighted by their traces. Layers that
    are stacked in a scan, or groups of a convolution, have a pair of factors each.

    Biases and gains, and parameters used in any other way, have the exact block if it is small, otherwise the exact
    block of each row or the exact diagonal, from whole gradients of `batch_size` examples; `methods` of the result, and
    its table, name these. A factor of more than 4,096 rows is replaced by its diagonal.

    Args:
        function: the loss of one example `(params, example) -> scalar` or `(scalar, aux)`, or its `gf.batch_mean`;
            with `loss`, the outputs `(params, x) -> array` for one example, such as `net.apply`.
        loss: of one example's outputs: `"softmax"`, `"squared"` or a function `(outputs, y) -> scalar`, as in
            `gf.curvature.ggn_vp`; None for the empirical Fisher.
        samples: the number of random vectors u per example with `E[u u^T] = H`, the Hessian of the loss with respect
            to the outputs, that are pulled back instead of the columns of a root of H (instead of labels sampled from
            the net, whose gradients have the same second moments). Needs `loss`.
        weight_sharing: `"expand"` or `"reduce"`.
        batch_size: the number of examples at a time. Memory: their activations, and the cotangents of these.

    Returns:
        `(params, batch, key=None) -> KroneckerCurvature`, compiled at its first call; it can be called inside `jit`.
        `batch` is the examples with a leading axis, `(x, y)` with `loss`; `key` draws the samples, `jax.random.key(0)`
        by default.

    Raises:
        ValueError: an unknown `loss` or `weight_sharing`, `batch_size` or `samples` below 1, samples without a loss;
            labels that do not fit the outputs.
        TypeError: a loss that is not a floating scalar, outputs that are not one floating array, no floating parameter.
        ParameterError: complex parameters.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.mlp([4, 3])
    >>> params, x = net.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), [32, 4])
    >>> curvature = gf.curvature.kfac(net.apply, "softmax")(params, (x, jnp.arange(32) % 3))
    >>> curvature.blocks["W1"].first.shape, curvature.blocks["W1"].second.shape  # of outputs, and of inputs
    ((1, 3, 3), (1, 4, 4))
    >>> curvature.methods
    (('W1', 'K-FAC, dense'), ('b1', 'exact block'))
    >>> step = curvature.inverse_product(params, damping=0.1)
    >>> gf.shapes(step)
    {'W1': [3, 4], 'b1': [3]}
    """
    source = _source("kfac", function, loss, samples, batch_size)
    return _transform("kfac", _kfac, function, source, weight_sharing)


def ekfac(
    function: Callable,
    loss: str | Callable | None = None,
    *,
    samples: int | None = None,
    weight_sharing: WeightSharing = "expand",
    batch_size: int = 64,
) -> Callable[..., KroneckerCurvature]:
    """Return a function that approximates a curvature matrix by K-FAC, with corrected eigenvalues.

    EK-FAC: George et al., *Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis*, 2018. The
    eigenvectors of the Kronecker products of `gf.curvature.kfac` are kept; a second pass over the batch replaces their
    eigenvalues by the second moments of the gradients along the eigenvectors, the best ones in the Frobenius norm. The
    trace is then exact, and with several positions or uses of a weight nothing is left out of its gradient. The
    gradients of single examples are formed only for weights with several positions or uses.

    Args:
        function: as in `gf.curvature.kfac`.
        loss: as in `gf.curvature.kfac`.
        samples: as in `gf.curvature.kfac`; both passes use the same.
        weight_sharing: as in `gf.curvature.kfac`.
        batch_size: as in `gf.curvature.kfac`.

    Returns:
        `(params, batch, key=None) -> KroneckerCurvature`, compiled at its first call; it can be called inside `jit`.

    Raises:
        ValueError: as in `gf.curvature.kfac`.
        TypeError: as in `gf.curvature.kfac`.
        ParameterError: complex parameters.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.mlp([4, 3])
    >>> params, x = net.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), [32, 4])
    >>> curvature = gf.curvature.ekfac(net.apply, "softmax")(params, (x, jnp.arange(32) % 3))
    >>> exact = gf.curvature.ggn_diagonal(net.apply, "softmax")(params, (x, jnp.arange(32) % 3))
    >>> total = sum(leaf.sum() for leaf in jax.tree.leaves(exact))
    >>> print(f"{curvature.trace() / total:.4f}")
    1.0000
    """
    source = _source("ekfac", function, loss, samples, batch_size)
    return _transform("ekfac", _ekfac, function, source, weight_sharing)


def _transform(
    name: str, compute: Callable, function: Callable, source: Source, weight_sharing: str
) -> Callable[..., KroneckerCurvature]:
    """Return what `kfac` and `ekfac` return; `compute` is `_kfac` or `_ekfac`."""
    if weight_sharing not in get_args(WeightSharing):
        raise ValueError(f"{name}: weight_sharing must be 'expand' or 'reduce', got {weight_sharing!r}")
    compiled = jit_arrays(functools.partial(compute, source, weight_sharing == "reduce"))

    @transform_of(function, name, own=2)
    def curvature(params: PyTree, batch: PyTree, *, key: Key[Array, ""] | None = None) -> KroneckerCurvature:
        """Return the Kronecker-factored curvature at `params`, averaged over the examples of `batch`."""
        _check(source, params, batch)
        return compiled(params, batch, key)

    return curvature


def ggn_diagonal(
    outputs: Callable, loss: str | Callable = "softmax", *, samples: int | None = None, batch_size: int = 64
) -> Callable[..., PyTree]:
    """Return a function that computes the diagonal of the generalized Gauss-Newton matrix.

    It is exact: the sum of the squared gradients of each column of a root of the loss's Hessian with respect to the
    outputs, which takes one backward pass per output. Squares are summed from the inputs of each product and the
    cotangents of its outputs; single gradients are formed only for weights with several positions or uses (Dangel et
    al., *BackPACK: Packing more into backprop*, 2020, DiagGGNExact).

    Args:
        outputs: `(params, x) -> array` for one example, such as `net.apply`.
        loss: of one example's outputs: `"softmax"`, `"squared"` or a function `(outputs, y) -> scalar`, as in
            `gf.curvature.ggn_vp`.
        samples: an unbiased estimate from this number of backward passes instead: see `gf.curvature.kfac`.
        batch_size: the number of examples at a time.

    Returns:
        `(params, (x, y), key=None) -> tree` like the parameters, averaged over the batch; compiled at its first call.

    Raises:
        ValueError: as in `gf.curvature.kfac`.
        TypeError: as in `gf.curvature.kfac`.
        ParameterError: complex parameters.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> outputs = lambda w, x: w @ x
    >>> x, y = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.zeros([2, 1])
    >>> gf.curvature.ggn_diagonal(outputs, "squared")(jnp.ones([1, 2]), (x, y)).round(3)  # 2 mean x^2
    Array([[10., 20.]], dtype=float32)
    """
    if loss is None:
        raise ValueError(
            "ggn_diagonal: loss must be 'softmax', 'squared' or a function (outputs, y) -> scalar"
        )
    source = _source("ggn_diagonal", outputs, loss, samples, batch_size)
    compiled = jit_arrays(functools.partial(_ggn_diagonal, source))

    @transform_of(outputs, "ggn_diagonal", own=2)
    def diagonal(
        params: PyTree, batch: tuple[PyTree, PyTree], *, key: Key[Array, ""] | None = None
    ) -> PyTree:
        """Return the diagonal of the Gauss-Newton matrix at `params`: a tree like `params`. `batch` is `(x, y)`."""
        _check(source, params, batch)
        return compiled(params, batch, key)

    return diagonal


def _source(
    what: str, function: Callable, loss: str | Callable | None, samples: int | None, batch_size: int
) -> Source:
    if batch_size < 1:
        raise ValueError(f"{what}: batch_size must be an integer >= 1, got {batch_size}")
    if isinstance(loss, str) and loss not in ("softmax", "squared"):
        raise ValueError(
            f"{what}: loss must be 'softmax', 'squared' or a function (outputs, y) -> scalar, got {loss!r}"
        )
    if samples is not None and (loss is None or samples < 1):
        raise ValueError(
            f"{what}: samples must be an integer >= 1, beside a loss of the outputs, got {samples}"
            + (f". Pass {what}(outputs, 'softmax', samples={samples})" if loss is None else "")
        )
    if loss is None:
        function = with_hint(loss_of_example(function), REMEDY)
    return Source(what, function, loss, samples, batch_size)


def _check(source: Source, params: PyTree, batch: PyTree) -> None:
    """Check what a compiled program cannot: the labels' values."""
    floating_leaves(params, source.what)
    if source.loss is None:
        return
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise ValueError(f"{source.what}: expected a batch (x, y), got {type(batch).__name__}")
    if source.loss == "softmax" and jnp.size(batch[1]):
        z: Any = jax.eval_shape(lambda: jax.vmap(lambda x: source.function(params, x))(batch[0]))
        classes = math.prod(z.shape) // jnp.size(batch[1])
        check_range(
            batch[1], classes, source.what, padding=z.ndim > 2 and z.shape[:-1] == jnp.shape(batch[1])
        )


def _call(source: Source, params: PyTree, batch: PyTree) -> tuple[TracedLoss, Plan]:
    call = source.traced(params, batch)
    return call, Plan(call).pairing()


def _blocks(
    source: Source, reduce: bool, params: PyTree, batch: PyTree, key: jax.Array | None
) -> tuple[TracedLoss, list[Block]]:
    call, plan = _call(source, params, batch)
    inputs, cotangents = jax.tree.map(
        lambda x: x / call.size, sums_over(source, params, batch, key, measure_factors(reduce))
    )
    return call, [block_of(p, a, g) for p, a, g in zip(described(plan), inputs, cotangents, strict=True)]


def _kfac(source: Source, reduce: bool, params: PyTree, batch: PyTree, key: Any) -> KroneckerCurvature:
    call, blocks = _blocks(source, reduce, params, batch, key)
    return KroneckerCurvature(call.tree(blocks), call.size)


def _ekfac(source: Source, reduce: bool, params: PyTree, batch: PyTree, key: Any) -> KroneckerCurvature:
    call, blocks = _blocks(source, reduce, params, batch, key)
    of = [block.eigen() for block in blocks]
    # Blocks of whole gradients are exact.
    bases = [
        None if block.method.startswith(("exact", "unused")) else (block.first, block.second) for block in of
    ]
    _, squares = sums_over(source, params, batch, key, measure_squares(bases))
    pairs = zip(of, squares, strict=True)
    return KroneckerCurvature(
        call.tree([block if s is None else corrected(block, s / call.size) for block, s in pairs]), call.size
    )


def _ggn_diagonal(source: Source, params: PyTree, batch: PyTree, key: Any) -> PyTree:
    call, plan = _call(source, params, batch)
    parameters = described(plan)
    _, squares = sums_over(source, params, batch, key, measure_squares([(None, None)] * len(parameters)))
    found = [
        (p.layout.leaf(s) if p.layout else s.reshape(p.shape)) / call.size
        for p, s in zip(parameters, squares, strict=True)
    ]
    return call.like(found)
