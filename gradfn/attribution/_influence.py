"""`gf.attribution.influence`: how a loss would change if a training example counted more or less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from gradfn.core.precision import widen
from gradfn.core.signature import transform_of
from gradfn.curvature._kfac import KroneckerCurvature, ekfac
from gradfn.curvature.directional import slope_of_scalar
from gradfn.curvature.products import flat_matrix
from gradfn.flatten import loss_of_example
from gradfn.jaxpr.call import floating_leaves, jit_arrays, value_and_aux, with_hint
from gradfn.per_example.traced_loss import REMEDY


def influence(
    loss: Callable,
    curvature: Callable | None = None,
    *,
    damping: float | None = None,
    batch_size: int = 64,
    tolerance: float = 1e-4,
    max_products: int = 1000,
) -> Callable[..., Float[Array, "test train"]]:
    """Return a function that computes the influence of each training example on the loss of each test example.

    Influence functions: Koh and Liang, *Understanding Black-box Predictions via Influence Functions*, 2017, equation
    (2) with the opposite sign. The score is `g_test . (H + damping I)^-1 g_train`, the gradient of the test example
    times the inverse curvature of the mean training loss times the gradient of the training example. For a net at a
    minimum of a convex loss and no damping it is the rate at which the loss of the test example falls as the weight of
    the training example in the sum over the N examples rises from 1, times N: it is positive if the training example
    helped, and without it the test loss rises by `score / N`, to first order. For nets, where training neither
    converges nor has a single minimum, Bae et al. (arXiv 2209.05364, 2022) say what the damped score
    approximates; measure it against training again on random subsets
    (the linear datamodeling score of Park et al., *TRAK*, 2023; see the experiment `influence`).

    The inverse is applied to the test gradients; those of single training examples are not formed: the dot product
    with them is a directional derivative of the loss, which a forward pass (`jax.jvp`) computes.

    Args:
        loss: `(params, example) -> scalar` or `(scalar, aux)`, of one example, such as
            `gf.classification_loss(net)`; or its `gf.batch_mean`.
        curvature: what is inverted, one of
            None, EK-FAC of the empirical Fisher: `gf.curvature.ekfac(loss)`, which needs nothing but the loss;
            `gf.curvature.ekfac(net.apply, "softmax")`, EK-FAC of the Gauss-Newton matrix, which is better if the net
            does not fit all examples (Grosse et al., *Studying Large Language Model Generalization with Influence
            Functions*, 2023); or `gf.curvature.kfac`;
            a product, of which the conjugate gradient method computes exact inverses, with one product per iteration
            for each test example: `gf.curvature.ggn_vp(net.apply)`, or the Hessian
            `gf.curvature.hvp(gf.batch_mean(loss))`, which must be positive definite with the damping.
        damping: added to each eigenvalue. By default, with a Kronecker-factored curvature, a tenth of the mean
            eigenvalue of each parameter's block (Grosse et al., 2023); it must be given with a product.
        batch_size: the largest number of training examples, and of test examples, at a time. Memory: the gradients
            of `batch_size` test examples, and the activations of `batch_size ** 2` pairs; with a product, the
            activations of all training examples.
        tolerance: of the residual of the conjugate gradient method, relative to the test gradient.
        max_products: the number of products per test example to stop after; scores of test examples that have not
            converged by then, or met a direction of negative curvature, are NaN.

    Returns:
        `(params, train, test) -> [test, train]`. `train` and `test` are batches of the examples that the loss takes;
        the curvature is that of `train`. Compiled at its first call; it can be called inside `jit`.

    Raises:
        ValueError: a product without damping; damping below 0; `batch_size` below 1.
        TypeError: a curvature that is neither a product nor returns a `gf.curvature.KroneckerCurvature`; no floating
            parameter.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> loss = lambda w, example: 0.5 * (w @ example[0] - example[1]) ** 2
    >>> train = jnp.eye(2), jnp.array([1.0, 2.0])  # the Hessian of the mean loss is I / 2
    >>> test = jnp.array([[1.0, 0.0]]), jnp.array([3.0])
    >>> hessian = gf.curvature.hvp(gf.batch_mean(loss))  # gradients: [-1 0], [0 -2] and [-3 0]
    >>> scores = gf.attribution.influence(loss, hessian, damping=0)(jnp.zeros(2), train, test)
    >>> scores.shape, [round(float(score), 3) + 0.0 for score in scores[0]]
    ((1, 2), [6.0, 0.0])
    """
    is_product = getattr(curvature, "is_curvature_product", False)
    if batch_size < 1:
        raise ValueError(f"influence: batch_size must be an integer >= 1, got {batch_size}")
    if damping is not None and not damping >= 0:
        raise ValueError(f"influence: damping must be >= 0, got {damping}")
    if is_product and damping is None:
        raise ValueError(
            "influence: a curvature product needs damping: influence(loss, product, damping=1e-3), or damping=0 where "
            "the matrix is positive definite"
        )
    if curvature is not None and not callable(curvature):
        raise TypeError(
            "influence: curvature must be a function such as gf.curvature.ekfac(net.apply, 'softmax') or "
            f"gf.curvature.ggn_vp(net.apply), got {type(curvature).__name__}"
        )
    matrix_of = ekfac(loss) if curvature is None else curvature
    loss = with_hint(loss_of_example(loss), REMEDY)

    def solver(params: PyTree, train: PyTree) -> Callable[[PyTree], PyTree]:
        """Return the function that multiplies a gradient by the inverse."""
        leaves = floating_leaves(params, "influence")
        if is_product:
            times = flat_matrix(matrix_of, leaves, (train,), {})
            damped = lambda v: times(v) + damping * v  # noqa: E731
            solve = lambda v: conjugate_gradient(damped, v, tolerance, max_products)  # noqa: E731
            return lambda v: leaves.tree(leaves.split(solve(leaves.flat(leaves.match(v)))))
        matrix: Any = matrix_of(params, train)
        if not isinstance(matrix, KroneckerCurvature):
            raise TypeError(
                "influence: curvature must return a gf.curvature.KroneckerCurvature, such as "
                "gf.curvature.ekfac(net.apply, 'softmax'), or be a product, such as gf.curvature.ggn_vp(net.apply) or "
                f"gf.curvature.product(f); it returned {type(matrix).__name__}"
            )
        matrix = matrix.decomposed()
        added = matrix.relative_damping() if damping is None else damping
        return lambda v: matrix.inverse_product(v, added)

    @jit_arrays
    def products(params: PyTree, train: PyTree, test: PyTree) -> jax.Array:
        leaves = floating_leaves(params, "influence")
        solve = solver(params, train)

        def value(values: list[PyTree], example: PyTree) -> jax.Array:
            return value_and_aux(loss(leaves.fill(values), example))[0]

        def of_test(example: PyTree) -> jax.Array:
            gradient = jax.grad(value)(leaves.values, example)
            direction = leaves.match(solve(leaves.tree(gradient)))

            def slope(other: PyTree) -> jax.Array:
                return slope_of_scalar(lambda values: value(values, other), leaves.values, direction)

            return lax.map(slope, train, batch_size=batch_size)

        # Each product is one with all training examples: one test example at a time.
        return lax.map(of_test, test, batch_size=1 if is_product else batch_size)

    @transform_of(loss, "influence", own=2)
    def scores(params: PyTree, train: PyTree, test: PyTree) -> jax.Array:
        """Return the influence `[test, train]` of training on test examples, at `params`."""
        train, test = jax.tree.map(jnp.asarray, (train, test))
        return products(params, train, test)

    return scores


def conjugate_gradient(
    times: Callable[[jax.Array], jax.Array], b: jax.Array, tolerance: float, max_products: int
) -> jax.Array:
    """Return x with `A x = b` for a positive definite matrix, `[P]`; NaN if the residual stays above the tolerance.

    Hestenes and Stiefel, *Methods of conjugate gradients for solving linear systems*, 1952.

    Args:
        times: `v -> A v`.
        b: the right side.
        tolerance: of the residual, relative to b.
        max_products: the number of products to stop after.
    """
    dot = lambda x, y: jnp.vdot(x, y, precision=lax.Precision.HIGHEST)  # noqa: E731
    enough = tolerance**2 * dot(b, b)

    def goes_on(state: Any) -> jax.Array:
        k, _, _, _, square, positive = state
        return (k < max_products) & (square > enough) & positive

    def step(state: Any) -> Any:
        k, x, r, p, square, _ = state
        Ap = times(p)
        curvature = dot(p, Ap)
        rate = square / curvature
        x, r = x + rate * p, r - rate * Ap
        new = dot(r, r)
        return k + 1, x, r, r + (new / square) * p, new, curvature > 0

    b = widen(b)
    start = (jnp.zeros((), jnp.int32), jnp.zeros_like(b), b, b, dot(b, b), jnp.array(True))
    _, x, _, _, square, positive = lax.while_loop(goes_on, step, start)
    return jnp.where((square <= enough) & positive, x, jnp.nan)
