"""A target that whole units cannot meet is said before the training begins (issue 11, A21)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from labkit.experiment import Experiment
from labkit.sparsity.block import Block
from labkit.sparsity.cubic import Cubic
from labkit.sparsity.layers import prunable
from labkit.sparsity.structured import Structured, Units


def notes(target: float, *numbers: int) -> list[str]:
    """Of a network with modules of so many units, of equal weight."""
    units = [Units(number, (f"{at}.up.weight",), f"{at}.down.weight") for at, number in enumerate(numbers)]
    shapes = {name: (12, 12) for each in units for name in (*each.into, each.out)}
    method: Any = object.__new__(Structured)
    method.context, method.target = SimpleNamespace(units=units, shapes=shapes), target
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


def block_notes(target: float, scope: str, size: int, *shapes: tuple[int, ...]) -> list[str]:
    """The notes of block sparsity in a network with weights of these shapes."""
    method: Any = object.__new__(Block)
    method.context, method.target = SimpleNamespace(shapes=dict(enumerate(shapes))), target
    method.options = SimpleNamespace(scope=scope, size=size)
    return list(method.notes())


@pytest.mark.parametrize(
    ("target", "scope", "shapes", "reached"),
    [
        (0.25, "global", [(16, 16)], "0.00"),  # found by random experiments: effective was 0.0 without a word
        (0.5, "layer", [(16, 16), (10, 20)], "0.33"),
        (0.9, "global", [(32, 3, 3, 3), (32, 32, 1, 1)], "0.88"),
    ],
)
def test_few_blocks_cannot_meet_every_target(target: float, scope: str, shapes: list[Any], reached: str) -> None:
    [note] = block_notes(target, scope, 16, *shapes)
    assert f"sparsity.target {target:g} is out of reach for blocks of 16 × 16 weights" in note
    assert f"about {reached} become zero" in note


def test_many_blocks_meet_their_target() -> None:
    assert block_notes(0.9, "global", 4, (64, 64), (64, 128)) == []
    assert block_notes(0.5, "layer", 16, (64, 64), (32, 16)) == []


@given(steps=st.integers(1, 300), at=st.floats(0, 0.9), span=st.floats(0.01, 1), every=st.none() | st.integers(1, 400))
def test_the_cubic_schedule_ends_at_its_target(steps: int, at: float, span: float, every: int | None) -> None:
    """Also in a run so short that it begins and ends in one update: it stayed dense there."""
    options = SimpleNamespace(at=at, end=min(1.0, at + span), every=every)
    experiment = Experiment().set({"sparsity.method": "gradual", "sparsity.target": 0.8})
    context: Any = SimpleNamespace(
        experiment=experiment, options=options, masks=None, shapes={"w": (2, 2)}, steps=steps
    )
    method: Any = Cubic(context)
    cuts = [step for step in range(steps) if method.changes_masks(step)]
    assert cuts
    assert method.sparsity(cuts[-1] + 1) == 0.8
    reached = [method.sparsity(step + 1) for step in cuts]
    assert reached == sorted(reached)


def test_weights_under_weight_normalisation_stay_dense() -> None:
    """A row of zeros has no direction: its norm divides by zero, and the network was NaN from then on."""

    def model(normalised: Callable[[nn.Module], nn.Module]) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), normalised(nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 2))

    for normalised in (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm):
        assert list(prunable(model(normalised), ends=True)) == ["0.weight", "2.weight", "3.weight"]


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
