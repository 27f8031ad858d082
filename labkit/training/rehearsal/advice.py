"""Words for what goes wrong when a person's own task is tried, and what to do about it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from labkit.experiment.fault import named
from labkit.training.rehearsal.leaves import kept_graph
from labkit.workloads.base import Batch, Task


def samples_of(indices: list[int], what: str) -> str:
    """The samples of a pass, in words."""
    return f"sample {indices[0]} of {what}" if len(indices) == 1 else f"samples {indices[0]} and {indices[1]} of {what}"


def shape_of(value: Tensor) -> str:
    """Type and shape of a tensor."""
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def described(value: Any) -> str:
    """The kind of a value that a model or a loss has given."""
    if isinstance(value, Tensor):
        return shape_of(value)
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(str, list(value)[:4]))}"
    return "None" if value is None else f"a {type(value).__name__}"


def hint(batch: Batch, model: nn.Module) -> str:
    """Advice where the type of the input is the likely reason."""
    x = batch["x"]
    embeds = any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in model.modules())
    if not (x.is_floating_point() or x.is_complex() or embeds):
        return f"; x is {str(x.dtype).removeprefix('torch.')}: give numbers in float32 (x.float())"
    if model.training and len(x) == 1:
        return "; a pass of this rank holds one sample: raise training.global_batch or lower gradients.accumulation"
    return ""


def backward_fault(task: Task, error: Exception) -> str:
    """Why the pass backward fails, in one sentence."""
    if "backward through the graph a second time" not in str(error):
        return f"the pass backward from the loss fails: {named(error)}"
    place = kept_graph(task)
    kept = f"{place} is kept" if place else "something is kept"
    return (
        f"{kept} from one pass for the next together with its graph, which the first pass backward has used up: keep "
        "it without (detach())"
    )
