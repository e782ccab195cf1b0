"""The compiled functions of a training run: many steps in one call, and one step that is inspected."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from gradfn.core.net import takes_key
from gradfn.flatten import Loss, loss_of_example
from gradfn.jaxpr.call import value_and_aux
from gradfn.train.log import refuse_names
from gradfn.train.model import batch_loss
from gradfn.train.source import Source
from gradfn.train.step import TrainState, apply_gradients, step_key, step_keywords, train_step

if TYPE_CHECKING:
    from gradfn.inspection import Inspection
    from gradfn.per_example import NoiseScale

CAPACITY = 4096  # steps in a chunk at most


class Chunks(NamedTuple):
    """The compiled functions. Each takes the state, the epoch's order, and the row of the order for the next batch."""

    advance: Callable[..., tuple[TrainState, dict[str, jax.Array], jax.Array]]
    """`(state, order, row, n) -> (state, metrics [CAPACITY] each, whether all parameters are finite)`"""
    inspect: Callable[..., tuple[TrainState, dict[str, jax.Array], jax.Array, Inspection]]
    """`(state, order, row) -> (state, metrics [1] each, whether all parameters are finite, Inspection)`: one step"""
    measure: Callable[..., NoiseScale]
    """`(state, order, row) -> NoiseScale` of the next step; the loss must be a `BatchMean`"""
    arguments: Callable[..., tuple[Any, dict[str, Any]]]
    """`(state, order, row) -> (batch, keywords)`: the arguments of the loss in the next step"""


def chunks(
    loss: Loss, optimizer: optax.GradientTransformation, source: Source, mesh: jax.sharding.Mesh | None
) -> Chunks:
    """Return the compiled functions of a training run; one program serves chunks of every length."""
    from gradfn.inspection import inspect
    from gradfn.per_example import noise_scale

    one_step = train_step(loss, optimizer)

    def batch_of(arrays: PyTree, state: TrainState, order: Any, row: jax.Array) -> PyTree:
        # One more fold separates the key of the batch from the key of the loss's noise in the same step.
        batch = source.batch(arrays, order, row, jax.random.fold_in(step_key(state), 1))
        if mesh is None:
            return batch
        shared, alone = (
            jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
            for axes in (mesh.axis_names[:1], ())
        )
        examples = source.batch_size
        shardings = jax.tree.map(lambda leaf: shared if leaf.shape[:1] == (examples,) else alone, batch)
        return jax.lax.with_sharding_constraint(batch, shardings)

    @jax.jit
    def advance(arrays: PyTree, state: TrainState, order: Any, row: jax.Array, n: jax.Array) -> PyTree:
        def body(i: jax.Array, carry: tuple[TrainState, PyTree]) -> tuple[TrainState, PyTree]:
            state, columns = carry
            state, metrics = one_step(state, batch_of(arrays, state, order, row + i))
            return state, jax.tree.map(lambda column, value: column.at[i].set(value), columns, metrics)

        _, metrics = jax.eval_shape(lambda: one_step(state, batch_of(arrays, state, order, row)))
        refuse_names(metrics.keys() - {"loss"}, "the loss's aux")
        columns = jax.tree.map(lambda leaf: jnp.zeros([CAPACITY], leaf.dtype), metrics)
        state, columns = jax.lax.fori_loop(0, n, body, (state, columns))
        return state, columns, all_finite(state.params)

    @jax.jit
    def inspected(arrays: PyTree, state: TrainState, order: Any, row: jax.Array) -> Any:
        batch, keywords = batch_of(arrays, state, order, row), step_keywords(loss, state)
        f = batch_loss(loss, state.rest)
        found = inspect(f, input_grads=False)(state.params, batch, **keywords)
        value_fn = lambda params: value_and_aux(f(params, batch, **keywords))[0]  # noqa: E731
        after, metrics, updates = apply_gradients(
            optimizer, state, found.value, found.aux, found.grads, value_fn
        )
        columns = {name: value[None] for name, value in metrics.items()}
        return after, columns, all_finite(after.params), found.with_updates(state.params, updates)

    @jax.jit
    def measure(arrays: PyTree, state: TrainState, order: Any, row: jax.Array) -> NoiseScale:
        batch = batch_of(arrays, state, order, row)
        of_one = loss_of_example(loss) if state.rest is None else state.rest.loss(loss_of_example(loss))
        if not takes_key(of_one):
            return noise_scale(of_one)(state.params, batch)
        keys = jax.random.split(step_key(state), source.batch_size)  # as batch_mean splits it
        return noise_scale(lambda params, one, key: of_one(params, one, key=key))(state.params, batch, keys)

    @jax.jit
    def arguments(
        arrays: PyTree, state: TrainState, order: Any, row: jax.Array
    ) -> tuple[Any, dict[str, Any]]:
        return batch_of(arrays, state, order, row), step_keywords(loss, state)

    functions = (advance, inspected, measure, arguments)
    return Chunks(*(functools.partial(function, source.arrays) for function in functions))


def all_finite(tree: PyTree) -> jax.Array:
    """Return whether a tree's floats are all finite, as a bool scalar."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in floats] or [True]))
