"""Reading and writing files: writes replace a file atomically, and reads trust nothing.

Whoever writes gets the whole new file under its name or, whatever interrupts the writing, the old one. Whoever reads
gets content of the expected form, within a size that was set beforehand, or a `FileError` of one line that names the
file and the fault. A name that was read from a file becomes a path by `beside` alone.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import msgspec

T = TypeVar("T")

JSON_LIMIT = 64 << 20  # bytes of a JSON file, or of one line of rows
BLOCK = 1 << 20  # bytes of a file of rows that are read at once
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
MESSAGE_LIMIT = 2000  # characters
LOCK = ".lock"  # the lock file of a folder that is owned
PART = ".part"  # the suffix of unfinished files
IDLE = 3600.0  # seconds after which an unfinished file counts as abandoned


class FileError(ValueError):
    """A file that cannot be used; the message names it and the reason, in one line.

    It may quote names and contents from untrusted files, so characters that could control a terminal are replaced.

    >>> print(FileError("a.json: expected a name, got 'b\\n\\x1b[2J'"))
    a.json: expected a name, got 'b  [2J'
    """

    def __init__(self, message: str) -> None:
        super().__init__(
            "".join(letter if letter.isprintable() else " " for letter in message[:MESSAGE_LIMIT])
        )


@contextlib.contextmanager
def replacing(file: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary file for content that replaces `file` at the end of the block.

    The content goes into a new file beside it, with a random name that nobody else has. At the end of the block it is
    flushed to the disk and renamed; after an error it is removed. A link named `file` is replaced, not followed.

    Raises:
        OSError: it cannot be written (a full disk, say); the error names `file`.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "a.txt")
    >>> with replacing(file) as out:
    ...     _ = out.write(b"all of it")
    >>> file.read_text()
    'all of it'
    """
    file = Path(file)
    part = file.with_name(f".{file.name}.{secrets.token_hex(8)}{PART}")
    try:
        try:
            with part.open("xb") as out:
                yield out
                out.flush()
                os.fsync(out.fileno())
            part.replace(file)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
    except OSError as error:
        if error.filename not in (None, str(part)):
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


def replace_file(file: str | os.PathLike[str], data: bytes) -> None:
    """Write data into a file atomically: see `replacing`."""
    with replacing(file) as out:
        out.write(data)


def write_new(file: str | os.PathLike[str], text: str) -> None:
    """Write a text into a file that does not exist yet.

    Raises:
        FileExistsError: it exists; it stays as it is.
    """
    with open(file, "x", encoding="utf-8") as stream:
        stream.write(text)


def remove_parts(folder: Path, name: str, idle: float = 0.0) -> None:
    """Remove the unfinished files of processes that were killed while they replaced a file.

    Args:
        folder: where the file is.
        name: of the file.
        idle: seconds without a write after which a file is removed; 0 where no other process can be writing.
    """
    for part in folder.iterdir():
        if re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}{re.escape(PART)}", part.name):
            with contextlib.suppress(OSError):
                if not idle or time.time() - part.lstat().st_mtime >= idle:
                    part.unlink()


def inner_folder(folder: Path, name: str) -> Path:
    """Return a folder inside another one; it is created if necessary.

    Raises:
        FileError: the name is taken by a link, which may lead anywhere, or by a file.
    """
    inner = folder / name
    inner.mkdir(parents=True, exist_ok=True)
    if inner.is_symlink():
        raise FileError(f"{inner}: is a link, where a folder is expected; remove it")
    return inner


