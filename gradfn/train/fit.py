"""`fit`: whole chunks of steps compiled into one call, with the data on the device.

What a step computes depends on its number alone (its batch, its key), and a chunk's length is a traced number:
one program runs every chunk, so that how steps are grouped, where a run was interrupted and how fast the machine
is change no bit of the outcome.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradfn.data.batches import epoch_order
from gradfn.losses import Loss
from gradfn.train import checkpoint
from gradfn.train.log import Log
from gradfn.train.step import TrainState, train_state, train_step

Row = dict[
    str, Any
]  # one evaluation: step, epoch, loss, examples_per_second, seconds, and what evaluate said
CHECKPOINT = "checkpoint.safetensors"
CAPACITY = 4096  # steps in a chunk at most
CHUNK_SECONDS = (
    0.2  # what a chunk should take: often enough for the progress bar, seldom enough to cost nothing
)


class Fit(NamedTuple):
    """What training gave: the parameters, the whole state, and a row for each evaluation."""

    params: Any
    state: TrainState
    history: list[Row]


def fit(
    loss: Loss,
    params: Any,
    data: Any,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    batch_size: int = 32,
    seed: int = 0,
    evaluate: Callable[[Any], dict[str, Any]] | None = None,
    eval_every: int | None = None,
    stop: Callable[[list[Row]], bool] | None = None,
    folder: str | Path | None = None,
    checkpoint_seconds: float = 10.0,
    resume: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> Fit:
    """Train parameters.

    Args:
        loss: `(params, batch) -> scalar` or `(scalar, aux)`, with `key=` where it has noise in it. gradfn's own
            losses, which are of one example, are meant over the batch.
        params: any pytree of arrays; left as they are.
        data: a pytree of arrays with one leading axis of examples, which is shuffled each epoch; or a function
            `(key) -> batch` that can be compiled.
        optimizer: from optax.
        steps: how many to take in all.
        batch_size: examples a step, where `data` is arrays. What does not fill a batch waits for another epoch.
        seed: decides the order of the examples and the keys of noise.
        evaluate: `(params) -> {name: scalar}`, called every `eval_every` steps and at the end.
        eval_every: in steps; once an epoch by default (a tenth of all steps where `data` is a function).
        stop: `(history) -> bool`, asked after each evaluation; True ends the run. See `gf.stalled`.
        folder: where to write `metrics.jsonl`, TensorBoard events and the checkpoint; None for nowhere.
        checkpoint_seconds: write a checkpoint when this much time has passed since the last, and at the end.
        resume: go on from the folder's checkpoint, where there is one, to the bit as if never interrupted.
        mesh: devices to share each batch, along the mesh's first axis; parameters are on all of them.
        progress: show a progress bar (in a terminal) or a line for each evaluation (elsewhere).

    Returns:
        `Fit(params, state, history)`. A row of `history` has `step`, `epoch`, `loss` (the mean since the row
        before), `examples_per_second`, `seconds`, aux's scalars and what `evaluate` said.

    Raises:
        ValueError: arrays of unlike length, a batch that is larger than the data, numbers below 1.
        CheckpointError: `resume` finds the checkpoint of another run, or one that cannot be read.
        FloatingPointError: the loss is no longer finite; the last good checkpoint is kept.

    >>> import jax, jax.numpy as jnp, optax, gradfn as gf
    >>> net = gf.mlp([2, 1])
    >>> x = jax.random.normal(jax.random.key(0), [100, 2])
    >>> y = x @ jnp.array([1.0, -2.0])
    >>> start = net.init(jax.random.key(1))
    >>> fitted = gf.fit(gf.regression_loss(net), start, (x, y), optax.adam(0.1), 200, progress=False)
    >>> print(fitted.params["W1"].round(3))
    [[ 1. -2.]]
    """
    source = _Source(data, batch_size, seed)
    _positive(steps=steps, eval_every=1 if eval_every is None else eval_every)
    eval_every = eval_every or min(source.epoch_steps or max(steps // 10, 1), steps)
    state = train_state(params, optimizer, jax.random.key(seed))
    settings = {"steps": steps, "batch_size": batch_size, "seed": seed, "eval_every": eval_every}
    log = Log(None if folder is None else Path(folder), settings, progress)
    if resume and log.folder and (log.folder / CHECKPOINT).exists():
        state, notes = checkpoint.load(log.folder / CHECKPOINT, like=state)
        log.restore(notes)
        if log.finished:
            return Fit(state.params, state, log.history)
    if mesh is not None:
        # Automatic axes: the compiler shares the work, the loss knows nothing of devices.
        auto = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
        mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=auto)
        state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    run_chunk = _chunk_of_steps(loss, optimizer, source, mesh)

    with log.bar():
        step = int(state.step)
        length = 1  # the first chunk is one step, to learn what a step takes
        saved = time.monotonic()
        while step < steps and not log.finished:
            end = min(step + length, source.epoch_end(step), (step // eval_every + 1) * eval_every, steps)
            began = time.monotonic()
            after, metrics = run_chunk(state, source.order(step), source.row(step), end - step)
            if end == source.epoch_end(step) and end < steps:
                source.order(end)  # shuffle the next epoch while the device is at work
            values = {name: np.asarray(column)[: end - step] for name, column in metrics.items()}
            took = time.monotonic() - began
            _finite(values["loss"], step)
            log.steps(values, source.batch_size, took)
            if end - step == length:  # not cut short by a boundary, so its time is telling
                length = int(np.clip(length * CHUNK_SECONDS / max(took, 1e-9), length / 2, length * 8))
                length = min(max(length, 1), CAPACITY)
            state, step = after, end
            if step % eval_every == 0 or step == steps:
                answers = {} if evaluate is None else evaluate(state.params)
                log.row(step, source.epoch_of(step), {name: float(value) for name, value in answers.items()})
                log.finished = step == steps or (stop is not None and stop(log.history))
            if log.folder and (log.finished or time.monotonic() - saved >= checkpoint_seconds):
                checkpoint.save(log.folder / CHECKPOINT, state, log.notes())
                saved = time.monotonic()
    return Fit(state.params, state, log.history)


def stalled(
    name: str, evaluations: int, better: Callable[[float, float], float] = min
) -> Callable[..., bool]:
    """Return a `stop` for `fit`: a metric has not become better for some evaluations.

    Prechelt, *Early Stopping, But When?*, 1998.

    Args:
        name: of a metric in the history's rows.
        evaluations: how many to wait.
        better: `min` for losses, `max` for accuracies.

    >>> import gradfn as gf
    >>> stop = gf.stalled("loss", evaluations=2)
    >>> stop([{"loss": 3.0}, {"loss": 1.0}, {"loss": 2.0}]), stop([{"loss": 1.0}, {"loss": 2.0}, {"loss": 1.5}])
    (False, True)
    """

    def stop(history: list[Row]) -> bool:
        values = [row[name] for row in history]
        if len(values) <= evaluations:
            return False
        before, recent = values[:-evaluations], values[-evaluations:]
        best = better(before)
        return better(best, *recent) == best

    return stop


class _Source:
    """Where batches come from: arrays in a new order each epoch, or a function of a key."""

    def __init__(self, data: Any, batch_size: int, seed: int) -> None:
        self.make = data if callable(data) else None
        self.seed = seed
        self.arrays: Any = None
        self.epoch_steps: int | None = None
        if self.make is not None:
            batch = jax.eval_shape(self.make, jax.random.key(0))
            self.batch_size = jax.tree.leaves(batch)[0].shape[0]
            return
        self.arrays = jax.tree.map(jnp.asarray, data)
        lengths = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(self.arrays)}
        if len(lengths) != 1 or None in lengths:
            found = jax.tree.map(lambda leaf: list(leaf.shape), self.arrays)
            raise ValueError(f"fit: data are arrays with one leading axis of examples, came {found}")
        self.n = lengths.pop()
        _positive(batch_size=batch_size)
        if batch_size > self.n:
            raise ValueError(f"fit: batch_size is at most the {self.n} examples there are, came {batch_size}")
        self.batch_size = batch_size
        self.epoch_steps = self.n // batch_size
        self._order: tuple[int, Any] = (-1, None)

    def order(self, step: int) -> Any:
        """Return the epoch's order, int32 [steps an epoch, batch], on the device."""
        if self.epoch_steps is None:
            return None
        epoch = step // self.epoch_steps
        if self._order[0] != epoch:
            self._order = (epoch, jnp.asarray(epoch_order(self.n, self.batch_size, self.seed, epoch)))
        return self._order[1]

    def row(self, step: int) -> int:
        """Return the row of the epoch's order that a step uses."""
        return step % self.epoch_steps if self.epoch_steps else 0

    def epoch_of(self, step: int) -> float | None:
        """Return how many epochs some steps are."""
        return step / self.epoch_steps if self.epoch_steps else None

    def epoch_end(self, step: int) -> float:
        """Return the step at which the epoch of this step is over."""
        return (step // self.epoch_steps + 1) * self.epoch_steps if self.epoch_steps else float("inf")

    def batch(self, arrays: Any, order: Any, row: jax.Array, key: jax.Array) -> Any:
        """Return one batch; traced."""
        if self.make is not None:
            return self.make(key)
        return jax.tree.map(lambda array: take_rows(array, order[row]), arrays)


def _chunk_of_steps(
    loss: Loss, optimizer: optax.GradientTransformation, source: _Source, mesh: jax.sharding.Mesh | None
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Return `(state, order, row, n) -> (state, metrics)`: `n` steps in one call, one program for every `n`."""
    one_step = train_step(loss, optimizer)

    def batch_of(arrays: Any, order: Any, row: jax.Array, state: TrainState) -> Any:
        # The last fold keeps the batch's key apart from that of the loss's noise in the same step.
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
        batch = source.batch(arrays, order, row, key)
        if mesh is None:
            return batch
        shared = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names[0]))
        return jax.lax.with_sharding_constraint(batch, shared)

    @jax.jit
    def chunk(arrays: Any, state: TrainState, order: Any, row: jax.Array, n: jax.Array) -> Any:
        def body(i: jax.Array, carry: tuple[TrainState, Any]) -> tuple[TrainState, Any]:
            state, columns = carry
            state, metrics = one_step(state, batch_of(arrays, order, row + i, state))
            return state, jax.tree.map(lambda column, value: column.at[i].set(value), columns, metrics)

        _, shapes = jax.eval_shape(one_step, state, jax.eval_shape(batch_of, arrays, order, row, state))
        columns = jax.tree.map(lambda leaf: jnp.zeros([CAPACITY], leaf.dtype), shapes)
        return jax.lax.fori_loop(0, n, body, (state, columns))

    return lambda state, order, row, n: chunk(source.arrays, state, order, row, n)


def take_rows(array: jax.Array, index: jax.Array) -> jax.Array:
    """Return `array[index]`: rows `[batch, ...]` of `[examples, ...]`, quickly on every platform.

    XLA:CPU splits a gather over its threads and pays more for that than the copy costs; a loop of row copies
    keeps to one. Where a row is one number, and on accelerators, the gather is the quicker one.
    """
    if array.ndim == 1:
        return array[index]

    def copy_rows(array: jax.Array, index: jax.Array) -> jax.Array:
        def put(i: jax.Array, rows: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_slice_in_dim(array, index[i], 1)  # [1, ...]
            return jax.lax.dynamic_update_slice_in_dim(rows, row, i, 0)

        rows = jnp.zeros((len(index), *array.shape[1:]), array.dtype)
        return jax.lax.fori_loop(0, len(index), put, rows)

    return jax.lax.platform_dependent(array, index, cpu=copy_rows, default=lambda array, index: array[index])


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"fit: {name} is 1 or more, came {number}")


def _finite(losses: np.ndarray, step: int) -> None:
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise FloatingPointError(f"the loss became {losses[bad[0]]} at step {step + int(bad[0])}")
