"""An exponential moving average of the weights, kept in the optimizer's state."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from gradfn.core.precision import wide


class EmaWeights(NamedTuple):
    """The state of `gf.train.ema_weights`.

    Attributes:
        count: updates taken.
        average: of the parameters, in float32 at least.
    """

    count: Int[Array, ""]  # type: ignore[assignment]
    average: PyTree


def ema_weights(decay: float) -> optax.GradientTransformation:
    """Return an optax transformation that averages the parameters over training; it changes no update.

    Polyak and Juditsky, *Acceleration of Stochastic Approximation by Averaging*, 1992, with weights that decay
    exponentially. They are normalized as in Adam (Kingma and Ba, 2015, section 3), so that the initial parameters,
    which training leaves behind, are not in the average. `optax.ema` averages updates instead.

    Args:
        decay: in [0, 1): the average is over about `1 / (1 - decay)` updates.

    Returns:
        A transformation for the end of a chain, behind the learning rate: it takes what it is given to be the step that
        is added to the parameters. `gf.train.averaged_weights` reads the average.

    Raises:
        ValueError: a decay out of range; or parameters are not passed to `update`.

    >>> import jax.numpy as jnp, optax, gradfn as gf
    >>> optimizer = optax.chain(optax.sgd(1.0), gf.train.ema_weights(0.5))
    >>> state = optimizer.init(jnp.array(8.0))
    >>> for params in (8.0, 4.0):  # steps to 4 and to 0
    ...     updates, state = optimizer.update(jnp.array(4.0), state, jnp.array(params))
    >>> print(f"{gf.train.averaged_weights(state, jnp.array(0.0)):.3f}")  # (4 / 4 + 0 / 2) / (1 / 4 + 1 / 2)
    1.333
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema_weights: decay must be in [0, 1), got {decay}")

    def init(params: PyTree) -> EmaWeights:
        return EmaWeights(jnp.zeros([], jnp.int32), jax.tree.map(_widened, params))

    def update(updates: PyTree, state: EmaWeights, params: PyTree = None) -> tuple[PyTree, EmaWeights]:
        if params is None:
            raise ValueError("ema_weights: update must be given the parameters: update(grads, state, params)")
        count = optax.safe_increment(state.count)
        # The sum of decay^i (1 - decay) over the updates before is 1 - decay^count.
        t = count.astype(jnp.float32)
        # The logarithm in double precision: a decay of 0.9999999 is not a float32.
        rate = (1 - decay) / -jnp.expm1(t * math.log(decay)) if decay else jnp.float32(1)

        def average(mean: jax.Array, param: jax.Array, step: jax.Array) -> jax.Array:
            with jax.numpy_dtype_promotion("standard"):
                new = _widened((param + step).astype(param.dtype))  # as optax.apply_updates will store it
            return mean + rate.astype(mean.real.dtype) * (new - mean)

        return updates, EmaWeights(count, jax.tree.map(average, state.average, params, updates))

    return optax.GradientTransformation(init, update)


def averaged_weights(opt_state: PyTree, params: PyTree) -> PyTree:
    """Return the average that `gf.train.ema_weights` keeps in an optimizer's state.

    `gf.fit(..., eval_params=gf.train.averaged_weights)` evaluates it during training, and
    `gf.train.averaged_weights(fitted.state.opt_state, fitted.params)` is it after training.

    Args:
        opt_state: the state of an optimizer with `ema_weights` in it, `fitted.state.opt_state`.
        params: the parameters that it was trained with; of an Equinox model, the model. Their dtypes, and all that is
            not trained or not averaged (`optax.masked`, `optax.partition`), are those of the result.

    Raises:
        ValueError: none or several in the state.

    >>> import jax.numpy as jnp, optax, gradfn as gf
    >>> params = {"w": jnp.ones(2)}
    >>> gf.train.averaged_weights(gf.train.ema_weights(0.9).init(params), params)
    {'w': Array([1., 1.], dtype=float32)}
    """
    is_ema = lambda node: isinstance(node, EmaWeights)  # noqa: E731
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_ema) if is_ema(node)]
    if len(found) != 1:
        raise ValueError(
            f"averaged_weights: expected one gf.train.ema_weights in the optimizer, got {len(found)}. Write "
            "optax.chain(optimizer, gf.train.ema_weights(decay))"
        )
    # What is not trained, and what optax.masked and optax.partition leave out, has no average.
    is_absent = lambda node: node is None or isinstance(node, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(
        lambda mean, param: param if is_absent(mean) else mean.astype(param.dtype),
        found[0].average,
        params,
        is_leaf=is_absent,
    )


def _widened(param: PyTree) -> jax.Array:
    return jnp.asarray(param).astype(wide(jnp.asarray(param).dtype))