def open_to_append(file: Path, size: int | None = None) -> IO[bytes]:
    """Open a file to append to, after cutting it to `size` bytes; links are not followed.

    Raises:
        OSError: it cannot be opened.
        FileError: it is not a regular file, or a link; or it has fewer than `size` bytes.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    if file.is_symlink():
        raise FileError(f"{file}: is a link, where a file is expected; remove it")
    handle = os.open(file, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0), 0o666)
    out = os.fdopen(handle, "ab")
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"{file}: is not a regular file")
        if size is not None:
            if status.st_size < size:
                raise FileError(f"{file}: expected at least {size:,} bytes, got {status.st_size:,}")
            os.ftruncate(handle, size)
    except BaseException:
        out.close()
        raise
    return out


def open_regular(file: str | os.PathLike[str], limit: int | None = None) -> IO[bytes]:
    """Open a regular file for reading: neither a device nor a pipe, which may never end.

    Args:
        file: its path.
        limit: bytes that it may have.

    Raises:
        FileError: it is missing, cannot be read, is not a regular file, or is larger than `limit`.
    """
    try:
        handle = os.open(file, OPEN_FLAGS)
    except FileNotFoundError as error:
        raise FileError(f"{file}: there is no such file") from error
    except (OSError, ValueError) as error:  # a name that is too long, or has a NUL in it
        raise FileError(f"{str(file)[:300]}: cannot be read ({getattr(error, 'strerror', error)})") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise FileError(f"{file}: is not a regular file")
    if limit is not None and status.st_size > limit:
        os.close(handle)
        raise FileError(f"{file}: expected at most {limit:,} bytes, got {status.st_size:,}")
    return os.fdopen(handle, "rb")


def read_bytes(file: str | os.PathLike[str], limit: int) -> bytes:
    """Read a file of at most `limit` bytes; errors are those of `open_regular`."""
    with open_regular(file, limit) as content:
        try:
            size = os.fstat(
                content.fileno()
            ).st_size  # reading up to the limit would allocate a buffer of that size
            data = content.read(size + 1)
            if len(data) > size:  # it has grown
                data += content.read(max(limit - size, 0))
        except OSError as error:
            raise FileError(f"{file}: cannot be read ({error.strerror})") from error
    if len(data) > limit:
        raise FileError(f"{file}: expected at most {limit:,} bytes")
    return data


def read_text(file: str | os.PathLike[str], limit: int) -> str:
    """Read a file of at most `limit` bytes in UTF-8; errors are those of `open_regular`, and FileError for others."""
    try:
        return read_bytes(file, limit).decode()
    except UnicodeDecodeError as error:
        raise FileError(f"{file}: not UTF-8 ({error.reason} at byte {error.start:,})") from error


def read_json(file: str | os.PathLike[str], form: type[T], limit: int = JSON_LIMIT) -> T:
    """Read a JSON file whose content has a form.

    Args:
        file: its path.
        form: the type of the content: `dict[str, float]`, a `TypedDict`, a dataclass, ... Fields
            that a `TypedDict` or a dataclass does not name are dropped.
        limit: bytes that the file may have.

    Returns:
        The content, of that type.

    Raises:
        FileError: as for `open_regular`; or it is not JSON of this form. The message gives the location.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "a.json")
    >>> replace_file(file, b'{"rate": "high"}')
    >>> read_json(file, dict[str, float])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    gradfn.files.FileError: .../a.json: Expected `float`, got `str` - at `$[...]`
    """
    return parse_json(read_bytes(file, limit), form, str(file))


def parse_json(data: bytes | str, form: type[T], name: str) -> T:
    """Parse JSON whose content has a form: see `read_json`; `name` is what to call it in the error."""
    import msgspec

    return _decoded(functools.partial(msgspec.json.decode, type=form), data, name)


def _decoded(decode: Callable[[Any], T], data: bytes | str, name: str) -> T:
    """Decode JSON; raise a FileError where it is invalid."""
    import msgspec

    try:
        return decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FileError(f"{name}: {error}") from error
    except RecursionError as error:
        raise FileError(f"{name}: nested too deeply") from error


def read_rows(
    file: str | os.PathLike[str], form: type[T], start: int = 0, limit: int = JSON_LIMIT
) -> Iterator[T]:
    """Yield the rows of a file with JSON on each line, one at a time.

    A last line without its end is left out: it is still being written, or its writer was killed.

    Args:
        file: its path.
        form: of a row, as in `read_json`.
        start: the byte to start at, where a row starts.
        limit: bytes that one row may have.

    Raises:
        FileError: as for `read_json`; it names the line.
    """
    for rows in read_blocks_of_rows(file, form, start, limit):
        yield from rows


def read_blocks_of_rows(
    file: str | os.PathLike[str], form: type[T], start: int = 0, limit: int = JSON_LIMIT
) -> Iterator[list[T]]:
    """Yield the rows of a file as `read_rows` does, in blocks, which is faster for many rows."""
    import msgspec

    decoder = msgspec.json.Decoder(form)
    with open_regular(file) as content:
        content.seek(start)
        number, rest = 0, b""
        while block := content.read(BLOCK):
            whole, end, rest = (rest + block).rpartition(b"\n")
            if end:
                rows = _decoded_rows(decoder, whole, file, number, limit)
                number += len(rows)
                yield rows
            if len(rest) > limit:
                raise FileError(f"{file}: line {number + 1:,}: expected at most {limit:,} bytes")


def _decoded_rows(
    decoder: msgspec.json.Decoder[T], whole: bytes, file: str | os.PathLike[str], number: int, limit: int
) -> list[T]:
    """Return the rows in some lines of a file, which `number` others precede."""
    import msgspec

    if len(whole) <= limit:  # so is each line, and together they are decoded in half the time
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            rows = decoder.decode_lines(whole)
            if len(rows) == whole.count(b"\n") + 1:
                return rows
    rows = []
    for i, line in enumerate(whole.split(b"\n"), start=number + 1):
        if len(line) > limit:
            raise FileError(f"{file}: line {i:,}: expected at most {limit:,} bytes")
        rows.append(_decoded(decoder.decode, line, f"{file}: line {i:,}"))
    return rows


def beside(file: Path, name: Any) -> Path:
    """Return the path of a file that another file names; it must be in the same folder.

    Raises:
        FileError: the name would lead elsewhere, or is not a valid file name.

    >>> beside(Path("runs/a/index.json"), "../../b")
    Traceback (most recent call last):
    gradfn.files.FileError: runs/a/index.json: expected the name of a file beside it, got '../../b'
    """
    plain = isinstance(name, str) and 0 < len(name.encode("utf-8", "replace")) <= 255
    if not plain or name in (".", "..") or re.search(r"[/\\\x00-\x1f]", name) or Path(name).name != name:
        raise FileError(f"{file}: expected the name of a file beside it, got {name!r:.100}")
    return file.with_name(name)


def inside(folder: str | os.PathLike[str], name: str) -> Path:
    """Return the path of a file in a folder, which may be a link only to what lies in that folder too.

    Raises:
        FileError: it leads out of the folder.
    """
    file = Path(folder) / name
    root, target = (Path(os.path.realpath(path)) for path in (folder, file))
    if not target.is_relative_to(root):
        raise FileError(f"{file}: is a link that leads out of {folder}; remove it")
    return file


def cache_folder(name: str) -> Path:
    """Return gradfn's folder of that name in the user's cache, following the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says to ignore a relative path.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "gradfn" / name


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own a folder while the block runs: no other process can own it, and ownership ends with the process.

    A process may own a folder several times over, in one thread.

    Raises:
        FileError: another process (or thread) owns it, or its lock is a link.
        OSError: it cannot be locked (the folder is read-only, say); it names the file.
    """
    import filelock

    if (folder / LOCK).is_symlink():
        raise FileError(f"{folder / LOCK}: is a link, where a file is expected; remove it")
    # By its real path: the meaning of a relative path changes with the working directory. `gradfn runs` holds the
    # lock for a moment, to tell whether a run is in progress.
    lock = filelock.FileLock(Path(os.path.realpath(folder)) / LOCK, timeout=0.2, is_singleton=True)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise FileError(
            f"{folder}: is in use by another run; wait until it ends, or name another folder"
        ) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder / LOCK)) from error
    try:
        yield
    finally:
        lock.release()
