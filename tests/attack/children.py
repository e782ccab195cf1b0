"""The attacked processes: the functions they run, and how to run many of them.

They are forked from a server that has imported gradfn but has not started jax, so each starts in milliseconds.
"""

import collections
import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

PRELOADED = [
    "gradfn.cli",
    "gradfn.inspection",
    "gradfn.nets",
    "gradfn.train",
    "tensorboardX",
    "safetensors.numpy",
    "msgspec",
    "filelock",
    "PIL.Image",
]
PRELOADED += [
    "gradfn.pages.page",
    "gradfn.runs.sample",
    "jinja2",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
]
PRELOADED += ["tests.attack.children", "tests.attack.mutations"]
TIMEOUT = 600  # seconds after which a process is considered hung
EVENTS = {"open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.listdir", "os.scandir"}


class End(NamedTuple):
    """The end of a process: its exit code (negative for a signal) and its output."""

    code: int
    out: str
    err: str

    @property
    def traceback(self):
        return "Traceback" in self.out + self.err


def in_child(forks, target, *args, after=None, number=signal.SIGKILL):
    """Run a function in its own process.

    Args:
        forks: a multiprocessing context.
        target: a module-level function.
        args: its arguments.
        after: the delay in seconds before a signal is sent, or a function that waits for the moment.
        number: the signal.

    Returns:
        Its `End`.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "out"), Path(folder, "err")
        for file in files:
            file.touch()  # a signal may arrive before the process writes
        process = forks.Process(target=_run, args=(target, args, *map(str, files)))
        process.start()
        if after is not None:
            after() if callable(after) else process.join(after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            process.join()
            return End(-999, "", f"hung for {TIMEOUT} s")
        return End(process.exitcode, *(file.read_text(errors="replace") for file in files))


def wait_for_handlers(process):
    """Wait until a process of the command line has installed its signal handlers."""
    status = Path(f"/proc/{process.pid}/status")
    # Bit 14 of the caught signals is SIGTERM (15), which Python does not catch by default.
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text(encoding="utf-8"))[1], 16) >> 14 & 1:
        assert process.poll() is None
        time.sleep(0.001)


def at_once(function, jobs):
    """Return the results of a function for all jobs, run in parallel on all CPUs."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, jobs))


def _run(target, args, out, err):
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    code = 1
    try:
        code = target(*args) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # skip multiprocessing's own cleanup, which is not attacked


# Functions that the processes run


def die_at(folder, event):
    """Kill this process, like a power failure, just before its n-th operation on files in a folder."""
    left = itertools.count(event, -1)

    def hook(name, args):
        if name in EVENTS and args and isinstance(args[0], (str, bytes, os.PathLike)):
            touched = os.fsdecode(args[0]).startswith(str(folder)) and not os.fsdecode(args[0]).endswith(
                ".lock"
            )
            if touched and next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def train(folder, steps=240, event=None, evaluate=None, hash_file=None, **options):
    """Train a small network in a folder, or resume there; write a hash of all results to `hash_file`."""
    import jax
    import jax.numpy as jnp
    import optax

    import gradfn as gf

    x = jax.random.normal(jax.random.key(0), [50, 3])
    net = gf.mlp([3, 4, 2])
    start = net.init(jax.random.key(1))
    measure = gf.batch_mean(gf.classification_loss(net))
    data = (x, (x[:, 0] > 0).astype(jnp.int32))
    options = {
        "resume": True,
        "eval_every": 15,
        "inspect_every": 30,
        "noise_every": 40,
        "keep_every": 80,
    } | options
    if event is not None:
        die_at(folder, event)
    fitted = gf.fit(
        measure,
        start,
        data,
        optax.adam(0.05),
        steps,
        batch_size=8,
        folder=folder,
        checkpoint_seconds=0,
        progress=False,
        evaluate=evaluate or (lambda params: {"spread": float(params["W1"].std())}),
        **options,
    )
    if hash_file:
        Path(hash_file).write_text(fingerprint(fitted))


def fingerprint(fitted):
    """Return a hash of parameters and rows, without times."""
    digest = hashlib.sha256()
    for name, leaf in sorted(fitted.params.items()):
        digest.update(name.encode() + bytes(leaf.tobytes()))
    for rows in (fitted.history, fitted.inspections, fitted.noise):
        for row in rows:
            timeless = {name: value for name, value in row.items() if "second" not in name}
            digest.update(json.dumps(timeless, sort_keys=True).encode())
    return digest.hexdigest()


def command(*words, folder=None):
    """Run the command line."""
    from gradfn import cli

    if folder:
        os.chdir(folder)
    return cli.main(list(words))


# Properties that must hold


def readable(folder):
    """Return the faults of an attacked folder of `train`: an unreadable checkpoint, partial files."""
    faults = [f"left behind: {file}" for file in Path(folder).rglob("*.part")]
    checkpoint = Path(folder, "checkpoint.safetensors")
    if checkpoint.exists():
        from safetensors import safe_open

        try:
            with safe_open(checkpoint, "numpy") as content:
                for name in content.keys():  # noqa: SIM118
                    content.get_tensor(name)
        except Exception as error:
            faults.append(f"{checkpoint}: {error}")
    return faults


def snapshot(folder):
    """Return a hash and the times of every file in a folder, without following links."""
    found = collections.OrderedDict()
    for file in sorted(Path(folder).rglob("*")):
        status = file.lstat()
        content = file.read_bytes() if file.is_file() and not file.is_symlink() else b""
        found[str(file)] = (
            status.st_mode,
            status.st_size,
            status.st_mtime_ns,
            hashlib.sha256(content).hexdigest(),
        )
    return found
