"""The compiled functions of a training run: many steps in one call, and one step that is inspected."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from gradfn.core.net import takes_key
from gradfn.flatten import Loss, loss_of_example
from gradfn.jaxpr.call import value_and_aux
from gradfn.jaxpr.varying import zeros
from gradfn.train.gathering import gather_where_used
from gradfn.train.log import refuse_names
from gradfn.train.measures import learning_rate, norm
from gradfn.train.model import batch_loss
from gradfn.train.peak import step_flops
from gradfn.train.placing import replicated
from gradfn.train.source import Source
from gradfn.train.split import split_of
from gradfn.train.step import Change, TrainState, apply_gradients, one_step, step_key, step_keywords

if TYPE_CHECKING:
    from gradfn.inspection import Inspection
    from gradfn.per_example import NoiseScale

CAPACITY = 4096  # steps in a chunk at most
# From this many bytes of state per device on, a chunk reuses the state's memory.
DONATED = 1 << 24


class Recorded(NamedTuple):
    """What a chunk of steps tells about them.

    Attributes:
        metrics: of each step, `[CAPACITY]` or, of a step that is inspected, `[1]`.
        measures: of the last step: see `measures_of`.
        finite: whether all parameters are finite.
    """

    metrics: dict[str, jax.Array]
    measures: dict[str, jax.Array]
    finite: jax.Array

    def joined(self, later: Recorded, start: int) -> Recorded:
        """Return what was recorded of a chunk, on the host, with what was recorded from one of its steps on."""
        metrics: dict[str, Any] = {
            name: np.concatenate([column[:start], later.metrics[name]])[:CAPACITY]
            for name, column in self.metrics.items()
        }
        return Recorded(metrics, later.measures, later.finite)


class Chunks(NamedTuple):
    """The compiled functions. Each takes the state, the epoch's order, and the row of the order for the next batch.

    A large state is donated: the new state is written into the memory of the old one, which cannot be used after the
    call. So the state before a bad step must survive otherwise: `advance` ends the chunk before a step whose loss or
    gradients are not finite, and `careful` takes that step if loss and parameters are finite after it (an optimizer may
    mend its gradients); see `finished`. A small state is kept instead, so that the steps can be repeated from it, and
    what takes a larger part of a short step is left out.
    """

    advance: Callable[..., tuple[TrainState, Recorded]]
    """`(state, order, row, n) -> (state, recorded)`"""
    careful: Callable[..., tuple[TrainState, Recorded]]
    """`(state, order, row) -> (state, recorded)`: one step, not taken if it is not finite"""
    inspect: Callable[..., tuple[TrainState, Recorded, Inspection]]
    """`(state, order, row) -> (state, recorded, Inspection)`: one step"""
    measure: Callable[..., NoiseScale]
    """`(state, order, row) -> NoiseScale` of the next step; the loss must be a `BatchMean`"""
    arguments: Callable[..., tuple[Any, dict[str, Any]]]
    """`(state, order, row) -> (batch, keywords)`: the arguments of the loss in the next step"""
    flops: Callable[[TrainState, Any], float]
    """`(state, order)`: the floating-point operations of a step, see `gradfn.train.peak`"""
    compile: Callable[[TrainState, Any, bool], None]
    """`(state, order, inspects)`: compile `advance` (and `inspect`), without taking a step"""
    donated: bool
    """Whether the state is donated, and steps are guarded."""


def chunks(loss: Loss, optimizer: optax.GradientTransformation, source: Source, state: TrainState) -> Chunks:
    """Return the compiled functions of a training run; one program serves chunks of every length.

    Args:
        loss: of a batch.
        optimizer: from optax.
        source: of the batches, placed where the state is.
        state: the first one: where its arrays lie decides how the work is split over devices, and that later states
            lie there too.
    """
    from gradfn.inspection import inspect
    from gradfn.per_example import noise_scale

    split = split_of(state.params)
    donated = bytes_per_device(state) >= DONATED
    step = one_step(loss, optimizer, split, guard=donated)
    stays = everywhere = None  # no mesh: jax decides
    if split is not None:
        stays, everywhere = jax.tree.map(lambda leaf: leaf.sharding, state), replicated(split.mesh)
    donate = 1 if donated else ()

    def batch_of(arrays: PyTree, state: TrainState, order: Any, row: jax.Array) -> PyTree:
        # One more fold separates the key of the batch from the key of the loss's noise in the same step.
        batch = source.batch(arrays, order, row, jax.random.fold_in(step_key(state), 1))
        return batch if split is None else split.share(batch)

    @functools.partial(jax.jit, donate_argnums=donate, out_shardings=(stays, everywhere))
    def advance(arrays: PyTree, state: TrainState, order: Any, row: jax.Array, n: jax.Array) -> PyTree:
        def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            i, _, state, columns, measures = carry
            after, metrics, change = step(state, batch_of(arrays, state, order, row + i))
            columns = jax.tree.map(lambda column, value: column.at[i].set(value), columns, metrics)
            # Only of the last step: sums over all parameters would take a large part of a short step.
            measures = jax.lax.cond(i == n - 1, lambda: measures_of(change, after), lambda: measures)
            # Only a guarded step may not be taken.
            taken = after.step > state.step if donated else jnp.array(True)
            return i + 1, taken, after, columns, measures

        def shapes() -> tuple[PyTree, PyTree]:
            after, metrics, change = step(state, batch_of(arrays, state, order, row))
            return metrics, measures_of(change, after)

        metrics, measures = jax.eval_shape(shapes)
        refuse_names(metrics.keys() - {"loss"}, "the loss's aux")
        columns = jax.tree.map(lambda leaf: jnp.zeros([CAPACITY], leaf.dtype), metrics)
        start = jnp.int32(0), jnp.array(True), state, columns, zeros(measures)
        _, good, state, columns, measures = jax.lax.while_loop(
            lambda carry: (carry[0] < n) & carry[1], body, start
        )
        return state, Recorded(columns, measures, good & all_finite(state.params))

    @functools.partial(jax.jit, donate_argnums=donate, out_shardings=(stays, everywhere))
    def careful(arrays: PyTree, state: TrainState, order: Any, row: jax.Array) -> PyTree:
        after, metrics, change = one_step(loss, optimizer, split)(state, batch_of(arrays, state, order, row))
        measures = measures_of(change, after)
        good, after = guarded(state, after, metrics["loss"])
        columns = {name: value[None] for name, value in metrics.items()}
        return after, Recorded(columns, measures, good)

    @functools.partial(jax.jit, donate_argnums=donate, out_shardings=(stays, everywhere, None))
    def inspected(arrays: PyTree, state: TrainState, order: Any, row: jax.Array) -> Any:
        batch, keywords = batch_of(arrays, state, order, row), step_keywords(loss, state)
        f = gather_where_used(batch_loss(loss, state.rest), split, again=False)
        found = inspect(f, input_grads=False)(state.params, batch, **keywords)
        value_fn = lambda params: value_and_aux(f(params, batch, **keywords))[0]  # noqa: E731
        after, metrics, change = apply_gradients(
            optimizer, state, found.value, found.aux, found.grads, value_fn, split
        )
        found = found.with_updates(state.params, change.updates)
        measures = measures_of(change, after)
        good = all_finite(after.params)
        if donated:
            good, after = guarded(state, after, metrics["loss"])
        columns = {name: value[None] for name, value in metrics.items()}
        return after, Recorded(columns, measures, good), found

    @jax.jit
    def measure(arrays: PyTree, state: TrainState, order: Any, row: jax.Array) -> NoiseScale:
        batch = batch_of(arrays, state, order, row)
        params = state.params if split is None else split.gather(state.params)
        of_one = loss_of_example(loss) if state.rest is None else state.rest.loss(loss_of_example(loss))
        if not takes_key(of_one):
            return noise_scale(of_one)(params, batch)
        keys = jax.random.split(step_key(state), source.batch_size)  # as batch_mean splits it
        return noise_scale(lambda params, one, key: of_one(params, one, key=key))(params, batch, keys)

    @jax.jit
    def arguments(
        arrays: PyTree, state: TrainState, order: Any, row: jax.Array
    ) -> tuple[Any, dict[str, Any]]:
        return batch_of(arrays, state, order, row), step_keywords(loss, state)

    def flops(arrays: PyTree, state: TrainState, order: Any) -> float:
        def forward(arrays: PyTree, state: TrainState, order: Any) -> PyTree:
            batch, keywords = batch_of(arrays, state, order, jnp.int32(0)), step_keywords(loss, state)
            return batch_loss(loss, state.rest)(state.params, batch, **keywords)

        return step_flops(forward, arrays, state, order)

    def compile(arrays: PyTree, state: TrainState, order: Any, inspects: bool) -> None:
        advance.lower(arrays, state, order, 0, 0).compile()
        if inspects:
            inspected.lower(arrays, state, order, 0).compile()

    functions: tuple[Callable, ...] = (advance, careful, inspected, measure, arguments, flops, compile)
    bound = (functools.partial(function, source.arrays) for function in functions)
    return Chunks(*bound, donated=donated)  # type: ignore[misc, arg-type]


def measures_of(change: Change, after: TrainState) -> dict[str, jax.Array]:
    """Return the norms of a step's gradient and update, and its learning rate if the optimizer's state has it."""
    norms = {"grad_norm": norm(change.grads), "update_norm": norm(change.updates)}
    rate = learning_rate(after.opt_state)
    return norms if rate is None else norms | {"learning_rate": jnp.asarray(rate, jnp.float32)}


def guarded(before: TrainState, after: TrainState, loss: jax.Array) -> tuple[jax.Array, TrainState]:
    """Return whether a step's loss and parameters are finite, and the state after it; if they are not, before it."""
    good = jnp.isfinite(loss) & all_finite(after.params)
    keep = lambda new, old: new if new is old else jnp.where(good, new, old)  # noqa: E731
    return good, jax.tree.map(keep, after, before)


