"""Processes to be attacked: what they run, and how to run many of them.

They are forked from a server that has imported gradfn and has not started jax, so that each begins in milliseconds.
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
    "gradfn.report.page",
    "gradfn.runs.sample",
    "jinja2",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
]
PRELOADED += ["tests.attack.children", "tests.attack.mutations"]
TIMEOUT = 600  # seconds after which a process counts as one that hangs
EVENTS = {"open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.listdir", "os.scandir"}


class End(NamedTuple):
    """How a process ended: its exit code (negative for a signal), and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def traceback(self):
        return "Traceback" in self.out + self.err


def in_child(forks, target, *args, after=None, number=signal.SIGKILL):
    """Run a function in a process of its own.

    Args:
        forks: the context of multiprocessing.
        target: a function of a module.
        args: its arguments.
        after: seconds after which the process gets a signal, or a function that waits until then.
        number: which signal.

    Returns:
        Its `End`.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "out"), Path(folder, "err")
        for file in files:
            file.touch()  # a signal may come before the process writes
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
            return End(-999, "", f"it hung for {TIMEOUT} s")
        return End(process.exitcode, *(file.read_text(errors="replace") for file in files))


def wait_for_handlers(process):
    """Wait until a process of the command line handles signals; until then they are Python's own affair."""
    status = Path(f"/proc/{process.pid}/status")
    # Bit 14 of the signals that are caught, 15, is SIGTERM, which Python itself does not catch.
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text(encoding="utf-8"))[1], 16) >> 14 & 1:
        assert process.poll() is None
        time.sleep(0.001)


def at_once(function, jobs):
    """Return a function's results for each of some jobs, as many at once as there are CPUs."""
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
    os._exit(code)  # what multiprocessing does at its children's end is no part of the attack


# What the processes do


def die_at(folder, event):
    """End this process, as a power cut would, just before its n-th operation on files in a folder."""
    left = itertools.count(event, -1)

    def hook(name, args):
        if name in EVENTS and args and isinstance(args[0], (str, bytes, os.PathLike)):
            touched = os.fsdecode(args[0]).startswith(str(folder)) and not os.fsdecode(args[0]).endswith(
                ".lock"
            )
            if touched and next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def train(folder, steps=240, event=None, evaluate=None, told=None, **options):
    """Train a small network in a folder, or go on there; put a hash of all that came of it into the file `told`."""
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
    if told:
        Path(told).write_text(fingerprint(fitted))


def fingerprint(fitted):
    """Return a hash of parameters and rows, leaving out what clocks said."""
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


# What must hold


def readable(folder):
    """Return what is wrong with a folder of `train` that something was done to: its checkpoint, what lies about."""
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
    """Return a hash and the times of every file in a folder, links not followed: it changes if anything is touched."""
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
