"""Several processes that train together: how they meet, how they agree, and how they end.

jax runs them (`jax.distributed`): each runs the same program, arrays lie on the devices of all, and a compiled function
runs on all devices at once. So whatever decides what is run next must be the same in each process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NoReturn

import jax
import numpy as np
from jaxtyping import PyTree

from gradfn.train import lost
from gradfn.train.placing import replicated

# How long a process that failed waits for the others to end with it.
END_SECONDS = 5.0
# How long after the last heartbeat jax ends the other processes at the latest.
END_MARGIN = 15.0
# jax's own, where the program called `jax.distributed.initialize` itself.
_heartbeat_seconds = 100.0
# How collectives fail where the other end is gone.
BROKEN = re.compile(
    r"gloo|nccl|rccl|collective|connection|socket|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED", re.I
)


def is_first() -> bool:
    """Return whether this is process 0, which alone writes files and shows progress; a single process is.

    >>> import gradfn as gf
    >>> gf.train.is_first()
    True
    """
    return jax.process_index() == 0


def agreed(number: float) -> float:
    """Return process 0's number on every process; each of them must call it.

    What depends on the clock, or on anything else that differs between processes, must be agreed on before it decides
    how many steps are taken or whether a checkpoint is written.

    >>> agreed(0.1)
    0.1
    """
    if jax.process_count() == 1:
        return number
    return float(_broadcast(np.array([number], np.float64))[0])


def largest(number: int) -> int:
    """Return the largest of the processes' numbers (int32) on every process; each of them must call it.

    >>> largest(3)
    3
    """
    if jax.process_count() == 1:
        return number
    from jax.experimental.multihost_utils import process_allgather

    return int(np.asarray(process_allgather(np.int32(number))).max())


def from_first(make: Callable[[], Any]) -> PyTree:
    """Return what process 0 makes, which must be JSON, on every process; each of them must call it.

    Raises:
        SystemExit: on the others, where it raised an error on process 0.
    """
    if jax.process_count() == 1:
        return make()
    content, error = b"", None
    if is_first():
        try:
            content = json.dumps(make()).encode()
        except BaseException as raised:
            error = raised
    if not (size := int(agreed(len(content)))):
        if error is not None:
            raise error
        raise SystemExit(1)
    data = _broadcast(np.frombuffer(content if is_first() else bytes(size), np.uint8))
    return json.loads(data.tobytes())


def gathered(tree: PyTree) -> PyTree:
    """Return a tree whose arrays are whole, on a device of this process; each process must call it.

    After `gf.fit` on a mesh of several processes' devices, each of them holds a part of the parameters, or a copy of
    them that only a function that runs on all processes can take. What this returns is for one process alone.

    Args:
        tree: arrays on a mesh, of one process or of several; others are returned as they are.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> gf.train.gathered({"w": jnp.ones(2)})
    {'w': Array([1., 1.], dtype=float32)}
    """

    def whole(leaf: PyTree) -> PyTree:
        if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
            return leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(whole(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        if not leaf.is_fully_replicated:
            mesh: Any = leaf.sharding.mesh  # type: ignore[attr-defined]
            leaf = jax.jit(_same, out_shardings=replicated(mesh))(leaf)
        return leaf.addressable_data(0)

    return jax.tree.map(whole, tree)


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: float = 300.0,
    heartbeat_seconds: float = 30.0,
) -> None:
    """Make this process one of several: `jax.distributed.initialize`, and an end with all others where one is lost.

    Each process calls it, before anything is computed. Without arguments, jax finds them: SLURM, Open MPI, Kubernetes
    and TPU pods say what they are. Elsewhere they may be in the environment too: `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.

    Where a process is lost, jax ends the others after `heartbeat_seconds`, also those that wait for it; the last line
    on stderr names the one that was lost. A process that ends with an error, which is printed as always, ends the
    others in the same way.

    Args:
        coordinator: the address at which the others reach process 0, `host:port`.
        processes: how many there are.
        process: the index of this one, from 0.
        timeout: how long to wait for the others, in seconds.
        heartbeat_seconds: after this time without a sign of life, a process is lost.

    Raises:
        ValueError: arguments that do not fit each other, or none where jax does not find them.
        ConnectionError: process 0 cannot be reached, or cannot be reached by others; nothing was started.
        RuntimeError: something was computed before, or this was called before.

    >>> import gradfn as gf
    >>> gf.train.initialize("10.0.0.1:1234", processes=2, process=0)  # doctest: +SKIP
    """
    global _heartbeat_seconds
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _from_environment("JAX_NUM_PROCESSES") if processes is None else processes
    process = _from_environment("JAX_PROCESS_ID") if process is None else process
    _check(coordinator, processes, process)
    if coordinator is not None and process is not None:
        _reach(coordinator, process, time.monotonic() + timeout)
    _filter_stderr(-1 if process is None else process, processes or 0, coordinator or "")
    # Its C++ handler of SIGTERM would replace Python's; `fit` has the processes agree on signals.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=max(round(timeout), 1),
            heartbeat_timeout_seconds=max(round(heartbeat_seconds), 1),
        )
    except ValueError as error:
        raise ValueError(
            "initialize: neither SLURM, Open MPI, Kubernetes nor a TPU pod was found. Give the coordinator's "
            "address (host:port), the number of processes and the index of this one"
        ) from error
    _heartbeat_seconds = heartbeat_seconds
    sys.excepthook = _ending_all(sys.excepthook)


def leave(code: int) -> NoReturn:
    """End this process, which failed: with the others where they fail too, or after a few seconds alone.

    Those that still run then lose it.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    thread = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    thread.start()
    thread.join(END_SECONDS)
    os._exit(code)


@contextlib.contextmanager
def losing_none() -> Iterator[None]:
    """Wait for jax to end this process where the block fails because another one was lost: jax knows which."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # jax raises either
        if jax.process_count() > 1 and BROKEN.search(str(error)):
            time.sleep(_heartbeat_seconds + END_MARGIN)
        raise


def _broadcast(array: np.ndarray) -> np.ndarray:
    """Return process 0's array on every process, all bits of it: without 64-bit types jax would round a float64."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    data = np.frombuffer(array.tobytes(), np.uint8)
    return np.frombuffer(np.asarray(broadcast_one_to_all(data)).astype(np.uint8).tobytes(), array.dtype)


def _same(array: jax.Array) -> jax.Array:
    return array


def _from_environment(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"initialize: {name} must be an integer >= 0, got {text!r:.60}")
    return int(text)


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Raise a ValueError for arguments that do not fit each other."""
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if (processes is not None or process is not None) and missing:
        raise ValueError(
            f"initialize: coordinator, processes and process belong together; {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing"
        )
    if processes is not None and processes < 1:
        raise ValueError(f"initialize: processes must be an integer >= 1, got {processes}")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(f"initialize: process must be from 0 to {processes - 1}, got {process}")
    if coordinator is not None:
        _host_and_port(coordinator)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 1 << 16:
        raise ValueError(
            f"initialize: coordinator must be host:port with a port from 1 to 65535, got {address!r:.100}"
        )
    return host.strip("[]"), int(port)


def _reach(address: str, process: int, deadline: float) -> None:
    """Wait until process 0 listens at an address; on process 0, check that it can.

    jax would end this process instead of raising an error.
    """
    host, port = _host_and_port(address)
    if process == 0:
        try:
            with socket.create_server(("", port)):
                return
        except OSError as error:
            raise ConnectionError(
                f"initialize: process 0 cannot listen on port {port} of {address} ({error.strerror}). "
                "Choose a free port"
            ) from error
    started = time.monotonic()
    while True:
        try:
            socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.1)).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                seconds = f"{time.monotonic() - started:.0f} s ({error.strerror or error})"
                raise ConnectionError(
                    f"initialize: process {process} did not reach process 0 at {address} within {seconds}. "
                    "Check the address, and that process 0 runs"
                ) from error
        time.sleep(0.1)


def _filter_stderr(process: int, processes: int, address: str) -> None:
    """Let stderr flow through `gradfn.train.lost`, which says in a sentence why jax ends this process."""
    if os.name != "posix" or not sys.executable:
        return
    read, write = os.pipe()
    sys.stderr.flush()
    words = [sys.executable, "-I", "-S", lost.__file__, str(process), str(processes), address]
    files = [
        (os.POSIX_SPAWN_DUP2, read, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
    ]
    os.posix_spawn(sys.executable, words, os.environ, file_actions=files)
    os.dup2(write, 2)
    os.close(read)
    os.close(write)


def _ending_all(
    print_error: Callable[[type[BaseException], BaseException, TracebackType | None], Any],
) -> Callable[[type[BaseException], BaseException, TracebackType | None], None]:
    """Return a `sys.excepthook` that ends the process, so that the others do not wait for it."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print_error(kind, error, trace)
        leave(130 if issubclass(kind, KeyboardInterrupt) else 1)

    return hook
