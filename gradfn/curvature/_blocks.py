"""Blocks of a block-diagonal curvature matrix, one per parameter, each a stack of Kronecker products.

A parameter is seen as a stack of s matrices `[s, k, n]`, and its block as s matrices of size `k n`, one per matrix:

    KroneckerBlock: `first (x) second`, which maps V to `first V second`;
    EigenBlock: `(U (x) W) diag(values) (U (x) W)^T`, which maps V to `U (values * (U^T V W)) W^T`.

A factor is `[s, k, k]`, or `[s, k]` if it is diagonal. A dense block is a Kronecker product with a second factor of 1,
and a diagonal block one of a diagonal factor and 1.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Layout(NamedTuple):
    """How a parameter is seen as a stack of matrices.

    Attributes:
        shape: of the parameter.
        split: the shape that it is reshaped to first.
        order: of the axes of `split`, as they are transposed.
        sizes: s, k and n.
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    sizes: tuple[int, int, int]

    def stack(self, x: jax.Array) -> jax.Array:
        """Return `[s, k, n]`, given an array of the parameter's shape."""
        return x.reshape(self.split).transpose(self.order).reshape(self.sizes)

    def leaf(self, x: jax.Array) -> jax.Array:
        """Return an array of the parameter's shape, given `[s, k, n]`."""
        back = sorted(range(len(self.order)), key=lambda i: self.order[i])
        return x.reshape([self.split[i] for i in self.order]).transpose(back).reshape(self.shape)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["first", "second"], meta_fields=["layout", "method"]
)
@dataclass(frozen=True)
class KroneckerBlock:
    """The block of one parameter, as a stack of Kronecker products.

    Attributes:
        first: `[s, k, k]`, or `[s, k]` if it is diagonal.
        second: `[s, n, n]`, or `[s, n]`.
        layout: how the parameter is seen as `[s, k, n]` (static).
        method: how the block was found, in words (static).
    """

    first: Float[Array, "s k ..."]
    second: Float[Array, "s n ..."]
    layout: Layout
    method: str

    def product(self, v: jax.Array) -> jax.Array:
        """Return the block times an array like the parameter."""
        x = self.layout.stack(v)
        return self.layout.leaf(_times(_times(x, self.first, 1), self.second, 2))

    def diagonal(self) -> jax.Array:
        """Return the diagonal, an array like the parameter."""
        first, second = (_diagonal(factor) for factor in (self.first, self.second))
        return self.layout.leaf(first[:, :, None] * second[:, None, :])  # [s, k, n]

    def trace(self) -> jax.Array:
        """Return the trace, a scalar."""
        return jnp.sum(_diagonal(self.first).sum(-1) * _diagonal(self.second).sum(-1))

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the block."""
        return self.first.dtype

    @property
    def is_batched(self) -> bool:
        """Whether the arrays have further axes in front, added by vmap."""
        return self.first.shape[0] != self.layout.sizes[0] or self.first.ndim > 3

    def eigen(self) -> EigenBlock:
        """Return the block decomposed."""
        (first, values), (second, more) = _eigen(self.first), _eigen(self.second)
        products = values[:, :, None] * more[:, None, :]  # [s, k, n]
        return EigenBlock(first, second, products, self.layout, self.method)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["first", "second", "values"],
    meta_fields=["layout", "method"],
)
@dataclass(frozen=True)
class EigenBlock:
    """The block of one parameter, by eigenvalues in a basis of Kronecker products.

    Attributes:
        first: `[s, k, k]`, with basis vectors as columns; None for the standard basis.
        second: `[s, n, n]`, likewise.
        values: `[s, k, n]`.
        layout: how the parameter is seen as `[s, k, n]` (static).
        method: how the block was found, in words (static).
    """

    first: Float[Array, "s k k"] | None
    second: Float[Array, "s n n"] | None
    values: Float[Array, "s k n"]
    layout: Layout
    method: str

    def map(self, values: jax.Array, v: jax.Array) -> jax.Array:
        """Return the matrix with these eigenvalues, in the block's basis, times an array like the parameter."""
        x = _rotated(_rotated(self.layout.stack(v), self.first, 1), self.second, 2) * values
        return self.layout.leaf(_rotated(_rotated(x, self.first, 1, back=True), self.second, 2, back=True))

    def product(self, v: jax.Array) -> jax.Array:
        """Return the block times an array like the parameter."""
        return self.map(self.values, v)

    def diagonal(self) -> jax.Array:
        """Return the diagonal, an array like the parameter."""
        first, second = (q if q is None else q**2 for q in (self.first, self.second))
        x = _rotated(_rotated(self.values, first, 1, back=True), second, 2, back=True)
        return self.layout.leaf(x)

    def trace(self) -> jax.Array:
        """Return the trace, a scalar."""
        return jnp.sum(self.values)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the block."""
        return self.values.dtype

    @property
    def is_batched(self) -> bool:
        """Whether the arrays have further axes in front, added by vmap."""
        return self.values.ndim > 3

    def eigen(self) -> EigenBlock:
        """Return the block."""
        return self


Block = KroneckerBlock | EigenBlock


def dense_layout(shape: tuple[int, ...], largest: int) -> Layout | None:
    """Return the layout of dense blocks of a parameter: of the whole, or of each row; None if they are too large."""
    size = math.prod(shape)
    if size**2 <= largest:
        return Layout(shape, (size,), (0,), (1, size, 1))
    if len(shape) > 1 and size * shape[-1] <= largest:
        return Layout(shape, (size,), (0,), (size // shape[-1], shape[-1], 1))
    return None


def diagonal_layout(shape: tuple[int, ...]) -> Layout:
    """Return the layout of a diagonal block."""
    size = math.prod(shape)
    return Layout(shape, (size,), (0,), (1, size, 1))


def _times(x: jax.Array, factor: jax.Array, axis: int) -> jax.Array:
    """Return `[s, k, n]` times a symmetric factor along one axis."""
    if factor.ndim == 2:
        return x * jnp.expand_dims(factor, 3 - axis)
    formula = "skn,skj->sjn" if axis == 1 else "skn,snj->skj"
    return jnp.einsum(formula, x, factor, precision=lax.Precision.HIGHEST)


def _rotated(x: jax.Array, basis: jax.Array | None, axis: int, back: bool = False) -> jax.Array:
    """Return `[s, k, n]` in another basis along one axis, or back."""
    if basis is None:
        return x
    basis = basis.swapaxes(1, 2) if back else basis
    formula = "skn,skj->sjn" if axis == 1 else "skn,snj->skj"
    return jnp.einsum(formula, x, basis, precision=lax.Precision.HIGHEST)


def _diagonal(factor: jax.Array) -> jax.Array:
    return factor if factor.ndim == 2 else jnp.diagonal(factor, axis1=1, axis2=2)


def _eigen(factor: jax.Array) -> tuple[jax.Array | None, jax.Array]:
    """Return the basis and eigenvalues of a factor; those below 0 are rounding errors."""
    if factor.ndim == 2:
        return None, factor
    values, basis = jnp.linalg.eigh(factor)
    return basis, jnp.maximum(values, 0)
