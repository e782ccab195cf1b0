"""What is measured of pairs of inputs and cotangents: Kronecker factors, and squares of gradients in some basis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from gradfn.core.precision import widen
from gradfn.curvature._blocks import (
    Block,
    EigenBlock,
    KroneckerBlock,
    dense_layout,
    diagonal_layout,
)
from gradfn.curvature._pairs import Chunk, Measure, Parameter, Recorded, in_parts
from gradfn.per_example.ghost import Factors, product

# A factor of a larger side is diagonal, and a dense block has at most LARGEST_BLOCK elements.
LARGEST_SIDE, LARGEST_BLOCK = 4096, 2**22
# Elements of gradients of single examples that are in memory at a time.
AT_ONCE = 2**22

Basis = jax.Array | None  # [s, k, k], with basis vectors as columns; None for the standard basis


def measure_factors(reduce: bool) -> Measure:
    """Return how to measure factors: per parameter and use those of the inputs, then those of the cotangents.

    Without uses, there is one of whole gradients.
    """

    def measure(chunk: Chunk) -> tuple[PyTree, Callable[[list[Recorded]], PyTree]]:
        def of_inputs(parameter: Parameter, inputs: Recorded) -> list[jax.Array]:
            assert parameter.layout is not None
            sizes = parameter.layout.sizes
            return [
                _of_rows(x, sizes[1 + use.input], parameter.dtype)
                if any(use.looks_up)
                else _second_moment(widen(x), "mean" if reduce else "each mean")
                for x, use in zip(inputs, parameter.uses, strict=True)
            ]

        def of_cotangents(parameter: Parameter, recorded: Recorded) -> list[jax.Array]:
            if not parameter.uses:
                return [_of_gradients(g, parameter.shape) for g in recorded]
            return [
                _second_moment(g, "sum" if reduce and not any(use.looks_up) else "each")
                for g, use in zip(recorded, parameter.uses, strict=True)
            ]

        once = [
            of_inputs(p, inputs) if p.uses else []
            for p, inputs in zip(chunk.parameters, chunk.inputs, strict=True)
        ]
        return once, lambda recorded: [
            of_cotangents(*pair) for pair in zip(chunk.parameters, recorded, strict=True)
        ]

    return measure


def block_of(
    parameter: Parameter, inputs: Sequence[jax.Array], cotangents: Sequence[jax.Array]
) -> KroneckerBlock:
    """Return the block of a parameter, given the means of what `measure_factors` measured."""
    dtype = parameter.dtype
    if parameter.unused:
        layout = diagonal_layout(parameter.shape)
        zeros = jnp.zeros([1, layout.sizes[1]], dtype)
        return KroneckerBlock(zeros, jnp.ones([1, 1], dtype), layout, "unused")
    if not parameter.uses:
        (matrix,) = cotangents
        dense = dense_layout(parameter.shape, LARGEST_BLOCK)
        layout = dense or diagonal_layout(parameter.shape)
        ones = jnp.ones([layout.sizes[0], 1], dtype)
        part = ("block" if layout.sizes[0] == 1 else "blocks of rows") if dense else "diagonal"
        return KroneckerBlock(matrix, ones, layout, f"exact {part}")
    assert parameter.layout is not None
    pairs = [
        (x, g) if use.input == 0 else (g, x)
        for use, x, g in zip(parameter.uses, inputs, cotangents, strict=True)
    ]
    first, second = pairs[0] if len(pairs) == 1 else _joined(pairs)
    # Of rows that are looked up, the diagonal is the whole factor.
    cut = any(
        x.ndim == 2 and not all(use.looks_up[i] for use in parameter.uses)
        for i, x in ((0, first), (1, second))
    )
    method = f"K-FAC, {parameter.kinds}" + (", factor cut to its diagonal" if cut else "")
    return KroneckerBlock(first, second, parameter.layout, method)


def measure_squares(bases: Sequence[tuple[Basis, Basis] | None]) -> Measure:
    """Return how to measure squares of the gradients' elements `[s, k, n]`, in a basis for each parameter.

    Where there is None instead of bases, nothing is measured; whole gradients are squared as they are, `[1, size, 1]`.
    """

    def measure(chunk: Chunk) -> tuple[PyTree, Callable[[list[Recorded]], PyTree]]:
        inputs = [
            [_in_basis(x, basis[use.input], any(use.looks_up)) for x, use in zip(of, p.uses, strict=True)]
            if basis
            else []
            for p, basis, of in zip(chunk.parameters, bases, chunk.inputs, strict=True)
        ]

        def squares(
            p: Parameter, basis: tuple[Basis, Basis] | None, inputs: Recorded, recorded: Recorded
        ) -> jax.Array | None:
            if basis is None:
                return None
            if not p.uses:
                return sum(
                    (jnp.sum(widen(g) ** 2, 0) for g in recorded), jnp.zeros(p.shape, p.dtype)
                ).reshape(1, -1, 1)
            pairs = [
                (x, _in_basis(g, basis[1 - use.input], False))
                for x, g, use in zip(inputs, recorded, p.uses, strict=True)
            ]
            return _sum_of_squares(p, pairs, basis)

        return [], lambda recorded: list(map(squares, chunk.parameters, bases, inputs, recorded))

    return measure


def corrected(block: Block, squares: jax.Array) -> EigenBlock:
    """Return a block with the eigenvalues that the gradients have in its basis."""
    of = block.eigen()
    return EigenBlock(of.first, of.second, squares, of.layout, f"E{of.method}")


def _second_moment(x: jax.Array, how: str) -> jax.Array:
    """Return the sum over examples of second moments of one side, `[B, s, f, k] -> [s, k, k]`, or `[s, k]`.

    Args:
        x: the side.
        how: `"each"` sums over positions, `"each mean"` averages over them; `"sum"` and `"mean"` are the second
            moments of the sum and mean over positions.
    """
    if how in ("sum", "mean"):
        x = getattr(x, how)(2, keepdims=True)
    scale = 1 / x.shape[2] if how == "each mean" else 1
    if x.shape[3] > LARGEST_SIDE:
        return scale * jnp.sum(x**2, (0, 2))
    return scale * jnp.einsum("bsfi,bsfj->sij", x, x, precision=lax.Precision.HIGHEST)


def _of_rows(ids: jax.Array, n: int, dtype: Any) -> jax.Array:
    """Return the second moments of one-hot vectors, how often each row is used: `[B, s, f] -> [s, n]`."""
    count = lambda ids: jnp.zeros(n, dtype).at[ids.ravel()].add(_inside(ids, dtype).ravel())  # noqa: E731
    return jax.vmap(count, 1)(ids) / ids.shape[2]


def _inside(ids: jax.Array, dtype: Any) -> jax.Array:
    """Return 1 for the index of a row, 0 for one out of range."""
    return (ids >= 0).astype(dtype)


def _of_gradients(g: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the second moments of whole gradients `[B, *shape]`: dense blocks `[s, k, k]`, or a diagonal `[1, k]`."""
    g = widen(g)
    layout = dense_layout(shape, LARGEST_BLOCK)
    if layout is None:
        return jnp.sum(g**2, 0).reshape(1, -1)
    x = g.reshape(g.shape[0], *layout.sizes[:2])  # [B, s, k]
    return jnp.einsum("bsi,bsj->sij", x, x, precision=lax.Precision.HIGHEST)


