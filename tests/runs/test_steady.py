"""Steady-state step times: known medians, and intervals that hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.runs.steady import MIN_STEPS, SteadyState, ratio, warmup


@pytest.mark.parametrize(("steps", "left_out"), [(0, 0), (2, 2), (10, 3), (30, 3), (100, 10), (200, 20), (100_000, 20)])
def test_a_tenth_is_left_out(steps: int, left_out: int) -> None:
    assert warmup(steps) == left_out


def test_medians_and_quantiles_are_those_of_the_steps_after_the_warm_up() -> None:
    steady = SteadyState.of(np.array([9.0, 9.0, 9.0, *range(1, 12)]))
    assert steady.warmup_steps == 3
    assert steady.median == 6
    assert steady.quantile(0.1) == 2
    assert steady.quantile(0.9) == 10
    assert steady.reason is None


def test_slow_first_steps_do_not_count() -> None:
    seconds = np.full(100, 0.1)
    seconds[:10] = 5
    assert SteadyState.of(seconds).median == pytest.approx(0.1)


@pytest.mark.parametrize(("steps", "enough"), [(0, False), (5, False), (MIN_STEPS + 2, False), (MIN_STEPS + 3, True)])
def test_too_few_steps_make_a_complaint(steps: int, enough: bool) -> None:
    steady = SteadyState.of(np.ones(steps))
    assert (steady.reason is None) == enough
    if not enough:
        assert "not enough steps" in (steady.reason or "")
    if steps == 0:
        assert steady.median is None
        assert steady.quantile(0.5) is None


def test_a_steady_ratio_is_exact() -> None:
    assert ratio(SteadyState.of(np.full(40, 0.2)), SteadyState.of(np.full(40, 0.1))) == (2.0, 2.0, 2.0)


@settings(deadline=None, max_examples=30)
@given(st.integers(MIN_STEPS + 3, 300), st.integers(MIN_STEPS + 3, 300), st.integers(0, 1000))
def test_the_interval_holds_the_value_and_repeats_itself(n: int, m: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    one, other = SteadyState.of(random.lognormal(0, 0.3, n)), SteadyState.of(random.lognormal(0, 0.3, m))
    value, low, high = ratio(one, other)
    assert 0 < low <= high
    assert low <= value * 1.2
    assert value / 1.2 <= high
    assert ratio(one, other) == (value, low, high), "the same numbers give the same interval"


def correlated(random: np.random.Generator, steps: int, median: float) -> np.ndarray:
    """Step times in which a slow moment lasts several steps (an autoregressive process of order one)."""
    noise = np.zeros(steps)
    for step in range(1, steps):
        noise[step] = 0.6 * noise[step - 1] + random.normal(0, 0.05)
    return np.asarray(median * np.exp(noise))


def test_the_interval_covers_the_truth() -> None:
    """Of many pairs of runs whose true ratio is 1.8, nearly all intervals contain it; 95 % would be perfect."""
    random = np.random.default_rng(7)
    covered, widths = 0, []
    for _ in range(150):
        base, run = (SteadyState.of(correlated(random, 200, median)) for median in (0.18, 0.1))
        _, low, high = ratio(base, run)
        covered += low <= 1.8 <= high
        widths.append(high - low)
    assert covered / 150 > 0.85, f"{covered} of 150"
    assert np.mean(widths) < 0.2, "and they still say something"


def test_single_step_resampling_would_be_too_sure() -> None:
    """Blocks make the interval wider than shuffling single steps would, because neighbours are alike."""
    random = np.random.default_rng(3)
    steady = SteadyState.of(correlated(random, 400, 1.0))
    blocks = steady.medians()
    single = np.median(random.choice(steady.seconds, size=(400, len(steady.seconds))), axis=1)
    assert blocks.std() > 1.2 * single.std()
