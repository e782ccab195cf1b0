"""Tokenizers of Hugging Face: the `tokenizer.json` of a model, encoded by the library `tokenizers`.

The library encodes. Decoding is done here, because the library decodes a whole sequence at once, and a stream must end
up with the same text: a file's decoder is a chain of steps, each of which takes the strings of tokens one at a time and
yields texts as soon as no later token can change them.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gradfn.data._tokenizer import HUGGING_FACE, Tokenizer, smallest_dtype
from gradfn.data.dataset import DataError, data_errors
from gradfn.files import JSON_LIMIT, read_bytes

FILE = "tokenizer.json"
Step = Callable[[Iterator[str]], Iterator[str]]  # from the strings of tokens to texts


def huggingface(
    path: str | os.PathLike[str], special_tokens: bool = True, sha256: str | None = None
) -> Tokenizer:
    """Return the tokenizer of a Hugging Face model.

    Tokens are those of the library `tokenizers`, and so is the text that they decode to. Truncation and padding that a
    file asks for are left out. Strings of added tokens that occur in a text (`<|endoftext|>`) become those tokens.
    Special tokens are not part of a decoded text; `piece` returns their names.

    Args:
        path: a `tokenizer.json`, or a folder that contains one.
        special_tokens: whether `encode` adds the special tokens that the file asks for, such as a first `<s>`.
        sha256: of the file; another file is refused.

    Returns:
        A tokenizer named `huggingface:<absolute path>`. Its `size` is its largest token + 1. There may be gaps:
        decoding an integer that is not a token raises a DataError.

    Raises:
        ImportError: `tokenizers` is not installed.
        DataError: a file that is missing, damaged or not the one with this sha256, or one whose decoder is not
            supported (of CTC, or with regular expressions).

    >>> import tempfile, tokenizers, gradfn as gf
    >>> from tokenizers import decoders, models, pre_tokenizers
    >>> library = tokenizers.Tokenizer(models.BPE({"h": 0, "i": 1, "Ġ": 2, "hi": 3}, [("h", "i")]))
    >>> library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    >>> library.save(f"{tempfile.gettempdir()}/tokenizer.json")
    >>> coder = gf.data.huggingface(tempfile.gettempdir())
    >>> coder.encode("hi hi"), coder.decode([3, 2, 0]), coder.piece(2)
    (array([3, 2, 3], dtype=uint8), 'hi h', b' ')
    """
    try:
        import tokenizers
    except ImportError as error:
        message = "this needs tokenizers: pip install 'gradfn[tokenizers]' (or tokenizers)"
        raise ImportError(message) from error
    file = Path(path).expanduser()
    file = file / FILE if file.is_dir() else file
    with data_errors():
        data = read_bytes(file, JSON_LIMIT)
        digest = hashlib.sha256(data).hexdigest()
        if sha256 not in (None, digest):
            raise DataError(
                f"{file}: expected sha256 {sha256}, got {digest}. The tokenizer was replaced by another one"
            )
    try:
        library = tokenizers.Tokenizer.from_buffer(data)
        library.no_truncation()
        library.no_padding()
        size = max(library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        special = frozenset(i for i, token in library.get_added_tokens_decoder().items() if token.special)
        content = None if library.decoder is None else json.loads(library.decoder.__getstate__())
    except BaseException as error:
        if not _of_library(error):
            raise
        raise DataError(
            f"{file}: not a tokenizer that tokenizers {tokenizers.__version__} reads ({error})"
        ) from error
    if not size:
        raise DataError(f"{file}: expected a tokenizer with at least one token, got none")
    try:
        steps, piece_of = _decoder(content)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: its decoder is not supported ({error})") from error
    dtype = smallest_dtype(size)

    def encode(text: str) -> np.ndarray:
        try:
            # Older versions of the library replace lone surrogates.
            text.encode()
            return np.array(library.encode(text, add_special_tokens=special_tokens).ids, dtype)
        except BaseException as error:
            if not _of_library(error):
                raise
            raise DataError(f"{file}: cannot encode {text[:100]!r} ({error})") from error

    def name_of(token: int) -> str:
        name = library.id_to_token(token) if 0 <= token < size else None
        if name is None:
            raise DataError(f"{file}: {token} is not a token; expected one of the {size:,} in [0, {size:,})")
        return name

    def texts(tokens: Iterable[int]) -> Iterator[str]:
        named = ((token, name_of(token)) for token in map(int, tokens))
        found: Iterator[str] = (name for token, name in named if token not in special)
        for step in steps:
            found = step(found)
        return found

    return Tokenizer(
        f"{HUGGING_FACE}:{file.resolve()}",
        size,
        encode,
        piece=lambda token: piece_of(name_of(int(token))),
        special=special,
        texts=texts,
        file={"file_sha256": digest, "special_tokens": special_tokens},
    )


def _of_library(error: BaseException) -> bool:
    """Return whether an error is the library's; those of its Rust code that it does not expect are no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


