"""Parts of a task that make several ranks, or several passes of one, compute something else than one process does.

Random parts are found by trying: passes over the same samples in training mode must agree, and so must samples that are
read again. Batch normalisation looks at a whole share and is known by its class. A loss must be the mean that its
weights say: what parts of a batch give must add up to what the batch gives. (Issue 11, A6, A8, A9.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from labkit.training.restore import restored
from labkit.workloads.base import Batch, ClassificationTask, Task
from labkit.workloads.custom_task import SimpleTask
from labkit.workloads.language_task import LanguageTask
from labkit.workloads.weights import is_torchs

SAMPLES = 4
PASSES = 3
"""Passes over the same samples that must agree; more where something is named like dropout."""
PASSES_IF_SUSPECTED = 12
LOSS_SAMPLES = 64
TOLERANCE = 1e-3
"""Of the loss: far more than rounding, even in 16 bits; far less than what another divisor makes."""

Place = Callable[[Batch], Batch]


def inexact_parts(
    model: nn.Module, ranks: int, passes: int = 1, task: Task | None = None, place: Place = lambda batch: batch
) -> list[str]:
    """One sentence for each reason why `ranks` ranks of `passes` passes differ from one process; [] if none is seen.

    With `task`, whose batches `place` moves to the model, random parts are proved; without, they are known by the names
    of their settings. The model, its buffers and all random numbers are as before afterwards.
    """
    reasons: list[str] = []
    if task is not None:
        reasons += [str(note) for note in task.facts().get("notes", [])]
        reasons += _random_data(task)
    if ranks * passes == 1:
        return reasons
    where = "rank" if ranks > 1 else "pass"
    differ = "so ranks differ from one process" if ranks > 1 else "so passes differ from a batch in one piece"
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not (isinstance(module, nn.SyncBatchNorm) and passes == 1):
            reasons.append(f"{name}: batch normalisation sees one {where}'s samples, {differ}")
            break
    culprit = random_part(model, task, place)
    if culprit is not None:
        name, kind = culprit
        reasons.append(f"{name}: {kind} draws other numbers on every {where}, {differ}")
    return reasons


def random_part(model: nn.Module, task: Task | None, place: Place = lambda batch: batch) -> tuple[str, str] | None:
    """(name, kind) of the first part of the model whose output in training mode is random; None if passes agree."""
    suspects = list(_suspects(model))
    if task is not None:
        outputs = _repeated(model, task, place, PASSES_IF_SUSPECTED if suspects else PASSES)
        if outputs is not None:
            for name, first in outputs[0].items():
                if any(not _same(first, other.get(name)) for other in outputs[1:]):
                    module = model.get_submodule(name) if name else model
                    return name or type(model).__name__, "dropout" if module in suspects else "a random part"
            return None
    named = {module: name for name, module in model.named_modules()}
    return (named[suspects[0]] or type(model).__name__, "dropout") if suspects else None


def uneven_loss(task: Task, place: Place = lambda batch: batch) -> str | None:
    """Why the task's loss is not the mean that its weights say, in one sentence; None if parts add up to the whole.

    The outputs of a few samples are computed once, so that only the loss is on trial. A loss that cannot be tried here
    is left to the rehearsal.
    """
    if _proved(task):
        return None
    count = min(LOSS_SAMPLES, len(task.train))
    indices = np.linspace(0, len(task.train) - 1, count).astype(int).tolist()
    model = task.model
    with undisturbed(model, task.train), torch.no_grad():
        model.eval()
        try:
            batch = place(task.train.__getitems__(indices))
            output = model(batch["x"])
            whole = float(task.loss(output, batch))
            again = float(task.loss(output, batch))
            total = weights = 0.0
            for number in range(count):
                part = {name: tensor[number : number + 1] for name, tensor in batch.items()}
                weight = float(task.batch_weight(part))
                if weight:
                    total += float(task.loss(output[number : number + 1], part)) * weight
                    weights += weight
            divisor = float(task.batch_weight(batch))
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
            return None
    if count < 2 or not np.isfinite(whole):
        return None
    if abs(whole - again) > TOLERANCE * max(1e-6, abs(whole)):
        return "the loss draws random numbers: it differs each time it is computed on the same outputs"
    united = total / weights if weights else 0.0
    even = abs(divisor - weights) <= TOLERANCE * max(1.0, abs(divisor))
    if even and abs(united - whole) <= TOLERANCE * max(1e-3, abs(whole)):
        return None
    return (
        f"the loss is no mean over samples: {count} samples give {whole:.6g} together, but {united:.6g} by themselves, "
        "so parts of a batch do not add up to it; give batch_weight, which says what a batch's loss is a mean over"
    )


def _proved(task: Task) -> bool:
    """Whether the loss is labkit's own or torch's own, whose divisors are known and tested."""
    if isinstance(task, SimpleTask):
        return task.weight_fn is None and is_torchs(task.loss_fn)
    return getattr(type(task), "loss", None) in (ClassificationTask.loss, LanguageTask.loss)


@contextmanager
def undisturbed(*parts: Any) -> Iterator[None]:
    """Whatever runs inside, what the parts (models, data sets) hold and all random numbers are restored."""
    tensors = (tensor for part in parts if isinstance(part, nn.Module) for tensor in part.parameters())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    with restored(*parts, device=device):
        yield


def _suspects(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with a setting that is named like dropout and not zero."""
    for module in model.modules():
        named = [value for name, value in vars(module).items() if "drop" in name.lower()]
        if isinstance(module, _DropoutNd):
            named.append(module.p)
        if isinstance(module, nn.RNNBase) and module.num_layers == 1:
            continue  # its dropout is between layers
        if any(isinstance(value, float) and value > 0 for value in named):
            yield module


