"""Texts of any size, compared with Python's text mode: every slice, the offsets in errors, and bounded memory."""

import contextlib
import hashlib
import io
import os
import sys
import time
import tracemalloc
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import gradfn as gf
from gradfn.data import DataError, file_tokens

module = sys.modules["gradfn.data._text"]
by_example = settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
texts = st.text(st.sampled_from("ab \r\n\r\né中😀\ufeff\x85\u2028\0"), min_size=1, max_size=60)
blocks = st.tuples(st.sampled_from([1, 2, 3, 5, 64]), st.integers(1, 3))


@contextlib.contextmanager
def small_blocks(block, blocks_read):
    """Set the block size to `block` bytes, and the read size to `blocks_read` blocks."""
    with (
        mock.patch.object(file_tokens, "BLOCK", block),
        mock.patch.object(file_tokens, "READ", block * blocks_read),
        mock.patch.object(file_tokens, "TOKENS", block + 4),
        mock.patch.object(module, "READ", block * blocks_read),
        mock.patch.object(module, "PIECE", block),
    ):
        yield


def read_by_python(data):
    """Return a text as Python's text mode reads it, and its tokens."""
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline=None).read()
    symbols = sorted(set(text))
    return text, np.array([symbols.index(letter) for letter in text], np.uint8)


@by_example
@given(texts, blocks, st.data())
@example("\ufeff\r\n", (1, 1), None)
@example("a\r\r\n\n\r", (3, 1), None)
def test_slices_equal_those_of_the_decoded_text(tmp_path, text, sizes, data):
    content = text.encode()
    expected_text, expected = read_by_python(content)
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with small_blocks(*sizes):
        if not expected_text:
            with pytest.raises(DataError, match="the file is empty"):
                file_tokens.file_tokens(file)
            return
        tokens, digest = file_tokens.file_tokens(file)
        assert digest == hashlib.sha256(content).hexdigest()
        assert tokens.coder.symbols == "".join(sorted(set(expected_text)))
        assert (tokens.dtype, tokens.shape, tokens.ndim) == (expected.dtype, expected.shape, 1)
        np.testing.assert_array_equal(np.asarray(tokens), expected, strict=True)
        assert list(tokens) == expected.tolist()
        if data is None:
            return
        numbers = st.none() | st.integers(-70, 70)
        key = slice(data.draw(numbers), data.draw(numbers), data.draw(numbers.filter(lambda step: step != 0)))
        np.testing.assert_array_equal(tokens[key], expected[key], strict=True)
        i = data.draw(st.integers(-len(expected), len(expected) - 1))
        assert tokens[i] == expected[i]
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(expected))] * 2)))
        part = tokens.part(start, stop)
        np.testing.assert_array_equal(part[key], expected[start:stop][key], strict=True)


