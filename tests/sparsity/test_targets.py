"""A target that whole units cannot meet is said before the training begins (issue 11, A21)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from labkit.experiment import Experiment
from labkit.sparsity.structured import Structured, Units


def notes(target: float, *numbers: int) -> list[str]:
    """Of a network with modules of so many units, of equal weight."""
    units = [Units(number, (f"{at}.up.weight",), f"{at}.down.weight") for at, number in enumerate(numbers)]
    shapes = {name: (12, 12) for each in units for name in (*each.into, each.out)}
    method: Any = object.__new__(Structured)
    method.setting, method.target = SimpleNamespace(units=units, shapes=shapes), target
    return list(method.notes())


@pytest.mark.parametrize(
    ("target", "numbers", "reached"),
    [(0.5, (3,), "0.33"), (0.99, (4,), "0.75"), (0.9, (2, 64), "0.70")],
)
def test_few_units_cannot_meet_every_target(target: float, numbers: tuple[int, ...], reached: str) -> None:
    [note] = notes(target, *numbers)
    assert f"sparsity.target {target:g} is out of reach" in note
    assert f"ends at {reached}:" in note


@pytest.mark.parametrize(("target", "numbers"), [(0.5, (4, 64)), (0.75, (4,)), (0.9, (64, 128))])
def test_one_that_is_met_needs_no_word(target: float, numbers: tuple[int, ...]) -> None:
    assert notes(target, *numbers) == []


def test_what_a_compressor_cannot_do_under_zero_is_said_as_it_is() -> None:
    """Under ZeRO 1 ranks do hold the same weights; the reduce-scatter has no place for a compressor."""
    wanted = Experiment().set(
        {"layout": {"dp_shard": 2, "zero_stage": 1}, "gradients.compression.method": "topk", "training.global_batch": 8}
    )
    said = [warning.reason for warning in wanted.warnings() if warning.field == "gradients.compression.method"]
    assert len(said) == 1
    assert "reduce-scatter" in said[0]
    assert "layout.dp_replicate" in said[0]
    assert "same weights" not in said[0]
