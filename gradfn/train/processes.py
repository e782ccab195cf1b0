"""Several processes that train together: how they meet, and how they agree."""

from __future__ import annotations

import jax
import numpy as np


def is_first() -> bool:
    """Return whether this is process 0, which alone writes files and shows progress."""
    return jax.process_index() == 0


def agreed(number: float) -> float:
    """Return process 0's number on every process; each of them must call it.

    What depends on the clock, or on anything else that differs between processes, must be agreed on before it decides
    how many steps are taken or whether a checkpoint is written.
    """
    if jax.process_count() == 1:
        return number
    from jax.experimental.multihost_utils import broadcast_one_to_all

    # As two halves: without 64-bit types, a float64 would be rounded.
    halves = broadcast_one_to_all(np.frombuffer(np.float64(number).tobytes(), np.uint32))
    return float(np.asarray(halves, np.uint32).view(np.float64)[0])


def initialize(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Make this process one of several: `jax.distributed.initialize`, with collectives on CPUs as well.

    Args:
        coordinator: the address of process 0, `host:port`; where it is None, jax finds all three (SLURM, Open MPI,
            Kubernetes, TPU pods).
        processes: how many there are.
        process: the index of this one, from 0.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, processes, process)
