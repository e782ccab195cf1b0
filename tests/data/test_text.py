"""Texts: tokenizers round-trip, and no validation token is ever trained on."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradfn as gf
from gradfn.data import DataError
from gradfn.train import adamw_warmup_cosine, from_host

TEXT = "to be, or not to be: that is the question.\n" * 30


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.sampled_from(["characters", "bytes"])
)
def test_tokenizers_round_trip(text, name):
    coder = gf.data.tokenizer(name, [text])
    tokens = coder.encode(text)
    assert 0 <= tokens.min() <= tokens.max() < coder.size
    assert coder.decode(tokens) == text
    assert "".join(coder.stream(tokens)) == text
    again = gf.data.tokenizer_from(coder.to_dict())
    np.testing.assert_array_equal(again.encode(text), tokens)
    assert again.size == coder.size


def test_a_stream_holds_back_incomplete_characters():
    coder = gf.data.utf8_bytes()
    assert list(coder.stream(coder.encode("aé"))) == ["a", "", "é", ""]
    assert "".join(coder.stream([0xC3])) == "�"


def test_characters_are_in_order_and_dtypes_small():
    coder = gf.data.characters("ba", "cab")
    assert coder.symbols == "abc"
    assert coder.encode("cab").dtype == np.uint8
    assert gf.data.characters("".join(map(chr, range(300)))).encode("a").dtype == np.uint16


def test_characters_of_long_texts_are_looked_up_in_parts(monkeypatch):
    monkeypatch.setattr(sys.modules["gradfn.data._tokenizer"], "PART", 3)
    text = "aébcé中\U0001f600dd"
    coder = gf.data.characters(text, "z")
    assert coder.symbols == "".join(sorted({*text, "z"}))
    assert coder.encode(text).tolist() == [coder.symbols.index(letter) for letter in text]
    with pytest.raises(DataError, match=r"expected one of the .* characters .*, got 'q'"):
        coder.encode(text + "q")


@pytest.mark.parametrize("text", ["x", "é", "\U0001f600", "\udc80"])
def test_an_unknown_character_is_named(text):
    with pytest.raises(DataError, match="expected one of the 3 characters 'abc', got"):
        gf.data.characters("abc").encode("ab" + text)


def test_tiktoken_is_selected_by_name(monkeypatch):
    pairs = types.SimpleNamespace(
        n_vocab=50257,
        encode_ordinary=lambda text: [ord(letter) + 256 for letter in text],
        decode_single_token_bytes=lambda token: chr(token - 256).encode(),
    )
    fake = types.SimpleNamespace(get_encoding={"gpt2": pairs}.__getitem__)
    monkeypatch.setitem(sys.modules, "tiktoken", fake)
    coder = gf.data.tokenizer("tiktoken:gpt2")
    assert (coder.name, coder.size, coder.encode("ab").dtype) == ("tiktoken:gpt2", 50257, np.uint16)
    assert coder.decode(coder.encode("ab")) == "ab"
    with pytest.raises(DataError, match="tiktoken:gpt9"):
        gf.data.tokenizer("tiktoken:gpt9")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match=r"pip install 'gradfn\[tiktoken\]'"):
        gf.data.tokenizer("tiktoken:gpt2")


# Texts


@pytest.mark.parametrize("tokens", ["characters", "bytes"])
def test_training_and_validation_parts_make_up_the_text(tmp_path, tokens):
    (tmp_path / "a.txt").write_text(TEXT)
    data = gf.data.text(tmp_path / "a.txt", tokens, validation=0.25)
    assert data.tokenizer.decode(data.train) + data.tokenizer.decode(data.validation) == TEXT
    assert abs(len(data.validation) - len(TEXT) / 4) < 1
    assert isinstance(data.train, np.memmap) == (tokens == "bytes")
    assert f"{data.tokenizer.size} {tokens}; sha256 {data.sha256}" in repr(data)


@pytest.mark.parametrize("piece", [1, 2, 3, 1 << 24])
def test_text_equals_pythons_text_mode(tmp_path, piece, monkeypatch):
    monkeypatch.setattr(sys.modules["gradfn.data._text"], "PIECE", piece)
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\r\n\r\nf\xc3\xbcnf\r")
    expected = file.read_text(encoding="utf-8-sig")
    assert expected == "one\ntwo\nthree\n\nfünf\n"
    read = gf.data.text(file, validation=0)
    mapped = gf.data.text(gf.data.tokenize(file, tmp_path / "a.npy"), validation=0)
    for data in (read, mapped):
        assert data.tokenizer.decode(data.train) == expected
        assert not {"\r", "\ufeff"} & set(data.tokenizer.symbols)
    raw = gf.data.text(file, "bytes", validation=0)
    again = gf.data.text(gf.data.tokenize(file, tmp_path / "b.npy", "bytes"), validation=0)
    assert bytes(raw.train) == bytes(again.train) == file.read_bytes()  # bytes are the file's
    lines = gf.data.lines(file, validation=0.25)
    assert set(lines.tokenizer.symbols) == set(expected)


def test_lines_end_where_pythons_text_mode_ends_them(tmp_path):
    (tmp_path / "a.txt").write_bytes("a\u2028b\r\nc\x0bd\x85e\nf\x1cg".encode())
    data = gf.data.lines(tmp_path / "a.txt", validation=0)
    found = {data.tokenizer.decode(row[row >= 0]) for row in data.train[1]}
    assert found == {"a\u2028b\n", "c\x0bd\x85e\n", "f\x1cg\n"}


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf", b""])
def test_a_byte_order_mark_alone_is_an_empty_text(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match="the file is empty"):
        gf.data.text(tmp_path / "a.txt")
    with pytest.raises(DataError, match="empty"):
        gf.data.tokenize(tmp_path / "a.txt", tmp_path / "a.npy")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(DataError, match="at byte 5"):
        gf.data.text(tmp_path / "a.txt")


def test_the_built_in_text_repeats_no_paragraph():
    data = gf.data.text()
    paragraphs = [" ".join(part.split()) for part in gf.data.python_topics().split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert len(data.train) > 200_000
    train, validation = map(data.tokenizer.decode, (data.train, data.validation))
    long = [part for part in validation.split("\n\n")[1:-1] if len(part) > 200]
    assert long
    assert not [part for part in long if part in train]


def test_tiny_shakespeare(shared_data):
    data = gf.data.text(shared_data / "tinyshakespeare" / "input.txt")
    assert (len(data.train) + len(data.validation), data.tokenizer.size) == (1_115_394, 65)
    assert len(data.validation) == 111_539


@pytest.mark.parametrize("piece", [7, 1 << 24])
@pytest.mark.parametrize("tokens", ["characters", "bytes"])
def test_a_file_of_tokens_is_mapped_and_the_same(tmp_path, tokens, piece, monkeypatch):
    monkeypatch.setattr(sys.modules["gradfn.data._text"], "PIECE", piece)
    (tmp_path / "a.txt").write_text(TEXT + "é\r\nend")
    file = gf.data.tokenize(tmp_path / "a.txt", tmp_path / "a.npy", tokens)
    mapped, read = gf.data.text(file), gf.data.text(tmp_path / "a.txt", tokens)
    assert isinstance(mapped.train, np.memmap)
    np.testing.assert_array_equal(mapped.train, read.train)
    np.testing.assert_array_equal(mapped.validation, read.validation)
    assert mapped.tokenizer.to_dict() == read.tokenizer.to_dict()


@pytest.mark.parametrize(
    ("content", "name", "tokens", "message"),
    [
        (None, "a.txt", "characters", "there is no such file"),
        (b"", "a.txt", "characters", "the file is empty"),
        (b"", "a.txt", "bytes", "the file is empty"),
        (b"a\xff", "a.txt", "characters", "not in UTF-8 .* at byte 1.; try tokens=bytes"),
        (b"abc", "a.txt", "words", "tokens must be characters, bytes, tiktoken:<encoding> .*, got 'words'"),
        (
            b"abc",
            "a.npy",
            "characters",
            "expected the tokenizer in a.npy.tokenizer.json beside it",
        ),
    ],
)
def test_unusable_files_raise(tmp_path, content, name, tokens, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        gf.data.text(tmp_path / name, tokens)


@pytest.mark.parametrize(("content", "to"), [(b"", "a.npy"), (b"\xff", "a.npy"), (b"a", "a.bin")])
def test_texts_that_cannot_be_tokenized_raise(tmp_path, content, to):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"empty|UTF-8|ends in \.npy"):
        gf.data.tokenize(tmp_path / "a.txt", tmp_path / to, "bytes")


def test_only_files_of_an_earlier_call_are_overwritten(tmp_path):
    source, other = tmp_path / "stories.json", tmp_path / "a.json"
    source.write_text('["to be", "or not"]')
    other.write_text("mine")
    (tmp_path / "a.npy.tokenizer.json").write_text('{"name": "bytes"}')
    (tmp_path / "b.npy").write_bytes(b"mine")
    (tmp_path / "link.npy").symlink_to(source)
    (tmp_path / "hard.npy").hardlink_to(source)
    (tmp_path / "text.npy").write_text("a text with an unlucky name")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    file = gf.data.tokenize(source, tmp_path / "stories.npy")
    assert gf.data.text(file).tokenizer.decode(gf.data.text(file, validation=0).train) == source.read_text()
    for name in ("a.npy", "b.npy"):
        with pytest.raises(DataError, match="already exists and was not written by"):
            gf.data.tokenize(source, tmp_path / name)
    for name in ("link.npy", "hard.npy"):
        with pytest.raises(DataError, match=f"{name}: this is the text itself"):
            gf.data.tokenize(source, tmp_path / name)
    with pytest.raises(DataError, match=r"text\.npy: this is the text itself"):
        gf.data.tokenize(tmp_path / "text.npy", tmp_path / "." / "text.npy", "bytes")
    marked = file.with_name(f"{file.name}.tokenizer.json")
    with pytest.raises(DataError, match="this is the text itself"):
        gf.data.tokenize(marked, file)
    assert before == {file: file.read_bytes() for file in before}
    assert not list(tmp_path.glob(".*.part"))


def test_tokens_are_replaced_whole_by_new_ones_only(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("aaaa")
    (tmp_path / "b.txt").write_text("bcbcbc")
    file = gf.data.tokenize(tmp_path / "a.txt", tmp_path / "t.npy")
    mapped = gf.data.text(file, validation=0)
    gf.data.tokenize(tmp_path / "b.txt", file)
    assert mapped.train.tolist() == [0] * 4  # an existing map stays valid
    data = gf.data.text(file, validation=0)
    assert data.tokenizer.decode(data.train) == "bcbcbc"

    tokens = file.read_bytes()
    gf.data.tokenize(tmp_path / "a.txt", file)
    file.write_bytes(tokens)  # tokens of one text, tokenizer of another
    with pytest.raises(DataError, match=r"expected 4 tokens .* got 6\. Tokenize"):
        gf.data.text(file)


# Lines


def test_lines_are_independent_sequences(tmp_path):
    (tmp_path / "names.txt").write_text("emma\nava\n\nemma\r\nisabella \nmia\n")
    data = gf.data.lines(tmp_path / "names.txt", validation=0.25)
    (inputs, targets), held = data.train, data.validation
    assert (inputs.shape, held[0].shape) == ((3, 9), (1, 9))
    found = []
    for row, answer in zip(np.concatenate([inputs, held[0]]), np.concatenate([targets, held[1]])):
        n = (answer >= 0).sum()
        text = data.tokenizer.decode(row[:n])
        assert text[0] == "\n"
        assert data.tokenizer.decode(answer[:n]) == text[1:] + "\n"
        assert (answer[n:] == -1).all()
        found.append(text[1:])
    assert sorted(found) == ["ava", "emma", "isabella", "mia"]


def test_no_line_is_in_both_parts(shared_data):
    data = gf.data.lines(shared_data / "names" / "names.txt")
    train, held = ({row.tobytes() for row in part[1]} for part in (data.train, data.validation))
    assert (len(train) + len(held), data.tokenizer.size) == (29_494, 27)
    assert not train & held


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\na\n", "at least two different lines"),
        ("a\n" + "b" * 300, "at most 255 characters, got one of 300"),
    ],
)
def test_unusable_lines_raise(tmp_path, content, message):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        gf.data.lines(tmp_path / "a.txt")


# Windows


@given(st.integers(2, 60), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_windows_stay_inside_their_part(n, length, seed):
    tokens = np.arange(n, dtype=np.uint8)
    if n < length + 1:
        with pytest.raises(DataError, match=r"expected at least .* tokens for windows of"):
            gf.data.host_windows(tokens, length, 4)
        return
    for inputs, targets in (
        gf.data.host_windows(tokens, length, 4, seed)(3),
        gf.data.fixed_windows(tokens, length),
    ):
        assert inputs.shape == targets.shape
        assert inputs.shape[1] == length
        np.testing.assert_array_equal(targets, inputs + 1)
        np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(length))
        assert inputs.min() >= 0
        assert targets.max() < n


def test_windows_on_the_device_cover_every_token():
    tokens = np.arange(10, dtype=np.uint8)
    draw = jax.jit(gf.data.windows(tokens, 4, batch=64))
    batches = [draw(jax.random.key(i)) for i in range(4)]
    inputs, targets = (np.concatenate(part) for part in zip(*batches))
    assert inputs.dtype == np.int32
    np.testing.assert_array_equal(targets, inputs + 1)
    np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(4))
    assert set(inputs[:, 0]) == set(range(6))
    assert targets.max() == 9
    with pytest.raises(DataError, match="windows of 10 and their targets, got 10"):
        gf.data.windows(tokens, 10, 1)


@pytest.mark.parametrize("make", [gf.data.windows, gf.data.host_windows, gf.data.fixed_windows])
def test_windows_are_of_integers_by_position(make):
    def draw(tokens):
        made = make(tokens, 3, 2)
        return made if isinstance(made, tuple) else made(jax.random.key(0) if make is gf.data.windows else 0)

    for bad in (np.linspace(0, 1, 20), np.zeros([4, 5], int), ["a"] * 20):
        with pytest.raises(DataError, match=r"tokens must be integers of shape \[N\], got"):
            draw(bad)
    expected = draw(np.arange(20))
    np.testing.assert_array_equal(draw(list(range(20))), expected)
    pandas = pytest.importorskip("pandas")
    np.testing.assert_array_equal(draw(pandas.Series(np.arange(20), index=np.arange(20)[::-1])), expected)


def test_fixed_windows_are_adjacent_and_evenly_spread():
    inputs, _ = gf.data.fixed_windows(np.arange(101), 10)
    np.testing.assert_array_equal(inputs, np.arange(100).reshape(10, 10))
    np.testing.assert_array_equal(gf.data.fixed_windows(np.arange(101), 10, most=2)[0][:, 0], [0, 50])


# Training on windows


def bigram(params, batch):
    tokens, targets = batch
    return optax.softmax_cross_entropy_with_integer_labels(params[tokens], targets).mean()


def test_fit_counts_tokens_and_keeps_the_text_out_of_the_program():
    data = gf.data.characters(TEXT).encode(TEXT)
    draw = gf.data.windows(data, 8, batch=4)
    assert len(jax.tree.leaves(draw)) == 1
    fitted = gf.fit(bigram, jnp.zeros([32, 32]), draw, optax.adam(0.1), 60, progress=False)
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"] < 3.5
    row = fitted.history[-1]
    np.testing.assert_allclose(row["tokens_per_second"], 8 * row["examples_per_second"])
    assert "epoch" not in row


@pytest.mark.slow
def test_host_batches_depend_on_the_step_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["gradfn.train.loading"], "HOST_STEPS", 7)
    draw = gf.data.host_windows(np.arange(200) % 32, 8, batch=4, seed=1)
    optimizer = optax.sgd(1.0)

    def train(steps, **options):
        return gf.fit(
            bigram, jnp.zeros([32, 32]), from_host(draw), optimizer, steps, progress=False, **options
        )

    fitted = train(20)
    state, step = (
        gf.train_state(jnp.zeros([32, 32]), optimizer, jax.random.key(0)),
        gf.train_step(bigram, optimizer),
    )
    for i in range(20):
        state, _ = step(state, draw(i))
    np.testing.assert_allclose(fitted.params, state.params, rtol=1e-5, atol=1e-6)
    assert [row["step"] for row in fitted.history] == list(range(2, 21, 2))

    def interrupt(params, calls=[]):  # noqa: B006
        calls.append(0)
        if len(calls) == 5:
            raise InterruptedError
        return {}

    with pytest.raises(InterruptedError):
        train(20, folder=tmp_path, checkpoint_seconds=0, evaluate=interrupt)
    np.testing.assert_array_equal(train(20, folder=tmp_path, resume=True).params, fitted.params)


def test_accumulated_gradients_equal_those_of_one_large_batch():
    draw = gf.data.host_windows(np.arange(200) % 32, 8, batch=4)
    whole = lambda step: jax.tree.map(lambda *a: np.concatenate(a), draw(2 * step), draw(2 * step + 1))  # noqa: E731
    options = {"warmup": 2, "decay": 0.5}
    start = {"W": jnp.ones([32, 32])}

    def loss(params, batch):
        return bigram(params["W"], batch)

    halves = gf.fit(
        loss, start, from_host(draw), adamw_warmup_cosine(6, accumulate=2, **options), 12, progress=False
    )
    wholes = gf.fit(loss, start, from_host(whole), adamw_warmup_cosine(6, **options), 6, progress=False)
    np.testing.assert_allclose(halves.params["W"], wholes.params["W"], rtol=1e-5)


@pytest.mark.slow
def test_only_matrices_decay():
    params = {"W": jnp.ones([2, 2]), "b": jnp.ones(2), "norm": {"gain": jnp.ones([3, 2])}}
    optimizer = adamw_warmup_cosine(10, rate=0.1, warmup=0, decay=0.5)
    with jax.numpy_dtype_promotion("standard"):  # as in gradfn's own steps; optax mixes integers and floats
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["W"], -0.05)
    assert not updates["b"].any()
    assert not updates["norm"]["gain"].any()
    with pytest.raises(ValueError, match=r"warmup must be in \[0, 10\), the number of steps, got 10"):
        adamw_warmup_cosine(10, warmup=10)