def finished(
    run: Chunks, state: TrainState, recorded: Recorded, order: Any, row: int, n: int, step: int
) -> tuple[TrainState, Recorded]:
    """Finish a chunk of donated states that ended before a step, if that step can be taken after all.

    Args:
        run: the compiled functions of the run.
        state: that the chunk returned; it is given up.
        recorded: by the chunk, on the host.
        order: of the epoch.
        row: of the chunk's first batch.
        n: the number of steps of the chunk.
        step: the number of steps before it.

    Returns:
        The state after all steps, or that before the one that is not finite; and what is recorded of the chunk.
    """
    while (done := int(state.step) - step) < n and not recorded.finite:
        state, one = run.careful(state, order, row + done)
        recorded = recorded.joined(jax.device_get(one), done)
        if not recorded.finite:
            break
        if done + 1 < n:
            state, others = run.advance(state, order, row + done + 1, n - done - 1)
            recorded = recorded.joined(jax.device_get(others), done + 1)
    return state, recorded


def bytes_per_device(tree: PyTree) -> int:
    """Return how much memory the arrays of a tree take on each device that they lie on."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def owned(state: TrainState) -> TrainState:
    """Return a state whose memory can be donated: no array in it is the caller's, and none is in it twice."""
    given = state.params, state.model_state, state.rest, state.key
    known = set(map(id, jax.tree.leaves(given)))

    def owned_once(leaf: jax.Array) -> jax.Array:
        if id(leaf) in known:
            return jnp.copy(leaf)
        known.add(id(leaf))
        return leaf

    params, model_state, rest, key = jax.tree.map(jnp.copy, given)
    opt_state = jax.tree.map(owned_once, state.opt_state)
    return TrainState(params, opt_state, state.step, key, model_state, rest)


def all_finite(tree: PyTree) -> jax.Array:
    """Return whether a tree's floats are all finite, as a bool scalar."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in floats] or [True]))
