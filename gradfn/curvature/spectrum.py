"""Estimates from products with random vectors: trace, diagonal and spectrum of a curvature matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from gradfn.core.params import path_name
from gradfn.core.signature import transform_of
from gradfn.curvature.lanczos import begin, extend
from gradfn.curvature.products import as_product, flat_matrix, keys_of
from gradfn.display import ROWS, ShowsTable, TextTable, array_table, extremes
from gradfn.jaxpr.call import Leaves, floating_leaves, jit_arrays


class _Estimate(NamedTuple):
    value: PyTree
    standard_error: PyTree


class Estimate(ShowsTable, _Estimate):
    """A mean over random vectors and its standard error. `print` shows a table.

    Attributes:
        value: the estimate, unbiased: a scalar, or a tree like the parameters; in units of the loss per squared
            unit of the parameters.
        standard_error: the standard deviation of the estimate over random vectors, itself estimated from these;
            of the same shape.
    """

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table of a scalar and its standard error, or with one row per parameter."""
        values = jax.tree_util.tree_leaves_with_path(self.value)
        errors = jax.tree.leaves(self.standard_error)
        out = TextTable("Estimate")
        if isinstance(self.value, jax.Array) and self.value.ndim == 0:
            out.add_column("value", ".6g")
            out.add_column("standard error", ".2g")
            out.add_row(float(self.value), float(self.standard_error))
            return out
        out.add_column("path", shorten=True)
        for header in ("shape", "mean", "smallest", "largest", "mean standard error"):
            out.add_column(header)
        for (path, value), error in zip(values, errors, strict=True):
            means = float(value.mean()), float(error.mean())
            smallest, largest = extremes(value)
            out.add_row(
                path_name(path) or "value",
                value.shape,
                means[0],
                smallest,
                largest,
                means[1],
                weight=abs(means[0]),
            )
        return out.folded(rows, "estimate.table(rows=None)")


def hessian_trace(loss: Callable, samples: int = 64) -> Callable[..., Estimate]:
    """Return a function that estimates the trace of the Hessian of a loss: the sum of its eigenvalues.

    The mean of `v . H v` over vectors of random signs. It takes one product per vector, one after the other, so
    memory does not grow with their number. Hutchinson, *A stochastic estimator of the trace*, 1990.

    Args:
        loss: any JAX function `(params, *args) -> scalar` or `(scalar, aux)`, or a product, as for
            `gf.curvature.hessian_eigs`.
        samples: the number of vectors, at least 2. The standard error falls with its square root.

    Returns:
        `(params, *args, key=None) -> Estimate` of two scalars, compiled at its first call; it can be called
        inside `jit`. `key` draws the signs, `jax.random.key(0)` by default; a loss with a parameter `key` gets a
        part of it.

    Raises:
        ValueError: fewer than 2 samples.
        TypeError: a loss that is not a floating scalar, or no floating parameter.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> H = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    >>> trace = gf.curvature.hessian_trace(lambda w: 0.5 * w @ H @ w, samples=1000)(jnp.ones(2))
    >>> bool(abs(trace.value - 5) < 3 * trace.standard_error), round(float(trace.standard_error), 2)
    (True, 0.06)
    """
    return _estimator(loss, samples, "hessian_trace", lambda v, Hv: v @ Hv, lambda leaves, value: value)


def hessian_diagonal(loss: Callable, samples: int = 64) -> Callable[..., Estimate]:
    """Return a function that estimates the diagonal of the Hessian of a loss: the curvature along each parameter.

    The mean of `v * H v` over vectors of random signs, one product per vector. The error of an entry comes from
    the other entries in its row, so single entries need many samples; sums over a layer need few. Bekas,
    Kokiopoulou and Saad, *An estimator for the diagonal of a matrix*, 2007.

    Args:
        loss: any JAX function `(params, *args) -> scalar` or `(scalar, aux)`, or a product, as for
            `gf.curvature.hessian_eigs`.
        samples: the number of vectors, at least 2.

    Returns:
        `(params, *args, key=None) -> Estimate` of two trees like the parameters, compiled at its first call; it
        can be called inside `jit`. `key` is that of `gf.curvature.hessian_trace`.

    Raises:
        ValueError: fewer than 2 samples.
        TypeError: a loss that is not a floating scalar, or no floating parameter.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> gf.curvature.hessian_diagonal(lambda w: w[0] ** 2 + 3 * w[1] ** 2, samples=2)(jnp.ones(2)).value
    Array([2., 6.], dtype=float32)
    """

    def in_tree(leaves: Leaves, value: jax.Array) -> PyTree:
        return leaves.tree(leaves.split(value))

    return _estimator(loss, samples, "hessian_diagonal", lambda v, Hv: v * Hv, in_tree)


