"""Download checked files, whole or not at all."""

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gradfn.data.dataset import DataError
from gradfn.files import replace_file

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

CHUNK = 1 << 16
TIMEOUT = 30.0  # seconds without a byte


def download(sources: Mapping[str, Path], check: Callable[[str, bytes], None], otherwise: str) -> None:
    """Fetch each address into its file, with a progress bar on standard error.

    Args:
        sources: address -> file to write. Its folder is made if need be.
        check: called with the address and the bytes that came, before anything is written; raises DataError.
        otherwise: what the user can do when the network cannot help, for the message.

    Raises:
        DataError: no connection, an error for an answer, a cut-off body, or `check` refused it. Files that
            came before are whole and stay; of the one that failed nothing is left.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for address, file in sources.items():
            task = progress.add_task(file.name, total=None)
            try:
                body = fetch(address, partial(show, progress, task))
                check(address, body)
                file.parent.mkdir(parents=True, exist_ok=True)
                replace_file(file, body)
            except DataError as error:
                raise DataError(f"{error}\n{otherwise}") from error
            except urllib.error.HTTPError as error:
                error.close()
                what = f"the server answered {error.code} {error.reason}"
                raise DataError(f"{address}: {what}.\n{otherwise}") from error
            except (OSError, http.client.HTTPException) as error:
                what = f"could not be brought to {file} ({error})"
                raise DataError(f"{address}: {what}.\n{otherwise}") from error


def show(progress: "Progress", task: "TaskID", done: int, total: int | None) -> None:
    """Set one file's bar to `done` of `total` bytes."""
    progress.update(task, completed=done, total=total)


def fetch(address: str, progress: Callable[[int, int | None], None]) -> bytes:
    """Return the body at an address, whole; `progress` is told bytes so far and bytes in all."""
    with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
        length = response.headers.get("Content-Length")
        total = int(length) if length and length.isdigit() else None
        chunks, done = [], 0
        progress(done, total)
        while chunk := response.read(CHUNK):
            chunks.append(chunk)
            done += len(chunk)
            progress(done, total)
    # http.client raises for a short body only when it is read in one go.
    if total is not None and done != total:
        raise DataError(f"{address}: the download was cut off: {done:,} of {total:,} bytes came.")
    return b"".join(chunks)
