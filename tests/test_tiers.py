"""The tiers of tests: what the list names exists, and every case runs in one tier."""

from __future__ import annotations

import re
from pathlib import Path

from tests.tiers import SAMPLES, Sample

TESTS = Path(__file__).parent


def test_every_test_that_is_sampled_exists() -> None:
    """A name that no test has any more would be passed over, and the test would run whole."""
    defined = {
        name for file in TESTS.rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text("utf-8"))
    }
    assert not set(SAMPLES) - defined


def test_a_sample_takes_every_nth_case_and_leaves_the_others_to_a_later_tier() -> None:
    assert [Sample(3, 2).tier(index) for index in range(8)] == [1, 3, 2, 1, 2, 3, 1, 3]
    assert [Sample(2, 1).tier(index) for index in range(4)] == [1, 2, 1, 2]
    assert [Sample(0, 1).tier(index) for index in range(2)] == [2, 2]
    assert [Sample(2).tier(index) for index in range(4)] == [1, 3, 1, 3]
