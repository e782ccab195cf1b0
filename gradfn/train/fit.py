"""`fit`: whole chunks of steps compiled into one call, with the data on the device.

What a step computes depends on its number alone (its batch, its key), and a chunk's length is a traced number:
one program runs every chunk, so that how steps are grouped, where a run was interrupted and how fast the machine
is change no bit of the outcome.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradfn.losses import Loss
from gradfn.train import checkpoint
from gradfn.train.log import Log
from gradfn.train.source import Source, source_of
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
    _positive(steps=steps, eval_every=1 if eval_every is None else eval_every)
    source = source_of(data, batch_size, seed)
    eval_every = eval_every or min(source.epoch_steps or max(steps // 10, 1), steps)
    epoch_steps = source.epoch_steps or steps
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
        jax.block_until_ready(
            run_chunk(state, source.order(source.epoch(step)), 0, 0)
        )  # compile, take no step
        length = 1  # the first chunk is one step, to learn what a step takes
        saved = time.monotonic()
        while step < steps and not log.finished:
            boundaries = ((step // every + 1) * every for every in (eval_every, epoch_steps))
            end = min(step + length, steps, *boundaries)
            began = time.monotonic()
            after, metrics = run_chunk(state, source.order(source.epoch(step)), source.row(step), end - step)
            source.order(source.epoch(end))  # a new epoch's is shuffled while the device works
            values = {name: np.asarray(column)[: end - step] for name, column in metrics.items()}
            took = time.monotonic() - began
            _finite(values["loss"], step)
            log.steps(values, source.batch_size, took)
            if end - step == length:  # not cut short by a boundary, so its time is telling
                aim = length * CHUNK_SECONDS / max(took, 1e-9)
                length = int(np.clip(aim, max(length // 2, 1), min(length * 8, CAPACITY)))
            state, step = after, end
            if step % eval_every == 0 or step == steps:
                answers = {} if evaluate is None else evaluate(state.params)
                epoch = step / source.epoch_steps if source.epoch_steps else None
                log.row(step, epoch, {name: float(value) for name, value in answers.items()})
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
        best = functools.reduce(better, values[:-evaluations])
        return functools.reduce(better, values[-evaluations:], best) == best

    return stop


def _chunk_of_steps(
    loss: Loss, optimizer: optax.GradientTransformation, source: Source, mesh: jax.sharding.Mesh | None
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


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"fit: {name} is 1 or more, came {number}")


def _finite(losses: np.ndarray, step: int) -> None:
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise FloatingPointError(f"the loss became {losses[bad[0]]} at step {step + int(bad[0])}")
