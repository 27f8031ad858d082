"""Do the samples of a batch change what the others give? Then ranks and passes compute something else than one process.

Found by trying, whatever the reason: statistics over the batch, attention among samples, a layer that takes the axis of
the samples for that of time. Some samples of a batch are exchanged for others, and what the rest of it gives must stay;
random numbers are the same in both passes. Batch normalisation is known by its class and is left in evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from labkit.workloads.base import Batch, Task
from labkit.workloads.restore import Noted, undisturbed
from labkit.workloads.seed import seed_generators

SAMPLES, KEPT = 4, 2
"""Of a pass, and how many of them stay while the others are exchanged."""
ROUNDINGS = 64
"""Two passes of the same shape agree but for so many roundings of the largest number; mostly to the last bit."""
LOOSE = 1e-2
"""Of the largest number: passes of two shapes are summed up in other orders, even in 16 bits."""

Place = Callable[[Batch], Batch]


class Passage(NamedTuple):
    """What a module was given in a pass, and what it gave."""

    given: Any
    gave: Any


Outputs = dict[str, Passage]
"""By the names of the modules, in the order in which they ended; the model's own under ''."""


@contextmanager
def watched(model: nn.Module) -> Iterator[Callable[[Tensor], Outputs]]:
    """Gives a function that runs the model on a copy of x and returns what every module was given and gave, copied."""
    outputs: Outputs = {}

    def entered(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, positional: Any, keywords: Any) -> None:
            outputs.setdefault(f"{name}>", Passage(_copied((positional, keywords)), None))

        return hook

    def left(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, positional: Any, output: Any) -> None:
            begun = outputs.pop(f"{name}>", None)
            if begun is not None:
                outputs.setdefault(name, Passage(begun.given, _copied(output)))

        return hook

    def run(x: Tensor) -> Outputs:
        outputs.clear()
        output = _copied(model(x.clone()))
        return {**{name: passage for name, passage in outputs.items() if name}, "": Passage(_copied(x), output)}

    handles: list[Any] = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(entered(name), with_kwargs=True))
            handles.append(module.register_forward_hook(left(name)))
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def first_differing(before: Outputs, after: Outputs, same: Callable[[Any, Any], bool]) -> str:
    """The first module that was given the same in two passes and gave something else; '' for the model itself."""
    for name, passage in before.items():
        if name in after and same(passage.given, after[name].given) and not same(passage.gave, after[name].gave):
            return name
    return ""


def coupled_part(model: nn.Module, task: Task, place: Place) -> str | None:
    """The name of the first part of the model that mixes the samples of a batch in training mode; None if none does.

    None also where the model cannot be run here. The model and all random numbers are as before afterwards.
    """
    if len(task.train) <= KEPT:
        return None
    # Watched first: what is put back between passes would take the hooks away.
    with torch.no_grad(), watched(model) as outputs, undisturbed(model, task.train) as noted:
        try:
            chosen = np.linspace(0, len(task.train) - 1, 2 * SAMPLES - KEPT).astype(int).tolist()
            x = place(task.train.__getitems__(chosen))["x"]
            culprit = _mixing(partial(_pass, model, noted, outputs), x)
        except Exception:  # a person's own code: the rehearsal says what it raises
            return None
    return type(model).__name__ if culprit == "" else culprit


def _mixing(run: Callable[..., Outputs], x: Tensor) -> str | None:
    whole = run(x[:SAMPLES])
    exchanged = run(torch.cat([x[:KEPT], x[SAMPLES:]]))
    if not _agree(whole[""].gave, exchanged[""].gave):
        return first_differing(whole, exchanged, _agree)
    if not _agree(whole[""].gave, run(x[:SAMPLES], seed=1)[""].gave):
        return None  # in a smaller batch random numbers are others
    loosely = partial(_agree, loose=LOOSE)
    alone = run(x[:KEPT])
    return None if loosely(whole[""].gave, alone[""].gave) else first_differing(whole, alone, loosely)


def _pass(model: nn.Module, noted: Noted, outputs: Callable[[Tensor], Outputs], x: Tensor, seed: int = 0) -> Outputs:
    """One pass in training mode from the same state as all others."""
    noted.undo()
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    seed_generators(seed)
    if x.is_cuda:
        torch.cuda.manual_seed(seed)
    return outputs(x)


def _agree(before: Any, after: Any, loose: float | None = None) -> bool:
    """Do the rows of the samples that stayed agree, in all tensors that have a row for each sample?"""
    if isinstance(before, Tensor):
        if (
            not isinstance(after, Tensor)
            or not before.dim()
            or len(before) != SAMPLES
            or before.shape[1:] != after.shape[1:]
        ):
            return True
        return _near(before[:KEPT], after[:KEPT], loose)
    if isinstance(before, dict):
        return not isinstance(after, dict) or all(_agree(before[key], after.get(key), loose) for key in before)
    if isinstance(before, tuple | list):
        same_kind = isinstance(after, tuple | list) and len(before) == len(after)
        return not same_kind or all(_agree(a, b, loose) for a, b in zip(before, after, strict=True))
    return True


def _near(before: Tensor, after: Tensor, loose: float | None) -> bool:
    if not (before.is_floating_point() or before.is_complex()):
        return bool(torch.equal(before, after))
    tolerance = loose if loose is not None else ROUNDINGS * torch.finfo(before.dtype).eps
    first, second = (
        (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double().nan_to_num()
        for tensor in (before, after)
    )
    largest = max((float(tensor.abs().max()) for tensor in (first, second) if tensor.numel()), default=0.0)
    return not largest or float((first - second).abs().max()) <= tolerance * largest


def _copied(value: Any) -> Any:
    """Copies of the tensors in a value, which later modules may write to."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_copied(inner) for inner in value]
    return value
