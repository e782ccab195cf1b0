"""Curves of any number of points: their buckets describe all points."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradfn.runs.curve import CAPACITY, LARGEST, Curve

Y = st.one_of(st.none(), st.floats(), st.floats(-10, 10), st.integers())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(Y, min_size=1, max_size=60),
    st.integers(1, 60),
    st.integers(1, 700),
    st.lists(st.integers(1, 900)),
)
def test_buckets_describe_all_points_exactly(values, repeats, limit, chunks):
    values = values * repeats
    curve = Curve()
    at = 0
    for size in [*chunks, len(values)]:
        curve.extend(range(at, at + len(values[at : at + size])), values[at : at + size])
        at += len(values[at : at + size])
    buckets = curve.buckets(limit)
    assert len(buckets) <= min(limit, CAPACITY)
    sizes = [bucket.n_finite + bucket.n_other for bucket in buckets]
    assert sum(sizes) == curve.n == len(values)
    assert len(set(sizes[:-1])) <= 1
    assert sizes[-1] <= sizes[0]
    y = np.array([math.nan if value is None else value for value in values], float)
    for bucket, size, start in zip(buckets, sizes, np.cumsum([0, *sizes])):
        points = y[start : start + size]
        finite = np.clip(points[np.isfinite(points)], -LARGEST, LARGEST)
        assert (bucket.first, bucket.last) == (start, start + size - 1)
        assert (bucket.n_finite, bucket.n_other) == (len(finite), size - len(finite))
        if len(finite):
            assert (bucket.low, bucket.high) == (finite.min(), finite.max())
            scale = np.abs(finite).max()
            assert bucket.low <= bucket.mean <= bucket.high
            assert abs(bucket.mean - math.fsum(finite / len(finite))) <= 1e-12 * scale + 1e-300
    indices = np.flatnonzero(np.isfinite(y))
    assert curve.ends == ([(int(i), y[i]) for i in indices[[0, -1]]] if len(indices) else [])


@pytest.mark.parametrize("n", [1, 2, 299, 300])
def test_few_points_stay_as_they_are(n):
    points = [(7 * i, math.sin(i)) for i in range(n)]
    buckets = Curve(points).buckets(300)
    assert [(bucket.x, bucket.low, bucket.high, bucket.mean) for bucket in buckets] == [
        (x, y, y, y) for x, y in points
    ]
    assert {type(bucket.x) for bucket in buckets} == {int}


def test_a_million_points_take_no_more_memory_than_some_hundred():
    curve = Curve()
    x = np.arange(10_000)
    for i in range(100):
        y = np.full(10_000, 1.0)
        y[77] = 9.0 if i == 50 else 1.0
        curve.extend(x + 10_000 * i, y)
        assert curve._buckets.nbytes <= 8 * 7 * CAPACITY
    buckets = curve.buckets(300)
    assert 150 < len(buckets) <= 300
    [spike] = [bucket for bucket in buckets if bucket.high == 9.0]
    assert spike.first <= 500_077 <= spike.last
    assert curve.ends == [(0, 1.0), (999_999, 1.0)]
    assert buckets[-1].last == 999_999


def test_integers_beyond_floats_are_not_finite_and_steps_beyond_them_stay_in_bounds():
    curve = Curve([(10**400, 10**400), (-(10**400), -(10**400)), (math.nan, None), (math.inf, 1)])
    buckets = curve.buckets(10)
    assert [bucket.n_other for bucket in buckets] == [1, 1, 1, 0]
    assert all(abs(bucket.x) <= LARGEST for bucket in buckets)
