"""`gf.attribution.tracin`: the influence of training examples on the predictions for test examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from gradfn.core.precision import norm, widen
from gradfn.core.signature import transform_of
from gradfn.curvature.directional import slope_of_scalar
from gradfn.flatten import loss_of_example
from gradfn.jaxpr.call import floating_leaves, jit_arrays, value_and_aux, with_hint
from gradfn.per_example.traced_loss import REMEDY


def tracin(
    loss: Callable, *, normalize: bool = False, batch_size: int = 64
) -> Callable[..., Float[Array, "test train"]]:
    """Return a function that computes the influence of each training example on the loss of each test example.

    TracInCP: Pruthi et al., *Estimating Training Data Influence by Tracing Gradient Descent*, 2020, equation
    (1). The score is the sum over checkpoints of the learning rate times the dot product of the gradients of the
    two examples: to first order, how far the steps on the training example lowered the loss of the test example.
    It is positive if the training example helped, and negative if it harmed, as a mislabeled copy does.

    The gradients of single training examples are not formed: the dot product with the gradient of a test example is
    a directional derivative of the loss, which a forward pass (`jax.jvp`) computes. (They are formed, `batch_size`
    at a time, if a function inside has only a `jax.custom_vjp` and no forward mode.)

    Examples with large gradients, the outliers, have the highest scores throughout. With `normalize`, the score is
    the cosine of the two gradients instead (Hanawa et al., *Evaluation of Similarity-based Explanations*, 2021): a
    copy then has the highest score.

    Args:
        loss: `(params, example) -> scalar` or `(scalar, aux)`, of one example, such as
            `gf.classification_loss(net)`; or its `gf.batch_mean`.
        normalize: divide by the norms of both gradients; those of the training examples are formed, `batch_size`
            at a time.
        batch_size: the largest number of training examples, and of test examples, at a time. Memory: the gradients
            of `batch_size` test examples, and the activations of `batch_size ** 2` pairs.

    Returns:
        `(checkpoints, train, test, learning_rates) -> [test, train]`, in units of the loss per step on that example
        alone at each checkpoint. `checkpoints` is a list of parameter trees (or of models of another framework;
        `gf.train.kept` reads those of a run), `train` and `test` are batches of the examples that the loss takes,
        `learning_rates` is a float, or one for each checkpoint. The scores describe gradient descent; for Adam,
        which rescales its steps, they are an approximation.

    Raises:
        ValueError: no checkpoint, or not one learning rate for each.
        TypeError: no floating parameter.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> loss = lambda w, example: 0.5 * (w @ example[0] - example[1]) ** 2
    >>> train = jnp.eye(2), jnp.array([1.0, 2.0])
    >>> test = jnp.array([[1.0, 0.0]]), jnp.array([3.0])
    >>> gf.attribution.tracin(loss)([jnp.zeros(2)], train, test, 0.1)  # gradients: [-1 0], [0 -2]; and [-3 0]
    Array([[0.3, 0. ]], dtype=float32)
    """
    if batch_size < 1:
        raise ValueError(f"tracin: batch_size must be an integer >= 1, got {batch_size}")
    loss = with_hint(loss_of_example(loss), REMEDY)

    @jit_arrays
    def products(params: PyTree, train: PyTree, test: PyTree) -> jax.Array:
        leaves = floating_leaves(params, "tracin")

        def value(values: list[PyTree], example: PyTree) -> jax.Array:
            return value_and_aux(loss(leaves.fill(values), example))[0]

        def of_test(example: PyTree) -> jax.Array:
            direction = jax.grad(value)(leaves.values, example)
            if normalize:
                length = _norm(direction)
                direction = [(widen(g) / length).astype(g.dtype) for g in direction]

            def slope(other: PyTree) -> jax.Array:
                return slope_of_scalar(lambda values: value(values, other), leaves.values, direction)

            return jax.lax.map(slope, train, batch_size=batch_size)

        found = jax.lax.map(of_test, test, batch_size=batch_size)  # [test, train]
        if normalize:
            length_of = lambda other: _norm(jax.grad(value)(leaves.values, other))  # noqa: E731
            found /= jax.lax.map(length_of, train, batch_size=batch_size)[None]
        return found

    @transform_of(loss, "tracin", own=2)
    def scores(
        checkpoints: Sequence[PyTree],
        train: PyTree,
        test: PyTree,
        learning_rates: float | Float[Array, " checkpoints"] | Sequence[float],
    ) -> jax.Array:
        """Return the influence `[test, train]` of training on test examples, summed over `checkpoints`."""
        n = len(checkpoints)
        rates = jnp.asarray(learning_rates, jnp.float32)
        rates = jnp.broadcast_to(rates, [n]) if rates.ndim == 0 else rates
        if n == 0 or len(rates) != n:
            raise ValueError(
                "tracin: expected one or more checkpoints, and a learning rate for each, got "
                f"{n} checkpoints and {len(rates)} learning rates"
            )
        train, test = jax.tree.map(jnp.asarray, (train, test))
        return sum(
            rate * products(params, train, test) for params, rate in zip(checkpoints, rates, strict=True)
        )

    return scores


def _norm(gradient: list[PyTree]) -> jax.Array:
    lengths = [norm(g) for g in gradient]
    widest = max((length.dtype for length in lengths), key=lambda dtype: dtype.itemsize)
    length = norm(jnp.stack([length.astype(widest) for length in lengths]))
    # An example that is fitted exactly has no gradient.
    return jnp.where(length > 0, length, 1)
