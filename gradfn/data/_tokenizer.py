"""Tokenizers: text to whole numbers and back, by characters, by bytes, or by tiktoken's pieces."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import numpy as np

from gradfn.data.dataset import DataError

PART = 1 << 20  # characters that are looked up at a time


class TokenizerFile(TypedDict):
    """What files hold of a tokenizer: `Tokenizer.to_dict`."""

    name: str
    symbols: NotRequired[str]


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A pair of pure functions between text and tokens in [0, size).

    Attributes:
        name: `"characters"`, `"bytes"` or `"tiktoken:<encoding>"`.
        size: how many tokens there are, the `vocab` of a language model.
        encode: text -> tokens `[N]`, in the smallest unsigned dtype that holds them all.
        piece: one token -> its bytes in UTF-8; a token of bytes or of tiktoken may be a part of a character.
        symbols: the characters that tokens stand for, in order; empty for the other kinds.
    """

    name: str
    size: int
    encode: Callable[[str], np.ndarray]
    piece: Callable[[int], bytes]
    symbols: str = ""

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.piece(int(token)) for token in tokens).decode("utf-8", "replace")

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the text of tokens as they come; characters that are not complete yet wait for their rest."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield decoder.decode(self.piece(int(token)))
        yield decoder.decode(b"", final=True)

    def to_dict(self) -> TokenizerFile:
        """Return what `tokenizer_from` makes it from again, ready for JSON."""
        return {"name": self.name, "symbols": self.symbols} if self.symbols else {"name": self.name}


def tokenizer_from(content: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that `Tokenizer.to_dict` described.

    Raises:
        DataError: content that no tokenizer returned.
        ImportError: it is one of tiktoken, which is not installed.

    >>> import gradfn as gf
    >>> told = gf.data.characters("hello").to_dict()
    >>> gf.data.tokenizer_from(told).decode([1, 0, 2, 2, 3])
    'hello'
    """
    import msgspec

    try:
        checked = msgspec.convert(content, TokenizerFile)
    except msgspec.ValidationError as error:
        raise DataError(f"tokenizer: {error}") from error
    if checked["name"] != "characters":
        return tokenizer(checked["name"])
    symbols = checked.get("symbols", "")
    found = characters(symbols)
    if found.symbols != symbols:  # another order would give other tokens
        raise DataError("tokenizer: expected each of its symbols once, in the order of their code points")
    return found


def tokenizer(name: str, texts: Iterable[str] = ()) -> Tokenizer:
    """Return a tokenizer by its name.

    Args:
        name: `"characters"`, `"bytes"`, or `"tiktoken:<encoding>"` such as `"tiktoken:gpt2"`.
        texts: what the characters are collected from.

    Raises:
        DataError: an unknown name.
        ImportError: tiktoken is asked for and not there.

    >>> import gradfn as gf
    >>> gf.data.tokenizer("bytes").encode("é").tolist()
    [195, 169]
    """
    kind, _, encoding = name.partition(":")
    if name == "characters":
        return characters(*texts)
    if name == "bytes":
        return utf8_bytes()
    if kind == "tiktoken":
        return tiktoken(encoding or "gpt2")
    raise DataError(
        f"tokens: there are characters, bytes and tiktoken:<encoding> (tiktoken:gpt2), got {name!r:.100}"
    )


def characters(*texts: str) -> Tokenizer:
    """Return the tokenizer of the characters that occur in some texts, in the order of their code points.

    Raises:
        DataError: no character at all; and `encode` raises it for a character that is not among them.

    >>> import gradfn as gf
    >>> letters = gf.data.characters("hello")
    >>> letters.symbols, letters.encode("hole").tolist(), letters.decode([1, 3, 2, 0])
    ('ehlo', [1, 3, 2, 0], 'hole')
    """
    seen = np.zeros(0x110000, bool)  # by code point
    for text in texts:
        for at in range(0, len(text), PART):
            seen[_points(text[at : at + PART])] = True
    points = np.flatnonzero(seen)
    if not len(points):
        raise DataError("there are no characters in an empty text")
    symbols = "".join(map(chr, points))
    pieces = [symbol.encode() for symbol in symbols]
    # By code point; the last one stands for all beyond.
    table = np.full(int(points[-1]) + 2, -1, np.int32)
    table[points] = np.arange(len(points))

    def encode(text: str) -> np.ndarray:
        tokens = np.empty(len(text), _dtype(len(points)))
        for at in range(0, len(text), PART):
            part = text[at : at + PART]
            tokens[at : at + PART] = encode_part(part)
        return tokens

    def encode_part(text: str) -> np.ndarray:
        tokens = table[np.minimum(_points(text), np.uint32(len(table) - 1))]
        unknown = np.flatnonzero(tokens < 0)
        if len(unknown):
            raise DataError(
                f"the character {text[unknown[0]]!r} is not among the {len(points)} that the text is made of: "
                f"{symbols!r:.200}. Leave it out, or train with tokens=bytes, which knows every text"
            )
        return tokens

    return Tokenizer("characters", len(points), encode, lambda token: pieces[token], symbols)


def utf8_bytes() -> Tokenizer:
    """Return the tokenizer whose 256 tokens are the bytes of UTF-8; it knows every text.

    >>> import gradfn as gf
    >>> gf.data.utf8_bytes().encode("hi")
    array([104, 105], dtype=uint8)
    """
    return Tokenizer(
        "bytes", 256, lambda text: np.frombuffer(text.encode(), np.uint8), lambda token: bytes([token])
    )


def tiktoken(encoding: str = "gpt2") -> Tokenizer:
    """Return one of tiktoken's tokenizers, of pieces of words (byte pairs; Sennrich et al., 2016).

    tiktoken downloads an encoding once and keeps it.

    Args:
        encoding: `"gpt2"`, `"cl100k_base"`, ...

    Raises:
        ImportError: tiktoken is not there.
        DataError: it does not know the encoding, or cannot get it.
    """
    try:
        import tiktoken as library
    except ImportError as error:
        raise ImportError("this needs tiktoken: pip install 'gradfn[tiktoken]' (or tiktoken)") from error
    try:
        coder = library.get_encoding(encoding)
    except Exception as error:  # a name it does not know, or whatever its download raises
        raise DataError(f"tiktoken:{encoding}: {error}") from error

    def encode(text: str) -> np.ndarray:
        return np.array(coder.encode_ordinary(text), _dtype(coder.n_vocab))

    return Tokenizer(f"tiktoken:{encoding}", coder.n_vocab, encode, coder.decode_single_token_bytes)


def _points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)  # the code points, [N]


def _dtype(size: int) -> np.dtype:
    return np.min_scalar_type(size - 1)
