"""The Lanczos process on a symmetric matrix that is only known by its products with flat vectors.

Every new vector is made orthogonal to all earlier ones, twice: without that, rounding brings copies of
eigenvalues that were found already. Lanczos, 1950; Golub and van Loan, *Matrix Computations*, chapter 10.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from gradfn.core.precision import norm

Matrix = Callable[[jax.Array], jax.Array]  # [P] -> [P]
Which = Literal["magnitude", "largest", "smallest"]

_product = functools.partial(jnp.matmul, precision="highest")  # accelerators would round to fewer digits

STRIDE = 4  # products between looks at the residuals


class Basis(NamedTuple):
    """Orthonormal vectors, and the matrix seen from them; rows and columns that are not there yet are zero.

    Attributes:
        vectors: `[m + 1, P]`, the last is where the matrix leads out of the others.
        projected: `[m, m]`, `vectors[:m] A vectors[:m]^T`; tridiagonal, but for what a restart kept.
        out: scalar, how long that last vector was.
    """

    vectors: jax.Array
    projected: jax.Array
    out: jax.Array


class Pairs(NamedTuple):
    """Eigenvalues `[k]`, eigenvectors `[k, P]`, residual norms `[k]`, and how many products they took."""

    values: jax.Array
    vectors: jax.Array
    residuals: jax.Array
    products: jax.Array


class Ritz(NamedTuple):
    """Eigenpairs as seen from the basis: values `[k]`, coordinates `[m, k]`, residuals `[k]`, products so far."""

    values: jax.Array
    S: jax.Array
    residuals: jax.Array
    products: jax.Array


def begin(start: jax.Array, m: int) -> Basis:
    """Return a basis of one vector `[P]` with room for m, and for the one after."""
    vectors = jnp.zeros([m + 1, start.size], start.dtype)
    first = start / norm(start)
    return Basis(vectors.at[0].set(first), jnp.zeros([m, m], start.dtype), jnp.zeros([], start.dtype))


def extend(matrix: Matrix, basis: Basis, start: Any, stop: Any, key: jax.Array) -> Basis:
    """Multiply vectors `start` to `stop - 1`, which makes vectors `start + 1` to `stop`."""

    def step(j: Any, basis: Basis) -> Basis:
        Q, T, _ = basis
        w = matrix(Q[j])
        size = norm(w)
        w, along = _orthogonal(Q, w)
        out = norm(w)
        # Nothing leads out: what is left is rounding. The process goes on in a direction that it has not seen.
        closed = out <= 10 * jnp.finfo(w.dtype).eps * size
        fresh = jax.lax.cond(closed, lambda: _unseen(Q, jax.random.fold_in(key, j)), lambda: w / out)
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
    """Return k eigenpairs by the Lanczos process, restarted with the best part of the basis when it is full.

    Wu and Simon, *Thick-restart Lanczos method for large symmetric eigenvalue problems*, 2000.

    Args:
        matrix: symmetric, `[P] -> [P]`.
        start: `[P]`, any vector that is not zero.
        k: how many, at most P.
        which: those of largest magnitude, the largest or the smallest.
        m: vectors in the basis, from k + 1 up (or P).
        tolerance: on residuals, relative to each eigenvalue.
        products: not to be exceeded by more than a stride; at least k.
        key: for directions to go on in when the process has come to an end early.
    """
    kept = min(k + (m - k) // 2, m - 1)  # more than k: what is kept is not to be found anew

    def going(state: Any) -> jax.Array:
        _, _, pairs, done = state
        return ~done & (pairs.products < products)

    def go(state: Any) -> Any:
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
        ended = (stop == m) & (m == start.size) | ~jnp.isfinite(basis.out)  # there is no more; or only NaN
        return basis, jnp.where(full, kept, stop), pairs, done | ended

    zeros = jnp.zeros([k], start.dtype)
    nothing = Ritz(zeros, jnp.eye(m, k, dtype=start.dtype), zeros + jnp.inf, jnp.int32(0))
    basis, _, pairs, _ = jax.lax.while_loop(
        going, go, (begin(start, m), jnp.int32(0), nothing, jnp.bool_(False))
    )
    vectors = _product(pairs.S.T, basis.vectors[:m])  # [k, P]
    # Products are rounded, too: no residual can be told to be below that.
    floor = jnp.finfo(start.dtype).eps * jnp.abs(pairs.values).max()
    return Pairs(pairs.values, vectors, pairs.residuals + floor, pairs.products)


def small(values: jax.Array, residuals: jax.Array, tolerance: float) -> jax.Array:
    """Tell which residuals `[k]` are small: relative to their eigenvalues, or as small as rounding lets them be."""
    rounding = 4 * jnp.finfo(values.dtype).eps * jnp.abs(values).max()
    return residuals <= tolerance * jnp.abs(values) + rounding


def _orthogonal(Q: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return what of `w` is orthogonal to the rows of Q, and its components along them."""
    first = _product(Q, w)  # [m + 1]
    w = w - _product(first, Q)
    second = _product(Q, w)
    return w - _product(second, Q), first + second


def _unseen(Q: jax.Array, key: jax.Array) -> jax.Array:
    w, _ = _orthogonal(Q, jax.random.normal(key, Q.shape[1:], Q.dtype))
    length = norm(w)
    return jnp.where(length > 0, w / length, 0)  # zero where the basis spans everything


def _ritz(T: jax.Array, n: Any, which: Which) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return eigenvalues `[m]` and eigenvectors `[m, m]` of `T[:n, :n]`, and the order that they are wanted in."""
    there = jnp.arange(len(T), dtype=jnp.int32) < n
    bound = norm(T)
    scale = jnp.where(
        bound > 0, bound, 1
    )  # of T's own size: its eigenvalues are right to rounding of the largest
    # Vectors that are not there yet get an eigenvalue of their own, outside of the others, and come last.
    values, S = jnp.linalg.eigh(jnp.where(there, T, 0) + jnp.diag(jnp.where(there, 0, -2 * scale)))
    wanted = {"magnitude": jnp.abs(values), "largest": values, "smallest": -values}[which]
    order = jnp.argsort(jnp.where(values < -1.5 * scale, -jnp.inf, wanted), descending=True)
    return values, S, order


def _restarted(basis: Basis, values: jax.Array, S: jax.Array, order: jax.Array, kept: int) -> Basis:
    """Return a basis of the first `kept` Ritz vectors, followed by the vector that leads out."""
    m = len(S)
    chosen = order[:kept]
    best = _product(S[:, chosen].T, basis.vectors[:m])  # [kept, P]
    vectors = jnp.zeros_like(basis.vectors).at[:kept].set(best).at[kept].set(basis.vectors[m])
    diagonal = jnp.where(jnp.arange(m) < kept, values[order], 0)
    return Basis(vectors, jnp.diag(diagonal), basis.out)
