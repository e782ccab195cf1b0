"""Texts for language models: tokens in two parts that never mix, from any file or from Python's own documentation."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradfn.data.dataset import DataError
from gradfn.data.tokenizer import Tokenizer, tokenizer, tokenizer_from, utf8_bytes
from gradfn.files import replace_file

PIECE = 1 << 24  # characters that are tokenized at a time
FORMAT = "tokenizer of gf.data.tokenize"  # marks its files: nothing else is overwritten


class Text(NamedTuple):
    """Tokens for training and for validation: the beginning of a text and its end.

    Attributes:
        train: `[N]`, of the tokenizer's dtype; on no device, for large files in no memory either (`np.memmap`).
        validation: `[M]`, what comes after; no window can reach from one into the other.
        tokenizer: text to tokens and back.
        name: what to write on a figure.
        sha256: of the text's UTF-8, or of the file it was read from.
    """

    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer
    name: str
    sha256: str

    def __repr__(self) -> str:
        parts = f"{len(self.train):,} train, {len(self.validation):,} validation tokens"
        return f"Text({self.name!r}: {parts}; {_of(self.tokenizer)}; sha256 {self.sha256})"


class Lines(NamedTuple):
    """Lines that are sequences of their own, as padded arrays: input t is answered with target t.

    Every sequence begins with the token of the line's end and is to be answered with it at its own end. Padding
    has the target -1, which `gf.next_token_loss` leaves out.

    Attributes:
        train: inputs and targets, `[N, longest + 1]` int32 each.
        validation: the same; no line is in both.
        tokenizer: text to tokens and back; `"\\n"` ends a line.
        name: what to write on a figure.
        sha256: of the text's UTF-8, or of the file it was read from.
    """

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    tokenizer: Tokenizer
    name: str
    sha256: str

    def __repr__(self) -> str:
        parts = f"{len(self.train[0]):,} train, {len(self.validation[0]):,} validation lines"
        longest = self.train[0].shape[1] - 1
        return (
            f"Lines({self.name!r}: {parts} up to {longest} long; {_of(self.tokenizer)}; sha256 {self.sha256})"
        )


def text(
    path: str | os.PathLike[str] | None = None, tokens: str = "characters", validation: float = 0.1
) -> Text:
    """Load a text for a language model.

    Args:
        path: any file in UTF-8 (of any bytes, with `tokens="bytes"`), or the `.npy` of tokens that `tokenize`
            wrote. Bytes and `.npy` are mapped into memory, not read. None for `python_topics`. Text is read as
            Python reads it: every end of a line is `\\n`, and a byte order mark is left out; bytes are the file's.
        tokens: `"characters"`, `"bytes"` or `"tiktoken:<encoding>"`; an `.npy` file knows by itself.
        validation: the share of the tokens, the last ones, to keep for validation.

    Raises:
        DataError: a file that is missing, empty, not in UTF-8, or without its tokenizer; an unknown tokenizer.
        ImportError: tiktoken is asked for and not there.

    >>> import gradfn as gf
    >>> data = gf.data.text(tokens="bytes")
    >>> data.train.dtype, data.name
    (dtype('uint8'), 'topics of the Python documentation')
    >>> data.tokenizer.decode(data.train[:22])
    'The "assert" statement'
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation is a share from 0 up and below 1, came {validation}")
    if path is None:
        content = python_topics()
        coder = tokenizer(tokens, [content])
        return _parts(
            coder.encode(content), coder, validation, "topics of the Python documentation", _sha256(content)
        )
    file = Path(path).expanduser()
    digest = _file_sha256(file)
    if file.suffix == ".npy":
        coder, all_tokens = _mapped(file)
    elif tokens == "bytes":
        coder, all_tokens = utf8_bytes(), np.memmap(file, np.uint8, "r")
    else:
        content = _read(file)
        coder = tokenizer(tokens, [content])
        all_tokens = coder.encode(content)
    return _parts(all_tokens, coder, validation, file.name, digest)


