"""Descriptions of what goes wrong when a user's own task is tried, with advice on what to do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from labkit.experiment.fault import describe_error
from labkit.training.rehearsal.leaves import kept_graph
from labkit.workloads.base import Batch, Task


def samples_of(indices: list[int], what: str) -> str:
    """Return a description of the samples of a pass: `indices` of the data set `what` ("train" or "test")."""
    return f"sample {indices[0]} of {what}" if len(indices) == 1 else f"samples {indices[0]} and {indices[1]} of {what}"


def shape_of(value: Tensor) -> str:
    """Return dtype and shape of a tensor as text."""
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def describe(value: Any) -> str:
    """Return a short description of what a model or a loss returned."""
    if isinstance(value, Tensor):
        return shape_of(value)
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(str, list(value)[:4]))}"
    return "None" if value is None else f"a {type(value).__name__}"


def hint(batch: Batch, model: nn.Module) -> str:
    """Return advice to append to an error, starting with "; ", if dtype or batch size is the likely cause; else ''."""
    x = batch["x"]
    embeds = any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in model.modules())
    if not (x.is_floating_point() or x.is_complex() or embeds):
        return f"; x is {str(x.dtype).removeprefix('torch.')}: convert it to float32 (x.float())"
    if model.training and len(x) == 1:
        return "; a pass of this rank has only one sample: raise training.global_batch or lower gradients.accumulation"
    return ""


def backward_fault(task: Task, error: Exception) -> str:
    """Return one sentence on why the backward pass fails."""
    if "backward through the graph a second time" not in str(error):
        return f"the backward pass from the loss fails: {describe_error(error)}"
    place = kept_graph(task)
    subject = place or "something"
    return (
        f"{subject} is kept from one pass to the next together with its graph, which the first backward pass has "
        "freed: call detach() on it before keeping it"
    )
