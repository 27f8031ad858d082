"""What the tests of the workloads share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from labkit.experiment import Experiment
from labkit.experiment.machine import Machine
from labkit.experiment.registry import registry

MACHINE = Machine(cores=2, cores_total=2, memory_bytes=8 * 2**30)


def reasons(workload: Mapping[str, Any], **training: Any) -> list[str]:
    """The problems that the workload itself reports, as sentences."""
    experiment = Experiment.from_dict({"workload": dict(workload), "training": {"steps": 1} | training})
    method = registry("workload")[experiment.workload.name].load()
    return [str(problem) for problem in method.problems(experiment, MACHINE)]


def train(task: Any, steps: int, batch: int = 32, lr: float = 2e-3) -> list[float]:
    """Train on one rank, as the loop would; returns the loss of every step."""
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=lr)
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(steps):
        indices = order[torch.arange(step * batch, (step + 1) * batch) % len(order)].tolist()
        samples = task.train.__getitems__(indices)
        loss = task.loss(task.model(samples["x"]), samples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def evaluate(task: Any, batch: int = 256, parts: int = 1) -> dict[str, float]:
    """Metrics on the held-out data, summed over batches; `parts` ranks take every parts-th sample."""
    sums: dict[str, float] = {}
    for rank in range(parts):
        mine = list(range(rank, len(task.test), parts))
        for start in range(0, len(mine), batch):
            samples = task.test.__getitems__(mine[start : start + batch])
            for key, value in task.evaluate(task.model(samples["x"]), samples).items():
                sums[key] = sums.get(key, 0.0) + float(value)
    return task.metrics(sums)


def gradients(task: Any, samples: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over `samples`, by parameter."""
    task.model.zero_grad()
    task.loss(task.model(samples["x"]), samples).backward()
    return {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}


def assert_split_equals_whole(task: Any, samples: Mapping[str, torch.Tensor], parts: list[int]) -> None:
    """The weighted mean of the parts' gradients is the gradient of the whole batch, in float64."""
    task.model.double()
    double = {k: v.double() if v.is_floating_point() else v for k, v in samples.items()}
    whole = gradients(task, double)
    count = len(double["y"])
    assert sum(parts) == count
    mean = {name: torch.zeros_like(g) for name, g in whole.items()}
    start = 0
    for size in parts:
        part = {k: v[start : start + size] for k, v in double.items()}
        for name, gradient in gradients(task, part).items():
            mean[name] += gradient * size / count
        start += size
    for name in whole:
        torch.testing.assert_close(mean[name], whole[name], rtol=1e-9, atol=1e-12, msg=name)
