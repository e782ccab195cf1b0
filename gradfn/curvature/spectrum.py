"""A curvature matrix in random directions: its trace, its diagonal, and how its eigenvalues are spread."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradfn.curvature.lanczos import begin, extend
from gradfn.curvature.products import as_product, flat_matrix
from gradfn.inspection.leaves import Leaves, floating_leaves
from gradfn.inspection.scalar import jit_arrays


class Estimate(NamedTuple):
    """A mean over random directions, and how far it may be off.

    Attributes:
        value: the estimate, unbiased: a scalar, or a tree like the parameters.
        standard_error: of the same shape: the deviation that the estimate has over other directions, itself
            estimated from these.
    """

    value: Any
    standard_error: Any


def hessian_trace(
    loss: Callable, samples: int = 64, *, key: jax.Array | None = None
) -> Callable[..., Estimate]:
    """Return a function that estimates the trace of a loss's Hessian: the sum of its eigenvalues.

    The mean of `v . H v` over vectors of random signs; one product each, in turns, so memory does not grow with
    their number. Hutchinson, *A stochastic estimator of the trace*, 1990.

    Args:
        loss: any JAX function `(params, *args) -> scalar` or `(scalar, aux)`, or a product, as for
            `gf.curvature.hessian_eigs`.
        samples: how many vectors, 2 at least. The standard error falls with their square root.
        key: for the signs; `jax.random.key(0)` if None.

    Returns:
        `(params, *args) -> Estimate` of two scalars, compiled at its first call; it can be called inside `jit`.

    Raises:
        ValueError: fewer than 2 samples.
        TypeError: a loss that is not a floating scalar, or no floating parameter.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> H = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    >>> trace = gf.curvature.hessian_trace(lambda w: 0.5 * w @ H @ w, samples=1000)(jnp.ones(2))
    >>> bool(abs(trace.value - 5) < 3 * trace.standard_error), round(float(trace.standard_error), 2)
    (True, 0.06)
    """
    return _estimator(loss, samples, key, "hessian_trace", lambda v, Hv: v @ Hv, lambda leaves, value: value)


def hessian_diagonal(
    loss: Callable, samples: int = 64, *, key: jax.Array | None = None
) -> Callable[..., Estimate]:
    """Return a function that estimates the diagonal of a loss's Hessian: each parameter's own curvature.

    The mean of `v * H v` over vectors of random signs; one product each. An entry's error comes from the other
    entries in its row, so single entries need many samples; sums over a layer need few. Bekas, Kokiopoulou and
    Saad, *An estimator for the diagonal of a matrix*, 2007.

    Args:
        loss: any JAX function `(params, *args) -> scalar` or `(scalar, aux)`, or a product, as for
            `gf.curvature.hessian_eigs`.
        samples: how many vectors, 2 at least.
        key: for the signs; `jax.random.key(0)` if None.

    Returns:
        `(params, *args) -> Estimate` of two trees like the parameters, compiled at its first call; it can be
        called inside `jit`.

    Raises:
        ValueError: fewer than 2 samples.
        TypeError: a loss that is not a floating scalar, or no floating parameter.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> gf.curvature.hessian_diagonal(lambda w: w[0] ** 2 + 3 * w[1] ** 2, samples=2)(jnp.ones(2)).value
    Array([2., 6.], dtype=float32)
    """

    def in_tree(leaves: Leaves, value: jax.Array) -> Any:
        return leaves.tree(leaves.split(value))

    return _estimator(loss, samples, key, "hessian_diagonal", lambda v, Hv: v * Hv, in_tree)


class Spectrum(NamedTuple):
    """How a matrix's eigenvalues are spread: weighted points, one row a random direction.

    Each row is a Gauss quadrature of the spectrum: `(weights * f(nodes)).sum(1)`, meant over rows, is near the
    mean of f over all eigenvalues, and exact (but for the random directions) for polynomials below degree
    `2 * steps`.

    Attributes:
        nodes: `[samples, steps]`, the points, in the loss's units per squared unit of the parameters.
        weights: `[samples, steps]`, shares of all eigenvalues; each row sums to 1.
        size: how many eigenvalues there are: the number of parameters.
    """

    nodes: jax.Array
    weights: jax.Array
    size: jax.Array

    def density(self, grid: Any = None, width: float | None = None) -> tuple[jax.Array, jax.Array]:
        """Return a grid `[n]` and the share of eigenvalues per unit there `[n]`, blurred by a Gaussian.

        Args:
            grid: `[n]`; 512 points over the whole spectrum if None.
            width: the Gaussian's standard deviation; a hundredth of the spectrum's width if None.
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

    def above(self, x: Any) -> jax.Array:
        """Return about how many eigenvalues are above `x`."""
        return self.size * jnp.where(self.nodes > x, self.weights, 0).sum(1).mean()


