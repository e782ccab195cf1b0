"""`fit`: whole chunks of steps compiled into one call, with the data on the device.

What a step computes depends on its number alone (its batch, its key, whether it is inspected), and a chunk's length is
a traced number: one program runs every chunk. So neither the grouping of steps into chunks, nor an interruption, nor
the speed of the machine changes a bit of the result.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from gradfn.core.params import named_leaves
from gradfn.display import ShowsTable, TextTable
from gradfn.flatten import BatchMean, Loss
from gradfn.layout import CHECKPOINT, CHECKPOINTS, MEASURES
from gradfn.losses import check_targets
from gradfn.stored import Stored
from gradfn.timings import phase
from gradfn.train import restore, sharded
from gradfn.train.bands import Bands, Spike
from gradfn.train.chunk import CAPACITY, chunks, finished, owned
from gradfn.train.fault import fault, state_before
from gradfn.train.figures import closing, split_figures
from gradfn.train.folder import own, prepare
from gradfn.train.identity import Identity, identity
from gradfn.train.loading import Position
from gradfn.train.log import Log, refuse_names
from gradfn.train.logged import LogFunction, log_functions
from gradfn.train.memory import keep_blocks_of_steps
from gradfn.train.model_file import check_model_file, write_model_file
from gradfn.train.notes import Notes, Settings, Totals, check_same_run, of_another_run
from gradfn.train.peak import peak_of
from gradfn.train.placing import automatic, mesh_context, mesh_of, place
from gradfn.train.processes import agreed, from_first, is_first, losing_none
from gradfn.train.profiling import Profile
from gradfn.train.rows import Row, Rows
from gradfn.train.saver import Saver
from gradfn.train.source import Source, source_of
from gradfn.train.spikes import examined, find, spike_of
from gradfn.train.split import check_mesh, split_of
from gradfn.train.step import TrainState, placed_state
from gradfn.train.stopping import deferred
from gradfn.versions import versions

# A chunk should take this long: short enough for the progress bar to move, long enough for calls to cost nothing.
CHUNK_SECONDS = 0.2
# How many rows of its history a result shows.
LAST = 10


class _Fit(NamedTuple):
    params: PyTree
    state: TrainState
    history: Sequence[Row]
    inspections: Sequence[Row]
    noise: Sequence[Row]


class Fit(ShowsTable, _Fit):
    """The result of `fit`: the trained parameters, the whole state, and the recorded rows. `print` shows a table.

    Rows are lists where there is no folder, but those of inspections, which read like a list, are made when they are
    read. Where there is a folder all are `gradfn.train.rows.Rows`, which read like lists too: the last ones (up to 4 MB
    as JSON) are in memory, older ones are read from the folder's files.

    Attributes:
        params: the trained parameters, of the type that `fit` was given.
        state: everything that training carries from step to step.
        history: one row per evaluation: see `fit`.
        inspections: one row per inspection: `{"step": ...}` and the fields of `Inspection.to_dict`.
        noise: one row per measurement of the noise scale: `{"step": ...}`, the fields of `NoiseScale.to_dict`, and
            the `running_scale`.
        spikes: one row per spike, see `inspect_when`; not among what is unpacked.
    """

    spikes: Sequence[Row] = ()

    def table(self, rows: int | None = LAST) -> TextTable:
        """Return the last rows of the history as a table, at most that many; None for all."""
        n = len(self.history)
        shown = self.history[0 if rows is None else max(n - rows, 0) :]
        hidden = n - len(shown)
        note = f"{hidden:,} of {n:,} rows are not shown: fitted.table(rows=None) lists them" if hidden else ""
        size = sum(map(np.size, jax.tree.leaves(self.state.params)))
        out = TextTable(f"Fit: {int(self.state.step):,} steps, {size:,} parameters", note)
        names = list(dict.fromkeys(name for row in shown for name in row))
        for name in names:
            rate = name == "seconds" or name.endswith("_per_second")
            drop = 3 if name in MEASURES else 2 if rate else 1 if name == "epoch" else 0
            out.add_column(name, ",.1f" if rate else "", drop=drop)
        for row in shown:
            out.add_row(*[row.get(name) for name in names])
        return out

    @property
    def model_state(self) -> PyTree:
        """The state that the loss carried from step to step; None where it carried none."""
        return self.state.model_state


@phase("training")
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
    eval_params: Callable[[PyTree, PyTree], PyTree] | None = None,
    eval_every: int | None = None,
    inspect_every: int | None = None,
    inspect_when: Literal["spike"] | Spike | None = None,
    inspect_stats: Sequence[str] | None = None,
    noise_every: int | None = None,
    stop: Callable[[Sequence[Row]], bool] | None = None,
    folder: str | Path | None = None,
    checkpoint_seconds: float = 1.0,
    keep_every: int | None = None,
    resume: bool = False,
    log: LogFunction | Sequence[LogFunction] | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
    profile_steps: Sequence[int] | None = None,
) -> Fit:
    """Train parameters.

    Args:
        loss: of a batch, `(params, batch) -> scalar` or `(scalar, aux)`, with `key=` where it has noise in it; for a
            loss of one example, such as `gf.classification_loss(net)`, pass `gf.batch_mean(loss)`. With `state`,
            `(params, batch, state) -> (scalar, {"state": new_state, ...})`. `docs/losses.md` compares both kinds.
            Large arrays of its own, such as a teacher's, belong into a `jax.tree_util.Partial`: those of a closure
            are compiled into the program.
        params: any pytree; it is not modified. Its floating arrays are trained, the rest is configuration, so an
            Equinox model works. Of a Flax NNX module the `nnx.Param`s are trained, and its other variables (running
            means, counters of random numbers) are carried from step to step.
        data: a pytree of arrays with one leading axis of examples, which is shuffled each epoch; or a function
            `(key) -> batch` that can be compiled; or batches made on the host, see `gf.train.from_host`
            and, for data loaders, `gf.train.from_loader`.
        optimizer: from optax.
        steps: the total number of steps.
        state: a pytree of arrays that the loss gets, and returns changed, at each step: Linen's `batch_stats`,
            Equinox's `State`. `docs/state.md` shows each.
        batch_size: examples per step, where `data` is arrays. The last partial batch of an epoch is dropped;
            reshuffling changes which examples it holds.
        seed: decides the order of the examples and the keys of noise.
        evaluate: `(params) -> {name: scalar}`, called every `eval_every` steps and at the end; with `state`, `(params,
            state) -> {name: scalar}`. Matplotlib figures among the scalars go to `log` and TensorBoard, and are closed.
            To keep the parameters longer than the call, copy them (`jax.tree.map(jnp.copy, params)`): training reuses
            the memory of large ones.
        eval_params: `(opt_state, params) -> params`, for optimizers that evaluate other parameters than they train:
            `gf.train.averaged_weights`, `optax.contrib.schedule_free_eval_params`. What it returns is what `evaluate`
            gets; `fitted.params` are those that were trained.
        eval_every: in steps; by default an epoch (a tenth of all steps where `data` is a function).
        inspect_every: inspect all gradients and activations every N steps, with `gf.inspect`. The update of an
            inspected step uses the gradients of the inspection.
        inspect_when: `"spike"`, or a `gf.train.Spike`, which says what is watched: inspect a step when the loss or the
            gradient's norm leaves its running band upwards. A row of `spikes` says which, which parameters' gradients
            left their bands first, the norm of each example's gradient (of a `gf.batch_mean`), the optimizer's
            moments before the step, and the inspection. The state is held twice: at the start of a chunk of steps
            and at its end.
        inspect_stats: the statistics that inspections take, as `gf.inspect(stats=)`; with `"histogram"`, TensorBoard
            and Weights & Biases get histograms of activations and gradients. `gf.inspect`'s own by default.
        noise_every: measure the gradient's noise scale every N steps, with `gf.per_example.noise_scale`,
            on the step's own batch; the loss must be a `gf.batch_mean`. The running scale averages over about fifty
            measurements.
        stop: `(history) -> bool`, called after each evaluation; True ends the run. See `gf.stalled`.
        folder: where to write `metrics.jsonl`, `inspections.jsonl`, `noise.jsonl`, `spikes.jsonl`, TensorBoard events
            and the checkpoint; None writes nothing. A run owns its folder: unless it resumes, files that an earlier
            run of `fit` wrote there are removed (other files stay). `gf.report(folder)` makes a page of it. Where the
            loss is gradfn's own and its net has a description (see `gf.Net`), `model.json` holds that. The
            checkpoint holds the state and how far each file of rows reaches; a run that resumes truncates them to that.
        checkpoint_seconds: write a checkpoint when this much time has passed since the last (more where
            writing one takes over a twentieth of it), and at the end. It is written while the next steps run.
        keep_every: also keep the parameters every N steps and at the end, which `gf.train.kept` reads. They
            stay in the folder.
        resume: continue from the folder's checkpoint, if there is one: the result has the same bits as that of a run
            that was never interrupted. The data, the loss, the initial parameters, `batch_size`, `seed`, `eval_every`
            and the structure of the optimizer's state must be those of the run (`gradfn.train.identity` says how they
            are compared); nothing is written before that is checked. `steps` may be larger, unless `stop` ended the
            run; the row of the step where it ended before stays in the history. A learning rate schedule belongs to
            the optimizer: give it the total number of steps from the start.
        log: `(kind, row) -> None`, or several such functions, which get every row as soon as there is one: `kind` is
            `"metrics"`, `"inspection"`, `"noise"`, `"spike"` or `"figure"`, and `row["step"]` is the step. A figure's
            row is `{"step", "name", "figure"}`. See `gf.train.wandb_log`, `gf.train.mlflow_log` and
            `docs/trackers.md`. They are called on the host, in order, and only by the first of several processes. An
            error that one raises ends the run, whose last checkpoint is kept. A run that resumes does not repeat rows
            that are in the folder.
        mesh: the devices for parameters that are not on any mesh: each device then holds all of them. Parameters that
            are on a mesh stay as they are split (`docs/scaling.md`), and need no `mesh`.
        progress: show a progress bar (in a terminal) or a line per evaluation (elsewhere).
        profile_steps: `(10, 20)` traces the steps 10 to 19, counted from 0, with jax's profiler, into `profile` in
            the folder. TensorBoard (with its profile plugin) and Perfetto open it. A run that resumes after the first
            of them traces the rest.

    Returns:
        `Fit(params, state, history, inspections, noise)`, with `.spikes` and `.model_state`. `params` has the type of
        the argument. A row of `history` has `step`, `epoch`, `loss` (averaged over the steps since the row before),
        `examples_per_second` (and `tokens_per_second`, padding included, where examples are integers `[tokens]`),
        `seconds`, the scalars of aux and what `evaluate` returned. Of the step that it ends with it has `grad_norm`
        (before the optimizer clips or averages), `update_norm`, and the `learning_rate` where the optimizer's state
        has it: with `gf.train.adamw_warmup_cosine`, `optax.inject_hyperparams`. On devices whose peak is known
        (`gradfn.train.peak`) it has `mfu`, the fraction of it that the matrix products of these steps took.

    On a mesh each batch is split over the axis called `data` (or over the only axis), the optimizer's state is split
    like the parameters, and the data are on every device, unless they were split before. Axes that are Explicit are
    Auto within; the results are on the mesh that was given.

    With a folder and in the main thread, SIGINT (Ctrl-C, a notebook's interrupt) and SIGTERM let the running steps
    finish, and an evaluation that is due. Then a checkpoint is written, a line says where it is, and
    KeyboardInterrupt or SystemExit(143) is raised. A second signal raises it at once.

    Raises:
        ValueError: data that are not numbers, or arrays of different lengths; targets that do not fit gradfn's own
            loss (labels outside the classes, NaN); a batch larger than the data, or one that cannot be split evenly
            over the devices; parameters on two meshes; a mesh without an axis `data`; numbers below 1; `noise_every`
            with a loss that is not a `gf.batch_mean`, or with a state that is carried; a scalar of aux or of `evaluate`
            with a name that the row has already; `inspect_stats` without inspections, or an unknown statistic.
        TypeError: `evaluate` returned something other than scalars and figures; `log` is not a function `(kind, row)`;
            a loss of one example; labels that are not integers; an optimizer that is not one; an iterable of
            batches; nothing in `params` can be trained, or it holds state that must not be (it says what to write); a
            loss that does not return the state that it takes.
        FileError: another run trains in the folder; or something in it is a link, which is not followed; or its
            `model.json`, with a tokenizer, describes another network.
        OSError: a file in the folder cannot be written (the disk is full, for instance); it names the file. The last
            good checkpoint is kept, and `resume` continues from it.
        CheckpointError: `resume` finds a checkpoint of another run, or one that cannot be read; it says what
            differs.
        ImportError: a folder is given, parameters are split over devices, and orbax is not installed.
        FloatingPointError: the loss or a gradient is no longer finite; the message gives its origin, as
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
    _check_positive(
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
    functions = log_functions(log)
    if inspect_stats is not None:
        inspect_stats = _stats_of(inspect_stats, inspect_every, inspect_when)
    keep_blocks_of_steps()
    profile = Profile(profile_steps, steps, None if folder is None else Path(folder))
    several = jax.process_count() > 1
    with losing_none(), deferred(folder is not None or several) as stopping, contextlib.ExitStack() as stack:
        home = mesh_of(params) if mesh is None else mesh
        on = set() if home is None else {device.process_index for device in home.devices.flat}
        if several and len(on) < jax.process_count():
            raise ValueError(
                "fit: several processes train together on one mesh, with devices of each of them. Pass "
                'mesh=jax.make_mesh((jax.device_count(),), ("data",)), or parameters that are on one'
            )
        if home is not None:
            # The compiler splits the work; neither the loss nor the code here knows of axes that are Explicit.
            stack.enter_context(mesh_context(automatic(home)))
        source = source_of(data, batch_size, seed)
        if not callable(source.content):  # a function's batches are known only inside the program
            check_targets(loss, source.content)
        settings = Settings(steps=steps, batch_size=batch_size, seed=seed, eval_every=eval_every)
        key = jax.random.key(seed)
        run = _Run(
            settings, placed_state(params, optimizer, key, state, lambda parts: check_mesh(parts, mesh))
        )
        run.home = home
        split = split_of(run.state.params)
        if split is not None:
            split.check_batch(source.examples())
        spike = spike_of(inspect_when, run.state)
        if noise_every and run.state.model_state is not None:
            raise ValueError("fit: noise_every must be None where a state is carried from step to step")
        if folder is not None:
            found = identity(run.state, source, loss)
            run.identity = from_first(lambda: found)
            if sharded.is_split(run.state):
                sharded.require()
        root = None if folder is None else Path(folder)
        record = Log(
            root if is_first() else None,
            steps,
            source.tokens,
            progress and is_first(),
            spike is not None,
            functions if is_first() else (),
        )
        stack.enter_context(own(record.folder))
        if root:
            check_model_file(root, loss)
            stored = restore.find(root) if resume else None
            if stored:
                run.resume(record, root, stored)
            if run.finished:
                return run.result(record)
            if record.folder:
                prepare(record.folder, resume=stored is not None, keep=keep_every is not None)
                write_model_file(record.folder, loss)
        source = source.started(steps, run.loader)
        eval_every = settings["eval_every"] or min(source.epoch_steps or max(steps // 10, 1), steps)
        settings["eval_every"] = eval_every
        periods = [every for every in (eval_every, noise_every, keep_every, source.order_steps) if every]
        source = source.placed(None) if split is None else source.placed(split.mesh, split.axis)
        programs = chunks(loss, optimizer, source, run.state, inspect_every, spike, inspect_stats)
        names = [name or "params" for name, _ in named_leaves(run.state.params)]
        most = peak_of(run.state.step)
        flops = programs.flops(run.state, source.order(source.epoch(run.step))) if most else 0.0
        if programs.donated and not run.step:
            run.state = owned(run.state)

        with (
            record.open(run.step),
            Saver(record, checkpoint_seconds, copies=programs.donated, folder=root) as saver,
            profile.stopped(),
        ):
            if not stopping.agree():
                programs.compile(run.state, source.order(source.epoch(run.step)))
            record.start(run.step)
            length = 1  # the first chunk is one step, to learn how long a step takes
            room = 1  # for inspections of a chunk
            ended = stopping.agree()
            while run.step < steps and not run.finished and not ended:
                step = run.step
                profile.at(step)
                here = run.state, source.order(source.epoch(step)), source.row(step)
                if noise_every and step % noise_every == 0:
                    run.totals, noise = run.totals.after_noise(programs.measure(*here))
                    record.noise_scale(step, noise)
                began = time.monotonic()
                ends = *((step // every + 1) * every for every in periods), *profile.edges_after(step)
                if source.end is not None:  # the data end before the last step
                    ends = *ends, source.end
                end = min(step + length, steps, *ends, *programs.due(step, steps)[room : room + 1])
                after, recorded = programs.advance(*here, end - step)
                if end < steps:
                    source.order(source.epoch(end))  # of a new epoch; it is shuffled while the device works
                on_host: Any = jax.device_get(recorded)
                if programs.donated and not on_host.finite:
                    after, on_host = finished(programs, after, on_host, *here[1:], end - step, step)
                columns, measures, finite, inspections, watched = on_host
                metrics = {name: column[: end - step] for name, column in columns.items()}
                took = agreed(time.monotonic() - began)
                if inspections:
                    room = len(inspections)
                broken = None
                if not (finite and np.isfinite(metrics["loss"]).all()):
                    broken = state_before(programs, (here[0], after), *here[1:], metrics["loss"])
                # The step that broke is inspected too, but none after it.
                inspected = programs.due(step, end if broken is None else min(int(broken.step) + 1, end))
                if inspected:
                    record.inspect(inspected, inspections.tree(len(inspected)))
                if spike is not None:
                    n = end - step if broken is None else int(broken.step) - step
                    rows = {name: column[:n] for name, column in watched.items()}
                    for one in find(spike, run.bands, rows, metrics["loss"][:n], names, step):
                        record.spike(examined(programs, source, here, one))
                if broken is not None:
                    raise fault(loss, programs, broken, *here[1:], metrics["loss"], step)
                run.totals = run.totals.after_steps(metrics, source.batch_size, took)
                run.state, run.step = after, end
                record.advance(end, float(metrics["loss"][-1]), run.totals)
                # A chunk that was cut short does not have a representative time.
                if end - step == length:
                    aim = length * CHUNK_SECONDS / max(took, 1e-9)
                    length = int(np.clip(aim, max(length // 2, 1), min(length * 8, CAPACITY)))
                if end % eval_every == 0 or end == steps:
                    returned: dict[str, Any] = {}
                    if evaluate is not None:
                        outside = run.outside
                        if eval_params is not None:
                            of_average = eval_params(outside.opt_state, outside.params)
                            outside = outside._replace(params=of_average)
                        carried = [] if state is None else [outside.model_state]
                        with contextlib.nullcontext() if home is None else mesh_context(home):
                            returned = evaluate(outside.model, *carried)
                    refuse_names(returned, "evaluate", run.totals.sums)
                    evaluated, figures = split_figures(returned)
                    epoch = end / source.epoch_steps if source.epoch_steps else None
                    evaluated = {name: agreed(value) for name, value in evaluated.items()}
                    measures = {name: float(value) for name, value in measures.items()}
                    if most:
                        rate = run.totals.examples_per_second / source.batch_size
                        measures["mfu"] = flops * rate / most
                    with closing(figures):
                        record.figures(end, figures)
                    record.row(run.totals.row(end, epoch, source.tokens, evaluated, measures))
                    run.totals = run.totals.after_row()
                    run.finished = end == steps or bool(agreed(stop is not None and stop(record.history)))
                if root and keep_every and (end % keep_every == 0 or run.finished):
                    restore.keep(root, end, run.state.params, run.state.model_state)
                del here, after  # the state that the checkpoint being written does not need
                saver.wait()
                if saver.due() or run.finished:
                    saver.save(end, run.state, run.notes(record, source))
                ended = stopping.agree() or end == source.end
            if ended and saver.step != run.step:
                saver.save(run.step, run.state, run.notes(record, source))
        if run.step == source.end and run.step < steps and not run.finished:
            raise ValueError(
                f"fit: the data ended after {run.step:,} batches, but steps is {steps:,}. Pass a loader that can be "
                "iterated over again, or fewer steps"
            )
        if record.folder:
            file = record.folder / (CHECKPOINTS if sharded.is_split(run.state) else CHECKPOINT)
            stopping.message = f"stopped at step {run.step:,} of {steps:,}; resume=True continues from {file}"
        return run.result(record)


@dataclass
class _Run:
    """The state of a run of `fit`: what a checkpoint holds, beside the rows.

    Attributes:
        settings: the arguments of `fit` that decide what the run computes.
        state: after `step` steps.
        step: how many steps were taken.
        finished: whether the run has ended: it took all its steps, or `stop` ended it.
        totals: its counters.
        identity: what distinguishes it from other runs; None where there is no folder.
        home: the caller's mesh; None where the state is not on one.
        bands: what is known of the numbers that are watched for spikes.
        loader: the last known position of the loader that the batches come from; None where there is none.
    """

    settings: Settings
    state: TrainState
    step: int = 0
    finished: bool = False
    totals: Totals = field(default_factory=Totals)
    identity: Identity | None = None
    home: Mesh | None = None
    bands: Bands = field(default_factory=Bands)
    loader: Position | None = None

    def resume(self, log: Log, folder: Path, stored: Stored) -> None:
        """Continue from the checkpoint that was found in a folder, with the rows up to there; nothing is written.

        Raises:
            CheckpointError: it is of another run, or cannot be read.
        """
        assert self.identity
        self.state = _shapes(self.state)  # frees its memory for the state that is loaded
        self.state, notes = restore.load(stored, self.state, form=Notes)
        self.step = int(self.state.step)
        log.restore(check_same_run(notes, self.settings, self.identity, folder), self.step, folder)
        last = log.history[-1]["step"] if log.history else 0
        if last + notes.n_steps != self.step or notes.n_steps < 0:
            found = f"{last:,} in the last row and {notes.n_steps:,} since"
            raise of_another_run(folder, f"is of step {self.step:,}, but counts {found}; it is damaged")
        self.totals = notes.totals
        self.bands = notes.bands or Bands()
        self.loader = notes.loader
        # A run that took all its steps may take more; one that `stop` ended has ended.
        longer = last == notes.settings["steps"] < self.settings["steps"]
        self.finished = notes.finished and not longer
        self.settings["eval_every"] = self.settings["eval_every"] or notes.settings["eval_every"]

    def notes(self, log: Log, source: Source) -> Notes:
        """Return what a checkpoint holds beside the state."""
        return Notes(
            **vars(self.totals),
            settings=self.settings,
            finished=self.finished,
            logs=log.extents,
            identity=self.identity,
            versions=versions(),
            bands=self.bands if self.bands.steps else None,
            loader=source.position(self.step),
        )

    @property
    def outside(self) -> TrainState:
        """The state as the caller sees it: on a mesh, on the caller's own, whose axes may be Explicit."""
        return self.state if self.home is None else place(self.state, self.home)

    def result(self, log: Log) -> Fit:
        """Return what `fit` returns."""
        state = self.outside
        fitted = Fit(state.model, state, log.history, log.inspections, log.noise)
        fitted.spikes = log.spikes
        return fitted


def _shapes(state: TrainState) -> TrainState:
    """Return the structure of a state without its arrays; keys, which are small, stay."""
    is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf if is_key(leaf) else shape(leaf), state)


def stalled(
    name: str, evaluations: int, better: Callable[[float, float], float] = min
) -> Callable[..., bool]:
    """Return a `stop` for `fit`, which ends a run when a metric has not improved for some evaluations.

    Prechelt, *Early Stopping, But When?*, 1998.

    Args:
        name: a metric in the rows of the history.
        evaluations: how many evaluations to wait for an improvement.
        better: `min` for losses, `max` for accuracies. NaN is worse than any number.

    >>> import gradfn as gf
    >>> stop = gf.stalled("loss", evaluations=2)
    >>> stop([{"loss": 3.0}, {"loss": 1.0}, {"loss": 2.0}]), stop([{"loss": 1.0}, {"loss": 2.0}, {"loss": 1.5}])
    (False, True)
    """

    # A history, how many of its rows have been read, and the best value in them.
    known: tuple[PyTree, int, list[float]] = (None, 0, [])

    def valid(rows: Iterable[Row]) -> list[float]:
        return [row[name] for row in rows if row[name] is not None and row[name] == row[name]]

    def stop(history: Sequence[Row]) -> bool:
        nonlocal known
        n = len(history) - evaluations
        if n <= 0 or not evaluations:
            return False
        # Rows are only ever appended, so older ones, which may be in a file, are read once.
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


def _stats_of(stats: Sequence[str], every: int | None, when: object) -> tuple[str, ...]:
    """Return the statistics that inspections take; a ValueError for unknown ones, or where nothing is inspected."""
    from gradfn.inspection.observe import checked_stats

    if every is None and when is None:
        raise ValueError("fit: inspect_stats needs inspections: pass inspect_every, or inspect_when, too")
    return checked_stats(stats, "fit")


def _check_positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"fit: {name} must be an integer >= 1, got {number}")


def _check_arguments(data: PyTree, optimizer: Any) -> None:
    """Raise a TypeError for a learning rate instead of an optimizer, and for an iterable of batches."""
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        rate = f"{optimizer:g}" if isinstance(optimizer, (int, float)) else "1e-3"
        got = f"{getattr(optimizer, '__name__', optimizer)!s:.60}"
        raise TypeError(f"fit: optimizer must be an optax optimizer, got {got}. Pass optax.adam({rate})")
    is_data = callable(data) or hasattr(data, "__array__") or isinstance(data, (Sequence, Mapping, Source))
    if isinstance(data, Iterator) or (
        isinstance(data, Iterable) and not is_data and jax.tree_util.all_leaves([data])
    ):
        raise TypeError(
            f"fit: data must be arrays or a function, got a {type(data).__name__}, whose batches cannot be looked up "
            "by step. Pass gf.train.from_loader(data), or arrays with all examples"
        )