def tokenize(path: str | os.PathLike[str], to: str | os.PathLike[str], tokens: str = "characters") -> Path:
    """Write a text's tokens to a file that `text` maps into memory, reading a part of the text at a time.

    Args:
        path: a file in UTF-8, of any size.
        to: the `.npy` file to write; the tokenizer goes beside it, into `<name>.npy.tokenizer.json`. Both replace
            only what an earlier call wrote.
        tokens: as in `text`. Pieces of tiktoken do not reach over the parts' ends, which are ends of lines.

    Returns:
        The `.npy` file.

    Raises:
        DataError: the file is missing, empty or not in UTF-8; or `to` is the text itself or a file that
            `tokenize` did not write.

    >>> import tempfile, gradfn as gf
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.txt").write_text("to be or not to be")
    >>> gf.data.text(gf.data.tokenize(folder / "a.txt", folder / "a.npy"), validation=0).train.tolist()[:5]
    [6, 4, 0, 1, 2]
    """
    source, target = Path(path).expanduser(), Path(to).expanduser()
    if target.suffix != ".npy":
        raise DataError(f"{target}: tokens go into a file whose name ends in .npy")
    _exists(source)
    _check_writable(source, target)
    coder = tokenizer(tokens, _pieces(source, tokens) if tokens == "characters" else ())
    length = sum(len(coder.encode(piece)) for piece in _pieces(source, tokens))
    if not length:
        raise DataError(f"{source}: the file is empty")
    # Under their own names the files appear whole: a map of the old tokens in memory stays as it was.
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        out = np.lib.format.open_memmap(part, "w+", coder.encode("").dtype, (length,))
        at = 0
        for piece in _pieces(source, tokens):
            encoded = coder.encode(piece)
            out[at : at + len(encoded)] = encoded
            at += len(encoded)
        out.flush()
        about = {"format": FORMAT, "tokens": length} | coder.to_dict()
        replace_file(_beside(target), json.dumps(about).encode())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def lines(
    path: str | os.PathLike[str] | None = None, validation: float = 0.1, seed: int = 0, longest: int = 255
) -> Lines:
    """Load the lines of a file (names, words) as sequences of characters, each line once.

    What stands twice is kept once, for a line that is in both parts would be a leak; so a random split is one
    that never leaks. Blank lines are left out.

    Args:
        path: a file in UTF-8; None for the words of `python_topics`.
        validation: the share of the lines to keep for validation.
        seed: which split.
        longest: of a line, in characters.

    Raises:
        DataError: a file that is missing, empty, or not in UTF-8, or a line that is too long.

    >>> import gradfn as gf
    >>> data = gf.data.lines()
    >>> inputs, targets = data.train
    >>> data.tokenizer.decode(targets[0][targets[0] >= 0])[-1], data.tokenizer.decode(inputs[0][:1])
    ('\\n', '\\n')
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation is a share from 0 up and below 1, came {validation}")
    if path is None:
        content = "\n".join(re.findall(r"[a-z]{2,}", python_topics().lower()))
        name, digest = "words of the Python documentation", _sha256(python_topics())
    else:
        file = Path(path).expanduser()
        name, digest, content = file.name, _file_sha256(file), _read(file)
    found = list(dict.fromkeys(line.strip() for line in content.split("\n") if line.strip()))
    if len(found) < 2:
        raise DataError(f"{name}: two different lines or more are needed, there are {len(found)}")
    too_long = next((line for line in found if len(line) > longest), None)
    if too_long is not None:
        raise DataError(
            f"{name}: a line of {len(too_long):,} characters, {too_long[:40]!r}...; {longest} is the longest that "
            "lines may be. Is it a running text, for which there is `gf.data.text`?"
        )
    coder = tokenizer("characters", ["\n", *found])
    width = max(map(len, found)) + 1
    inputs = np.zeros([len(found), width], np.int32)
    targets = np.full([len(found), width], -1, np.int32)
    for i, line in enumerate(found):
        encoded = coder.encode(f"\n{line}\n")
        inputs[i, : len(line) + 1], targets[i, : len(line) + 1] = encoded[:-1], encoded[1:]
    order = np.random.default_rng(seed).permutation(len(found))
    held = round(validation * len(found))
    train, out = order[held:], order[:held]
    return Lines((inputs[train], targets[train]), (inputs[out], targets[out]), coder, name, digest)


def python_topics() -> str:
    """Return the text that every Python brings along: what `help()` says on the language's topics.

    It differs between Python versions (so print its hash). Each paragraph is there once: many topics repeat
    others, and what the training part repeats would be a leak in the validation part.

    >>> import gradfn as gf
    >>> gf.data.python_topics().splitlines()[0]
    'The "assert" statement'
    """
    from pydoc_data.topics import topics

    once: dict[str, str] = {}
    for topic in topics.values():
        for paragraph in topic.split("\n\n"):
            once.setdefault(" ".join(paragraph.split()), paragraph.strip("\n"))
    once.pop("", None)
    return "\n\n".join(once.values())


def _parts(tokens: np.ndarray, coder: Tokenizer, validation: float, name: str, digest: str) -> Text:
    n_train = len(tokens) - int(validation * len(tokens))
    return Text(tokens[:n_train], tokens[n_train:], coder, name, digest)


def _read(file: Path) -> str:
    try:
        content = (
            file.read_bytes().decode()
        )  # the whole file, so that the error counts bytes from its beginning
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not in UTF-8 ({error.reason} at byte {error.start:,}); try tokens=bytes"
        ) from error
    content = _plain(content)
    if not content:
        raise DataError(f"{file}: the file is empty")
    return content


def _plain(content: str) -> str:
    """Return a text as Python's text mode reads it: lines end with a newline, and a byte order mark is no character."""
    return content.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _pieces(file: Path, tokens: str) -> Iterator[str]:
    """Yield a text in parts that end where lines end; as it is for bytes, else as `_plain` would return it."""
    encoding, newline = ("utf-8", "") if tokens == "bytes" else ("utf-8-sig", None)
    try:
        with file.open(encoding=encoding, newline=newline) as source:
            while piece := source.read(PIECE):
                yield piece + source.readline()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not in UTF-8 ({error.reason}); with tokens=bytes it need not be tokenized"
        ) from error


