"""Other people's models: every layout computes what a hand-written loop of plain PyTorch does, in float64."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from labkit.experiment import Experiment
from labkit.launch import launch
from labkit.runs.run import Run
from tests.training import own_tasks
from tests.training.by_hand import SEED, Loop, loop

EXACT = 1e-9
STEPS, BATCH = 6, 12
TASKS = Path(own_tasks.__file__)


def experiment(name: str, layout: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    return Experiment().set(
        {
            "workload": {"name": "custom", "path": f"{TASKS}:{name}"},
            "layout": layout or {},
            "training.steps": STEPS,
            "training.global_batch": BATCH,
            "training.seed": SEED,
            "training.evaluate_every": STEPS,
            "training.checkpoint_every": STEPS,
            "training.gradient_norm": True,
            "optimizer.lr": 0.02,
            "optimizer.schedule": "constant",
            "optimizer.weight_decay": 0.1,
            "quantization.training": "fp64",
        }
        | changes
    )


def finished(wanted: Experiment, resume: str | None = None) -> Run:
    run = launch(wanted, baseline=None, **({"resume": resume} if resume else {}))
    run.result(timeout=120)
    return run


@lru_cache
def by_hand(name: str, steps: int = STEPS) -> Loop:
    return loop(getattr(own_tasks, name), experiment(name, **{"training.steps": steps}))


def saved(run: Run) -> dict[str, torch.Tensor]:
    """Weights and buffers of the last checkpoint, of all stages."""
    folder = run.directory.checkpoint(STEPS)
    return {name: value for path in folder.glob("model*.safetensors") for name, value in load_file(path).items()}


def as_reals(tensor: torch.Tensor) -> torch.Tensor:
    """As checkpoints hold complex numbers of float64."""
    return torch.view_as_real(tensor) if tensor.dtype == torch.complex128 else tensor


def assert_as_by_hand(run: Run, hand: Loop, buffers: bool = True) -> None:
    data = run.data()
    assert data.loss == pytest.approx(hand.loss[-len(data.loss) :], abs=EXACT)
    assert data.grad_norm == pytest.approx(hand.norm[-len(data.loss) :], abs=EXACT)
    state = saved(run)
    expected = hand.model.state_dict() if buffers else dict(hand.model.named_parameters())
    assert state.keys() >= expected.keys()
    for name, value in expected.items():
        value = as_reals(value.detach())
        assert state[name].dtype == value.dtype, name
        assert (state[name] - value).abs().max() <= EXACT, name
    if buffers:
        assert data.evaluations[-1][2]["loss"] == pytest.approx(hand.held_out, abs=EXACT)


PIPE = {"pp": 2, "microbatches": 2}
FOLDED = {"pp": 2, "microbatches": 2, "stages_per_rank": 2, "schedule": "zbv"}
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"dp_replicate": 2},
    {"dp_shard": 2, "zero_stage": 1},
    {"dp_shard": 2, "zero_stage": 2},
    {"dp_shard": 2, "dp_replicate": 2, "zero_stage": 1},
    PIPE,
    {**PIPE, "dp_shard": 2, "zero_stage": 2},
    FOLDED,
]
NAMED = {"ids": lambda value: str(value).replace("'", "")}

# -- complex numbers (issue 11, A2 and B13) ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, **NAMED)
def test_complex_weights_and_buffers_keep_their_imaginary_part(layout: dict[str, Any]) -> None:
    assert_as_by_hand(finished(experiment("complex_weights", layout)), by_hand("complex_weights"))


# -- parameters that nothing uses (A5) and their checkpoints (A12) ----------------------------------------------------

UNUSED: list[dict[str, Any]] = [
    {},
    {"dp_shard": 2, "zero_stage": 1},
    {"dp_shard": 2, "zero_stage": 2},
    {"dp_shard": 3, "zero_stage": 1},
    {"dp_shard": 2, "dp_replicate": 2, "zero_stage": 2},
    {"dp_shard": 2, "zero_stage": 3},
]


@pytest.mark.parametrize("layout", UNUSED, **NAMED)
@pytest.mark.parametrize("name", ["branch", "branch_by_batch"])
def test_what_no_rank_uses_in_an_update_stays_as_it_is(name: str, layout: dict[str, Any]) -> None:
    if name == "branch_by_batch" and layout.get("zero_stage") == 3:
        pytest.skip("ranks that take other branches cannot gather together")
    assert_as_by_hand(finished(experiment(name, layout)), by_hand(name))


@pytest.mark.parametrize("layout", [PIPE, {**PIPE, "dp_shard": 2, "zero_stage": 1}, FOLDED], **NAMED)
def test_so_it_does_in_a_pipeline(layout: dict[str, Any]) -> None:
    assert_as_by_hand(finished(experiment("never_used", layout)), by_hand("never_used"))


@pytest.mark.parametrize("before", [{}, {"dp_shard": 2, "zero_stage": 1}, {"dp_shard": 2, "zero_stage": 3}, PIPE])
def test_a_run_with_parameters_that_never_had_a_gradient_goes_on_in_any_layout(before: dict[str, Any]) -> None:
    half = experiment("never_used", before, **{"training.steps": STEPS // 2, "training.checkpoint_every": STEPS // 2})
    first = finished(half)
    for after in ({}, {"dp_shard": 2, "zero_stage": 2}, PIPE):
        assert_as_by_hand(finished(experiment("never_used", after), resume=first.id), by_hand("never_used"))
