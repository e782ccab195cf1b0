"""Compiled programs on the disk, so that a command that ran before compiles nothing: jax's persistent cache.

jax finds a program by a hash of what it computes and of everything that it was compiled with, and trusts what it finds.
Hence the folder belongs to the user alone, and there is one for each kind of CPU: XLA compiles for the very features
that a CPU has, and machines that share a home folder may differ in them.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import platform
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradfn.files import cache_folder

LIMIT = 512 << 20  # bytes; a digits run writes 0.4 MB, one of gpt 1 MB
FAILED = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^'/]*)'")


def keep_programs() -> None:
    """Let jax keep what it compiles from now on in `gradfn/compiled` of the user's cache folder.

    Settings of the user precede: JAX_COMPILATION_CACHE_DIR for another folder, JAX_ENABLE_COMPILATION_CACHE=false for
    none. A folder that cannot be used, a full disk and damaged files cost time, and are not reported.
    """
    import jax

    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is None and settings.jax_enable_compilation_cache:
        # Path.home() may raise a RuntimeError.
        with contextlib.suppress(OSError, RuntimeError):
            folder = cache_folder("compiled") / _machine()
            for each in (folder.parent, folder):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            remove_oldest(folder.parent, LIMIT)
            if _is_private(folder.parent) and _is_private(folder):
                settings.update("jax_compilation_cache_dir", str(folder))
                # By default jax keeps programs that took a second to compile; a run has many small ones.
                settings.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if directory := settings.jax_compilation_cache_dir:
        warnings.showwarning = _replacing_damaged(Path(directory), warnings.showwarning)


def remove_oldest(folder: Path, limit: int) -> None:
    """Remove the files of a folder that were not used for the longest time, until the rest has `limit` bytes.

    jax can limit the folder itself, but then it locks and lists the whole folder for every program.
    """
    files = []
    for file in folder.rglob("*"):
        # Another process may remove it at the same time.
        with contextlib.suppress(FileNotFoundError):
            status = file.lstat()
            if not file.is_dir():
                files.append((max(status.st_atime, status.st_mtime), status.st_size, file))
    for _, size, file in sorted(files, reverse=True):
        limit -= size
        if limit < 0:
            file.unlink(missing_ok=True)


def _is_private(folder: Path) -> bool:
    """Return whether no other user can put files into a folder."""
    status = folder.stat()
    return not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)


def _machine() -> str:
    """Return a name for the CPU with its features, and the number of CPUs that this process may use."""
    wanted = ("model name", "flags", "Features")  # the last one on ARM
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = sorted({line for line in lines if line.startswith(wanted)})
    except OSError:
        cpu = []
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{platform.machine()} {cpu or platform.node()} {allowed}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _replacing_damaged(folder: Path, show: Callable[..., None]) -> Callable[..., None]:
    """Return a `warnings.showwarning` that removes a program that jax could not read, so that jax writes it again."""

    def shown(message: Any, *about: Any, **more: Any) -> None:
        failed = FAILED.match(str(message))
        if not failed:
            show(message, *about, **more)
        elif failed[1] == "reading":
            for file in folder.glob(f"{glob.escape(failed[2])}-*"):
                with contextlib.suppress(OSError):
                    file.unlink()

    return shown
