"""Hugging Face's tokenizers: tokens, texts and streams are those of the library, for every kind of file."""

import functools
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradfn as gf
from gradfn.data import DataError

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import (  # noqa: E402
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

WORDS = "to be, or not to be: that is the question. Don't say do not! näher déjà 中文 😀 she isn't here ?"
TEXTS = [WORDS, *WORDS.split()] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<s>", "</s>"]


def byte_level():
    """Return a tokenizer like GPT-2's and Llama 3's."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    library.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    library.add_tokens([AddedToken("dé jà", normalized=False), "<no wörd>"])
    return library


def byte_fallback(strips=True):
    """Return a tokenizer like Llama 2's, or like Gemma's, which do not split a text into words."""
    library = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    library.normalizer = normalizers.Replace(" ", "▁")
    letters = sorted(set("".join(TEXTS).replace(" ", "▁")) - set("中文😀"))
    library.train_from_iterator(
        [text.replace("中", "").replace("文", "").replace("😀", "") for text in TEXTS],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<unk>", *SPECIAL, *BYTES],
            initial_alphabet=letters,
            show_progress=False,
        ),
    )
    # Byte tokens are part of the vocabulary, but no added tokens.
    content = json.loads(library.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strips:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    library.decoder = decoders.Sequence(steps)
    library.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return library


def unigram(scheme="always"):
    """Return a sentencepiece-like tokenizer, as T5 and XLNet have it."""
    library = tokenizers.Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    library.decoder = decoders.Metaspace(prepend_scheme=scheme)
    library.train_from_iterator(
        TEXTS,
        trainers.UnigramTrainer(
            vocab_size=90, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
        ),
    )
    library.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 2)])
    return library


def word_piece():
    """Return a tokenizer like BERT's."""
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    library.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    library.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)]
    )
    return library


def words():
    """Return a tokenizer without a decoder: words are joined by spaces."""
    known = {word: 2 * i for i, word in enumerate(dict.fromkeys(["<unk>", *WORDS.split()]))}
    library = tokenizers.Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return library


KINDS = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "byte fallback, not stripped": functools.partial(byte_fallback, False),
    "unigram": unigram,
    "unigram, not prepended": functools.partial(unigram, "never"),
    "word pieces": word_piece,
    "words": words,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return for each kind the library's tokenizer and ours, with and without special tokens."""
    found = {}
    for kind, make in KINDS.items():
        folder, library = tmp_path_factory.mktemp("tokenizer"), make()
        library.save(str(folder / "tokenizer.json"))
        ours = (
            gf.data.huggingface(folder),
            gf.data.huggingface(folder / "tokenizer.json", special_tokens=False),
        )
        found[kind] = (library, *ours)
    return found


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([*WORDS.split(), " ", "  ", "\n", "<s>", "dé jà"]) | st.text(), max_size=6).map(
        "".join
    )
)
def test_tokens_and_texts_are_those_of_the_library(made, kind, text):
    library, coder, plain = made[kind]
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return
    for ours, special in ((coder, True), (plain, False)):
        tokens = ours.encode(text)
        assert tokens.tolist() == library.encode(text, add_special_tokens=special).ids
        assert tokens.dtype == np.min_scalar_type(library.get_vocab_size() * (1 + (kind == "words")) - 1)
        assert ours.decode(tokens) == library.decode(tokens.tolist())
        assert "".join(ours.stream(iter(tokens))) == library.decode(tokens.tolist())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_streams_of_any_tokens_add_up_to_the_text_of_the_library(made, kind, data):
    library, coder, _ = made[kind]
    known = sorted(library.get_vocab().values())
    bytes_ = [i for name, i in library.get_vocab().items() if len(name) == 1 or name.startswith("<0x")]
    tokens = data.draw(st.lists(st.sampled_from(known) | st.sampled_from(bytes_ or known), max_size=12))
    assert coder.decode(tokens) == library.decode(tokens)
    # Whoever stops reads the start of the text, but for characters that are incomplete.
    stream, given_so_far = coder.stream(iter(tokens)), ""
    for part in stream:
        given_so_far += part
        assert library.decode(tokens).startswith(given_so_far)


def test_pieces_are_the_bytes_of_tokens_within_a_text(made):
    for kind, text, expected in [
        ("byte level", "中 to", "中 to"),
        ("byte fallback", "中 to", " 中 to"),
        ("unigram", "to be", " to be"),
        ("word pieces", "question", " question"),
        ("words", "to be,", " to be,"),
    ]:
        coder = made[kind][2]
        assert b"".join(map(coder.piece, coder.encode(text))).decode() == expected
    library, coder, _ = made["byte fallback"]
    assert coder.piece(library.token_to_id("<0xE4>")) == b"\xe4"
    assert [coder.piece(i) for i in (0, 1)] == [b"<unk>", b"<s>"]
    assert coder.special == {0, 1, 2}
    library, coder, _ = made["byte level"]
    assert coder.piece(library.token_to_id("dé jà")) == "dé jà".encode()
    assert " is" in coder.vocabulary()


def test_a_stream_gives_each_word_as_soon_as_it_is_complete(made):
    _, coder, _ = made["byte fallback"]
    tokens = coder.encode("to 😀 be").tolist()
    consumed = []
    stream = coder.stream(token for token in tokens if not consumed.append(token))
    parts = []
    for part in stream:
        parts.append((len(consumed), part))
    assert "".join(part for _, part in parts) == "to 😀 be"
    assert len(parts) > 3
    assert parts[0][0] < len(tokens) / 2
    assert [part for _, part in parts if "😀" in part] == ["😀"]


