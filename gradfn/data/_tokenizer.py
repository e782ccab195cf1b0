"""Tokenizers: text to integers and back, by characters, by bytes, by tiktoken's byte pairs or as Hugging Face does."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import numpy as np

from gradfn.data.dataset import DataError

HUGGING_FACE = "huggingface"  # the start of names, before a colon and a path
PART = 1 << 20  # characters per look-up, to bound memory


class TokenizerFile(TypedDict):
    """A tokenizer as JSON: see `Tokenizer.to_dict`."""

    name: str
    symbols: NotRequired[str]
    file_sha256: NotRequired[str]  # of Hugging Face's file
    special_tokens: NotRequired[bool]  # whether encoding adds those that the file asks for


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A pair of pure functions between text and tokens in [0, size).

    Attributes:
        name: `"characters"`, `"bytes"`, `"tiktoken:<encoding>"` or `"huggingface:<path>"`.
        size: the vocabulary size, `vocab` of a language model.
        encode: text -> tokens `[N]`, in the smallest unsigned dtype for the vocabulary.
        piece: one token -> its bytes in UTF-8; in `bytes` and byte pairs a token may be a part of a character.
        symbols: for `characters`, the characters in the order of their tokens; empty otherwise.
        special: the tokens that are not part of a text, such as the one at its end.
        texts: tokens -> texts that add up to theirs; None where that is the text of their pieces' bytes.
        file: what identifies the file of a tokenizer that is read from one.
    """

    name: str
    size: int
    encode: Callable[[str], np.ndarray]
    piece: Callable[[int], bytes]
    symbols: str = ""
    special: frozenset[int] = frozenset()
    texts: Callable[[Iterable[int]], Iterator[str]] | None = None
    file: Mapping[str, Any] = field(default_factory=dict)

    def decode(self, tokens: Iterable[int], after: Iterable[int] = ()) -> str:
        """Return the text of tokens, or what they add to the text of others; invalid UTF-8 becomes U+FFFD."""
        return "".join(self.stream(tokens, after))

    def stream(self, tokens: Iterable[int], after: Iterable[int] = ()) -> Iterator[str]:
        """Yield the text of tokens as they arrive; incomplete characters are held back until they are complete.

        Args:
            tokens: they may still be generated.
            after: the tokens before them, whose text is left out. Some tokenizers write a token at the start of a text
                without the space that it has elsewhere.
        """
        new = False

        def all_tokens() -> Iterator[int]:
            nonlocal new
            yield from after
            new = True
            yield from tokens

        # No text is yielded after the next token is read, unless it needs that token.
        yield from (text for text in (self.texts or self._pieces)(all_tokens()) if new)

    def _pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield decoder.decode(self.piece(int(token)))
        yield decoder.decode(b"", final=True)

    def vocabulary(self) -> list[str]:
        """Return the text of each token on its own; an empty one for an integer that is not a token.

        >>> import gradfn as gf
        >>> gf.data.characters("hello").vocabulary()
        ['e', 'h', 'l', 'o']
        """
        texts = []
        for token in range(self.size):
            try:
                texts.append(self.piece(token).decode("utf-8", "replace"))
            except DataError:
                texts.append("")
        return texts

    def to_dict(self) -> TokenizerFile:
        """Return a JSON form, from which `tokenizer_from` restores the tokenizer."""
        content: Any = {"name": self.name, **self.file}
        return content | ({"symbols": self.symbols} if self.symbols else {})


def tokenizer_from(content: Mapping[str, Any]) -> Tokenizer:
    """Restore a tokenizer from the result of `Tokenizer.to_dict`.

    Raises:
        DataError: content that does not describe a tokenizer, or one whose file was moved or replaced.
        ImportError: a tokenizer of a library that is not installed.

    >>> import gradfn as gf
    >>> content = gf.data.characters("hello").to_dict()
    >>> gf.data.tokenizer_from(content).decode([1, 0, 2, 2, 3])
    'hello'
    """
    import msgspec

    try:
        checked = msgspec.convert(content, TokenizerFile)
    except msgspec.ValidationError as error:
        raise DataError(f"tokenizer: {error}") from error
    kind, _, path = checked["name"].partition(":")
    if kind == HUGGING_FACE:
        return _of_file(path, checked.get("special_tokens", False), checked.get("file_sha256"))
    if kind != "characters":
        return tokenizer(checked["name"])
    symbols = checked.get("symbols", "")
    found = characters(symbols)
    if found.symbols != symbols:  # in another order they would mean other tokens
        raise DataError("tokenizer: symbols must be unique and in the order of their code points")
    return found


