"""Texts for language models: tokens in two parts that never mix, from any file or from Python's own documentation."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NotRequired

import numpy as np

from gradfn.data._tokenizer import Tokenizer, TokenizerFile, tokenizer, tokenizer_from, utf8_bytes
from gradfn.data.dataset import DataError, data_errors
from gradfn.data.file_tokens import READ, FileTokens, decoded, file_tokens
from gradfn.files import IDLE, FileError, open_regular, read_json, remove_parts, replacing

PIECE = 1 << 24  # characters that tiktoken gets at a time
IN_MEMORY = 1 << 28  # bytes of tokens; those of larger texts stay in the file
FORMAT = "tokenizer of gf.data.tokenize"  # marks its files: nothing else is overwritten


class TokensFile(TokenizerFile):
    """What the file beside a file of tokens contains."""

    format: str
    tokens: NotRequired[int]  # how many
    sha256: NotRequired[str]  # of the file of tokens


class Text(NamedTuple):
    """Tokens for training and for validation: the beginning of a text and its end.

    Attributes:
        train: `[N]`, of the tokenizer's dtype; on no device, for large files in no memory either (`np.memmap`, or for
            characters an array of which slices are read, and all by `np.asarray`).
        validation: `[M]`, what comes after; no window can reach from one into the other.
        tokenizer: text to tokens and back.
        name: what to write on a figure.
        sha256: of the text's UTF-8, or of the file it was read from.
    """

    train: np.ndarray | FileTokens
    validation: np.ndarray | FileTokens
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
            wrote. Of any size: bytes and `.npy` are mapped into memory, and so are characters of more than 256 MB of
            tokens, which are decoded as they are used; tiktoken's tokens are in memory, for large texts there is
            `tokenize`. The file must stay as it is. None for `python_topics`. Text is read as Python reads it: every
            end of a line is `\\n`, and a byte order mark is left out; bytes are the file's.
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
        raise ValueError(f"validation must be >= 0 and < 1, got {validation}")
    if path is None:
        content = python_topics()
        coder = tokenizer(tokens, [content])
        return _parts(
            coder.encode(content), coder, validation, "topics of the Python documentation", _sha256(content)
        )
    file = Path(path).expanduser()
    all_tokens: np.ndarray | FileTokens
    if file.suffix == ".npy":
        coder, all_tokens, digest = _mapped(file)
    elif tokens == "bytes":
        coder, digest = utf8_bytes(), _file_sha256(file)
        all_tokens = np.memmap(file, np.uint8, "r")
    elif tokens == "characters":
        all_tokens, digest = file_tokens(file)
        coder = all_tokens.coder
        if all_tokens.nbytes <= IN_MEMORY:
            all_tokens = np.asarray(all_tokens)
    else:
        coder, digest = tokenizer(tokens), _file_sha256(file)
        all_tokens = np.concatenate([coder.encode(""), *_encoded(file, coder)])
    if not len(all_tokens):
        raise DataError(f"{file}: the file is empty")
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
    with data_errors():
        open_regular(source).close()
    _check_writable(source, target)
    for file in (target, _beside(target)):
        remove_parts(file.parent, file.name, IDLE)
    if tokens == "characters":
        found, _ = file_tokens(source)
        coder, length, encoded = found.coder, len(found), found.pieces()
    else:
        coder = tokenizer(tokens)
        length = sum(map(len, _encoded(source, coder)))
        encoded = _encoded(source, coder)
    if not length:
        raise DataError(f"{source}: the file is empty")
    header = io.BytesIO()
    dtype = np.lib.format.dtype_to_descr(coder.encode("").dtype)
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": (length,)})
    digest, written = hashlib.sha256(header.getvalue()), 0
    # Under their own names the files appear whole: a map of the old tokens in memory stays as it was. The tokenizer
    # gets its name first: a process that is killed in between leaves what the next call knows as its own.
    with replacing(target) as out, replacing(_beside(target)) as about:
        out.write(header.getvalue())
        for piece in encoded:
            out.write(piece.data)
            digest.update(piece.data)
            written += len(piece)
        if written != length:
            raise DataError(f"{source}: has changed while it was tokenized")
        content = {"format": FORMAT, "tokens": length, "sha256": digest.hexdigest()} | coder.to_dict()
        about.write(json.dumps(content).encode())
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
        raise ValueError(f"validation must be >= 0 and < 1, got {validation}")
    if path is None:
        name, digest = "words of the Python documentation", _sha256(python_topics())
        words = "\n".join(re.findall(r"[a-z]{2,}", python_topics().lower()))
        found = _distinct_lines([words], name, longest)
    else:
        file = Path(path).expanduser()
        name, digest = file.name, _file_sha256(file)
        found = _distinct_lines(_pieces(file, max(READ, longest)), name, longest)
    if len(found) < 2:
        raise DataError(f"{name}: two different lines or more are needed, there are {len(found)}")
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


def _distinct_lines(pieces: Iterable[str], name: str, longest: int) -> list[str]:
    """Return the lines of a text, each once, without white space around them."""
    found: dict[str, None] = {}
    rest = ""
    for piece in itertools.chain(pieces, ["\n"]):
        *complete, rest = (rest + piece).split("\n")
        if len(rest) > max(READ, longest):  # it may never end
            complete.append(rest)
        stripped = [line.strip() for line in complete]
        too_long = next((line for line in stripped if len(line) > longest), None)
        if too_long is not None:
            raise DataError(
                f"{name}: a line of {len(too_long):,} characters, {too_long[:40]!r}...; {longest} is the longest that "
                "lines may be. Is it a running text, for which there is `gf.data.text`?"
            )
        found.update(dict.fromkeys(line for line in stripped if line))
    return list(found)


def _parts(
    tokens: np.ndarray | FileTokens, coder: Tokenizer, validation: float, name: str, digest: str
) -> Text:
    n_train = len(tokens) - int(validation * len(tokens))
    if isinstance(tokens, FileTokens):
        train, held = tokens.part(0, n_train), tokens.part(n_train, len(tokens))
        return Text(train, held, coder, name, digest)
    return Text(tokens[:n_train], tokens[n_train:], coder, name, digest)


def _pieces(file: Path, size: int) -> Iterator[str]:
    """Yield a text as Python's text mode reads it, in pieces of `size` characters or a little more.

    They end where lines end, where there is such a place.
    """
    newlines, rest = io.IncrementalNewlineDecoder(None, translate=True), ""
    for data, text in decoded(file):
        rest += newlines.decode(text, final=not data)
        if len(rest) >= size:
            end = rest.rfind("\n") + 1 or len(rest)
            yield rest[:end]
            rest = rest[end:]
    rest += newlines.decode("", final=True)
    if rest:
        yield rest


def _encoded(file: Path, coder: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the tokens of a file, some at a time: its bytes, or the pieces of its text."""
    if coder.name == "bytes":
        return (np.frombuffer(data, np.uint8) for data, _ in decoded(file))
    return map(coder.encode, _pieces(file, PIECE))


