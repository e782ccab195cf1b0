"""The cost of a checkpoint of a large state: seconds, memory beyond the state, and the time that training waits.

    python -m benchmarks.saving --folder FOLDER    # on the disk to measure; needs twice the size of the state

The state has 100 arrays. gradfn writes one array at a time; safetensors' own writer, which gradfn used before, needs
all of them at once. Memory is the anonymous memory of the process beyond the state (`RssAnon` of Linux).
"""

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from benchmarks import harness
from gradfn.files import replace_file
from gradfn.train import checkpoint
from gradfn.train.log import Log
from gradfn.train.notes import Notes, Settings
from gradfn.train.saver import Saver

ARRAYS = 100
AT_ONCE = "safetensors, all at once"


class Cost(NamedTuple):
    """The cost of one way of saving or loading."""

    name: str
    seconds: float
    memory: float  # beyond the state, as a fraction of its size
    waited: float  # seconds that training waited


def state_of(size: int) -> dict[str, jax.Array]:
    """Return a state of `size` bytes."""
    return {f"w{i:03}": jnp.full([size // ARRAYS // 4], float(i)) for i in range(ARRAYS)}


def costs(folder: Path, size: int, chunk: float) -> Iterator[Cost]:
    """Yield the cost of each way.

    Args:
        folder: the folder to write to.
        size: of the state, in bytes.
        chunk: the duration in seconds of a chunk of steps that runs while a checkpoint is written.
    """
    file, state = folder / "checkpoint.safetensors", jax.block_until_ready(state_of(size))

    def at_once() -> float:
        began = time.monotonic()
        replace_file(file, safetensors.numpy.save({name: np.array(leaf) for name, leaf in state.items()}))
        return time.monotonic() - began

    def by_array() -> float:
        began = time.monotonic()
        checkpoint.save(file, state, {})
        return time.monotonic() - began

    def in_background() -> float:
        notes = Notes(settings=Settings(steps=1, batch_size=1, seed=0, eval_every=1), finished=False)
        with Saver(Log(folder, 1, None, progress=False), 0.0) as saver:
            began = time.monotonic()
            saver.save(1, state, notes)  # type: ignore[arg-type]
            time.sleep(chunk)
            saver.wait()
            return time.monotonic() - began - chunk

    def load() -> float:
        began = time.monotonic()
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        jax.block_until_ready(checkpoint.load(file, shapes))
        return time.monotonic() - began

    for name, act, new in (
        (AT_ONCE, at_once, 0),
        ("gradfn", by_array, 0),
        (f"gradfn, during {chunk:g} s of steps", in_background, 0),
        ("gradfn, loading", load, size),
    ):
        began = time.monotonic()
        waited, peak = peak_memory(act)
        yield Cost(name, time.monotonic() - began, (peak - new) / size, waited)
    file.unlink()


def peak_memory(act: Callable[[], float]) -> tuple[float, int]:
    """Return the result of a function, and by how many bytes the process grew during the call."""
    start, peak, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, own_memory() - start)
            time.sleep(0.005)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        return act(), max(peak, own_memory() - start)
    finally:
        done.set()
        watching.join()


def own_memory() -> int:
    """Return the anonymous memory of the process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--gigabytes", type=float, default=1.4, help="of the state")
    parser.add_argument("--chunk", type=float, default=1.0, help="duration of a chunk of steps in seconds")
    parser.add_argument("--json", metavar="FILE", help="also write the table to this file")
    options = parser.parse_args(arguments)
    size = int(options.gigabytes * 1e9)
    title = f"a state of {size / 1e9:g} GB in {ARRAYS} arrays, {os.cpu_count()} CPUs"
    figures = {
        cost.name: {"seconds": cost.seconds, "memory / state": cost.memory, "training waits, s": cost.waited}
        for cost in costs(options.folder, size, options.chunk)
    }
    harness.report_figures(title, figures, AT_ONCE, json_file=options.json)


if __name__ == "__main__":
    main()
