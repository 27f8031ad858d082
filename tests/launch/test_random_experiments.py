"""Some random experiments: finished and sane, or refused in one sentence before the first step."""

from __future__ import annotations

import pytest

from tests.benchmarks import fuzz_experiments as fuzz

CHOSEN = (0, 7, 10, 13, 14, 15, 16, 17, 18, 19)


def test_an_experiment_of_the_row_is_always_the_same() -> None:
    assert fuzz.draw(1, 5) == fuzz.draw(1, 5)
    assert len({fuzz.draw(1, number).to_json() for number in range(10)}) == 10


@pytest.mark.parametrize("number", CHOSEN)
def test_a_random_experiment_ends_well_or_is_refused(number: int) -> None:
    kind, reason = fuzz.outcome(fuzz.draw(1, number))
    assert kind in fuzz.GOOD, reason
    assert "\n" not in reason