def _mapped(file: Path) -> tuple[Tokenizer, np.ndarray]:
    _exists(file)
    beside = _beside(file)
    about = _about(file)
    if about is None:
        raise DataError(
            f"{file}: tokens are stored in a .npy file with their tokenizer in {beside.name} beside it, as "
            "gf.data.tokenize writes them"
        )
    try:
        coder = tokenizer_from(about)
        tokens = np.load(file, mmap_mode="r")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: cannot be read as tokens ({error})") from error
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(
            f"{file}: expected integer tokens of shape [N], got {list(tokens.shape)} {tokens.dtype}"
        )
    if about.get("tokens", len(tokens)) != len(tokens):
        raise DataError(
            f"{file}: expected {about['tokens']:,} tokens according to {beside.name}, got {len(tokens):,}: the two "
            "files do not belong together. Tokenize the text again"
        )
    return coder, tokens


def _beside(file: Path) -> Path:
    """Return the file of a token file's tokenizer."""
    return file.with_name(f"{file.name}.tokenizer.json")


def _about(file: Path) -> dict[str, Any] | None:
    """Return what the tokenizer file beside a token file contains, None where `tokenize` wrote none."""
    try:
        about = json.loads(_beside(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) and about.get("format") == FORMAT else None


def _check_writable(source: Path, target: Path) -> None:
    """Refuse to write tokens over the text, or over a file that `tokenize` did not write."""
    for file in (target, _beside(target)):
        if file.exists() and file.samefile(source):
            raise DataError(
                f"{file}: is the text itself, which its tokens would overwrite. Name another file"
            )
        if os.path.lexists(file) and _about(target) is None:
            raise DataError(
                f"{file}: already exists and was not written by gf.data.tokenize. Name another file, or delete it"
            )


def _exists(file: Path) -> None:
    if not file.is_file():
        raise DataError(f"{file}: there is no such file")


def _sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _file_sha256(file: Path) -> str:
    _exists(file)
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if not file.stat().st_size:
        raise DataError(f"{file}: the file is empty")
    return digest


def _of(coder: Tokenizer) -> str:
    kind = coder.name if coder.name in ("characters", "bytes") else f"pieces of {coder.name}"
    return f"{coder.size:,} {kind}"