class _Spectrum(NamedTuple):
    nodes: Float[Array, "samples steps"]
    weights: Float[Array, "samples steps"]
    size: Float[Array, ""]


class Spectrum(ShowsTable, _Spectrum):
    """The spectral density of a matrix as weighted points, one row per random direction.

    Each row is a Gauss quadrature of the spectrum: `(weights * f(nodes)).sum(1)`, averaged over the rows,
    estimates the mean of f over all eigenvalues. Apart from the random directions it is exact for polynomials of
    degree below `2 * steps`.

    Attributes:
        nodes: `[samples, steps]`, the points, in units of the loss per squared unit of the parameters.
        weights: `[samples, steps]`, fractions of all eigenvalues; each row sums to 1.
        size: the number of eigenvalues, which is the number of parameters.
    """

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table of one row: the range of the points, and the moments and counts that they estimate."""
        if jnp.ndim(self.size):
            return array_table("Spectrum, batched by vmap", self)
        samples, steps = self.nodes.shape
        out = TextTable(f"Spectrum of {int(self.size):,} eigenvalues: {samples} directions of {steps} points")
        for header in ("smallest", "largest", "mean", "trace", "number above 0"):
            out.add_column(header)
        mean = (self.weights * self.nodes).sum(1).mean()
        out.add_row(*map(float, (self.nodes.min(), self.nodes.max(), mean, mean * self.size, self.above(0))))
        return out

    def density(
        self, grid: ArrayLike | None = None, width: float | None = None
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Return a grid `[n]` and the fraction of eigenvalues per unit there `[n]`, smoothed by a Gaussian.

        Args:
            grid: `[n]`; 512 points over the whole spectrum if None.
            width: the standard deviation of the Gaussian; a hundredth of the width of the spectrum if None.
        """
        low, high = self.nodes.min(), self.nodes.max()
        blur = jnp.maximum((high - low) / 100, jnp.finfo(low.dtype).tiny) if width is None else width
        blur = jnp.asarray(blur, low.dtype)
        points = (
            jnp.linspace(low - 5 * blur, high + 5 * blur, 512)
            if grid is None
            else jnp.asarray(grid, low.dtype)
        )

        def at(x: jax.Array) -> jax.Array:
            return (self.weights * jax.scipy.stats.norm.pdf(x, self.nodes, blur)).sum(1).mean()

        return points, jax.lax.map(at, points)

    def above(self, x: ArrayLike) -> Float[Array, ""]:
        """Return the estimated number of eigenvalues above `x`."""
        return self.size * jnp.where(self.nodes > x, self.weights, 0).sum(1).mean()


