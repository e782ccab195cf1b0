"""One step of training, as a pure function of the state and a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradfn.losses import Loss, over_batch
from gradfn.net import takes_key
from gradfn.params import path_name


class TrainState(NamedTuple):
    """All that training carries from step to step, as one pytree."""

    params: Any
    opt_state: Any
    step: jax.Array  # int32 scalar: steps taken
    key: jax.Array  # a typed key; each step folds its number in


def train_state(params: Any, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Make the state that training begins with.

    Args:
        params: any pytree of arrays.
        optimizer: from optax.
        key: from `jax.random.key`; for losses with noise in them.

    >>> import jax, jax.numpy as jnp, optax, gradfn as gf
    >>> gf.train_state({"w": jnp.ones(3)}, optax.sgd(0.1), jax.random.key(0)).step
    Array(0, dtype=int32)
    """
    params = jax.tree.map(jnp.asarray, params)
    return TrainState(params, optimizer.init(params), jnp.zeros([], jnp.int32), key)


def train_step(
    loss: Loss, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Return the compiled step `(state, batch) -> (state, metrics)`, for those who own their loop.

    Args:
        loss: `(params, batch) -> scalar` or `(scalar, aux)`, with `key=` where it has noise in it. gradfn's own
            losses, which are of one example, are meant over the batch.
        optimizer: from optax.

    Returns:
        A jitted function; `metrics` holds `loss` and the scalars of aux.

    >>> import jax, jax.numpy as jnp, optax, gradfn as gf
    >>> step = gf.train_step(lambda params, batch: jnp.square(params["w"] - batch).mean(), optax.sgd(0.5))
    >>> state = gf.train_state({"w": jnp.zeros([])}, optax.sgd(0.5), jax.random.key(0))
    >>> state, metrics = step(state, jnp.array([1.0, 3.0]))
    >>> print(state.params["w"], metrics["loss"])
    2.0 5.0
    """
    value_and_grad = jax.value_and_grad(scalar_and_aux(over_batch(loss)), has_aux=True)

    @jax.jit
    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        (value, aux), grads = value_and_grad(state.params, batch, **step_keywords(loss, state))
        with jax.numpy_dtype_promotion(
            "standard"
        ):  # optax mixes integers and floats, whatever the user asks of us
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1, state.key), {"loss": value, **scalars(aux)}

    return step


def step_keywords(loss: Loss, state: TrainState) -> dict[str, Any]:
    """Return what a loss takes beside its parameters and its batch, in the step that comes next."""
    return {"key": step_key(state)} if takes_key(loss) else {}


def step_key(state: TrainState) -> jax.Array:
    """Return the key of the step that comes next."""
    return jax.random.fold_in(state.key, state.step)


def scalar_and_aux(loss: Loss) -> Loss:
    """Return a loss that always answers `(scalar, aux)`, with an empty aux where there is none."""

    def with_aux(*args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        answer = loss(*args, **kwargs)
        return answer if isinstance(answer, tuple) else (answer, {})

    return with_aux


def scalars(aux: Any) -> dict[str, jax.Array]:
    """Return the scalars in a tree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(aux)
    named = {path_name(path): jnp.asarray(leaf) for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if leaf.ndim == 0}
