"""Eigenvalues of a loss's Hessian, and the largest against what the learning rate allows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from gradfn.curvature.lanczos import Which, eigenpairs, small
from gradfn.curvature.products import as_product, flat_matrix
from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.inspection.leaves import floating_leaves
from gradfn.inspection.scalar import jit_arrays


class _Eigs(NamedTuple):
    values: jax.Array
    vectors: Any
    residuals: jax.Array
    converged: jax.Array
    products: jax.Array


class Eigs(ShowsTable, _Eigs):
    """Eigenvalues and eigenvectors of a curvature matrix. `print` shows a table; a pytree inside `jit`.

    Attributes:
        values: `[k]`, in the order that was asked for.
        vectors: a tree like the parameters, with a leading axis k; each has length 1 over all leaves together.
        residuals: `[k]`, `|H v - value v|`: an eigenvalue of H lies no further away from `value` than that, and
            where it is alone much nearer. Computed from the process, exact up to rounding.
        converged: `[k]` of bool, whether the residual is within the tolerance.
        products: how many products with H it took.
    """

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per eigenvalue."""
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
    key: jax.Array | None = None,
) -> Callable[..., Eigs]:
    """Return a function for k eigenvalues and eigenvectors of a loss's Hessian, without forming it.

    A restarted Lanczos process, compiled whole; the part of the Hessian product that does not depend on the
    vector is computed once. It stops as soon as all k residuals are small. Memory: `2k + 21` vectors of the
    parameters' size, and the loss's activations. Ghorbani et al., *An investigation into neural net optimization
    via Hessian eigenvalue density*, 2019; Wu and Simon, *Thick-restart Lanczos*, 2000.

    Args:
        loss: any JAX function `(params, *args) -> scalar` or `(scalar, aux)`; or, for another matrix than the
            Hessian, a product: `gf.curvature.ggn_vp(net.apply)`,
            `gf.curvature.fisher_vp(loss)`, `gf.curvature.product(f)`.
        k: how many.
        which: `"magnitude"`, the largest in size of either sign; `"largest"`, the most positive; `"smallest"`,
            the most negative.
        tolerance: on each residual, relative to its eigenvalue. The eigenvalue's own error goes with the
            residual's square.
        max_products: where to give up, k at least; what has not converged by then is marked.
        key: for the random start; `jax.random.key(0)` if None.

    Returns:
        `(params, *args) -> Eigs`, compiled at its first call; it can be called inside `jit` and `vmap`.

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
        raise ValueError(f"hessian_eigs: which is one of {', '.join(get_args(Which))}, came {which!r}")
    if k < 1 or max_products < k:
        raise ValueError(f"hessian_eigs: k is from 1 up, max_products from k up, came {k} and {max_products}")
    product = as_product(loss)

    def eigs(params: Any, /, *args: Any, **kwargs: Any) -> Eigs:
        leaves = floating_leaves(params, "hessian_eigs")
        if k > leaves.size:
            raise ValueError(f"hessian_eigs: k is at most the number of parameters, {leaves.size}, came {k}")
        start_key, fresh_key = jax.random.split(jax.random.key(0) if key is None else key)
        matrix = flat_matrix(product, leaves, args, kwargs)
        start = jax.random.normal(start_key, [leaves.size], leaves.dtype)
        m = min(2 * k + 20, leaves.size)
        found = eigenpairs(matrix, start, k, which, m, tolerance, max_products, fresh_key)
        vectors = leaves.tree(jax.vmap(leaves.split)(found.vectors))
        converged = small(found.values, found.residuals, tolerance)
        return Eigs(found.values, vectors, found.residuals, converged, found.products)

    return functools.wraps(loss, updated=())(jit_arrays(eigs))


class Sharpness(NamedTuple):
    """The largest eigenvalue of the Hessian beside what the learning rate allows.

    Attributes:
        value: the sharpness: the most positive eigenvalue.
        limit: `2 / learning_rate`. On a quadratic, gradient descent diverges along every direction whose
            curvature is above it.
        ratio: `value / limit`: above 1 is unstable.
        vector: the eigenvector, a tree like the parameters, of length 1.
        residual: `|H v - value v|`.
        converged: whether that is within the tolerance.
    """

    value: jax.Array
    limit: jax.Array
    ratio: jax.Array
    vector: Any
    residual: jax.Array
    converged: jax.Array


def sharpness(loss: Callable, learning_rate: float, **settings: Any) -> Callable[..., Sharpness]:
    """Return a function for a loss's sharpness against `2 / learning_rate`, where gradient descent turns unstable.

    Trained with the full batch and without momentum, networks grow sharper until they reach that limit, and
    then stay there: Cohen et al., *Gradient descent on neural networks typically occurs at the edge of
    stability*, 2021. Momentum and Adam have other limits.

    Args:
        loss: any JAX function `(params, *args) -> scalar` or `(scalar, aux)`, or a product, as for
            `gf.curvature.hessian_eigs`.
        learning_rate: of plain gradient descent.
        settings: `tolerance`, `max_products`, `key`, as of `gf.curvature.hessian_eigs`.

    Returns:
        `(params, *args) -> Sharpness`, compiled at its first call; it can be called inside `jit`.

    Raises:
        ValueError: a learning rate that is not above 0.
        TypeError: a loss that is not a floating scalar, or no floating parameter.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> seen = gf.curvature.sharpness(lambda w: 1.5 * w[0] ** 2 - w[1] ** 2, learning_rate=0.5)(jnp.ones(2))
    >>> round(float(seen.value), 4), float(seen.limit), round(float(seen.ratio), 4)
    (3.0, 4.0, 0.75)
    """
    if not isinstance(learning_rate, jax.Array) and not learning_rate > 0:
        raise ValueError(f"sharpness: a learning rate above 0, came {learning_rate}")
    top = hessian_eigs(loss, 1, which="largest", **settings)

    @functools.wraps(loss, updated=())
    def sharp(params: Any, /, *args: Any, **kwargs: Any) -> Sharpness:
        eigs = top(params, *args, **kwargs)
        value = eigs.values[0]
        limit = jnp.asarray(2 / learning_rate, value.dtype)
        vector = jax.tree.map(lambda v: v[0], eigs.vectors)
        return Sharpness(value, limit, value / limit, vector, eigs.residuals[0], eigs.converged[0])

    return sharp
