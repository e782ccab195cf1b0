"""What happens to memory that a step has freed."""

from __future__ import annotations

import ctypes
import sys

# glibc's options (malloc.h), and values that make it serve large arrays from memory it keeps.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
AT_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask the C library to keep the memory that is freed from now on, for the next one who asks.

    XLA takes memory for a step's values and frees it after the step. glibc gives large blocks back to the
    system, which has to hand out, and clear, the same pages again for the next step: a quarter of the time of
    a small GPT's step on a processor (`benchmarks/gpt_step.py`). A process that keeps them holds the most
    memory that it ever needed until it ends. `gradfn run` calls this; nothing else in gradfn does. See mallopt(3).

    Returns:
        Whether it did: false where the C library is not glibc.

    >>> from gradfn.train import keep_freed_memory
    >>> keep_freed_memory() in (True, False)
    True
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries of Linux have none
    if mallopt is None:
        return False
    return all(mallopt(option, AT_MOST) == 1 for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))
