"""What a loss is a mean over: samples, unless the task says something else (`Task.batch_weight`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from labkit.parallel.cast import as_reals, widened
from labkit.workloads.base import Batch, Task
from labkit.workloads.custom_task import SimpleTask
from labkit.workloads.weights import is_of_classes


def counts_samples(task: Task) -> bool:
    """Are the losses of this task means over samples, as known without a look at any batch?

    So they are in all workloads of labkit, and where a person's own task does not say anything else. A loss over
    classes leaves out targets, or weighs them.
    """
    given: Any = getattr(task, "batch_weight", None)
    if given is None:
        return True
    if getattr(given, "__func__", None) is SimpleTask.batch_weight:
        simple: Any = task
        return simple.weight_fn is None and not is_of_classes(simple.loss_fn)
    return str(getattr(given, "__module__", "")).startswith("labkit.workloads.")


def is_nothing(weight: Any) -> bool:
    """Is it the number zero? A weight that lies on a device is not looked at."""
    return isinstance(weight, float | int) and weight == 0


def weight_of(task: Task, batch: Batch) -> float:
    """What the mean loss of this batch is a mean over, at least 0; ValueError if the task says anything else."""
    given: Any = getattr(task, "batch_weight", None)
    if given is None:
        return float(len(next(iter(batch.values()))))
    weight = float(given(batch))
    if not 0 <= weight < float("inf"):
        raise ValueError(f"batch_weight of the task must give a number of at least 0, it gave {weight}")
    return weight


def loss_of(task: Task, output: Tensor, batch: Batch, counts: bool = True) -> Tensor:
    """The mean loss over a batch, computed in float32 at least.

    Of a batch that `counts` for nothing it is zero, with zero gradients: a mean over nothing would be no number.
    """
    if counts:
        return task.loss(widened(output), batch)
    return as_reals(output).sum() * 0.0