def test_integers_without_a_token_are_named(made):
    _, coder, _ = made["words"]
    assert coder.size == 2 * len(dict.fromkeys(WORDS.split())) + 1
    assert coder.vocabulary()[:4] == [" <unk>", "", " to", ""]
    for wrong in (3, coder.size, -1):
        for read in (
            coder.piece,
            lambda token: coder.decode([0, token]),
            lambda token: [*coder.stream([token])],
        ):
            with pytest.raises(DataError, match=rf"tokenizer\.json: {wrong} is not a token; expected one of"):
                read(wrong)


def test_a_tokenizer_is_restored_by_its_file(made, tmp_path):
    library, *_ = made["byte level"]
    file = tmp_path / "tokenizer.json"
    library.save(str(file))
    for special in (True, False):
        content = gf.data.huggingface(tmp_path, special).to_dict()
        assert content["name"] == f"huggingface:{file.resolve()}"
        again = gf.data.tokenizer_from(json.loads(json.dumps(content)))
        assert again.encode("to be").tolist() == library.encode("to be", add_special_tokens=special).ids
        assert again.to_dict() == content
    by_name = gf.data.tokenizer(f"huggingface:{tmp_path}")
    assert by_name.to_dict() == content
    library.add_tokens(["another"])
    library.save(str(file))
    with pytest.raises(DataError, match=r"tokenizer\.json: expected sha256 .*The tokenizer was replaced"):
        gf.data.tokenizer_from(content)
    file.rename(tmp_path / "moved.json")
    with pytest.raises(DataError, match=r"tokenizer\.json: there is no such file"):
        gf.data.tokenizer_from(content)


def test_a_text_is_tokenized_by_name(made, tmp_path):
    library, *_ = made["byte level"]
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text(WORDS)
    name = f"huggingface:{tmp_path}"
    data = gf.data.text(tmp_path / "a.txt", name, validation=0)
    assert data.train.tolist() == library.encode(WORDS, add_special_tokens=False).ids
    mapped = gf.data.text(gf.data.tokenize(tmp_path / "a.txt", tmp_path / "a.npy", name), validation=0)
    np.testing.assert_array_equal(mapped.train, data.train)
    assert mapped.tokenizer.decode(mapped.train) == WORDS
    with pytest.raises(DataError, match=r"or huggingface:<folder>, got 'huggingface:'"):
        gf.data.tokenizer("huggingface:")


def test_truncation_and_padding_of_a_file_are_left_out(tmp_path):
    library = byte_level()
    expected = library.encode(WORDS).ids
    library.enable_truncation(4)
    library.enable_padding(length=500)
    library.save(str(tmp_path / "tokenizer.json"))
    assert gf.data.huggingface(tmp_path).encode(WORDS).tolist() == expected


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Replace(Regex("a+"), "b"),
        decoders.Strip(" ", 1, 0),
        decoders.Sequence([decoders.Fuse(), decoders.WordPiece()]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
    ],
    ids=str,
)
def test_other_decoders_are_refused(decoder, tmp_path):
    library = words()
    library.decoder = decoder
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"tokenizer\.json: its decoder is not supported \("):
        gf.data.huggingface(tmp_path)


def test_damaged_files_get_one_line(tmp_path, monkeypatch):
    file = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match=r"tokenizer\.json: there is no such file"):
        gf.data.huggingface(tmp_path)
    file.mkdir()
    with pytest.raises(DataError, match=r"tokenizer\.json: is not a regular file"):
        gf.data.huggingface(tmp_path)
    file.rmdir()
    whole = byte_level().to_str().encode()
    damaged = [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b"{" * 100_000,
        whole[: len(whole) // 2],
        whole.replace(b'"BPE"', b'"ABC"'),
    ]
    damaged += [whole.replace(b'"model"', b'"mode"'), whole.replace(b'"type":"ByteLevel"', b'"type":"None"')]
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(
            DataError, match=r"tokenizer\.json: .*not a tokenizer that tokenizers [\d.]+ reads"
        ) as found:
            gf.data.huggingface(file)
        assert "\n" not in str(found.value)
    tokenizers.Tokenizer(models.BPE()).save(str(file))
    with pytest.raises(DataError, match="at least one token, got none"):
        gf.data.huggingface(file)
    file.write_bytes(whole)
    with pytest.raises(DataError, match="cannot encode"):
        gf.data.huggingface(file).encode("a\ud800")
    monkeypatch.setattr(sys.modules["gradfn.data._huggingface"], "JSON_LIMIT", 10)
    with pytest.raises(DataError, match="at most 10 bytes"):
        gf.data.huggingface(file)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'gradfn\[tokenizers\]'"):
        gf.data.huggingface(file)


# Stop strings


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_a_text_ends_before_the_stop_string_that_ends_first(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    assert "".join(gf.data.stop_at(parts, stops)) == expected


def test_nothing_is_read_after_a_stop_string():
    consumed = []
    parts = (part for part in ["a", "b.", "c"] if not consumed.append(part))
    assert [*gf.data.stop_at(parts, ".")] == ["a", "b"]
    assert consumed == ["a", "b."]
    with pytest.raises(ValueError, match="at least one character"):
        gf.data.stop_at(["a"], ["b", ""])
