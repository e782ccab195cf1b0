"""Eigenvalues of the Hessian of a loss, and the largest beside what the learning rate allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from gradfn.core.signature import transform_of
from gradfn.curvature.lanczos import Which, eigenpairs, small
from gradfn.curvature.products import as_product, flat_matrix, keys_of
from gradfn.display import ROWS, ShowsTable, TextTable, array_table
from gradfn.jaxpr.call import floating_leaves, jit_arrays


class _Eigs(NamedTuple):
    values: Float[Array, " k"]
    vectors: PyTree
    residuals: Float[Array, " k"]
    converged: Bool[Array, " k"]
    products: Int[Array, ""]


class Eigs(ShowsTable, _Eigs):
    """Eigenvalues and eigenvectors of a curvature matrix. `print` shows a table; a pytree inside `jit`.

    Attributes:
        values: `[k]`, in the order of `which`, in units of the loss per squared unit of the parameters.
        vectors: a tree like the parameters with a leading axis `k`; each has norm 1 over all leaves together.
        residuals: `[k]`, `|H v - value v|`. An eigenvalue of H lies within that distance of `value`; if it is
            isolated, much nearer. Computed by the Lanczos process, exact up to rounding.
        converged: `[k]` of bool, whether the residual is within the tolerance.
        products: the number of products with H that it took.
    """

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per eigenvalue."""
        if jnp.ndim(self.products):
            return array_table("Eigs, batched by vmap", self)
        out = TextTable(f"{len(self.values)} eigenvalues in {int(self.products)} products")
        out.add_column("eigenvalue", ".6g")
        out.add_column("residual", ".2g")
        out.add_column("converged")
        for value, residual, ok in zip(self.values, self.residuals, self.converged, strict=True):
            out.add_row(float(value), float(residual), "yes" if ok else "NO", weight=0 if ok else 1)
        return out.folded(rows, "eigs.table(rows=None)")


def hessian_eigs(
    loss: Callable,
    k: int = 5,
    *,
    which: Which = "magnitude",
    tolerance: float = 1e-3,
    max_products: int = 1000,
) -> Callable[..., Eigs]:
    """Return a function that computes k eigenvalues and eigenvectors of the Hessian of a loss, without forming it.

    A restarted Lanczos process, compiled as a whole. The part of the Hessian product that does not depend on the
    vector is computed once. It stops as soon as all k residuals are small. Memory: `2k + 21` vectors of the
    size of the parameters, and the activations of the loss. Ghorbani et al., *An investigation into neural net
    optimization via Hessian eigenvalue density*, 2019; Wu and Simon, *Thick-restart Lanczos*, 2000.

    Args:
        loss: any JAX function `(params, *args) -> scalar` or `(scalar, aux)`; or, for another matrix than the
            Hessian, a product: `gf.curvature.ggn_vp(net.apply)`, `gf.curvature.fisher_vp(loss)`,
            `gf.curvature.product(f)`.
        k: the number of eigenvalues.
        which: `"magnitude"`, the largest in magnitude; `"largest"`, the most positive; `"smallest"`, the most
            negative.
        tolerance: of each residual, relative to its eigenvalue. The error of the eigenvalue is of the order of
            the squared residual.
        max_products: the number of products with H to stop after, at least k; `converged` marks what has
            converged by then.

    Returns:
        `(params, *args, key=None) -> Eigs`, compiled at its first call; it can be called inside `jit` and
        `vmap`. `key` draws the start vector, `jax.random.key(0)` by default; a loss with a parameter `key` gets
        a part of it.

    Raises:
        ValueError: k below 1 or above the number of parameters, fewer products than k, an unknown `which`.
        TypeError: a loss that is not a floating scalar, or no floating parameter.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> scales = jnp.array([4.0, -3.0, 2.0, 1.0])
    >>> eigs = gf.curvature.hessian_eigs(lambda w: 0.5 * jnp.sum(scales * w**2), k=2)(jnp.ones(4))
    >>> [round(float(value), 4) for value in eigs.values], eigs.vectors.shape
    ([4.0, -3.0], (2, 4))
    """
    if which not in get_args(Which):
        raise ValueError(f"hessian_eigs: which must be one of {', '.join(get_args(Which))}, got {which!r}")
    if k < 1:
        raise ValueError(f"hessian_eigs: k must be an integer >= 1, got {k}")
    if max_products < k:
        raise ValueError(f"hessian_eigs: max_products must be at least k = {k}, got {max_products}")
    product = as_product(loss)

    def eigs(params: PyTree, /, *args: PyTree, key: Key[Array, ""] | None = None, **kwargs: PyTree) -> Eigs:
        """Return k eigenvalues and eigenvectors of the Hessian at `params`; `key` draws the start vector."""
        leaves = floating_leaves(params, "hessian_eigs")
        if k > leaves.size:
            raise ValueError(
                f"hessian_eigs: k must be at most the number of parameters, {leaves.size}, got {k}"
            )
        key, kwargs = keys_of(loss, params, args, key, kwargs)
        start_key, fresh_key = jax.random.split(key)
        matrix = flat_matrix(product, leaves, args, kwargs)
        start = jax.random.normal(start_key, [leaves.size], leaves.dtype)
        m = min(2 * k + 20, leaves.size)
        found = eigenpairs(matrix, start, k, which, m, tolerance, max_products, fresh_key)
        vectors = leaves.tree(jax.vmap(leaves.split)(found.vectors))
        converged = small(found.values, found.residuals, tolerance)
        return Eigs(found.values, vectors, found.residuals, converged, found.products)

    return transform_of(loss, "hessian_eigs")(jit_arrays(eigs))