def _mapped(file: Path) -> tuple[Tokenizer, np.ndarray, str]:
    """Return the tokenizer and the tokens of a file that `tokenize` wrote, and the file's sha256."""
    beside = _beside(file)
    with data_errors():
        open_regular(file).close()
        if not os.path.lexists(beside):
            raise DataError(
                f"{file}: tokens are stored in a .npy file with their tokenizer in {beside.name} beside it, as "
                "gf.data.tokenize writes them"
            )
        about = read_json(beside, TokensFile)
    if about["format"] != FORMAT:
        raise DataError(f"{beside}: expected format {FORMAT!r}, got {about['format']!r:.100}")
    try:
        coder = tokenizer_from(about)
    except DataError as error:
        raise DataError(f"{beside}: {error}") from error
    try:
        tokens = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # a header may be anything, and what numpy's reader then raises is
        raise DataError(f"{file}: not a readable .npy file ({' '.join(str(error).split()):.200})") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"{file}: expected integer tokens of shape [N], got {list(tokens.shape)} {tokens.dtype}"
        )
    expected = about.get("tokens", len(tokens))
    if expected != len(tokens):
        raise DataError(
            f"{file}: expected {expected:,} tokens according to {beside.name}, got {len(tokens):,}: the two "
            "files do not belong together. Tokenize the text again"
        )
    digest = _checked_sha256(file, tokens, coder.size)
    if about.get("sha256", digest) != digest:
        raise DataError(
            f"{file}: damaged, or not what {beside.name} describes: its sha256 is {digest}, expected "
            f"{about['sha256']:.100}. Tokenize the text again"
        )
    return coder, tokens, digest


def _checked_sha256(file: Path, tokens: np.memmap, size: int) -> str:
    """Return the sha256 of a file of tokens, all of which must be below `size`."""
    with open_regular(file) as content:
        digest = hashlib.sha256(content.read(tokens.offset))
        length = os.fstat(content.fileno()).st_size
    if length != tokens.offset + tokens.nbytes:
        raise DataError(
            f"{file}: expected {tokens.offset + tokens.nbytes:,} bytes, as its header says, got {length:,}"
        )
    for at in range(0, len(tokens), READ):
        piece = tokens[at : at + READ]
        digest.update(piece.view(np.uint8).data)
        if piece.min() < 0 or piece.max() >= size:
            i = at + int(np.argmax((piece < 0) | (piece >= size)))
            raise DataError(
                f"{file}: tokens must be from 0 to {size - 1:,} for its tokenizer, got {tokens[i]} at {i:,}"
            )
    return digest.hexdigest()


def _beside(file: Path) -> Path:
    """Return the file of a token file's tokenizer."""
    return file.with_name(f"{file.name}.tokenizer.json")


def _is_ours(target: Path) -> bool:
    """Tell whether `tokenize` wrote the tokenizer file beside a file of tokens."""
    try:
        return read_json(_beside(target), TokensFile)["format"] == FORMAT
    except FileError:
        return False


def _check_writable(source: Path, target: Path) -> None:
    """Refuse to write tokens over the text, or over a file that `tokenize` did not write."""
    for file in (target, _beside(target)):
        if file.exists() and file.samefile(source):
            raise DataError(
                f"{file}: is the text itself, which its tokens would overwrite. Name another file"
            )
        if os.path.lexists(file) and not _is_ours(target):
            raise DataError(
                f"{file}: already exists and was not written by gf.data.tokenize. Name another file, or delete it"
            )


def _sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _file_sha256(file: Path) -> str:
    with data_errors(), open_regular(file) as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]
        if not content.tell():
            raise DataError(f"{file}: the file is empty")
    return digest


def _of(coder: Tokenizer) -> str:
    kind = coder.name if coder.name in ("characters", "bytes") else f"pieces of {coder.name}"
    return f"{coder.size:,} {kind}"
