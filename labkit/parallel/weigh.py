"""What a loss is a mean over: samples, unless the task says something else (`Task.batch_weight`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from labkit.parallel.cast import as_reals, widen
from labkit.workloads.base import Batch, Task
from labkit.workloads.custom_task import SimpleTask
from labkit.workloads.weights import is_of_classes


def counts_samples(task: Task) -> bool:
    """Return whether the task's losses are known to be means over samples, without looking at a batch.

    This holds for all workloads of labkit, and for a user's own task that does not define anything else. A loss over
    classes may ignore targets, or weigh them.
    """
    batch_weight: Any = getattr(task, "batch_weight", None)
    if batch_weight is None:
        return True
    if getattr(batch_weight, "__func__", None) is SimpleTask.batch_weight:
        simple: Any = task
        return simple.weight_fn is None and not is_of_classes(simple.loss_fn)
    return str(getattr(batch_weight, "__module__", "")).startswith("labkit.workloads.")


def is_zero(weight: Any) -> bool:
    """Return whether the weight is the number zero; a weight on a device is not read and counts as non-zero."""
    return isinstance(weight, float | int) and weight == 0


def weight_of(task: Task, batch: Batch) -> float:
    """Return what the mean loss of this batch is divided by (at least 0): its samples, or what the task defines.

    Raises ValueError if the task returns a negative or infinite weight.
    """
    batch_weight: Any = getattr(task, "batch_weight", None)
    if batch_weight is None:
        return float(len(next(iter(batch.values()))))
    weight = float(batch_weight(batch))
    if not 0 <= weight < float("inf"):
        raise ValueError(f"batch_weight of the task must give a number of at least 0, it gave {weight}")
    return weight


def loss_of(task: Task, output: Tensor, batch: Batch, counts: bool = True) -> Tensor:
    """Return the mean loss over a batch, computed in at least float32.

    If the batch `counts` for nothing, return zero with zero gradients: a mean over nothing would be NaN.
    """
    if counts:
        return task.loss(widen(output), batch)
    return as_reals(output).sum() * 0.0
