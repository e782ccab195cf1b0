"""The Lanczos process on a symmetric matrix that is given only by its products with flat vectors.

Every new vector is orthogonalized against all earlier ones, twice: otherwise rounding produces copies of eigenvalues
that have converged. Lanczos, 1950; Golub and van Loan, *Matrix Computations*, chapter 10.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from gradfn.core.precision import norm

Matrix = Callable[[jax.Array], jax.Array]  # [P] -> [P]
Which = Literal["magnitude", "largest", "smallest"]

# By default, accelerators round products to fewer digits.
_product = functools.partial(jnp.matmul, precision="highest")

STRIDE = 4  # products between two checks of the residuals


class Basis(NamedTuple):
    """Orthonormal vectors and the matrix projected on them; rows and columns not computed yet are zero.

    Attributes:
        vectors: `[m + 1, P]`; the last is the direction of the residual, orthogonal to the others.
        projected: `[m, m]`, `vectors[:m] A vectors[:m]^T`; tridiagonal, except for the part kept by a restart.
        out: scalar, the norm of the residual before it was normalized.
    """

    vectors: jax.Array
    projected: jax.Array
    out: jax.Array


class Pairs(NamedTuple):
    """Eigenvalues `[k]`, eigenvectors `[k, P]`, residual norms `[k]`, and the number of products."""

    values: jax.Array
    vectors: jax.Array
    residuals: jax.Array
    products: jax.Array


class Ritz(NamedTuple):
    """Eigenpairs in the basis: values `[k]`, coordinates `[m, k]`, residuals `[k]`, products so far."""

    values: jax.Array
    S: jax.Array
    residuals: jax.Array
    products: jax.Array


State = tuple[Basis, jax.Array, Ritz, jax.Array]  # basis, vectors in it, eigenpairs, done


def begin(start: jax.Array, m: int) -> Basis:
    """Return a basis that consists of one vector `[P]`, with memory for m vectors and the residual."""
    vectors = jnp.zeros([m + 1, start.size], start.dtype)
    first = start / norm(start)
    return Basis(vectors.at[0].set(first), jnp.zeros([m, m], start.dtype), jnp.zeros([], start.dtype))


def extend(
    matrix: Matrix, basis: Basis, start: int | jax.Array, stop: int | jax.Array, key: jax.Array
) -> Basis:
    """Multiply vectors `start` to `stop - 1`, which gives vectors `start + 1` to `stop`."""

    def step(j: jax.Array, basis: Basis) -> Basis:
        Q, T, _ = basis
        w = matrix(Q[j])
        size = norm(w)
        w, along = _orthogonal(Q, w)
        out = norm(w)
        # The space is invariant and the residual is rounding: continue in a new direction.
        closed = out <= 10 * jnp.finfo(w.dtype).eps * size
        fresh = jax.lax.cond(closed, lambda: _new_direction(Q, jax.random.fold_in(key, j)), lambda: w / out)
        out = jnp.where(closed, 0, out)
        T = T.at[j, :].set(along[:-1]).at[:, j].set(along[:-1])
        return Basis(Q.at[j + 1].set(fresh), T, out)

    return jax.lax.fori_loop(start, stop, step, basis)


def eigenpairs(
    matrix: Matrix,
    start: jax.Array,
    k: int,
    which: Which,
    m: int,
    tolerance: float,
    products: int,
    key: jax.Array,
) -> Pairs:
    """Return k eigenpairs by the Lanczos process, which restarts with the best part of the basis when it is full.

    Wu and Simon, *Thick-restart Lanczos method for large symmetric eigenvalue problems*, 2000.

    Args:
        matrix: symmetric, `[P] -> [P]`.
        start: `[P]`, any nonzero vector.
        k: the number of eigenpairs, at most P.
        which: those of largest magnitude, the largest or the smallest.
        m: the number of vectors in the basis, at least k + 1 (or P).
        tolerance: of the residuals, relative to each eigenvalue.
        products: at least k; exceeded by less than STRIDE.
        key: draws the directions in which the process continues from an invariant space.
    """
    # More than k: what is kept need not be computed again.
    kept = min(k + (m - k) // 2, m - 1)

    def unfinished(state: State) -> jax.Array:
        _, _, pairs, done = state
        return ~done & (pairs.products < products)

    def advance(state: State) -> State:
        basis, n, before, _ = state
        stop = jnp.minimum(n + STRIDE, m)
        basis = extend(matrix, basis, n, stop, jax.random.fold_in(key, before.products))
        values, S, order = _ritz(basis.projected, stop, which)
        residuals = basis.out * jnp.abs(S[stop - 1, order[:k]])
        pairs = Ritz(values[order[:k]], S[:, order[:k]], residuals, before.products + stop - n)
        done = (stop >= k) & jnp.all(small(pairs.values, residuals, tolerance))
        full = (stop == m) & ~done & (m < start.size)
        basis = jax.lax.cond(full, lambda: _restarted(basis, values, S, order, kept), lambda: basis)
        pairs = pairs._replace(S=jnp.where(full, jnp.eye(m, k, dtype=S.dtype), pairs.S))
        # Nothing is left to find, or everything is NaN.
        ended = (stop == m) & (m == start.size) | ~jnp.isfinite(basis.out)
        return basis, jnp.where(full, kept, stop), pairs, done | ended

    zeros = jnp.zeros([k], start.dtype)
    nothing = Ritz(zeros, jnp.eye(m, k, dtype=start.dtype), zeros + jnp.inf, jnp.int32(0))
    initial = begin(start, m), jnp.int32(0), nothing, jnp.bool_(False)
    basis, _, pairs, _ = jax.lax.while_loop(unfinished, advance, initial)
    vectors = _product(pairs.S.T, basis.vectors[:m])  # [k, P]
    # Products are rounded too: a residual below this cannot be resolved.
    floor = jnp.finfo(start.dtype).eps * jnp.abs(pairs.values).max()
    return Pairs(pairs.values, vectors, pairs.residuals + floor, pairs.products)


def small(values: jax.Array, residuals: jax.Array, tolerance: float) -> jax.Array:
    """Return which residuals `[k]` are small: relative to their eigenvalues, or within rounding."""
    rounding = 4 * jnp.finfo(values.dtype).eps * jnp.abs(values).max()
    return residuals <= tolerance * jnp.abs(values) + rounding


def _orthogonal(Q: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the part of `w` that is orthogonal to the rows of Q, and its components along them."""
    first = _product(Q, w)  # [m + 1]
    w = w - _product(first, Q)
    second = _product(Q, w)
    return w - _product(second, Q), first + second


