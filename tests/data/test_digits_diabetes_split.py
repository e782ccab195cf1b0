"""The data sets that come with scikit-learn, and the split they share."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes, load_digits
from sklearn.linear_model import LinearRegression
from sklearn.neighbors import KNeighborsClassifier

from gradfn.data import diabetes, digits, split


def rows(*parts):
    return sorted(map(bytes, np.concatenate([x for x, _ in parts])))


def test_small_digits_equal_scikit_learns():
    data = digits(size=8)
    raw = load_digits()
    assert rows(*data[:3]) == rows(((raw.data / 16).astype(np.float32), None))
    for (x, y), n in zip(data[:3], (1257, 180, 360), strict=True):
        assert (x.shape, x.dtype, y.shape, y.dtype) == ((n, 64), np.float32, (n,), np.int32)
        counts = np.bincount(y, minlength=10)
        assert np.abs(counts - n * np.bincount(raw.target) / 1797).max() <= 1.5  # stratified
    look_up = dict(zip(map(bytes, raw.data.astype(np.float32)), raw.target, strict=True))
    assert all(look_up[bytes(image * 16)] == label for image, label in zip(*data.test, strict=True))
    assert data.shape == (8, 8)
    assert data.classes == tuple("0123456789")
    assert "8x8" in data.name


def test_large_digits_are_resized_small_ones():
    large, small = digits(), digits(size=8)
    assert large.train[0].shape == (1257, 784)
    assert large.shape == (28, 28)
    assert "resized" in large.name
    np.testing.assert_array_equal(large.test[1], small.test[1])
    images = large.test[0].reshape(-1, 28, 28)
    assert images.min() >= 0.0
    assert images.max() <= 1.0
    assert images.dtype == np.float32
    # The center of mass stays, and so does the mean, apart from clipping.
    little = small.test[0].reshape(-1, 8, 8)
    centres_28 = (images.sum(2) @ np.arange(28) / images.sum((1, 2)) + 0.5) / 28
    centres_8 = (little.sum(2) @ np.arange(8) / little.sum((1, 2)) + 0.5) / 8
    assert np.abs(centres_28 - centres_8).max() < 0.01
    assert abs(images.mean() - little.mean()) < 0.01
    # Images still match their labels, according to the nearest training image.
    assert KNeighborsClassifier(1).fit(*large.train).score(*large.test) > 0.97


def test_enlarging_keeps_a_constant_and_a_direction():
    enlarge = importlib.import_module("gradfn.data._digits").enlarge
    np.testing.assert_allclose(enlarge(np.full([1, 8, 8], 0.5), 28), 0.5, atol=1e-12)
    ramp = np.broadcast_to(np.linspace(0.0, 1.0, 8), (1, 8, 8))
    big = enlarge(ramp, 28)
    np.testing.assert_allclose(big, big[:, :1, :].repeat(28, axis=1), atol=1e-12)  # the same in every row
    assert (np.diff(big[0, 0]) >= 0).all()


def test_digits_same_seed_same_split():
    one, same, other = digits(size=8, seed=3), digits(size=8, seed=3), digits(size=8, seed=4)
    np.testing.assert_array_equal(one.train[0], same.train[0])
    assert not np.array_equal(one.train[1], other.train[1])


def test_digits_bad_sizes():
    with pytest.raises(ValueError, match=r"size must be 28 \(resized\) or 8 .*, got 14"):
        digits(size=14)
    with pytest.raises(ValueError, match=r"expected at least one training example, .* of 1,797"):
        digits(test=1797)
    with pytest.raises(ValueError, match="test needs one example per label, at least 10, got 7"):
        digits(test=7)
    with pytest.raises(ValueError, match="validation must be an integer >= 0, got -1"):
        digits(validation=-1)
    with pytest.raises(TypeError, match=r"test must be an integer, got 0\.2 \(float\)"):
        digits(test=0.2)
    with pytest.raises(ValueError, match="seed must be an integer from 0"):
        digits(seed=-1)


def test_diabetes():
    data = diabetes()
    x, y = data.train
    assert (x.shape, y.shape, x.dtype, y.dtype) == ((309, 10), (309, 1), np.float32, np.float32)
    np.testing.assert_allclose(x.mean(0, np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(x.std(0, np.float64), 1, atol=1e-6)
    undone = [part[1] * data.target_std + data.target_mean for part in data[:3]]
    raw = load_diabetes(scaled=False)
    np.testing.assert_allclose(np.sort(np.concatenate(undone)[:, 0]), np.sort(raw.target), rtol=1e-6)
    # Rows still match their targets: a linear fit to all patients explains 51.8 %, the published value.
    x, y = (np.concatenate(arrays) for arrays in zip(*data[:3], strict=True))
    assert abs(LinearRegression().fit(x, y).score(x, y) - 0.51775) < 1e-4
    assert repr(data) == "Dataset('diabetes': 309 train, 44 validation, 89 test; inputs 10; regression)"


def test_diabetes_is_standardized_by_the_training_part():
    data = diabetes(validation=0, test=440)
    assert np.isfinite(data.test[0]).all()
    np.testing.assert_allclose(np.abs(data.train[1]), 1, atol=1e-6)  # two patients, standardized
    assert data.validation[0].shape == (0, 10)
    with pytest.raises(ValueError, match="at least 2 training examples"):
        diabetes(validation=0, test=441)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), n=st.integers(1, 60), seed=st.integers(0, 2**32 - 1))
def test_split_parts_make_up_the_whole(data, n, seed):
    test = data.draw(st.integers(0, n - 1))
    validation = data.draw(st.integers(0, n - 1 - test))
    x = np.arange(n)
    parts = split(x, -x, validation=validation, test=test, seed=seed)
    assert [len(x) for x, _ in parts] == [n - test - validation, validation, test]
    assert sorted(np.concatenate([x for x, _ in parts]).tolist()) == x.tolist()
    assert all((x == -y).all() for x, y in parts)
    again = split(x, -x, validation=validation, test=test, seed=seed)
    np.testing.assert_equal(parts, again)
    without = split(x, -x, validation=0, test=test, seed=seed)
    assert (without[2][0] == parts[2][0]).all()  # validation never moves the test


def test_split_of_unequal_lengths():
    with pytest.raises(ValueError, match="got 3 rows of x and 4 of y"):
        split(np.zeros(3), np.zeros(4), validation=1, test=1)


def test_import_is_light():
    heavy = ["sklearn", "rich", "scipy.ndimage", "urllib.request"]
    code = f"import sys, gradfn.data; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'gradfn\[run\]'"):
        digits()
