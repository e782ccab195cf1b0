"""Download checked files, whole or not at all, within limits of size and time."""

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

from gradfn.data.dataset import DataError
from gradfn.files import IDLE, remove_parts, replacing

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

CHUNK = 1 << 16
TIMEOUT = 30.0  # seconds without a byte
SLOWEST = 10_000  # bytes a second, on average after the first TIMEOUT seconds


class Wanted(NamedTuple):
    """A file to download: where it goes, and how many bytes it may have."""

    file: Path
    limit: int


def download(sources: Mapping[str, Wanted], check: Callable[[str, Path], None], otherwise: str) -> None:
    """Fetch each address into its file, with a progress bar on standard error.

    Args:
        sources: address -> what to write. The folder is made if need be.
        check: called with the address and the file as it was received, before it gets its name; raises DataError.
        otherwise: what the user can do when the network cannot help, for the message.

    Raises:
        DataError: no connection, an error as response, a body that is cut off, too long or too slow, or `check`
            refused it. Files that were received before are whole and stay; of the one that failed nothing is left.
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
                what = f"the server answered {error.code} {error.reason!s:.200}"
                raise DataError(f"{address}: {what}. {otherwise}") from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                what = f"could not be brought to {file} ({error!s:.200})"
                raise DataError(f"{address}: {what}. {otherwise}") from error


def show(progress: "Progress", task: "TaskID", done: int, total: int | None) -> None:
    """Set one file's bar to `done` of `total` bytes."""
    progress.update(task, completed=done, total=total)


def fetch(address: str, limit: int, progress: Callable[[int, int | None], None]) -> Iterator[bytes]:
    """Yield the body at an address, a piece at a time.

    Args:
        address: http or https, and so is every address that it redirects to.
        limit: bytes that the body may have.
        progress: called with bytes so far and bytes in all, None while they are unknown.

    Raises:
        DataError: the body is cut off, has more bytes than the limit, or is too slow.
        OSError, http.client.HTTPException: what else goes wrong between here and there.
    """
    # In a thread of its own, since nothing else ends a wait that one byte now and then prolongs (in the names'
    # look-up, the handshake, the headers or the body). No piece that waits here is beyond the limit.
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
                    f"{address}: too slow: {done:,} bytes in {time.monotonic() - start:.0f} s, expected "
                    f"{SLOWEST:,} bytes a second after the first {TIMEOUT:g} s"
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
    # http.client raises for a short body only when it is read in one go.
    if total is not None and done != total:
        raise DataError(f"{address}: the download was cut off: {done:,} of {total:,} bytes")


class Connections:
    """The connections of a download, to close them from another thread: what waits for them then ends."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.closed = False

    def of(self, kind: Any) -> Any:
        """Return a class of http.client's connections that are noted here."""

        def connect(connection: Any) -> None:
            kind.connect(connection)
            self.sockets.append(connection.sock)
            if self.closed:
                self.close()

        return type("Connection", (kind,), {"connect": connect})

    def close(self) -> None:
        """Close those that there are, and those that come."""
        self.closed = True
        for connection in self.sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def receive(address: str, limit: int, pieces: "queue.Queue", connections: Connections) -> None:
    """Put the pieces of a body into a queue: its length where the server says it, bytes, None at its end.

    What is raised goes into the queue too. No more is received than shows that the body exceeds the limit.
    """

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request: Any) -> Any:
            return self.do_open(connections.of(http.client.HTTPConnection), request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request: Any) -> Any:
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
            # One read of the connection at a time: `read` would wait until the piece is full.
            while done <= limit and not connections.closed and (piece := response.read1(CHUNK)):
                done += len(piece)
                pieces.put(piece)
        pieces.put(None)
    except Exception as error:
        pieces.put(error)
