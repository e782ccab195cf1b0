"""The IDX reader: valid files round-trip, damaged files raise."""

import gzip
import struct

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradfn.data import DataError, read_idx

arrays = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, max_side=6))
by_example = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def encode(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@by_example
@given(array=arrays, compressed=st.booleans())
def test_round_trip(tmp_path, array, compressed):
    file = tmp_path / ("data.gz" if compressed else "data")
    file.write_bytes(gzip.compress(encode(array)) if compressed else encode(array))
    read = read_idx(file)
    np.testing.assert_array_equal(read, array, strict=True)
    read += 1  # the array is writable


@settings(by_example, max_examples=20)
@given(array=arrays, compressed=st.booleans())
def test_every_truncation_raises(tmp_path, array, compressed):
    file = tmp_path / ("data.gz" if compressed else "data")
    whole = gzip.compress(encode(array)) if compressed else encode(array)
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"data.*: (.*truncated|expected gzip data|the file is empty)"):
            read_idx(file)


@settings(by_example, max_examples=300)
@given(array=arrays, data=st.data())
def test_every_damaged_header_byte_raises(tmp_path, array, data):
    whole = bytearray(encode(array))
    place = data.draw(st.integers(0, 3 + 4 * array.ndim))
    whole[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    file = tmp_path / "data"
    file.write_bytes(whole)
    with pytest.raises(DataError, match="data: "):
        read_idx(file)


@settings(by_example, max_examples=300)
@given(array=arrays, data=st.data())
def test_a_damaged_gzip_byte_never_gives_a_wrong_array(tmp_path, array, data):
    whole = bytearray(gzip.compress(encode(array)))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    file = tmp_path / "data.gz"
    file.write_bytes(whole)
    try:
        read = read_idx(file)
    except DataError:
        return
    np.testing.assert_array_equal(read, array, strict=True)  # such as a flipped bit in the time stamp


@by_example
@given(junk=st.binary(max_size=60))
def test_random_bytes_raise_unless_they_are_idx(tmp_path, junk):
    file = tmp_path / "junk"
    file.write_bytes(junk)
    try:
        read = read_idx(file)
    except DataError:
        return
    assert encode(read) in (junk, gzip.decompress(junk) if junk[:2] == b"\x1f\x8b" else junk)


def test_messages(tmp_path):
    file = tmp_path / "labels.gz"
    good = encode(np.arange(5, dtype=np.uint8))
    cases = {
        b"<!DOCTYPE html><title>404</title>": "expected gzip data, got a file that starts with b'<!DOCTYPE",
        good: r"If it is decompressed, remove .gz from its name",
        gzip.compress(good + b"!!"): r"too long: expected 5 = 5 bytes of data, got 7",
        gzip.compress(good[:-1]): r"truncated: expected 5 = 5 bytes of data, got 4",
        gzip.compress(b"PK\x03\x04 zip"): "not an IDX file",
        gzip.compress(
            struct.pack(">HBBI", 0, 0x0D, 1, 1) + bytes(4)
        ): r"unsigned bytes \(0x08\), got type 0x0d",
        gzip.compress(struct.pack(">HBBII", 0, 8, 2, 0, 9)): r"not empty, got shape \[0, 9\]",
        b"": "the file is empty",
    }
    for content, message in cases.items():
        file.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_idx(file)
    with pytest.raises(DataError, match="nothing-here: there is no such file"):
        read_idx(tmp_path / "nothing-here")
    with pytest.raises(DataError, match="is not a regular file"):
        read_idx(tmp_path)


@pytest.mark.parametrize("ndim", [33, 64, 65, 255])
def test_more_dimensions_than_numpy_supports_raise(tmp_path, ndim):
    (tmp_path / "data").write_bytes(struct.pack(f">HBB{ndim}I", 0, 8, ndim, *[1] * ndim) + b"x")
    with pytest.raises(DataError, match=f"data: expected at most 32 dimensions, got {ndim}"):
        read_idx(tmp_path / "data")


def test_gzip_files_with_several_members_are_read(tmp_path):
    array = np.arange(200, dtype=np.uint8).reshape(10, 20)
    data = encode(array)
    (tmp_path / "data.gz").write_bytes(
        b"".join(gzip.compress(data[i : i + 7]) for i in range(0, len(data), 7))
    )
    np.testing.assert_array_equal(read_idx(tmp_path / "data.gz"), array, strict=True)
