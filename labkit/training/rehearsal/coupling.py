"""Detect models that mix the samples of a batch, so that ranks and passes do not compute what one process computes.

Mixing is detected by experiment, whatever its cause: statistics over the batch, attention among samples, a layer that
mistakes the batch dimension for the time dimension. Some samples of a batch are replaced
by others, and the outputs of the rest must not change; random numbers are the same in both passes. Batch normalisation
is recognised by its class and stays in evaluation mode.
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
from labkit.workloads.restore import Snapshot, undisturbed
from labkit.workloads.seed import seed_generators

SAMPLES, KEPT = 4, 2
"""Number of samples in a pass, and number of them that stay while the others are replaced."""
ROUNDINGS = 64
"""Tolerance for two passes of the same shape, in units of eps times the largest value; most agree bit for bit."""
LOOSE = 1e-2
"""Tolerance relative to the largest value for passes of two shapes, which sum in different orders, even in 16 bits."""

Place = Callable[[Batch], Batch]


class ModuleCall(NamedTuple):
    """Inputs and output of a module in one pass."""

    inputs: Any
    output: Any


Outputs = dict[str, ModuleCall]
"""Calls by module name, in the order in which the modules returned; the call of the model itself is under ''."""


@contextmanager
def record_modules(model: nn.Module) -> Iterator[Callable[[Tensor], Outputs]]:
    """Yield a function that runs the model on a copy of x and returns copies of every module's inputs and output."""
    outputs: Outputs = {}

    def before_forward(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, positional: Any, keywords: Any) -> None:
            outputs.setdefault(f"{name}>", ModuleCall(_copy((positional, keywords)), None))

        return hook

    def after_forward(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, positional: Any, output: Any) -> None:
            call = outputs.pop(f"{name}>", None)
            if call is not None:
                outputs.setdefault(name, ModuleCall(call.inputs, _copy(output)))

        return hook

    def run(x: Tensor) -> Outputs:
        outputs.clear()
        output = _copy(model(x.clone()))
        return {**{name: call for name, call in outputs.items() if name}, "": ModuleCall(_copy(x), output)}

    handles: list[Any] = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(before_forward(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after_forward(name)))
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def first_differing(before: Outputs, after: Outputs, same: Callable[[Any, Any], bool]) -> str:
    """Return the name of the first module whose outputs differ in two passes on the same inputs; '' for the model."""
    for name, call in before.items():
        if name in after and same(call.inputs, after[name].inputs) and not same(call.output, after[name].output):
            return name
    return ""


def coupled_module(model: nn.Module, task: Task, place: Place) -> str | None:
    """Return the name of the first module that mixes the samples of a batch in training mode; None if none does.

    Return None also if the model cannot be run here. The model and all generators of random numbers are restored.
    """
    if len(task.train) <= KEPT:
        return None
    # The hooks are registered first: the state that is restored between passes must contain them.
    with torch.no_grad(), record_modules(model) as outputs, undisturbed(model, task.train) as snapshot:
        try:
            indices = np.linspace(0, len(task.train) - 1, 2 * SAMPLES - KEPT).astype(int).tolist()
            x = place(task.train.__getitems__(indices))["x"]
            culprit = _mixing_module(partial(_pass, model, snapshot, outputs), x)
        except Exception:  # the user's own code: the rehearsal reports what it raises
            return None
    return type(model).__name__ if culprit == "" else culprit


def _mixing_module(run: Callable[..., Outputs], x: Tensor) -> str | None:
    whole = run(x[:SAMPLES])
    replaced = run(torch.cat([x[:KEPT], x[SAMPLES:]]))
    if not _agree(whole[""].output, replaced[""].output):
        return first_differing(whole, replaced, _agree)
    if not _agree(whole[""].output, run(x[:SAMPLES], seed=1)[""].output):
        return None  # the model draws random numbers, and a smaller batch would get different ones
    agree_loosely = partial(_agree, loose=LOOSE)
    alone = run(x[:KEPT])
    return None if agree_loosely(whole[""].output, alone[""].output) else first_differing(whole, alone, agree_loosely)


def _pass(
    model: nn.Module, snapshot: Snapshot, outputs: Callable[[Tensor], Outputs], x: Tensor, seed: int = 0
) -> Outputs:
    """Run one pass in training mode, from the same state as all other passes, and return the calls of its modules."""
    snapshot.undo()
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    seed_generators(seed)
    if x.is_cuda:
        torch.cuda.manual_seed(seed)
    return outputs(x)


def _agree(before: Any, after: Any, loose: float | None = None) -> bool:
    """Return whether the rows of the samples that stayed agree, in all tensors that have one row per sample."""
    if isinstance(before, Tensor):
        if (
            not isinstance(after, Tensor)
            or not before.dim()
            or len(before) != SAMPLES
            or before.shape[1:] != after.shape[1:]
        ):
            return True
        return _close(before[:KEPT], after[:KEPT], loose)
    if isinstance(before, dict):
        return not isinstance(after, dict) or all(_agree(before[key], after.get(key), loose) for key in before)
    if isinstance(before, tuple | list):
        same_kind = isinstance(after, tuple | list) and len(before) == len(after)
        return not same_kind or all(_agree(a, b, loose) for a, b in zip(before, after, strict=True))
    return True


def _close(before: Tensor, after: Tensor, loose: float | None) -> bool:
    if not (before.is_floating_point() or before.is_complex()):
        return bool(torch.equal(before, after))
    tolerance = loose if loose is not None else ROUNDINGS * torch.finfo(before.dtype).eps
    first, second = (
        (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double().nan_to_num()
        for tensor in (before, after)
    )
    largest = max((float(tensor.abs().max()) for tensor in (first, second) if tensor.numel()), default=0.0)
    return not largest or float((first - second).abs().max()) <= tolerance * largest


def _copy(value: Any) -> Any:
    """Return the value with copies of its tensors, because later modules may write to them."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_copy(inner) for inner in value]
    return value
