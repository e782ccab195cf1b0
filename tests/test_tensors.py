"""Files of arrays: what is written is what safetensors reads, and what is damaged is found."""

import io

import numpy as np
import pytest
from safetensors.numpy import load

from gradfn.files import FileError, replacing
from gradfn.tensors import CHECKSUM, Tensor, verify, write_tensors

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b/c": np.array(3, np.int64),
    "empty": np.zeros([0, 4], np.float16),
    "flags": np.array([True, False, True]),
    "transposed": np.arange(6, dtype=np.uint8).reshape(2, 3).T,
}


def of(arrays):
    return {
        name: Tensor(array.dtype, array.shape, lambda array=array: array) for name, array in arrays.items()
    }


@pytest.mark.parametrize("checksum", [False, True])
def test_safetensors_reads_what_is_written(checksum):
    out = io.BytesIO()
    write_tensors(out, of(ARRAYS), {"by": "é"}, checksum)
    found = load(out.getvalue())
    assert (found.pop(CHECKSUM, None) is not None) == checksum
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_an_array_is_loaded_when_the_one_before_is_written():
    loads = []

    def loaded(i):
        loads.append(i)
        return np.full([1000], i, np.float32)

    sizes = []

    class Out(io.BytesIO):
        def write(self, data):
            sizes.append((len(data), len(loads)))
            return super().write(data)

    tensors = {str(i): Tensor(np.dtype("float32"), (1000,), lambda i=i: loaded(i)) for i in range(3)}
    write_tensors(Out(), tensors, {})
    assert [n for size, n in sizes if size == 4000] == [1, 2, 3]


def test_every_flipped_bit_is_found(tmp_path):
    file = tmp_path / "a.safetensors"
    with replacing(file) as out:
        write_tensors(out, of({"a": ARRAYS["a"]}), {"by": "me"}, checksum=True)
    verify(file)
    whole = file.read_bytes()
    for i in range(len(whole)):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
        with pytest.raises(FileError, match=r"a\.safetensors: "):
            verify(file)
    for n in range(len(whole)):
        file.write_bytes(whole[:n])
        with pytest.raises(FileError, match=r"a\.safetensors: "):
            verify(file)


def test_a_file_without_a_checksum_is_not_verified_in_silence(tmp_path):
    file = tmp_path / "a.safetensors"
    with replacing(file) as out:
        write_tensors(out, of(ARRAYS), {})
    with pytest.raises(FileError, match="has no checksum"):
        verify(file)
