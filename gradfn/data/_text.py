"""Texts for language models: training and validation tokens, from any file or from Python's documentation."""

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
from gradfn.timings import phase

PIECE = 1 << 24  # characters per call of tiktoken
IN_MEMORY = 1 << 28  # bytes of tokens; larger texts stay in their file
FORMAT = "tokenizer of gf.data.tokenize"  # marks files that may be overwritten


class TokensFile(TokenizerFile):
    """The content of the JSON file beside a file of tokens."""

    format: str
    tokens: NotRequired[int]  # the number of tokens
    sha256: NotRequired[str]  # of the file of tokens


class Text(NamedTuple):
    """Tokens for training and for validation: the first part of a text and the rest.

    Attributes:
        train: `[N]`, of the tokenizer's dtype, on the host. Large files are not loaded: they are an `np.memmap`, or for
            characters a `FileTokens`, which reads slices on demand.
        validation: `[M]`, the tokens that follow; no window spans both parts.
        tokenizer: the tokenizer of the text.
        name: a name for figures.
        sha256: of the text in UTF-8, or of the file it was read from.
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
    """Lines as independent sequences, in padded arrays: target t is the token after input t.

    The newline token is the first input and the last target of every sequence. Padding has the target -1, which
    `gf.next_token_loss` ignores.

    Attributes:
        train: inputs and targets, `[N, longest + 1]` int32 each.
        validation: the same; no line is in both parts.
        tokenizer: the tokenizer of the lines; `"\\n"` ends a line.
        name: a name for figures.
        sha256: of the text in UTF-8, or of the file it was read from.
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


@phase("data")
def text(
    path: str | os.PathLike[str] | None = None, tokens: str = "characters", validation: float = 0.1
) -> Text:
    """Load a text for a language model.

    Args:
        path: any file in UTF-8 (any file at all with `tokens="bytes"`), or an `.npy` file of tokens written by
            `tokenize`; None for `python_topics`. Files may have any size: bytes and `.npy` files are memory-mapped, and
            so are characters of more than 256 MB of tokens, which are decoded on demand; tiktoken's tokens are in
            memory, so use `tokenize` for large texts. A mapped file must not change. Text is read in Python's text
            mode: line ends become `\\n`, and a byte order mark is dropped.
        tokens: `"characters"`, `"bytes"`, `"tiktoken:<encoding>"` or `"huggingface:<folder>"`; an `.npy` file has its
            own tokenizer.
        validation: the fraction of the tokens for validation, taken from the end.

    Raises:
        DataError: a file that is missing, empty, not in UTF-8, or without its tokenizer; an unknown tokenizer.
        ImportError: a tokenizer is requested whose library is not installed.

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
    """Write the tokens of a text to a file that `text` can memory-map, reading the text in pieces.

    Args:
        path: a file in UTF-8, of any size.
        to: the `.npy` file to write; the tokenizer is written to `<name>.npy.tokenizer.json` beside it. Only files from
            an earlier call are overwritten.
        tokens: as in `text`. The text is split at line ends, and tiktoken's tokens do not span two pieces.

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
        raise DataError(f"{target}: expected a file name that ends in .npy")
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
    # Both files are replaced atomically: existing memory maps of the old tokens stay valid. The tokenizer gets its name
    # first, so that after a kill in between the next call recognizes the files as its own.
    with replacing(target) as out, replacing(_beside(target)) as about:
        out.write(header.getvalue())
        for piece in encoded:
            out.write(piece.data)
            digest.update(piece.data)
            written += len(piece)
        if written != length:
            raise DataError(f"{source}: the file changed while it was tokenized")
        content = {"format": FORMAT, "tokens": length, "sha256": digest.hexdigest()} | coder.to_dict()
        about.write(json.dumps(content).encode())
    return target


@phase("data")
def lines(
    path: str | os.PathLike[str] | None = None, validation: float = 0.1, seed: int = 0, longest: int = 255
) -> Lines:
    """Load the lines of a file (names, words) as sequences of characters, without duplicates.

    Duplicates and blank lines are dropped, so that no line is in both parts of the random split.

    Args:
        path: a file in UTF-8; None for the words of `python_topics`.
        validation: the fraction of the lines for validation.
        seed: of the split.
        longest: the maximum length of a line, in characters.

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
        raise DataError(f"{name}: expected at least two different lines, got {len(found)}")
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
    """Return a text that is part of every Python: the topics of the interactive `help()`.

    It differs between Python versions (so print its hash). Many topics repeat paragraphs of others; each paragraph
    is kept once, so that the validation part does not repeat the training part.

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
    """Return the distinct lines of a text, stripped of white space."""
    found: dict[str, None] = {}
    rest = ""
    for piece in itertools.chain(pieces, ["\n"]):
        *complete, rest = (rest + piece).split("\n")
        if len(rest) > max(READ, longest):  # a line without an end must not fill the memory
            complete.append(rest)
        stripped = [line.strip() for line in complete]
        too_long = next((line for line in stripped if len(line) > longest), None)
        if too_long is not None:
            raise DataError(
                f"{name}: expected lines of at most {longest} characters, got one of {len(too_long):,}: "
                f"{too_long[:40]!r}... For running text use gf.data.text"
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
    """Yield a text as Python's text mode reads it, in pieces of `size` characters or slightly more.

    Pieces end at the end of a line if they contain one.
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
    """Yield the tokens of a file in pieces."""
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
                f"{file}: expected the tokenizer in {beside.name} beside it. gf.data.tokenize writes both files"
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
    except Exception as error:  # numpy's reader raises anything for a damaged header
        raise DataError(f"{file}: not a readable .npy file ({' '.join(str(error).split()):.200})") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"{file}: expected integer tokens of shape [N], got {list(tokens.shape)} {tokens.dtype}"
        )
    expected = about.get("tokens", len(tokens))
    if expected != len(tokens):
        raise DataError(
            f"{file}: expected {expected:,} tokens according to {beside.name}, got {len(tokens):,}. Tokenize the "
            "text again"
        )
    digest = _checked_sha256(file, tokens, coder.size)
    if about.get("sha256", digest) != digest:
        raise DataError(
            f"{file}: expected sha256 {about['sha256']:.100} according to {beside.name}, got {digest}. Tokenize "
            "the text again"
        )
    return coder, tokens, digest


def _checked_sha256(file: Path, tokens: np.memmap, size: int) -> str:
    """Return the sha256 of a file of tokens, which must all be in [0, size)."""
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
    """Return the tokenizer file that belongs to a file of tokens."""
    return file.with_name(f"{file.name}.tokenizer.json")


def _is_ours(target: Path) -> bool:
    """Return whether the tokenizer file beside a file of tokens was written by `tokenize`."""
    try:
        return read_json(_beside(target), TokensFile)["format"] == FORMAT
    except FileError:
        return False


def _check_writable(source: Path, target: Path) -> None:
    """Raise if writing would overwrite the text, or a file that `tokenize` did not write."""
    for file in (target, _beside(target)):
        if file.exists() and file.samefile(source):
            raise DataError(f"{file}: this is the text itself. Choose another file for its tokens")
        if os.path.lexists(file) and not _is_ours(target):
            raise DataError(
                f"{file}: already exists and was not written by gf.data.tokenize. Choose another name, or delete it"
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
