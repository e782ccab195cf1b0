"""How the C library treats memory that a step has freed."""

from __future__ import annotations

import ctypes
import sys

# Options of glibc (malloc.h), and the value that makes it serve large arrays from memory that it keeps.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
AT_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make the C library keep memory that is freed from now on, for the next allocation.

    XLA allocates memory for a step's values and frees it after the step. glibc returns large blocks to the
    system, which must supply and clear the same pages again for the next step: a quarter of the time of a small GPT's
    step on a CPU (`benchmarks/gpt_step.py`). A process that keeps freed memory holds its peak memory until it
    ends. `gradfn run` calls this; nothing else in gradfn does. See mallopt(3).

    Returns:
        Whether it succeeded: false where the C library is not glibc.

    >>> from gradfn.train import keep_freed_memory
    >>> keep_freed_memory() in (True, False)
    True
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is None:
        return False
    return all(mallopt(option, AT_MOST) == 1 for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))