class _Sharpness(NamedTuple):
    value: Float[Array, ""]
    limit: Float[Array, ""]
    ratio: Float[Array, ""]
    vector: PyTree
    residual: Float[Array, ""]
    converged: Bool[Array, ""]


class Sharpness(ShowsTable, _Sharpness):
    """The largest eigenvalue of the Hessian beside what the learning rate allows; `print` shows a table.

    Attributes:
        value: the sharpness: the most positive eigenvalue.
        limit: `2 / learning_rate`. On a quadratic, gradient descent diverges along every direction whose
            curvature is above it.
        ratio: `value / limit`; above 1 gradient descent is unstable.
        vector: the eigenvector, a tree like the parameters, of norm 1.
        residual: `|H v - value v|`.
        converged: whether the residual is within the tolerance.
    """

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table of one row: the sharpness, its limit and their ratio."""
        if jnp.ndim(self.value):
            return array_table("Sharpness, batched by vmap", self)
        verdict = "above the limit: gradient descent is unstable" if self.ratio > 1 else "within the limit"
        out = TextTable("Sharpness", verdict)
        for header in ("largest eigenvalue", "2 / learning rate", "ratio"):
            out.add_column(header, ".6g")
        out.add_column("residual", ".2g")
        out.add_column("converged")
        numbers = (self.value, self.limit, self.ratio, self.residual)
        out.add_row(*map(float, numbers), "yes" if self.converged else "NO")
        return out


def sharpness(
    loss: Callable, learning_rate: float, *, tolerance: float = 1e-3, max_products: int = 1000
) -> Callable[..., Sharpness]:
    """Return a function that computes the sharpness of a loss, to compare with the limit `2 / learning_rate`.

    Networks that are trained on the full batch without momentum grow sharper until they reach that limit, and
    then stay there: Cohen et al., *Gradient descent on neural networks typically occurs at the edge of
    stability*, 2021. Momentum and Adam have other limits.

    Args:
        loss: any JAX function `(params, *args) -> scalar` or `(scalar, aux)`, or a product, as for
            `gf.curvature.hessian_eigs`.
        learning_rate: of plain gradient descent.
        tolerance: as for `gf.curvature.hessian_eigs`.
        max_products: as for `gf.curvature.hessian_eigs`.

    Returns:
        `(params, *args, key=None) -> Sharpness`, compiled at its first call; it can be called inside `jit`.
        `key` is that of `gf.curvature.hessian_eigs`.

    Raises:
        ValueError: a learning rate that is not above 0.
        TypeError: a loss that is not a floating scalar, or no floating parameter.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> sharp = gf.curvature.sharpness(lambda w: 1.5 * w[0] ** 2 - w[1] ** 2, learning_rate=0.5)(jnp.ones(2))
    >>> round(float(sharp.value), 4), float(sharp.limit), round(float(sharp.ratio), 4)
    (3.0, 4.0, 0.75)
    """
    if not isinstance(learning_rate, jax.Array) and not learning_rate > 0:
        raise ValueError(f"sharpness: learning_rate must be above 0, got {learning_rate}")
    top = hessian_eigs(loss, 1, which="largest", tolerance=tolerance, max_products=max_products)

    @transform_of(loss, "sharpness")
    def sharp(
        params: PyTree, /, *args: PyTree, key: Key[Array, ""] | None = None, **kwargs: PyTree
    ) -> Sharpness:
        """Return the largest eigenvalue of the Hessian at `params`; `key` draws the start vector."""
        eigs = top(params, *args, key=key, **kwargs)
        value = eigs.values[0]
        limit = jnp.asarray(2 / learning_rate, value.dtype)
        vector = jax.tree.map(lambda v: v[0], eigs.vectors)
        return Sharpness(value, limit, value / limit, vector, eigs.residuals[0], eigs.converged[0])

    return sharp