def _new_direction(Q: jax.Array, key: jax.Array) -> jax.Array:
    w, _ = _orthogonal(Q, jax.random.normal(key, Q.shape[1:], Q.dtype))
    length = norm(w)
    # Zero if the basis spans the whole space.
    return jnp.where(length > 0, w / length, 0)


def _ritz(T: jax.Array, n: jax.Array, which: Which) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return eigenvalues `[m]` and eigenvectors `[m, m]` of `T[:n, :n]`, and their order by `which`."""
    computed = jnp.arange(len(T), dtype=jnp.int32) < n
    bound = norm(T)
    # Of the size of T: its eigenvalues are exact to rounding of the largest.
    scale = jnp.where(bound > 0, bound, 1)
    # Vectors that are not computed yet get an eigenvalue outside the range of the others, and are ordered last.
    values, S = jnp.linalg.eigh(jnp.where(computed, T, 0) + jnp.diag(jnp.where(computed, 0, -2 * scale)))
    wanted = {"magnitude": jnp.abs(values), "largest": values, "smallest": -values}[which]
    order = jnp.argsort(jnp.where(values < -1.5 * scale, -jnp.inf, wanted), descending=True)
    return values, S, order


def _restarted(basis: Basis, values: jax.Array, S: jax.Array, order: jax.Array, kept: int) -> Basis:
    """Return a basis of the first `kept` Ritz vectors, followed by the direction of the residual."""
    m = len(S)
    chosen = order[:kept]
    best = _product(S[:, chosen].T, basis.vectors[:m])  # [kept, P]
    vectors = jnp.zeros_like(basis.vectors).at[:kept].set(best).at[kept].set(basis.vectors[m])
    diagonal = jnp.where(jnp.arange(m) < kept, values[order], 0)
    return Basis(vectors, jnp.diag(diagonal), basis.out)
