"""The compiled functions of a training run: many steps in one call, some of which are inspected."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from gradfn.core.stacking import stacked
from gradfn.flatten import Loss
from gradfn.jaxpr.call import value_and_aux
from gradfn.jaxpr.varying import zeros
from gradfn.train.bands import Spike
from gradfn.train.gathering import gather_where_used
from gradfn.train.held import held
from gradfn.train.log import refuse_names
from gradfn.train.measures import learning_rate, norm
from gradfn.train.model import batch_loss
from gradfn.train.peak import step_flops
from gradfn.train.placing import place, replicated
from gradfn.train.source import Source
from gradfn.train.spikes import Examined, examiner, watched
from gradfn.train.split import Split, split_of
from gradfn.train.stacked import Stacked, bytes_of
from gradfn.train.step import (
    Change,
    TrainState,
    apply_gradients,
    of_example,
    one_step,
    step_key,
    step_keywords,
)

if TYPE_CHECKING:
    from gradfn.inspection import Inspection
    from gradfn.per_example import NoiseScale

CAPACITY = 4096  # steps in a chunk at most
INSPECTED = 1 << 22  # bytes of inspections in a chunk at most, unless one is larger
# From this many bytes of state per device on, a chunk reuses the state's memory.
DONATED = 1 << 24


class Recorded(NamedTuple):
    """What a chunk of steps tells about them.

    Attributes:
        metrics: of each step, `[CAPACITY]` or, of a single step, `[1]`.
        measures: of the last step: see `measures_of`.
        finite: whether all parameters are finite.
        inspections: one row per step that is inspected, see `flow.summarized`; None where none ever is.
        watched: of each step, see `gradfn.train.spikes.watched`; None where nothing is watched.
    """

    metrics: dict[str, jax.Array]
    measures: dict[str, jax.Array]
    finite: jax.Array
    inspections: Stacked | None
    watched: dict[str, jax.Array] | None = None

    def joined(self, later: Recorded, start: int, inspected: int) -> Recorded:
        """Return what was recorded of a chunk, on the host, with what was recorded from one of its steps on.

        Args:
            later: what was recorded from that step on.
            start: the number of steps before it.
            inspected: how many of those are inspected.
        """
        metrics: dict[str, Any] = {
            name: np.concatenate([column[:start], later.metrics[name]])[:CAPACITY]
            for name, column in self.metrics.items()
        }
        inspections = self.inspections
        if inspections and later.inspections:
            inspections = inspections.joined(later.inspections, inspected)
        return Recorded(metrics, later.measures, later.finite, inspections)


class Arrays(NamedTuple):
    """The arrays that the compiled functions get, but the state.

    Attributes:
        data: of the source of batches.
        loss: that the loss holds.
    """

    data: PyTree
    loss: list[jax.Array]


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
    """`(state, order, row, inspects) -> (state, recorded)`: one step, not taken if it is not finite"""
    measure: Callable[..., NoiseScale]
    """`(state, order, row) -> NoiseScale` of the next step; the loss must be a `BatchMean`"""
    arguments: Callable[..., tuple[Any, dict[str, Any]]]
    """`(state, order, row) -> (batch, keywords)`: the arguments of the loss in the next step"""
    flops: Callable[[TrainState, Any], float]
    """`(state, order)`: the floating-point operations of a step, see `gradfn.train.peak`"""
    compile: Callable[[TrainState, Any], None]
    """`(state, order)`: compile `advance`, without taking a step"""
    examine: Callable[..., Examined]
    """`(state, order, row) -> Examined`: what is recorded of the next step if it spikes; it is not taken"""
    due: Callable[[int, int], range]
    """`(start, end)`: which of the steps from `start` to before `end` are inspected"""
    donated: bool
    """Whether the state is donated, and steps are guarded."""


def chunks(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    source: Source,
    state: TrainState,
    inspect_every: int | None = None,
    spike: Spike | None = None,
    stats: Sequence[str] | None = None,
) -> Chunks:
    """Return the compiled functions of a training run; one program serves chunks of every length.

    Args:
        loss: of a batch.
        optimizer: from optax.
        source: of the batches, placed where the state is.
        state: the first one: where its arrays lie decides how the work is split over devices, and that later states
            lie there too.
        inspect_every: every how many steps one is inspected; None for none.
        spike: what each step is watched for; None for nothing. The state is then never donated, because steps are
            repeated from it.
        stats: which statistics an inspection takes; None for those of `gf.inspect`.
    """
    from gradfn.per_example import noise_scale

    split = split_of(state.params)
    donated = bytes_per_device(state) >= DONATED and spike is None
    own, loss_of = held(loss)
    own = jax.tree.map(jnp.asarray, own) if split is None else place(own, split.mesh)

    # Compiled on their own, they are traced once, though their shapes are needed before the loop.
    @jax.jit
    def step(own: list[jax.Array], state: TrainState, batch: PyTree) -> PyTree:
        return one_step(loss_of(own), optimizer, split, guard=donated)(state, batch)

    @jax.jit
    def inspected_step(own: list[jax.Array], state: TrainState, batch: PyTree) -> PyTree:
        return one_inspected_step(loss_of(own), optimizer, split, donated, stats)(state, batch)

    stays = everywhere = None  # no mesh: jax decides
    if split is not None:
        stays, everywhere = jax.tree.map(lambda leaf: leaf.sharding, state), replicated(split.mesh)
    donate = 1 if donated else ()

    def batch_of(arrays: Arrays, state: TrainState, order: Any, row: jax.Array) -> PyTree:
        # One more fold separates the key of the batch from the key of the loss's noise in the same step.
        batch = source.batch(arrays.data, order, row, jax.random.fold_in(step_key(state), 1))
        return batch if split is None else split.share(batch)

    @functools.partial(jax.jit, donate_argnums=donate, out_shardings=(stays, everywhere))
    def advance(arrays: Arrays, state: TrainState, order: Any, row: jax.Array, n: jax.Array) -> PyTree:
        def taken(state: TrainState, i: jax.Array) -> PyTree:
            return step(arrays.loss, state, batch_of(arrays, state, order, row + i))

        def taken_and_inspected(state: TrainState, i: jax.Array) -> PyTree:
            return inspected_step(arrays.loss, state, batch_of(arrays, state, order, row + i))

        def next_one(carry: Progress, after: TrainState, metrics: PyTree, change: Change) -> Progress:
            columns = jax.tree.map(
                lambda column, value: column.at[carry.i].set(value), carry.metrics, metrics
            )
            # Only of the last step: sums over all parameters would take a large part of a short step.
            measures = jax.lax.cond(
                carry.i == n - 1, lambda: measures_of(change, after), lambda: carry.measures
            )
            # Only a guarded step may not be taken.
            good = after.step > carry.state.step if donated else jnp.array(True)
            if spike is not None:
                of_step = watched(spike, change, after)
                rows = jax.tree.map(lambda rows, row: rows.at[carry.i].set(row), carry.watched, of_step)
                carry = carry._replace(watched=rows)
            return carry._replace(i=carry.i + 1, good=good, state=after, metrics=columns, measures=measures)

        def plain(carry: Progress) -> Progress:
            return next_one(carry, *taken(carry.state, carry.i))

        def inspected(carry: Progress) -> Progress:
            *result, found = taken_and_inspected(carry.state, carry.i)
            assert carry.inspections
            inspections = carry.inspections.with_row(carry.inspected, found)
            carry = carry._replace(inspections=inspections, inspected=carry.inspected + 1)
            return next_one(carry, *result)

        def is_due(carry: Progress) -> jax.Array:
            assert inspect_every
            return carry.state.step % inspect_every == 0

        def group(carry: Progress) -> Progress:
            # Two loops, not a branch per step: a branch would keep the compiler from joining it with the rest.
            carry = jax.lax.while_loop(lambda carry: carry.goes_on(n) & is_due(carry), inspected, carry)
            return jax.lax.while_loop(lambda carry: carry.goes_on(n) & ~is_due(carry), plain, carry)

        each = plain if inspect_every is None else inspected if inspect_every == 1 else group
        start = Progress.start(
            state,
            jax.eval_shape(taken if inspect_every is None else taken_and_inspected, state, row),
            inspect_every,
            spike,
        )
        end = jax.lax.while_loop(lambda carry: carry.goes_on(n), each, start)
        finite = end.good & all_finite(end.state.params)
        return end.state, Recorded(end.metrics, end.measures, finite, end.inspections, end.watched)

    @functools.partial(
        jax.jit, donate_argnums=donate, out_shardings=(stays, everywhere), static_argnames="inspects"
    )
    def careful(arrays: Arrays, state: TrainState, order: Any, row: jax.Array, inspects: bool) -> PyTree:
        own_loss = loss_of(arrays.loss)
        one = (
            one_inspected_step(own_loss, optimizer, split, stats=stats)
            if inspects
            else one_step(own_loss, optimizer, split)
        )
        after, metrics, change, *found = one(state, batch_of(arrays, state, order, row))
        measures = measures_of(change, after)
        good, after = guarded(state, after, metrics["loss"])
        columns = {name: value[None] for name, value in metrics.items()}
        inspections = Stacked.zeros(found[0], 1).with_row(0, found[0]) if found else None
        return after, Recorded(columns, measures, good, inspections)

    @jax.jit
    def measure(arrays: Arrays, state: TrainState, order: Any, row: jax.Array) -> NoiseScale:
        batch = batch_of(arrays, state, order, row)
        params = state.params if split is None else split.gather(state.params)
        of_one, key = of_example(loss_of(arrays.loss), state)
        return noise_scale(of_one)(params, batch, key=key)

    @jax.jit
    def examine(arrays: Arrays, state: TrainState, order: Any, row: jax.Array) -> Examined:
        one = functools.partial(inspected_step, arrays.loss)
        examined = examiner(loss_of(arrays.loss), one)
        return examined(state, batch_of(arrays, state, order, row))

    @jax.jit
    def arguments(
        arrays: Arrays, state: TrainState, order: Any, row: jax.Array
    ) -> tuple[Any, dict[str, Any]]:
        return batch_of(arrays, state, order, row), step_keywords(loss, state)

    def flops(arrays: Arrays, state: TrainState, order: Any) -> float:
        def forward(arrays: Arrays, state: TrainState, order: Any) -> PyTree:
            batch, keywords = batch_of(arrays, state, order, jnp.int32(0)), step_keywords(loss, state)
            return batch_loss(loss_of(arrays.loss), state.rest)(state.params, batch, **keywords)

        return step_flops(forward, arrays, state, order)

    def compile(arrays: Arrays, state: TrainState, order: Any) -> None:
        advance.lower(arrays, state, order, 0, 0).compile()

    def due(start: int, end: int) -> range:
        return (
            range(-(-start // inspect_every) * inspect_every, end, inspect_every)
            if inspect_every
            else range(0)
        )

    functions: tuple[Callable, ...] = (advance, careful, measure, arguments, flops, compile, examine)
    bound = (functools.partial(function, Arrays(source.arrays, own)) for function in functions)
    return Chunks(*bound, due=due, donated=donated)  # type: ignore[misc, arg-type]


class Progress(NamedTuple):
    """What a chunk's loop carries from step to step.

    Attributes:
        i: how many steps it has taken.
        inspected: how many of them were inspected.
        good: whether the last one was taken.
        state: after it.
        metrics: of each step, `[CAPACITY]`.
        measures: of the last step.
        inspections: as in `Recorded`.
        watched: as in `Recorded`.
    """

    i: jax.Array
    inspected: jax.Array
    good: jax.Array
    state: TrainState
    metrics: dict[str, jax.Array]
    measures: dict[str, jax.Array]
    inspections: Stacked | None
    watched: dict[str, jax.Array] | None

    @classmethod
    def start(
        cls, state: TrainState, shapes: PyTree, inspect_every: int | None, spike: Spike | None
    ) -> Progress:
        """Return the start of a loop, given the shapes of what a step returns."""
        after, metrics, change, *found = shapes
        refuse_names(metrics.keys() - {"loss"}, "the loss's aux")
        columns = jax.tree.map(lambda leaf: jnp.zeros([CAPACITY], leaf.dtype), metrics)
        measures = zeros(jax.eval_shape(measures_of, change, after))
        inspections = None
        if inspect_every:
            room = max(1, min(INSPECTED // bytes_of(found), -(-CAPACITY // inspect_every)))
            inspections = Stacked.zeros(found[0], room)
        of_steps = None
        if spike is not None:
            of_step = jax.eval_shape(functools.partial(watched, spike), change, after)
            of_steps = jax.tree.map(lambda leaf: jnp.zeros([CAPACITY, *leaf.shape], leaf.dtype), of_step)
        return cls(
            jnp.int32(0), jnp.int32(0), jnp.array(True), state, columns, measures, inspections, of_steps
        )

    def goes_on(self, n: jax.Array) -> jax.Array:
        """Whether there is another step to take, of `n`."""
        return (self.i < n) & self.good


def one_inspected_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    split: Split | None,
    guard: bool = False,
    stats: Sequence[str] | None = None,
) -> Callable[[TrainState, PyTree], tuple[TrainState, dict[str, jax.Array], Change, Inspection]]:
    """Return the function that takes one step as `one_step` does, with the gradients of an inspection.

    It also returns the inspection, in short: see `gradfn.inspection.flow.summarized`.
    """
    from gradfn.inspection import inspect
    from gradfn.inspection.flow import summarized
    from gradfn.inspection.summaries import DEFAULT_STATS

    stats = DEFAULT_STATS if stats is None else stats

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, jax.Array], Change, Inspection]:
        keywords = step_keywords(loss, state)
        f = gather_where_used(batch_loss(loss, state.rest), split, again=False)
        found = inspect(f, stats=stats, input_grads=False)(state.params, batch, **keywords)
        value_fn = lambda params: value_and_aux(f(params, batch, **keywords))[0]  # noqa: E731
        after, metrics, change = apply_gradients(
            optimizer, state, found.value, found.aux, found.grads, value_fn, split, guard
        )
        return after, metrics, change, summarized(found.with_updates(state.params, change.updates))

    return step


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
        inspects = bool(run.due(step + done, step + done + 1))
        state, one = run.careful(state, order, row + done, inspects)
        recorded = recorded.joined(jax.device_get(one), done, len(run.due(step, step + done)))
        if not recorded.finite:
            break
        if done + 1 < n:
            state, others = run.advance(state, order, row + done + 1, n - done - 1)
            recorded = recorded.joined(jax.device_get(others), done + 1, len(run.due(step, step + done + 1)))
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
    floats = stacked(leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact))
    return jnp.all(jnp.array([jnp.isfinite(array).all() for array in floats] or [True]))