# Decoding


def _decoder(content: Any) -> tuple[list[Step], Callable[[str], bytes]]:
    """Return the steps of a decoder, and a function from a token's string to its bytes within a text.

    Raises:
        ValueError: a decoder that cannot be done one token at a time; also KeyError and TypeError for damaged ones.
    """
    parts = _parts(content)
    kinds = [part["type"] for part in parts]
    steps, fused = [], False
    for part in parts:
        steps.append(_step(part, fused))
        fused = fused or part["type"] in ("Fuse", "ByteLevel")

    def piece_of(name: str) -> bytes:
        if "ByteLevel" in kinds:
            return _bytes_of(name)
        if "ByteFallback" in kinds and (byte := _byte(name)):
            return byte
        found: Iterator[str] = iter(["a", name])
        for step in steps:
            found = step(found)
        return "".join(found)[1:].encode()

    return steps, piece_of


def _parts(content: Any) -> list[dict[str, Any]]:
    if content is None:
        return [{"type": "None"}]
    if content["type"] != "Sequence":
        return [content]
    return [part for each in content["decoders"] for part in _parts(each)]


def _step(part: dict[str, Any], fused: bool) -> Step:
    """Return a step; `fused` says that the library would have one string here, of which we have the pieces."""
    kind = part["type"]
    if kind == "Fuse":
        return lambda texts: texts
    if kind == "Replace":
        pattern, content = part["pattern"].get("String"), str(part["content"])
        if not isinstance(pattern, str) or not pattern or (fused and len(pattern) > 1):
            raise ValueError(f"Replace with the pattern {part['pattern']!s:.100}")
        return lambda texts: (text.replace(pattern, content) for text in texts)
    if kind == "Strip" and fused:
        letter, start, stop = part["content"], int(part["start"]), int(part["stop"])
        if stop:
            raise ValueError(f"Strip at the end, stop {stop}")
        return lambda texts: _without_start(texts, letter, start)
    if fused:
        raise ValueError(f"{kind} after all tokens were joined")
    if kind == "None":
        return lambda texts: (f" {text}" if i else text for i, text in enumerate(texts))
    if kind == "ByteLevel":
        return _byte_level
    if kind == "ByteFallback":
        return _byte_fallback
    if kind == "Metaspace":
        letter = part["replacement"]
        at_start = " " if part.get("prepend_scheme", "always") == "never" else ""
        return lambda texts: (text.replace(letter, " " if i else at_start) for i, text in enumerate(texts))
    if kind == "WordPiece":
        prefix, cleans = str(part["prefix"]), bool(part["cleanup"])
        return lambda texts: _word_pieces(texts, prefix, cleans)
    raise ValueError(f"{kind:.100}")


def _without_start(texts: Iterator[str], letter: str, n: int) -> Iterator[str]:
    """Drop up to `n` letters at the start of a text."""
    for text in texts:
        while n and text.startswith(letter):
            text, n = text[1:], n - 1
        n = 0 if text else n
        yield text


def _byte_level(texts: Iterator[str]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for text in texts:
        yield decoder.decode(_bytes_of(text))
    yield decoder.decode(b"", final=True)


def _byte_fallback(texts: Iterator[str]) -> Iterator[str]:
    """Decode runs of bytes (`<0xE4>`); of a run that is not in UTF-8 each byte becomes U+FFFD."""
    run = b""
    for text in texts:
        if byte := _byte(text):
            run += byte
            continue
        if run:
            yield _text_of(run)
            run = b""
        yield text
    if run:
        yield _text_of(run)


def _text_of(run: bytes) -> str:
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(run)


def _byte(name: str) -> bytes:
    """Return the byte that a token of one byte stands for; nothing for other tokens."""
    found = re.fullmatch("<0x([0-9A-Fa-f]{2})>", name)
    return bytes.fromhex(found[1]) if found else b""


def _word_pieces(texts: Iterator[str], prefix: str, cleans: bool) -> Iterator[str]:
    for i, text in enumerate(texts):
        if i:
            text = text[len(prefix) :] if text.startswith(prefix) else f" {text}"
        for old, new in _CLEANED.items() if cleans else ():
            text = text.replace(old, new)
        yield text


# What is written without a space before it, in the order of the library.
_CLEANED = {
    " .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't", " 'm": "'m", " do not": " don't",
    " 's": "'s", " 've": "'ve", " 're": "'re",
}  # fmt: skip


def _byte_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level token stands for (Radford et al., 2019, `bytes_to_unicode`)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()


def _bytes_of(name: str) -> bytes:
    """Return the bytes of a byte-level token; an added token with other letters stands for its own text."""
    found = [_BYTES.get(letter) for letter in name]
    return name.encode() if None in found else bytes(byte for byte in found if byte is not None)