def hessian_spectrum(loss: Callable, samples: int = 8, steps: int = 48) -> Callable[..., Spectrum]:
    """Return a function that estimates the spectral density of the Hessian of a loss.

    Stochastic Lanczos quadrature: a Lanczos process of a few steps from each of several random directions, whose
    small tridiagonal matrix stands for the large one. It takes `samples * steps` products and memory for
    `steps + 1` vectors of the size of the parameters. Golub and Welsch, 1969; Ghorbani et al., *An investigation
    into neural net optimization via Hessian eigenvalue density*, 2019.

    Args:
        loss: any JAX function `(params, *args) -> scalar` or `(scalar, aux)`, or a product, as for
            `gf.curvature.hessian_eigs`.
        samples: the number of directions (vectors of random signs).
        steps: of each process, at least 2. They set the resolution; the ends of the spectrum converge first.

    Returns:
        `(params, *args, key=None) -> Spectrum`, compiled at its first call; it can be called inside `jit`. `key`
        is that of `gf.curvature.hessian_trace`.

    Raises:
        ValueError: fewer than 1 sample or 2 steps.
        TypeError: a loss that is not a floating scalar, or no floating parameter.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> scales = jnp.array([5.0, 1.0, 1.0, 1.0])
    >>> spectrum = gf.curvature.hessian_spectrum(lambda w: 0.5 * jnp.sum(scales * w**2), samples=2)(jnp.ones(4))
    >>> round(float(spectrum.above(2.0)), 4)  # of four eigenvalues, one is above 2
    1.0
    """
    if samples < 1 or steps < 2:
        raise ValueError(
            f"hessian_spectrum: expected samples >= 1 and steps >= 2, got samples={samples}, steps={steps}"
        )
    product = as_product(loss)

    def spectrum(
        params: PyTree, /, *args: PyTree, key: Key[Array, ""] | None = None, **kwargs: PyTree
    ) -> Spectrum:
        """Return the estimated spectral density of the Hessian at `params`; `key` draws the directions."""
        leaves = floating_leaves(params, "hessian_spectrum")
        if not leaves.size:
            raise ValueError("hessian_spectrum: expected at least one parameter, got only arrays of size 0")
        key, kwargs = keys_of(loss, params, args, key, kwargs)
        matrix = flat_matrix(product, leaves, args, kwargs)
        m = min(steps, leaves.size)

        def process(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            signs, fresh = jax.random.split(key)
            start = begin(jax.random.rademacher(signs, [leaves.size], leaves.dtype), m)
            nodes, S = jnp.linalg.eigh(extend(matrix, start, 0, m, fresh).projected)
            # The squared component of the start along each eigenvector.
            return nodes, S[0] ** 2

        nodes, weights = jax.lax.map(process, jax.random.split(key, samples))
        return Spectrum(nodes, weights, jnp.asarray(leaves.size, leaves.dtype))

    return transform_of(loss, "hessian_spectrum")(jit_arrays(spectrum))


def _estimator(
    loss: Callable, samples: int, what: str, statistic: Callable, finish: Callable
) -> Callable[..., Estimate]:
    """Return a function that computes the mean of `statistic(v, H v)` over random signs v, and its standard error."""
    if samples < 2:
        raise ValueError(f"{what}: samples must be >= 2 for a standard error, got {samples}")
    product = as_product(loss)

    def estimate(
        params: PyTree, /, *args: PyTree, key: Key[Array, ""] | None = None, **kwargs: PyTree
    ) -> Estimate:
        """Return the estimate at `params` and its standard error; `key` draws the random signs."""
        leaves = floating_leaves(params, what)
        key, kwargs = keys_of(loss, params, args, key, kwargs)
        matrix = flat_matrix(product, leaves, args, kwargs)
        keys = jax.random.split(key, samples)

        def step(i: jax.Array, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            # Welford's running variance: no difference of large sums.
            mean, squares, unit = so_far
            v = jax.random.rademacher(keys[i], [leaves.size], leaves.dtype)
            sample = statistic(v, matrix(v))
            change = sample - mean
            mean = mean + change / (i + 1).astype(leaves.dtype)
            # In units of the largest change so far: the squares themselves may over- or underflow.
            larger = jnp.maximum(unit, jax.lax.stop_gradient(jnp.abs(change)))
            safe = jnp.where(larger > 0, larger, 1)
            squares = squares * jnp.square(unit / safe) + (change / safe) * ((sample - mean) / safe)
            return mean, squares, larger

        nothing = jnp.zeros([leaves.size], leaves.dtype)
        zero = jnp.zeros_like(statistic(nothing, nothing))
        mean, squares, unit = jax.lax.fori_loop(0, samples, step, (zero, zero, zero))
        error = unit * jnp.sqrt(squares / (samples * (samples - 1)))
        return Estimate(finish(leaves, mean), finish(leaves, error))

    return transform_of(loss, what)(jit_arrays(estimate))
