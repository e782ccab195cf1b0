"""`gf.attribution.tracin`: which training examples taught the network its answer to a test example."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradfn.core.precision import norm, widen
from gradfn.curvature.directional import slope_of_scalar
from gradfn.flatten import loss_of_example
from gradfn.inspection.leaves import floating_leaves
from gradfn.inspection.scalar import jit_arrays


def tracin(loss: Callable, *, normalise: bool = False, part: int = 64) -> Callable[..., jax.Array]:
    """Make the influence of each training example on the loss of each test example.

    TracInCP: Pruthi et al., *Estimating Training Data Influence by Tracing Gradient Descent*, 2020, equation
    (1). The score is the sum over checkpoints of the learning rate times the product of the two examples'
    gradients: to first order, how much the steps taken on the training example lowered the test example's loss.
    Positive: it helped. Negative: it harmed, as a mislabelled copy does.

    No per-example gradient of a training example is formed: its product with the gradient of a test example is
    the slope of its loss in that direction, which a forward pass (`jax.jvp`) gives. (They are formed, `part` at a
    time, where a function inside has no forward mode, only a `jax.custom_vjp`.)

    Examples with large gradients, the odd ones out, lead every list. Normalised, a score is the cosine of the two
    gradients instead (Hanawa et al., *Evaluation of Similarity-based Explanations*, 2021): a copy then scores most.

    Args:
        loss: `(params, example) -> scalar` or `(scalar, aux)`, of one example, such as
            `gf.classification_loss(net)`; or its `gf.batch_mean`.
        normalise: divide by the norms of both gradients. Those of the training examples are formed, `part` at a time.
        part: most training examples, and test examples, at a time. Memory is taken for the gradients of `part`
            test examples, and for the activations of `part` times `part` pairs.

    Returns:
        `(checkpoints, train, test, learning_rates) -> [test, train]`, in units of the loss for one step on the
        example alone at each checkpoint. `checkpoints` is a list of parameter trees (or of
        models of another framework; `gf.train.kept` reads those of a run), `train` and `test` are
        batches as the loss takes them with a leading axis, `learning_rates` a number, or one for each checkpoint.
        The scores of gradient descent; with Adam, which scales its steps, they are still used, as an estimate.

    Raises:
        ValueError: no checkpoint, or not one learning rate for each; TypeError: no floating parameter.

    Example:
        >>> import jax.numpy as jnp, gradfn as gf
        >>> loss = lambda w, example: 0.5 * (w @ example[0] - example[1]) ** 2
        >>> train = jnp.eye(2), jnp.array([1.0, 2.0])
        >>> test = jnp.array([[1.0, 0.0]]), jnp.array([3.0])
        >>> gf.attribution.tracin(loss)([jnp.zeros(2)], train, test, 0.1)  # the gradients: [-1 0], [0 -2]; and [-3 0]
        Array([[0.3, 0. ]], dtype=float32)
    """
    if part < 1:
        raise ValueError(f"tracin: part is 1 or more, came {part}")
    loss = loss_of_example(loss)

    @jit_arrays
    def products(params: Any, train: Any, test: Any) -> jax.Array:
        leaves = floating_leaves(params, "tracin")

        def value(values: Any, example: Any) -> jax.Array:
            out = loss(leaves.fill(values), example)
            return out[0] if isinstance(out, tuple) else out

        def of_test(example: Any) -> jax.Array:
            direction = jax.grad(value)(leaves.values, example)
            if normalise:
                length = _norm(direction)
                direction = [(widen(g) / length).astype(g.dtype) for g in direction]

            def slope(other: Any) -> jax.Array:
                return slope_of_scalar(lambda values: value(values, other), leaves.values, direction)

            return jax.lax.map(slope, train, batch_size=part)

        found = jax.lax.map(of_test, test, batch_size=part)  # [test, train]
        if normalise:
            length_of = lambda other: _norm(jax.grad(value)(leaves.values, other))  # noqa: E731
            found /= jax.lax.map(length_of, train, batch_size=part)[None]
        return found

    def scores(checkpoints: Sequence[Any], train: Any, test: Any, learning_rates: Any) -> jax.Array:
        n = len(checkpoints)
        rates = [learning_rates] * n if np.ndim(learning_rates) == 0 else list(learning_rates)
        if n == 0 or len(rates) != n:
            raise ValueError(
                f"tracin: one learning rate for each of one or more checkpoints, came {len(rates)} for {n}"
            )
        train, test = jax.tree.map(jnp.asarray, (train, test))
        return sum(
            jnp.asarray(rate, jnp.float32) * products(params, train, test)
            for params, rate in zip(checkpoints, rates, strict=True)
        )

    return scores


def _norm(gradient: list[Any]) -> jax.Array:
    lengths = [norm(g) for g in gradient]
    widest = max((length.dtype for length in lengths), key=lambda dtype: dtype.itemsize)
    length = norm(jnp.stack([length.astype(widest) for length in lengths]))
    return jnp.where(length > 0, length, 1)  # an example that is learned to the last digit has no gradient