def _joined(pairs: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Return factors for a parameter with several uses: the average of each use's, weighted by the trace of its block.

    Their product has the trace, and the partial traces, of the sum of the uses' products; it is that sum if all uses
    have the same first factor, or the same second one, up to scale.
    """
    traces = [[_trace(factor) for factor in pair] for pair in pairs]  # [s] each
    total = sum(a * b for a, b in traces)
    safe = jnp.where(total > 0, total, 1)
    out = []
    for side in (0, 1):
        factors = [pair[side] for pair in pairs]
        if {factor.ndim for factor in factors} == {2, 3}:
            # Indices have a diagonal factor. It is dense if that of another use is.
            factors = [jax.vmap(jnp.diag)(x) if x.ndim == 2 else x for x in factors]
        # Factor u times the trace of its other side: its weight, times the factor with trace 1.
        scaled = [x * _over(of[1 - side], x.ndim) for x, of in zip(factors, traces, strict=True)]
        out.append(sum(scaled[1:], scaled[0]))
    return out[0] / _over(safe, out[0].ndim), out[1]


def _trace(factor: jax.Array) -> jax.Array:
    return factor.sum(-1) if factor.ndim == 2 else jnp.trace(factor, axis1=1, axis2=2)


def _over(x: jax.Array, ndim: int) -> jax.Array:
    return x.reshape(-1, *[1] * (ndim - 1))


def _in_basis(x: jax.Array, basis: Basis, looks_up: bool) -> jax.Array:
    """Return one side `[B, s, f, k]` in a basis; indices `[B, s, f]` stay indices in the standard basis."""
    if looks_up:
        if basis is None:
            return x
        rows = jax.vmap(lambda basis, ids: basis[ids], (0, 1), 1)(basis, x)  # [B, s, f, k]
        return rows * _inside(x, rows.dtype)[..., None]
    x = widen(x)
    return x if basis is None else jnp.einsum("bsfk,skj->bsfj", x, basis, precision=lax.Precision.HIGHEST)


def _sum_of_squares(
    p: Parameter, pairs: Sequence[tuple[jax.Array, jax.Array]], basis: tuple[Basis, Basis]
) -> jax.Array:
    """Return the sum over examples of the squared elements of their gradients, `[s, k, n]`.

    Args:
        p: the parameter.
        pairs: of each use the input side and the cotangent's side, in the basis.
        basis: of both sides.
    """
    assert p.layout is not None
    _, k, n = p.layout.sizes
    looked_up = [any(use.looks_up) and basis[use.input] is None for use in p.uses]
    (x, g), first = pairs[0], p.uses[0].input == 0
    if len(pairs) == 1 and looked_up[0]:
        rows = _squares_by_row(x, g, (n, k)[first])  # [s, rows, other]
        return rows if first else rows.swapaxes(1, 2)
    if len(pairs) == 1 and x.shape[2] == 1:
        sides = (x, g) if first else (g, x)
        return jnp.einsum(
            "bsi,bsj->sij", *[side[:, :, 0] ** 2 for side in sides], precision=lax.Precision.HIGHEST
        )

    def of_some(pairs: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
        def of_one(pairs: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
            sums = []
            for (x, g), use, ids in zip(pairs, p.uses, looked_up, strict=True):
                sides, looks_up = ((x, g), (ids, False)) if use.input == 0 else ((g, x), (False, ids))
                sums.append(Factors(sides, (k, n), looks_up))
            return product(sums) ** 2

        return jax.vmap(of_one)(pairs).sum(0)

    return in_parts(of_some, list(pairs), len(x), max(1, AT_ONCE // math.prod(p.layout.sizes)))


def _squares_by_row(ids: jax.Array, g: jax.Array, n: int) -> jax.Array:
    """Return the sum of squares of gradients of looked-up rows, `[B, s, f], [B, s, f, k] -> [s, n, k]`.

    Equal indices in one example are added up first, without a gradient of all rows for each example.
    """
    same = (ids[..., :, None] == ids[..., None, :]).astype(g.dtype)  # [B, s, f, f]
    sums = jnp.einsum("bsfg,bsgk->bsfk", same, g, precision=lax.Precision.HIGHEST)
    shares = sums**2 * (_inside(ids, g.dtype) / same.sum(-1))[..., None]

    def add(ids: jax.Array, shares: jax.Array) -> jax.Array:
        return jnp.zeros([n, g.shape[-1]], g.dtype).at[ids.ravel()].add(shares.reshape(-1, g.shape[-1]))

    return jax.vmap(add, 1)(ids, shares)