def tokenizer(name: str, texts: Iterable[str] = ()) -> Tokenizer:
    """Return a tokenizer by its name.

    Args:
        name: `"characters"`, `"bytes"`, `"tiktoken:<encoding>"` such as `"tiktoken:gpt2"`, or `"huggingface:<path>"` of
            a `tokenizer.json` or its folder: `huggingface` without special tokens, for texts to train on.
        texts: for `characters`, the texts to collect them from.

    Raises:
        DataError: an unknown name, or a file that cannot be used.
        ImportError: a library is requested that is not installed.

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
    if kind == HUGGING_FACE and encoding:
        return _of_file(encoding, special_tokens=False)
    raise DataError(
        "tokens must be characters, bytes, tiktoken:<encoding> (tiktoken:gpt2) or huggingface:<folder>, got "
        f"{name!r:.100}"
    )


def characters(*texts: str) -> Tokenizer:
    """Return a tokenizer for the characters that occur in the texts, in the order of their code points.

    Raises:
        DataError: texts without characters; `encode` raises it for a character that does not occur in the texts.

    >>> import gradfn as gf
    >>> letters = gf.data.characters("hello")
    >>> letters.symbols, letters.encode("hole").tolist(), letters.decode([1, 3, 2, 0])
    ('ehlo', [1, 3, 2, 0], 'hole')
    """
    occurs = np.zeros(0x110000, bool)  # by code point
    for text in texts:
        for at in range(0, len(text), PART):
            occurs[_points(text[at : at + PART])] = True
    points = np.flatnonzero(occurs)
    if not len(points):
        raise DataError("characters: expected a text with at least one character, got an empty text")
    symbols = "".join(map(chr, points))
    pieces = [symbol.encode() for symbol in symbols]
    # Indexed by code point; the last entry is for all larger ones.
    table = np.full(int(points[-1]) + 2, -1, np.int32)
    table[points] = np.arange(len(points))

    def encode(text: str) -> np.ndarray:
        tokens = np.empty(len(text), smallest_dtype(len(points)))
        for at in range(0, len(text), PART):
            part = text[at : at + PART]
            tokens[at : at + PART] = encode_part(part)
        return tokens

    def encode_part(text: str) -> np.ndarray:
        tokens = table[np.minimum(_points(text), np.uint32(len(table) - 1))]
        unknown = np.flatnonzero(tokens < 0)
        if len(unknown):
            raise DataError(
                f"expected one of the {len(points)} characters {symbols!r:.200}, got {text[unknown[0]]!r}. Leave "
                "it out, or train with tokens=bytes, which encodes every text"
            )
        return tokens

    return Tokenizer("characters", len(points), encode, lambda token: pieces[token], symbols)


def utf8_bytes() -> Tokenizer:
    """Return the tokenizer whose 256 tokens are the bytes of UTF-8; it can encode every text.

    >>> import gradfn as gf
    >>> gf.data.utf8_bytes().encode("hi")
    array([104, 105], dtype=uint8)
    """
    return Tokenizer(
        "bytes", 256, lambda text: np.frombuffer(text.encode(), np.uint8), lambda token: bytes([token])
    )


def tiktoken(encoding: str = "gpt2") -> Tokenizer:
    """Return one of tiktoken's byte-pair tokenizers (Sennrich et al., 2016).

    tiktoken downloads an encoding once and caches it.

    Args:
        encoding: `"gpt2"`, `"cl100k_base"`, ...

    Raises:
        ImportError: tiktoken is not installed.
        DataError: an unknown encoding, or a failed download.
    """
    try:
        import tiktoken as library
    except ImportError as error:
        raise ImportError("this needs tiktoken: pip install 'gradfn[tiktoken]' (or tiktoken)") from error
    try:
        coder = library.get_encoding(encoding)
    except Exception as error:  # an unknown name, or any error of its download
        raise DataError(f"tiktoken:{encoding}: {error}") from error

    def encode(text: str) -> np.ndarray:
        return np.array(coder.encode_ordinary(text), smallest_dtype(coder.n_vocab))

    return Tokenizer(f"tiktoken:{encoding}", coder.n_vocab, encode, coder.decode_single_token_bytes)


def _of_file(path: str, special_tokens: bool, sha256: str | None = None) -> Tokenizer:
    from gradfn.data._huggingface import huggingface

    return huggingface(path, special_tokens, sha256)


def _points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)  # the code points, [N]


def smallest_dtype(size: int) -> np.dtype:
    """Return the smallest unsigned dtype for tokens in [0, size)."""
    return np.min_scalar_type(size - 1)
