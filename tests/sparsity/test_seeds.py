"""Whatever seed an experiment may have, masks are drawn from it."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from labkit.experiment import Experiment
from labkit.launch import launch
from labkit.sparsity.choose import random_mask
from labkit.sparsity.set import SparseEvolutionaryTraining

LARGEST = 2**31 - 1


@given(seed=st.integers(0, LARGEST), number=st.integers(0, 10_000), step=st.integers(0, 10**9))
@example(seed=LARGEST, number=10_000, step=10**9)
@example(seed=200_000_000, number=0, step=0)
@settings(max_examples=50, deadline=None)
def test_growth_is_drawn_from_any_seed(seed: int, number: int, step: int) -> None:
    method = Mock(seed=seed)
    chances = [
        SparseEvolutionaryTraining.growth(method, "a", at, step, {}, torch.zeros(4, 5)) for at in (number, number + 1)
    ]
    assert chances[0].shape == (4, 5)
    assert not torch.equal(chances[0], chances[1])
    assert torch.equal(chances[0], SparseEvolutionaryTraining.growth(method, "a", number, step, {}, torch.zeros(4, 5)))


@given(seed=st.integers(0, LARGEST), number=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_so_are_static_masks(seed: int, number: int) -> None:
    assert int(random_mask((4, 5), 7, seed * 100_003 + number).sum()) == 7


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity.method": "set", "sparsity.target": 0.5, "sparsity.every": 2},
        {"sparsity.method": "static", "sparsity.target": 0.5},
        {
            "layout": {"dp_replicate": 2},
            "gradients.compression.method": "powersgd",
            "gradients.compression.start_step": 0,
        },
        {"quantization.training": "int8"},
    ],
    ids=str,
)
def test_a_run_with_the_largest_seed_ends_well(changes: dict[str, Any]) -> None:
    wanted = Experiment().set(
        {
            "workload": {"name": "vision", "model": "vit", "width": 16, "depth": 2, "image_size": 16, "patch": 4},
            "training.seed": LARGEST,
            "training.steps": 6,
            "training.global_batch": 8,
            "training.evaluate_every": 0,
            "training.checkpoint_every": 0,
        }
        | changes
    )
    run = launch(wanted, baseline=None)
    assert run.wait(60).state == "finished", run.cause