def _repeated(model: nn.Module, task: Task, place: Place, times: int) -> list[dict[str, Any]] | None:
    """What each module gives in passes over the same samples in training mode; None if the model cannot be run here."""
    outputs: list[dict[str, Any]] = []

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: outputs[-1].setdefault(name, output)

    with undisturbed(model, task.train), torch.no_grad():
        hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
        model.train()
        try:
            batch = place(task.train.__getitems__(list(range(min(SAMPLES, len(task.train))))))
            for number in range(times):
                outputs.append({})
                torch.manual_seed(number)
                outputs[-1][""] = model(batch["x"])
                if number and not _same(outputs[0][""], outputs[-1][""]):
                    return [outputs[0], outputs[-1]]
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
            return None
        finally:
            for hook in hooks:
                hook.remove()
    return outputs[:1]


def _same(one: Any, other: Any) -> bool:
    """Whether two outputs agree to the last bit; tensors in tuples, lists and dicts are compared one by one."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and bool(torch.equal(_real(one), _real(other)))
    if isinstance(one, dict):
        return isinstance(other, dict) and all(_same(value, other.get(name)) for name, value in one.items())
    if isinstance(one, tuple | list):
        return (
            isinstance(other, tuple | list)
            and len(one) == len(other)
            and all(_same(a, b) for a, b in zip(one, other, strict=True))
        )
    return True


def _real(tensor: Tensor) -> Tensor:
    """Numbers that compare equal also where they are no numbers."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.nan_to_num() if tensor.is_floating_point() else tensor


def _random_data(task: Task) -> Iterator[str]:
    """A sentence for each part of the data whose samples are others when they are read again."""
    for data, name, meaning in (
        (task.train, "training", "so ranks and repeated runs differ from one process unless they draw the same"),
        (task.test, "held-out", "so metrics do not repeat"),
    ):
        indices = list(range(min(SAMPLES, len(data))))
        with undisturbed(data):
            first = data.__getitems__(indices)
            if any(not _same(first, data.__getitems__(indices)) for _ in range(PASSES - 1)):
                yield f"the {name} samples are others each time they are read (random augmentation?), {meaning}"
