"""How the C library treats memory that a step has freed.

XLA allocates memory for a step's values and frees it after the step. glibc returns large blocks to the system, which
must supply and clear the same pages again for the next step: up to half of the time of a small GPT's step on a CPU
(`benchmarks/gpt_step.py`). See mallopt(3).
"""

from __future__ import annotations

import ctypes
import os
import sys

# Options of glibc (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
AT_MOST = 2**31 - 1
# The largest block that threads with a heap of their own (an arena), such as XLA's, can keep: HEAP_MAX_SIZE.
OF_THREADS = 1 << 26
CHOSEN_BY_USERS = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"

_kept = 0  # bytes: freed blocks up to this size are kept


def keep_freed_memory() -> bool:
    """Make the C library keep memory that is freed from now on, for the next allocation.

    A process that keeps freed memory holds its peak memory until it ends. `gradfn run` calls this. `gf.fit` and
    `gf.train_step` do the same for blocks of at most 64 MB, twice the size up to which glibc does so itself, unless
    the environment sets glibc's limits (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`). Call it
    before the first computation: threads that XLA has started return larger blocks all the same.

    Returns:
        Whether it succeeded: false where the C library is not glibc.

    >>> from gradfn.train import keep_freed_memory
    >>> keep_freed_memory() in (True, False)
    True
    """
    # With one heap for all threads; others cannot hold more than `OF_THREADS`.
    return _keep(AT_MOST, {M_TRIM_THRESHOLD: AT_MOST, M_MMAP_THRESHOLD: AT_MOST, M_ARENA_MAX: 1})


def keep_blocks_of_steps() -> None:
    """Make the C library keep freed blocks of up to 64 MB, unless it keeps more or the user has set its limits."""
    if not any(name in os.environ for name in CHOSEN_BY_USERS):
        # Twice as much at a heap's end, as glibc itself chooses.
        _keep(OF_THREADS, {M_TRIM_THRESHOLD: 2 * OF_THREADS, M_MMAP_THRESHOLD: OF_THREADS})


def _keep(size: int, options: dict[int, int]) -> bool:
    """Set options of glibc that make it keep freed blocks up to a size, unless it keeps larger ones."""
    global _kept
    if size <= _kept:
        return True
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is None or not all(mallopt(option, value) == 1 for option, value in options.items()):
        return False
    _kept = size
    return True
