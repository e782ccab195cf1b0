"""What a row of metrics says about the step that it ends with: norms, the learning rate, the device's use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from gradfn.core.precision import in_units, real_parts, root, unit_of
from gradfn.core.stacking import stacked

Schedule = Callable[[Any], Any]


class ScheduledRate(NamedTuple):
    """The state of `scale_by_schedule`.

    Attributes:
        count: updates taken.
        learning_rate: of the last update.
    """

    count: Int[Array, ""]  # type: ignore[assignment]
    learning_rate: Float[Array, ""]


def scale_by_schedule(schedule: Schedule) -> optax.GradientTransformation:
    """Return `optax.scale_by_learning_rate(schedule)` whose state has the learning rate, for `learning_rate`."""
    inner: optax.GradientTransformation = optax.scale_by_learning_rate(schedule)

    def rate(count: Any) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):  # schedules mix integers and floats
            return jnp.asarray(schedule(count), jnp.float32)

    def init(params: PyTree) -> ScheduledRate:
        state: Any = inner.init(params)
        return ScheduledRate(state.count, rate(state.count))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, ScheduledRate]:
        updates, after = inner.update(updates, optax.ScaleByScheduleState(count=state.count), params)
        return updates, ScheduledRate(after.count, rate(state.count))

    return optax.GradientTransformation(init, update)


def learning_rate(opt_state: PyTree) -> jax.Array | None:
    """Return the learning rate of the last update, where the optimizer's state has one.

    That of `gf.train.adamw_warmup_cosine` and that of `optax.inject_hyperparams` do. None where there is no learning
    rate in the state, several, or one for each parameter.

    >>> import jax.numpy as jnp, optax
    >>> optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    >>> print(learning_rate(optimizer.init({"w": jnp.ones(3)})))
    0.5
    >>> learning_rate(optax.sgd(0.5).init({"w": jnp.ones(3)}))
    """
    rates = [
        node.learning_rate if isinstance(node, ScheduledRate) else node.hyperparams.get("learning_rate")
        for node in jax.tree.leaves(opt_state, is_leaf=_has_rate)
        if _has_rate(node)
    ]
    known = [rate for rate in rates if rate is not None]
    return known[0] if len(known) == 1 and jnp.ndim(known[0]) == 0 else None


def _has_rate(node: Any) -> bool:
    return isinstance(node, ScheduledRate) or isinstance(getattr(node, "hyperparams", None), dict)


def norm(tree: PyTree) -> jax.Array:
    """Return the Euclidean norm of all numbers in a tree, in float32 or wider, without overflow or underflow.

    >>> import jax.numpy as jnp
    >>> print(f"{norm({'w': jnp.array([3e25, 4e25]), 'b': jnp.array([12e25])}):.3g}")
    1.3e+26
    """
    arrays = stacked(leaf for leaf in jax.tree.leaves(tree) if leaf.size)
    parts = [part for array in arrays for part in real_parts(array)]
    if not parts:
        return jnp.zeros([])
    dtype = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
    largest = jnp.stack([jnp.abs(part).max().astype(dtype) for part in parts])
    # Without the barrier, XLA computes the unit again for each part.
    unit = lax.optimization_barrier(unit_of(largest.max()))
    squares = [jnp.square(in_units(part, unit.astype(part.dtype))).sum().astype(dtype) for part in parts]
    return unit * root(jnp.stack(squares).sum())
