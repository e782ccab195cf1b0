"""`fit`: whole chunks of steps compiled into one call, with the data on the device.

What a step computes depends on its number alone (its batch, its key), and a chunk's length is a traced number:
one program runs every chunk, so that how steps are grouped, where a run was interrupted and how fast the machine
is change no bit of the outcome.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from gradfn.flatten import BatchMean, Loss
from gradfn.layout import CHECKPOINT
from gradfn.losses import check_targets
from gradfn.train import checkpoint
from gradfn.train.chunk import CAPACITY, chunks
from gradfn.train.fault import fault
from gradfn.train.folder import own, prepare
from gradfn.train.identity import identity
from gradfn.train.log import Log, Notes, Settings
from gradfn.train.rows import Row, Rows
from gradfn.train.saver import Saver
from gradfn.train.source import Source, source_of
from gradfn.train.step import TrainState, train_state
from gradfn.train.stopping import deferred

CHUNK_SECONDS = (
    0.2  # what a chunk should take: often enough for the progress bar, seldom enough to cost nothing
)


class Fit(NamedTuple):
    """What training gave: parameters, the whole state, a row for each evaluation, inspection, measure of noise.

    Rows are lists where there is no folder. Where there is one they are `gradfn.train.rows.Rows`, which read like
    lists: the last ones (up to 4 MB as JSON) are in memory, older ones are read from the folder's files.

    Attributes:
        params: of the type that was given.
        state: all that training carries from step to step.
        history: a row for each evaluation: see `fit`.
        inspections: `{"step": ...}` and what `Inspection.to_dict` says.
        noise: `{"step": ...}`, what `NoiseScale.to_dict` says, and the `running_scale`.
    """

    params: PyTree
    state: TrainState
    history: Sequence[Row]
    inspections: Sequence[Row]
    noise: Sequence[Row]

    @property
    def model_state(self) -> PyTree:
        """The state that the loss carried from step to step; None where it carried none."""
        return self.state.model_state


def fit(
    loss: Loss,
    params: PyTree,
    data: PyTree,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    state: PyTree = None,
    batch_size: int = 32,
    seed: int = 0,
    evaluate: Callable[..., dict[str, Any]] | None = None,
    eval_every: int | None = None,
    inspect_every: int | None = None,
    noise_every: int | None = None,
    stop: Callable[[Sequence[Row]], bool] | None = None,
    folder: str | Path | None = None,
    checkpoint_seconds: float = 1.0,
    keep_every: int | None = None,
    resume: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> Fit:
    """Train parameters.

    Args:
        loss: of a batch, `(params, batch) -> scalar` or `(scalar, aux)`, with `key=` where it has noise in it; for a
            loss of one example, such as `gf.classification_loss(net)`, pass `gf.batch_mean(loss)`. With `state`,
            `(params, batch, state) -> (scalar, {"state": new_state, ...})`.
        params: any pytree, left as it is. Its floating arrays are trained; all else is configuration, so an Equinox
            model will do. Of a Flax NNX module the `nnx.Param`s are trained, and its other variables (running
            means, counters of random numbers) are carried from step to step.
        data: a pytree of arrays with one leading axis of examples, which is shuffled each epoch; or a function
            `(key) -> batch` that can be compiled; or batches made on the host, see `gf.train.from_host`.
        optimizer: from optax.
        steps: how many to take in all.
        state: a pytree of arrays that the loss gets, and returns changed, at each step: Linen's `batch_stats`,
            Equinox's `State`. `docs/state.md` shows each.
        batch_size: examples a step, where `data` is arrays. What does not fill a batch waits for another epoch.
        seed: decides the order of the examples and the keys of noise.
        evaluate: `(params) -> {name: scalar}`, called every `eval_every` steps and at the end; with `state`, `(params,
            state) -> {name: scalar}`.
        eval_every: in steps; once an epoch by default (a tenth of all steps where `data` is a function).
        inspect_every: look at all gradients and activations each so many steps, with `gf.inspect`.
        noise_every: measure the gradient's noise scale each so many steps, with `gf.per_example.noise_scale`,
            on the step's own batch; the loss must be a `gf.batch_mean`. The running scale is of the last fifty or so.
        stop: `(history) -> bool`, asked after each evaluation; True ends the run. See `gf.stalled`.
        folder: where to write `metrics.jsonl`, `inspections.jsonl`, `noise.jsonl`, TensorBoard events and the
            checkpoint; None for nowhere. A run owns its folder: unless it resumes, what an earlier run of `fit`
            wrote there is removed (other files stay). `gradfn report FOLDER` makes a page of it. The checkpoint holds
            the state, and how far each file of rows reaches; a run that resumes cuts them to that.
        checkpoint_seconds: write a checkpoint when this much time has passed since the last (more where
            writing one takes over a twentieth of it), and at the end. It is written while the next steps are taken.
        keep_every: also keep the parameters each so many steps and at the end, which `gf.train.kept` reads. They
            stay in the folder.
        resume: continue from the folder's checkpoint, where there is one, to the bit as if never interrupted.
            The data, the loss, the parameters to start from, `batch_size`, `seed`, `eval_every` and the structure
            of the optimizer's state must be those that the run began with (`gradfn.train.identity` says how that
            is told); nothing is written before that is checked. `steps` may be larger, unless `stop` ended the
            run; the row of the step where it ended before stays in the history. A learning rate schedule is the
            optimizer's: give it the steps that it is to last.
        mesh: devices to share each batch, along the mesh's first axis; parameters are on all of them.
        progress: show a progress bar (in a terminal) or a line for each evaluation (elsewhere).

    Returns:
        `Fit(params, state, history, inspections, noise)`, and `.model_state`. `params` is of the type that was
        given. A row of `history` has `step`, `epoch`, `loss` (the mean
        since the row before), `examples_per_second` (and `tokens_per_second`, padding counted, where examples
        are whole numbers `[tokens]`), `seconds`, aux's scalars and what `evaluate` said.

    With a folder and in the main thread, SIGINT (Ctrl-C, a notebook's interrupt) and SIGTERM let the steps that are
    being taken end, and an evaluation that is due. Then a checkpoint is written, a line says where it is, and
    KeyboardInterrupt or SystemExit(143) is raised. A second signal raises it at once.

    Raises:
        ValueError: data that are not numbers or arrays of unlike length, targets that gradfn's own loss is not
            right for (labels outside of the classes, NaN), a batch that is larger than the data, numbers below 1;
            `noise_every` with a loss that is not a `gf.batch_mean`, or with a state that is carried; a scalar of aux or
            of `evaluate` with a name that the row has already.
        TypeError: a loss of one example; labels that are not integers; an optimizer that is not one; an iterable of
            batches; nothing in `params` can be trained, or it holds state that must not be (it says what to write); a
            loss that does not return the state that it takes.
        FileError: another run trains in the folder; or something in it is a link, which is not followed.
        OSError: a file in the folder cannot be written (the disk is full, say); it names the file. The last good
            checkpoint is kept, and `resume` continues from it.
        CheckpointError: `resume` finds the checkpoint of another run, or one that cannot be read; it says what
            differs.
        FloatingPointError: the loss or a gradient is no longer finite; it says where that began, as
            `gf.nan_origin` finds it. The last good checkpoint is kept.

    >>> import jax, jax.numpy as jnp, optax, gradfn as gf
    >>> net = gf.mlp([2, 1])
    >>> x = jax.random.normal(jax.random.key(0), [100, 2])
    >>> y = x @ jnp.array([1.0, -2.0])
    >>> loss, start = gf.batch_mean(gf.regression_loss(net)), net.init(jax.random.key(1))
    >>> fitted = gf.fit(loss, start, (x, y), optax.adam(0.1), 200, progress=False)
    >>> print(fitted.params["W1"].round(3))
    [[ 1. -2.]]
    """
    _positive(
        steps=steps,
        eval_every=eval_every,
        inspect_every=inspect_every,
        noise_every=noise_every,
        keep_every=keep_every,
    )
    _check_arguments(data, optimizer)
    if noise_every and not isinstance(loss, BatchMean):
        raise ValueError("fit: noise_every needs the loss of one example as well. Pass gf.batch_mean(loss)")
    if keep_every and folder is None:
        raise ValueError("fit: keep_every needs a folder to keep the parameters in")
    with deferred(folder is not None) as stopping, contextlib.ExitStack() as stack:
        source = source_of(data, batch_size, seed)
        if not callable(source.content):  # a function's batches are known only inside the program
            check_targets(loss, source.content)
        apart = state is not None  # the user's state, beside the model
        state = train_state(params, optimizer, jax.random.key(seed), state)
        if noise_every and state.model_state is not None:
            raise ValueError("fit: noise_every must be None where a state is carried from step to step")
        settings: Settings = {
            "steps": steps,
            "batch_size": batch_size,
            "seed": seed,
            "eval_every": eval_every,
        }
        who = None if folder is None else identity(state, source, loss)
        log = Log(None if folder is None else Path(folder), settings, who, progress, source.tokens)
        stack.enter_context(own(log.folder))
        if log.folder:
            going_on = resume and (log.folder / CHECKPOINT).exists()
            if going_on:
                like = _shapes(state)
                del state  # its memory is for the one that is loaded
                state, notes = checkpoint.load(log.folder / CHECKPOINT, like, form=Notes)
                log.restore(notes, int(state.step))
            if log.finished:
                return Fit(state.model, state, log.history, log.inspections, log.noise)
            prepare(log.folder, resume=going_on, keep=keep_every is not None)
        eval_every = log.settings["eval_every"] or min(source.epoch_steps or max(steps // 10, 1), steps)
        log.settings["eval_every"] = eval_every
        periods = [
            every
            for every in (eval_every, inspect_every, noise_every, keep_every, source.order_steps)
            if every
        ]
        if mesh is not None:
            # Automatic axes: the compiler shares the work, the loss knows nothing of devices.
            auto = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
            mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=auto)
            state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
            source = source.placed(mesh)
        run = chunks(loss, optimizer, source, mesh)

        step = int(state.step)
        with log.open(step), Saver(log, checkpoint_seconds) as saver:
            if stopping.signal is None:  # compile, and take no step
                jax.block_until_ready(run.advance(state, source.order(source.epoch(step)), 0, 0))
            log.begin(step)
            length = 1  # the first chunk is one step, to learn what a step takes
            while step < steps and not log.finished and stopping.signal is None:
                here = state, source.order(source.epoch(step)), source.row(step)
                if inspect_every and step % inspect_every == 0:
                    log.inspection(step, run.look(*here))
                if noise_every and step % noise_every == 0:
                    log.noise_scale(step, run.measure(*here))
                boundaries = ((step // every + 1) * every for every in periods)
                end = min(step + length, steps, *boundaries)
                began = time.monotonic()
                after, columns, finite = run.advance(*here, end - step)
                source.order(source.epoch(end))  # a new epoch's is shuffled while the device works
                columns, finite = jax.device_get((columns, finite))
                metrics = {name: column[: end - step] for name, column in columns.items()}
                took = time.monotonic() - began
                if not (finite and np.isfinite(metrics["loss"]).all()):
                    raise fault(loss, run, *here, metrics["loss"])
                log.steps(metrics, source.batch_size, took)
                if end - step == length:  # not cut short by a boundary, so its time is telling
                    aim = length * CHUNK_SECONDS / max(took, 1e-9)
                    length = int(np.clip(aim, max(length // 2, 1), min(length * 8, CAPACITY)))
                state, step = after, end
                if step % eval_every == 0 or step == steps:
                    carried = [state.model_state] if apart else []
                    answers = {} if evaluate is None else evaluate(state.model, *carried)
                    epoch = step / source.epoch_steps if source.epoch_steps else None
                    log.row(step, epoch, {name: float(value) for name, value in answers.items()})
                    log.finished = step == steps or (stop is not None and stop(log.history))
                if log.folder and keep_every and (step % keep_every == 0 or log.finished):
                    checkpoint.keep(log.folder, step, state.params, state.model_state)
                del here, after  # the state that the checkpoint being written does not need
                saver.wait()
                if log.finished or saver.due():
                    saver.save(step, state)
            if stopping.signal is not None and saver.step != step:
                saver.save(step, state)
        if log.folder:
            file = log.folder / CHECKPOINT
            stopping.message = f"stopped at step {step:,} of {steps:,}; resume=True continues from {file}"
        return Fit(state.model, state, log.history, log.inspections, log.noise)


def _shapes(state: TrainState) -> TrainState:
    """Return what tells how a state is built, without its arrays; keys, which are small, stay."""
    is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(
        lambda leaf: leaf if is_key(leaf) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state
    )


def stalled(
    name: str, evaluations: int, better: Callable[[float, float], float] = min
) -> Callable[..., bool]:
    """Return a `stop` for `fit`: a metric has not become better for some evaluations.

    Prechelt, *Early Stopping, But When?*, 1998.

    Args:
        name: of a metric in the history's rows.
        evaluations: how many to wait.
        better: `min` for losses, `max` for accuracies. NaN is worse than any number.

    >>> import gradfn as gf
    >>> stop = gf.stalled("loss", evaluations=2)
    >>> stop([{"loss": 3.0}, {"loss": 1.0}, {"loss": 2.0}]), stop([{"loss": 1.0}, {"loss": 2.0}, {"loss": 1.5}])
    (False, True)
    """

    known: tuple[PyTree, int, list[float]] = (
        None,
        0,
        [],
    )  # a history, how many of its rows, and the best of these

    def valid(rows: Iterable[Row]) -> list[float]:
        return [row[name] for row in rows if row[name] is not None and row[name] == row[name]]

    def stop(history: Sequence[Row]) -> bool:
        nonlocal known
        n = len(history) - evaluations
        if n <= 0 or not evaluations:
            return False
        # The rows of a run only grow in number, so older ones, which may be in a file, need be read but once.
        of, start, before = known
        if not (isinstance(history, Rows) and of is history and start <= n):
            start, before = 0, []
        before = [*before, *valid(history[start:n])]
        before = [functools.reduce(better, before)] if before else []
        known = history, n, before
        since = valid(history[n:])
        if not before or not since:
            return not since
        return functools.reduce(better, since, before[0]) == before[0]

    return stop


def _positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"fit: {name} is 1 or more, came {number}")


def _check_arguments(data: PyTree, optimizer: Any) -> None:
    """Raise a TypeError for a learning rate in place of an optimizer, and for an iterable of batches."""
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        rate = f"{optimizer:g}" if isinstance(optimizer, (int, float)) else "1e-3"
        got = f"{getattr(optimizer, '__name__', optimizer)!s:.60}"
        raise TypeError(f"fit: optimizer must be one of optax's, got {got}. Pass optax.adam({rate})")
    is_data = callable(data) or hasattr(data, "__array__") or isinstance(data, (Sequence, Mapping, Source))
    if isinstance(data, Iterator) or (
        isinstance(data, Iterable) and not is_data and jax.tree_util.all_leaves([data])
    ):
        raise TypeError(
            f"fit: data must be arrays or a function, got a {type(data).__name__}, whose batches have no numbers to "
            "resume by. Pass them joined into arrays, or gf.train.from_host(lambda step: batch)"
        )
