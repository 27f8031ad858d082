"""ZeRO 1 and 2 send updated parameters while the next forward pass has begun. On two ranks, on the CPU."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.experiment import Experiment, Layout
from labkit.experiment.sections import Gradients
from labkit.gradients.exchange import GradientReducer
from labkit.parallel.cut import shard_spec_of
from labkit.parallel.mesh import Mesh
from labkit.parallel.sync import GradientSync
from labkit.workloads.base import Blocks
from tests.parallel.below import on_ranks

BLOCKS = 4


def chain() -> Blocks:
    torch.manual_seed(0)
    return Blocks({f"block_{number}": nn.Linear(8, 8, bias=False) for number in range(BLOCKS)}).double()


def pending_and_weights(stage: int) -> dict[str, Any]:
    """Return how many all-gathers are pending before and after each block, and what the pass computes."""
    model, x = chain(), torch.ones(2, 8, dtype=torch.float64)
    mesh = Mesh(Layout(dp_shard=2), dist.get_rank(), "cpu")
    named = [(name, p, shard_spec_of(p)) for name, p in model.named_parameters()]
    # So small that every block has a bucket of its own.
    sync = GradientSync(named, mesh, stage, Gradients(bucket_mb=0.0001), GradientReducer(Experiment(), 1, None))
    sync.begin_pass(last=True, scheduled=False)
    model(x).sum().backward()
    sync.end_pass(last=True)
    optimizer = torch.optim.SGD([parameter for parameter, _ in sync.optimizer_parameters()], 0.1)
    optimizer.step()
    sync.after_update()
    pending = [len(sync._gathers)]
    model.before_block = sync.wait_for_parameters
    for block in model.blocks.values():
        block.register_forward_hook(lambda *of_a_hook: pending.append(len(sync._gathers)))
    return {"pending": pending, "output": model(x).tolist()}


def stage_1() -> dict[str, Any]:
    return pending_and_weights(1)


def stage_2() -> dict[str, Any]:
    return pending_and_weights(2)


def by_hand() -> Tensor:
    """Return the output after one update in one process; both ranks have the same samples, and gradients are summed."""
    model, x = chain(), torch.ones(2, 8, dtype=torch.float64)
    (2 * model(x).sum()).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    return model(x)


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    return on_ranks(2, stage_1, stage_2)


@pytest.mark.parametrize("stage", ["stage_1", "stage_2"])
def test_each_block_waits_for_its_own_parameters_only(results: dict[str, list[Any]], stage: str) -> None:
    for of_rank in results[stage]:
        assert of_rank["pending"] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("stage", ["stage_1", "stage_2"])
def test_the_pass_computes_with_the_new_parameters(results: dict[str, list[Any]], stage: str) -> None:
    for of_rank in results[stage]:
        torch.testing.assert_close(torch.tensor(of_rank["output"], dtype=torch.float64), by_hand().detach())


def test_a_copy_of_the_model_waits_for_nothing() -> None:
    model = chain()
    model.before_block = lambda block: pytest.fail("waited")
    deepcopy(model)(torch.ones(2, 8, dtype=torch.float64))