def hessian_spectrum(
    loss: Callable, samples: int = 8, steps: int = 48, *, key: jax.Array | None = None
) -> Callable[..., Spectrum]:
    """Return a function that estimates how the eigenvalues of a loss's Hessian are spread.

    Stochastic Lanczos quadrature: from each of some random directions, a Lanczos process of some steps, whose
    small matrix stands for the large one. `samples * steps` products; memory: `steps + 1` vectors of the
    parameters' size. Golub and Welsch, 1969; Ghorbani et al., *An investigation into neural net optimization via
    Hessian eigenvalue density*, 2019.

    Args:
        loss: any JAX function `(params, *args) -> scalar` or `(scalar, aux)`, or a product, as for
            `gf.curvature.hessian_eigs`.
        samples: how many directions (of random signs).
        steps: of each process, 2 at least: how fine the spectrum is resolved. Its ends are found first.
        key: for the signs; `jax.random.key(0)` if None.

    Returns:
        `(params, *args) -> Spectrum`, compiled at its first call; it can be called inside `jit`.

    Raises:
        ValueError: no sample, or fewer than 2 steps.
        TypeError: a loss that is not a floating scalar, or no floating parameter.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> scales = jnp.array([5.0, 1.0, 1.0, 1.0])
    >>> spectrum = gf.curvature.hessian_spectrum(lambda w: 0.5 * jnp.sum(scales * w**2), samples=2)(jnp.ones(4))
    >>> round(float(spectrum.above(2.0)), 4)  # of four eigenvalues, one is above 2
    1.0
    """
    if samples < 1 or steps < 2:
        raise ValueError(f"hessian_spectrum: samples from 1 up, steps from 2 up, came {samples} and {steps}")
    product = as_product(loss)

    def spectrum(params: Any, /, *args: Any, **kwargs: Any) -> Spectrum:
        leaves = floating_leaves(params, "hessian_spectrum")
        if not leaves.size:
            raise ValueError("hessian_spectrum: expected at least one parameter, got arrays of size 0 alone")
        matrix = flat_matrix(product, leaves, args, kwargs)
        m = min(steps, leaves.size)

        def process(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            signs, fresh = jax.random.split(key)
            start = begin(jax.random.rademacher(signs, [leaves.size], leaves.dtype), m)
            nodes, S = jnp.linalg.eigh(extend(matrix, start, 0, m, fresh).projected)
            return nodes, S[0] ** 2  # how much of the start lies along each

        nodes, weights = jax.lax.map(
            process, jax.random.split(jax.random.key(0) if key is None else key, samples)
        )
        return Spectrum(nodes, weights, jnp.asarray(leaves.size, leaves.dtype))

    return functools.wraps(loss, updated=())(jit_arrays(spectrum))


def _estimator(
    loss: Callable, samples: int, key: jax.Array | None, what: str, statistic: Callable, finish: Callable
) -> Callable[..., Estimate]:
    """Return a function for the mean of `statistic(v, H v)` over random signs v, and its standard error."""
    if samples < 2:
        raise ValueError(f"{what}: a standard error needs 2 samples at least, came {samples}")
    product = as_product(loss)

    def estimate(params: Any, /, *args: Any, **kwargs: Any) -> Estimate:
        leaves = floating_leaves(params, what)
        matrix = flat_matrix(product, leaves, args, kwargs)
        keys = jax.random.split(jax.random.key(0) if key is None else key, samples)

        def step(i: jax.Array, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            mean, squares, unit = so_far  # Welford: running, and no difference of large sums
            v = jax.random.rademacher(keys[i], [leaves.size], leaves.dtype)
            seen = statistic(v, matrix(v))
            change = seen - mean
            mean = mean + change / (i + 1).astype(leaves.dtype)
            # In units of the largest change so far: the squares themselves may over- or underflow.
            larger = jnp.maximum(unit, jax.lax.stop_gradient(jnp.abs(change)))
            safe = jnp.where(larger > 0, larger, 1)
            squares = squares * jnp.square(unit / safe) + (change / safe) * ((seen - mean) / safe)
            return mean, squares, larger

        zero = jnp.zeros_like(
            statistic(jnp.zeros([leaves.size], leaves.dtype), jnp.zeros([leaves.size], leaves.dtype))
        )
        mean, squares, unit = jax.lax.fori_loop(0, samples, step, (zero, zero, zero))
        error = unit * jnp.sqrt(squares / (samples * (samples - 1)))
        return Estimate(finish(leaves, mean), finish(leaves, error))

    return functools.wraps(loss, updated=())(jit_arrays(estimate))
