"""Atomic, verified downloads with limits on size and time."""

import contextlib
import http.client
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtyping import PyTree

from gradfn.data.dataset import DataError
from gradfn.files import IDLE, remove_parts, replacing

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

CHUNK = 1 << 16
TIMEOUT = 30.0  # seconds without a byte
SLOWEST = 10_000  # bytes per second, on average after the first TIMEOUT seconds


class Wanted(NamedTuple):
    """A file to download: its path, and its maximum size in bytes."""

    file: Path
    limit: int


def download(sources: Mapping[str, Wanted], check: Callable[[str, Path], None], otherwise: str) -> None:
    """Download each address to its file, with a progress bar on standard error.

    Args:
        sources: address -> file and limit. Missing folders are created.
        check: called with the address and the temporary file; raises DataError to reject it.
        otherwise: an alternative for the user, added to error messages.

    Raises:
        DataError: no connection, an HTTP error, a body that is truncated, too long or too slow, or rejected by
            `check`. Files downloaded earlier remain; of the one that failed nothing remains.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for address, (file, limit) in sources.items():
            task = progress.add_task(file.name, total=None)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                remove_parts(file.parent, file.name, IDLE)
                with replacing(file) as out:
                    for piece in fetch(address, limit, partial(show, progress, task)):
                        out.write(piece)
                    out.flush()
                    check(address, Path(out.name))
            except DataError as error:
                raise DataError(f"{error}. {otherwise}") from error
            except urllib.error.HTTPError as error:
                error.close()
                what = f"the server returned {error.code} {error.reason!s:.200}"
                raise DataError(f"{address}: {what}. {otherwise}") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                what = f"could not be downloaded to {file} ({error!s:.200})"
                raise DataError(f"{address}: {what}. {otherwise}") from error


def show(progress: "Progress", task: "TaskID", done: int, total: int | None) -> None:
    """Set one file's bar to `done` of `total` bytes."""
    progress.update(task, completed=done, total=total)


def fetch(address: str, limit: int, progress: Callable[[int, int | None], None]) -> Iterator[bytes]:
    """Yield the body at an address, in pieces.

    Args:
        address: http or https; the same holds for redirects.
        limit: the maximum size of the body in bytes.
        progress: called with the bytes so far and the total, which is None while unknown.

    Raises:
        DataError: the body is truncated, larger than the limit, or too slow.
        OSError, http.client.HTTPException: other network errors.
    """
    # The connection has its own thread: a socket timeout does not end a wait (in the name lookup, the handshake, the
    # headers or the body) that single bytes prolong. The queue never contains more than the limit.
    pieces: queue.Queue[bytes | int | Exception | None] = queue.Queue()
    connections = Connections()
    threading.Thread(
        target=receive, args=(address, limit, pieces, connections), name="download", daemon=True
    ).start()
    start, done, total = time.monotonic(), 0, None
    progress(done, total)
    try:
        while True:
            seconds_left = start + TIMEOUT + done / SLOWEST - time.monotonic()
            try:
                piece = pieces.get(seconds_left > 0, max(seconds_left, 0))
            except queue.Empty:
                raise DataError(
                    f"{address}: too slow: expected {SLOWEST:,} bytes per second after the first {TIMEOUT:g} s, got "
                    f"{done:,} bytes in {time.monotonic() - start:.0f} s"
                ) from None
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, int):
                total = piece
                if total > limit:
                    raise DataError(f"{address}: expected at most {limit:,} bytes, got a file of {total:,}")
            elif piece is None:
                break
            else:
                done += len(piece)
                if done > limit:
                    raise DataError(f"{address}: expected at most {limit:,} bytes, got more")
                yield piece
            progress(done, total)
    finally:
        connections.close()
    # http.client raises for a short body only if it is read with one call.
    if total is not None and done != total:
        raise DataError(f"{address}: truncated download: expected {total:,} bytes, got {done:,}")


class Connections:
    """The connections of a download; closing them from another thread ends all waits on them."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.closed = False

    def of(self, kind: Any) -> PyTree:
        """Return a subclass of an http.client connection whose instances register here."""

        def connect(connection: Any) -> None:
            kind.connect(connection)
            self.sockets.append(connection.sock)
            if self.closed:
                self.close()

        return type("Connection", (kind,), {"connect": connect})

    def close(self) -> None:
        """Close all connections, including later ones."""
        self.closed = True
        for connection in self.sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def receive(address: str, limit: int, pieces: "queue.Queue", connections: Connections) -> None:
    """Put the pieces of a body into a queue: its length if the server sends it, bytes, and None at the end.

    Exceptions are put into the queue too. Receiving stops when the body exceeds the limit.
    """

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request: Any) -> PyTree:
            return self.do_open(connections.of(http.client.HTTPConnection), request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request: Any) -> PyTree:
            return self.do_open(connections.of(http.client.HTTPSConnection), request)

    opener = urllib.request.OpenerDirector()  # without the handlers of file:, ftp: and data:
    for handler in (
        urllib.request.ProxyHandler,
        Http,
        Https,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    try:
        with opener.open(address, timeout=TIMEOUT) as response:
            length = response.headers.get("Content-Length")
            if (
                length
                and length.isdecimal()
                and "chunked" not in response.headers.get("Transfer-Encoding", "")
            ):
                pieces.put(int(length))
            done = 0
            # `read` would wait until the piece is full; `read1` returns what has arrived.
            while done <= limit and not connections.closed and (piece := response.read1(CHUNK)):
                done += len(piece)
                pieces.put(piece)
        pieces.put(None)
    except Exception as error:
        pieces.put(error)