def test_other_indices_raise(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    tokens, _ = file_tokens.file_tokens(tmp_path / "a.txt")
    for i in (5, -6):
        with pytest.raises(IndexError, match=rf"index must be in \[-5, 5\), got {i}"):
            tokens[i]
    for key in ([0, 1], 0.5, (0, 1), np.array([0, 1])):
        with pytest.raises(TypeError, match="expected an integer or a slice as index"):
            tokens[key]


@by_example
@given(st.binary(max_size=40) | texts.map(str.encode).flatmap(lambda t: st.just(t[:-1])), blocks)
def test_errors_give_byte_offsets_in_the_file(tmp_path, content, sizes):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    try:
        content.decode()
        message = None
    except UnicodeDecodeError as error:
        message = f"a.txt: not in UTF-8 ({error.reason} at byte {error.start}); try tokens=bytes"
    for read in (
        gf.data.text,
        gf.data.lines,
        lambda file: gf.data.tokenize(file, tmp_path / "b.npy"),
        lambda file: gf.data.tokenize(file, tmp_path / "b.npy", "bytes"),
    ):
        found = None
        try:
            with small_blocks(*sizes):
                read(file)
        except DataError as error:
            found = str(error)
        assert message is None or message in (found or "")
        for written in tmp_path.glob("b.npy*"):
            written.unlink()


@by_example
@given(st.lists(texts, max_size=4), blocks)
def test_lines_equal_those_of_python(tmp_path, lines, sizes):
    content = "\n".join(lines).encode()
    (tmp_path / "a.txt").write_bytes(content)
    expected = {line.strip() for line in read_by_python(content)[0].split("\n")} - {""}
    with small_blocks(*sizes):
        if len(expected) < 2:
            with pytest.raises(DataError, match=r"expected at least two different lines|the file is empty"):
                gf.data.lines(tmp_path / "a.txt")
            return
        data = gf.data.lines(tmp_path / "a.txt", validation=0)
    found = [data.tokenizer.decode(row[row >= 0])[:-1] for row in data.train[1]]
    assert sorted(found) == sorted(expected)


def test_a_large_text_stays_in_its_file_and_trains(tmp_path, monkeypatch):
    content = "to bé, or not to be: 中\r\n" * 40
    (tmp_path / "a.txt").write_bytes(content.encode())
    inside = gf.data.text(tmp_path / "a.txt")
    monkeypatch.setattr(module, "IN_MEMORY", 100)
    data = gf.data.text(tmp_path / "a.txt")
    assert isinstance(data.train, file_tokens.FileTokens)
    assert isinstance(inside.train, np.ndarray)
    assert data.sha256 == inside.sha256 == hashlib.sha256(content.encode()).hexdigest()
    assert repr(data) == repr(inside)
    assert data.tokenizer.decode(data.train[:30]) == content.replace("\r\n", "\n")[:30]
    for of_file, of_array in zip(data[:2], inside[:2]):
        np.testing.assert_array_equal(np.asarray(of_file), of_array, strict=True)
        assert of_file.nbytes == of_array.nbytes
        for make in (
            lambda tokens: gf.data.host_windows(tokens, 7, 5)(3),
            lambda t: gf.data.fixed_windows(t, 7),
        ):
            for a, b in zip(make(of_file), make(of_array)):
                np.testing.assert_array_equal(a, b, strict=True)
        for a, b in zip(*(gf.data.windows(part, 7, 5)(jax.random.key(0)) for part in (of_file, of_array))):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("letters", ["ab", "aé", "中😀"])
def test_memory_does_not_grow_with_the_text_nor_with_its_lines(tmp_path, letters, monkeypatch):
    monkeypatch.setattr(module, "IN_MEMORY", 0)
    file = tmp_path / "a.txt"
    file.write_bytes(letters.encode() * (24_000_000 // len(letters.encode())))
    n = 24_000_000 // len(letters.encode()) * len(letters)

    def peak(work):
        tracemalloc.start()
        with contextlib.suppress(DataError):
            work()
        at_most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return at_most

    assert peak(lambda: gf.data.text(file)) < 24 << 20  # twenty times the read size
    assert peak(lambda: gf.data.tokenize(file, tmp_path / "a.npy")) < 24 << 20
    assert peak(lambda: gf.data.lines(file)) < 24 << 20
    data = gf.data.text(tmp_path / "a.npy", validation=0)
    assert len(data.train) == n
    np.testing.assert_array_equal(data.train[-6:], [0, 1] * 3)


def test_a_file_that_changed_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IN_MEMORY", 0)
    file = tmp_path / "a.txt"
    file.write_text("aébé" * 10)
    tokens = gf.data.text(file, validation=0).train
    for content in ("xéxé" * 10, "abcdef" * 10):
        with file.open("r+b") as out:
            out.write(content.encode()[:60])
        with pytest.raises(DataError, match=r"a\.txt: the file has changed since it was opened"):
            tokens[3:9]


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "missing"])
def test_what_is_not_a_regular_file_raises(tmp_path, kind):
    file = tmp_path / "a.npy"
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    (tmp_path / "a.txt").symlink_to(file)
    readers = (
        lambda: gf.data.text(file),
        lambda: gf.data.text(tmp_path / "a.txt"),
        lambda: gf.data.text(tmp_path / "a.txt", "bytes"),
        lambda: gf.data.lines(file),
        lambda: gf.data.tokenize(file, tmp_path / "b.npy"),
        lambda: gf.data.tokenize(file, tmp_path / "b.npy", "bytes"),
    )
    for read in readers:
        with pytest.raises(DataError, match=r"a\.(npy|txt): (is not a regular file|there is no such file)"):
            read()


# Files of tokens


def npy(file, array=None, header=None, body=b""):
    """Write an array, or a header and a body that claim to be one."""
    if header is None:
        np.save(file, array)
    else:
        length = len(header).to_bytes(4, "little")
        file.write_bytes(b"\x93NUMPY\x02\x00" + length + header.encode() + body)


def beside(file, **content):
    fields = {"format": module.FORMAT, "name": "characters", "symbols": "abc"}
    file.with_name(f"{file.name}.tokenizer.json").write_text(module.json.dumps(fields | content))


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<i8", ">i4", ">u8", "i1"])
def test_tokens_of_every_byte_order_are_read(tmp_path, dtype):
    file = tmp_path / "a.npy"
    npy(file, np.array([0, 1, 2, 2, 1, 0, 1] * 3, dtype))
    beside(file)
    data = gf.data.text(file, validation=0)
    assert data.tokenizer.decode(data.train[:4]) == "abcc"
    assert data.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    expected = gf.data.windows(np.array(data.train, np.int32), 4, 8)(jax.random.key(0))
    np.testing.assert_array_equal(gf.data.windows(data.train, 4, 8)(jax.random.key(0)), expected)
    assert {part.dtype for part in gf.data.host_windows(data.train, 4, 8)(0)} == {np.dtype(np.int32)}


@pytest.mark.parametrize(
    ("token", "dtype"), [(3, "u1"), (3, ">u2"), (-1, "i8"), (2**31, "u4"), (2**63, "u8"), (-1, "i1")]
)
def test_tokens_outside_the_vocabulary_raise(tmp_path, token, dtype, monkeypatch):
    monkeypatch.setattr(module, "READ", 5)
    file = tmp_path / "a.npy"
    array = np.array([0, 1, 2] * 4, dtype)
    array[7] = token
    npy(file, array)
    beside(file)
    with pytest.raises(DataError, match=rf"a\.npy: tokens must be from 0 to 2 .*, got {token} at 7"):
        gf.data.text(file)


def header(descr="'|u1'", shape="(5,)", order="False"):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


HEADERS = {
    "a shape beyond the file": header(shape="(1000000000,)"),
    "a shape beyond all files": header(shape=f"({10**30},)"),
    "a negative shape": header(shape="(-5,)"),
    "no tokens": header(shape="(0,)"),
    "two axes": header(shape="(5, 1)"),
    "no axis": header(shape="()"),
    "objects": header("'|O'"),
    "floats": header("'<f4'"),
    "text": header("'<U1'"),
    "dates": header("'<M8[s]'"),
    "fields": header("[('a', '|u1')]"),
    "no dtype": header("'nothing'"),
    "a dtype of 10**9 bytes": header("'V1000000000'"),
    "no shape": "{'descr': '|u1'}",
    "a call": "__import__('os').system('true')",
    "depth": "(" * 9000,
    "brackets": "[" * 300 + "]" * 300,
    "nothing": "",
    "no end": "{'descr': '|u1', (",
    "an indent": " {\n  x",
    "a large header": header() + " " * 200_000,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header_raises_one_line(tmp_path, kind):
    file = tmp_path / "a.npy"
    npy(file, header=HEADERS[kind], body=b"\0\1\2\0\1")
    beside(file)
    with pytest.raises(DataError, match=r"a\.npy: ") as caught:
        gf.data.text(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04" + bytes(50), b"\x80\x04N.", b"text"])
def test_what_is_not_an_array_raises(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    beside(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"a\.npy: not a readable \.npy file"):
        gf.data.text(tmp_path / "a.npy")


def test_trailing_bytes_and_flipped_tokens_raise(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be")
    file = gf.data.tokenize(tmp_path / "a.txt", tmp_path / "a.npy")
    whole = file.read_bytes()
    file.write_bytes(whole + b"x")
    with pytest.raises(DataError, match=rf"a\.npy: expected {len(whole):,} bytes, as its header says, got"):
        gf.data.text(file)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=r"a\.npy: expected sha256 .* according to a\.npy\.tokenizer\.json"):
        gf.data.text(file)
    file.write_bytes(whole)
    assert len(gf.data.text(file, validation=0).train) == 18


@pytest.mark.parametrize(
    "content",
    [
        *({"tokens": value} for value in ("3", None, 2.5, [3], -1, 2**70)),
        *({"symbols": value} for value in (3, None, [], {"a": 1}, "cba", "aab", "")),
        *({"name": value} for value in (3, None, "words", "tiktoken:none/such", "a" * 5000, "\n")),
        *({"format": value} for value in (3, None, "", "another")),
        *({"sha256": value} for value in (3, "", "a" * 5000)),
    ],
)
def test_a_hostile_tokenizer_file_raises_one_line(tmp_path, content, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "tiktoken", mock.Mock(get_encoding=mock.Mock(side_effect=KeyError("none")))
    )
    npy(tmp_path / "a.npy", np.zeros(3, np.uint8))
    beside(tmp_path / "a.npy", **content)
    with pytest.raises(DataError, match=r"a\.npy") as caught:
        gf.data.text(tmp_path / "a.npy")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_tokenizer_file_that_is_not_json_or_not_a_file_raises(tmp_path):
    npy(tmp_path / "a.npy", np.zeros(3, np.uint8))
    file = tmp_path / "a.npy.tokenizer.json"
    for content in (b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"null", b"{}"):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.npy\.tokenizer\.json: "):
            gf.data.text(tmp_path / "a.npy")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DataError, match="is not a regular file"):
        gf.data.text(tmp_path / "a.npy")
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(DataError, match="already exists and was not written by"):
        gf.data.tokenize(tmp_path / "a.txt", tmp_path / "a.npy")


def test_a_full_disk_leaves_the_old_tokens(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("abcabc")
    (tmp_path / "b.txt").write_text("bcd" * 5)
    file = gf.data.tokenize(tmp_path / "a.txt", tmp_path / "t.npy")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        gf.data.tokenize(tmp_path / "b.txt", file)
    monkeypatch.undo()
    data = gf.data.text(file, validation=0)
    assert data.tokenizer.decode(data.train) == "abcabc"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.txt", "b.txt", "t.npy", "t.npy.tokenizer.json"]


def test_files_of_a_killed_process_are_replaced(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("abcabc")
    (tmp_path / "b.txt").write_text("dcbdcb")
    rename = Path.replace
    for source, renames in (("a.txt", 1), ("a.txt", 2), ("b.txt", 1)):
        done = []

        def replace(part, to, done=done, renames=renames):
            if len(done) == renames:
                raise KeyboardInterrupt
            done.append(rename(part, to))

        monkeypatch.setattr(Path, "replace", replace)
        with contextlib.suppress(KeyboardInterrupt):
            gf.data.tokenize(tmp_path / source, tmp_path / "t.npy")
        monkeypatch.undo()
    with pytest.raises(DataError, match=r"t\.npy: expected sha256 .* according to t\.npy\.tokenizer\.json"):
        gf.data.text(tmp_path / "t.npy")  # the new tokenizer with equally many old tokens
    data = gf.data.text(gf.data.tokenize(tmp_path / "b.txt", tmp_path / "t.npy"), validation=0)
    assert data.tokenizer.decode(data.train) == "dcbdcb"


def test_partial_files_of_killed_processes_are_removed_and_those_of_running_ones_stay(tmp_path):
    (tmp_path / "a.txt").write_text("abcabc")
    names = [f".{name}.{'0' * 15}{i}.part" for name in ("t.npy", "t.npy.tokenizer.json") for i in (1, 2)]
    for name in [*names, ".another.part"]:
        (tmp_path / name).write_text("a part")
        age = 7200 if name != names[0] else 60
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    gf.data.tokenize(tmp_path / "a.txt", tmp_path / "t.npy")
    assert {file.name for file in tmp_path.glob(".*")} == {names[0], ".another.part"}


# More than 2**31 tokens


@pytest.fixture
def beyond(tmp_path):
    """Return tokens in a sparse file of 2**32 + 10 bytes: zeros, with 1 to 20 in its middle and at its end."""
    file = tmp_path / "sparse"
    with file.open("wb") as out:
        for end in (3 * 2**30, 2**32 + 10):
            out.seek(end - 20)
            out.write(bytes(range(1, 21)))
    return np.memmap(file, np.uint8, "r")


def test_windows_reach_beyond_2_to_the_31(beyond):
    n = len(beyond)
    assert n == 2**32 + 10
    starts = np.random.default_rng([0, 7]).integers(0, n - 4, 300)
    inputs, targets = gf.data.host_windows(beyond, 4, 300)(7)
    np.testing.assert_array_equal(inputs, [beyond[start : start + 4] for start in starts])
    assert starts.max() > 2**31
    tail = beyond[n - 6 :]
    inputs, targets = gf.data.host_windows(tail, 5, 1)(0)  # a part of it has one window
    assert (inputs.tolist(), targets.tolist()) == ([[15, 16, 17, 18, 19]], [[16, 17, 18, 19, 20]])
    # Window 3 of 4 starts at 3/4 of all windows of 10 tokens.
    begin = 3 * ((n - 1) // 10) // 4 * 10
    inputs, targets = gf.data.fixed_windows(beyond, 10, most=4)
    assert begin > 2**31
    np.testing.assert_array_equal(inputs[3], beyond[begin : begin + 10])
    np.testing.assert_array_equal(targets[3], beyond[begin + 1 : begin + 11])
    assert targets[3].any()


def test_characters_of_files_reach_beyond_2_to_the_31(beyond):
    n = len(beyond)
    before = np.append(np.arange(0, n, file_tokens.BLOCK), n)  # what `file_tokens` would compute, slowly
    coder = gf.data.characters("".join(map(chr, [0, *range(1, 21)])).replace("\r", ""))
    assert coder.size == 20
    tokens = file_tokens.FileTokens("sparse", beyond, before, coder, 0, n)
    assert tokens[-7:].tolist() == [13, 14, 15, 16, 17, 18, 19]  # without 13, which is a line's end
    assert tokens[3 * 2**30 - 20 : 3 * 2**30 - 9].tolist() == [*range(1, 12)]
    assert tokens[3 * 2**30 + 5] == 0
    assert tokens.part(n - 10, n)[-1] == 19


def test_windows_on_the_device_refuse_more_tokens_than_indices_reach(beyond):
    with pytest.raises(DataError, match=r"windows: expected at most 2,147,483,647 tokens.*host_windows"):
        gf.data.windows(beyond, 4, 2)


def test_fit_refuses_more_examples_than_indices_reach(beyond):
    message = r"at most 2,147,483,647( examples)?, got 4,294,967,306\. Use gf\.train\.from_host"
    with pytest.raises(ValueError, match=message):
        gf.fit(
            lambda params, x: params, jnp.zeros([]), beyond, optax.sgd(0.1), 1, batch_size=4, progress=False
        )
    with pytest.raises(ValueError, match=message):
        gf.data.epoch_order(len(beyond), 4, 0, 0)
    with pytest.raises(ValueError, match=message):
        gf.data.batches(beyond, 4)


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.uint64])
def test_tokens_beyond_int32_raises(dtype):
    tokens = np.arange(20).astype(dtype)
    tokens[13] = 2**31
    for make in (
        lambda: gf.data.windows(tokens, 4, 2),
        lambda: [gf.data.host_windows(tokens, 12, 8)(i) for i in range(9)],
        lambda: gf.data.fixed_windows(tokens, 4),
    ):
        with pytest.raises(DataError, match=r"tokens must fit int32, got 2,147,483,648"):
            make()
