"""The error for a step that is not finite: which step, and the origin of the first number that is not finite."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradfn.core.params import named_leaves
from gradfn.flatten import Loss
from gradfn.train.chunk import Chunks, all_finite
from gradfn.train.model import batch_loss
from gradfn.train.step import TrainState


def state_before(
    run: Chunks, states: tuple[TrainState, TrainState], order: Any, row: int, losses: np.ndarray
) -> TrainState:
    """Return the state before the step that broke a chunk.

    Args:
        run: the compiled functions of the run.
        states: at the start of the chunk, with finite parameters, and at its end. A state that was donated is gone;
            the other one is then that before the step which broke.
        order: of the epoch.
        row: of the chunk's first batch.
        losses: of the chunk's steps, `[n]`.
    """
    before, after = states
    return after if run.donated else _repeat(run, before, order, row, losses)


def fault(
    loss: Loss, run: Chunks, state: TrainState, order: Any, row: int, losses: np.ndarray, step: int
) -> FloatingPointError:
    """Return the error that explains a chunk of steps in which one broke.

    Args:
        loss: the loss that was trained on.
        run: the compiled functions of the run.
        state: before the step which broke, see `state_before`.
        order: of the epoch.
        row: of the chunk's first batch.
        losses: of the chunk's steps, `[n]`.
        step: the number of steps before the chunk.
    """
    from gradfn.inspection import nan_origin

    broken = int(state.step) - step
    if run.donated and not all_finite(state.params):
        return _of_updates(state, step)
    batch, keywords = run.arguments(state, order, row + broken)
    value = losses[broken] if broken < len(losses) else np.nan
    what = f"the loss became {value}" if not np.isfinite(value) else "a gradient or an update is not finite"
    report = nan_origin(batch_loss(loss, state.rest))(state.params, batch, **keywords)
    return FloatingPointError(f"step {int(state.step)}: {what}\n{report}")


def _of_updates(state: TrainState, first: int) -> FloatingPointError:
    """Return the error for parameters that are not finite though each gradient since step `first` was."""
    names = [name or "params" for name, leaf in named_leaves(state.params) if not all_finite(leaf)]
    last = int(state.step) - 1
    steps = f"step {last}" if last <= first else f"a step from {first} to {last}"
    few = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    return FloatingPointError(f"{steps}: an update is not finite, though the gradients are; in {few}")


def _repeat(run: Chunks, state: TrainState, order: Any, row: int, losses: np.ndarray) -> TrainState:
    """Repeat a chunk of steps up to the one that broke; return the state before it."""
    bad = np.flatnonzero(~np.isfinite(losses))
    broken = int(bad[0]) if bad.size else len(losses)
    # A gradient that is not finite breaks the parameters first, and the loss one step later.
    if broken and not all_finite(run.advance(state, order, row, broken)[0].params):
        broken -= 1
    return run.advance(state, order, row, broken)[0]
