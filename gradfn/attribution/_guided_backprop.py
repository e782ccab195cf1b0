"""Guided backpropagation: ReLUs that let positive cotangents pass alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from gradfn.attribution._modified import explained
from gradfn.attribution._score import Target, score
from gradfn.core.signature import transform_of
from gradfn.jaxpr import Equation
from gradfn.jaxpr.call import jit_arrays
from gradfn.jaxpr.interpreter import Evaluate


def guided_backprop(
    f: Callable, target: Target = None, at: str | None = None
) -> Callable[..., Float[Array, " ..."]]:
    """Return a function that computes the gradient of a score where ReLUs pass positive cotangents alone.

    Springenberg et al., *Striving for Simplicity: The All Convolutional Net*, 2015. The backward pass of every ReLU
    sets a cotangent to 0 where it is negative, as well as where the input was. The maps are sharp, but nearly
    the same for random weights (Adebayo et al., 2018): they show edges of the input more than what was learned.

    Args:
        f: as for `gf.attribution.saliency`; between the input and the output there is a ReLU, written as
            `jax.nn.relu(x)`, `maximum(x, 0)`, `where(x > 0, x, 0)` or `x * (x > 0)`.
        target: as for `gf.attribution.saliency`.
        at: as for `gf.attribution.saliency`.

    Returns:
        `(params, x, *rest) -> map` of the shape and dtype of the input or site; compiled.

    Raises:
        ValueError: no ReLU, a while loop; and as for `gf.attribution.saliency`.
        TypeError: as for `gf.attribution.saliency`.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> f = lambda W, x: jnp.array([1.0, -1.0]) @ jnp.maximum(W @ x, 0.0)
    >>> gf.attribution.saliency(f)(jnp.eye(2), jnp.ones(2))
    Array([ 1., -1.], dtype=float32)
    >>> gf.attribution.guided_backprop(f)(jnp.eye(2), jnp.ones(2))
    Array([1., 0.], dtype=float32)
    """
    scored = score(f, target, "guided_backprop")

    @jit_arrays
    def compiled(params: PyTree, x: ArrayLike, rest: tuple[PyTree, ...]) -> jax.Array:
        call = explained(scored, at, params, x, rest, "guided_backprop")
        operands = {path: step.relu_of for path, step in call.steps.items() if step.relu_of is not None}
        if not operands:
            raise ValueError(
                "guided_backprop: expected a ReLU between the input and the output, got none. For other activation "
                "functions use gf.attribution.lrp"
            )

        def guide(equation: Equation, evaluate: Evaluate, inputs: Sequence[PyTree]) -> list[PyTree]:
            (y,) = evaluate([jax.lax.stop_gradient(x) for x in inputs])
            return [_guided(inputs[operands[equation.path]], y)]

        return jax.grad(lambda delta: call.run(delta, guide, operands), has_aux=True)(call.zero)[0]

    @transform_of(f, "guided_backprop", own=2)
    def gradient(params: PyTree, x: ArrayLike, /, *rest: PyTree) -> jax.Array:
        """Return the guided gradient of the score with respect to `x`, or to the site."""
        return compiled(params, x, rest)

    return gradient


@jax.custom_vjp
def _guided(x: jax.Array, y: jax.Array) -> jax.Array:
    return y


def _forward(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    return y, x > 0


def _backward(positive: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    return jnp.where(positive, jnp.maximum(g, 0), 0), None


_guided.defvjp(_forward, _backward)
