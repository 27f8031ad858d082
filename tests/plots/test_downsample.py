"""Downsampling keeps what a person reads off a curve: its ends, its bounds, its gaps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from labkit.plots.downsample import MAX_POINTS, extremes, means
from labkit.runs.smooth import smooth

values = arrays.arrays(
    np.float64,
    st.integers(1, 600),
    elements=st.floats(-1e6, 1e6) | st.sampled_from([np.nan, np.inf, -np.inf]),
)


@settings(max_examples=200, deadline=None)
@given(values, st.integers(10, 100))
def test_extremes_select_points_and_keep_ends_and_bounds(y: np.ndarray, most: int) -> None:
    x = np.arange(len(y)) * 3
    at, kept = extremes(x, y, most)
    assert len(at) == len(kept) <= max(most, 1)
    assert at[0] == x[0]
    assert at[-1] == x[-1]
    assert (np.diff(at) > 0).all()
    clean = np.where(np.isfinite(y), y, np.nan)
    np.testing.assert_array_equal(kept, clean[at // 3])
    if np.isfinite(y).any():
        assert np.nanmin(kept) == np.nanmin(clean)
        assert np.nanmax(kept) == np.nanmax(clean)


@settings(max_examples=200, deadline=None)
@given(values, st.integers(5, 100))
def test_means_keep_the_ends_and_stay_within_the_bounds(y: np.ndarray, most: int) -> None:
    x = np.arange(len(y), dtype=float) + 1
    at, mean = means(x, y, max_points=most)
    assert len(at) == len(mean) <= max(most, 1)
    assert at[0] == x[0]
    assert at[-1] == x[-1]
    finite = y[np.isfinite(y)]
    known = mean[np.isfinite(mean)]
    if len(known):
        slack = 1e-9 * (1 + np.abs(finite).max())
        assert finite.min() - slack <= known.min()
        assert known.max() <= finite.max() + slack
    else:
        assert not len(finite)


def test_the_weighted_mean_of_a_rate_is_the_rate_of_the_sums() -> None:
    seconds = np.tile([1.0, 3.0], 50)
    samples = np.full(100, 6.0)
    _, rate = means(np.arange(100), samples / seconds, weight=seconds, max_points=50)
    np.testing.assert_allclose(rate, 3.0)  # 12 samples in 4 s, not the mean of 6 and 2


@settings(max_examples=100, deadline=None)
@given(values, st.integers(1, 50))
def test_smoothing_is_a_trailing_mean(y: np.ndarray, window: int) -> None:
    result = smooth(y, window)
    assert len(result) == len(y)
    for at in {0, len(y) // 2, len(y) - 1}:
        part = y[max(0, at + 1 - window) : at + 1]
        part = part[np.isfinite(part)]
        if len(part):
            assert result[at] == pytest.approx(part.mean(), rel=1e-6, abs=1e-3)
        else:
            assert np.isnan(result[at])


def test_a_hundred_thousand_steps_become_at_most_two_thousand_points() -> None:
    y = np.random.default_rng(0).standard_normal(100_000)
    y[54_321] = 99.0
    at, kept = extremes(np.arange(100_000), y)
    assert len(at) <= MAX_POINTS
    assert kept.max() == 99.0
