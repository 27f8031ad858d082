"""Parts of a task that make several ranks, or several passes of one, compute something else than one process does.

Random parts are found by trying: passes over the same samples in training mode must agree, and so must samples that are
read again. Batch normalisation looks at a whole share and is known by its class; whatever else mixes the samples of a
batch is found by changing some of them (coupling.py). (Issue 11, A8, A9.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from labkit.training.rehearsal import hooks
from labkit.training.rehearsal.coupling import Outputs, Place, coupled_part, first_differing, watched
from labkit.workloads.base import Task
from labkit.workloads.restore import Noted, undisturbed

SAMPLES = 4
PASSES = 3
"""Passes over the same samples that must agree; more where something is named like dropout."""
PASSES_IF_SUSPECTED = 12
LATER = 10**6
"""Passes that a model's own counters are set forward, to see what begins late."""


def non_parity_modules(
    model: nn.Module, ranks: int, passes: int = 1, task: Task | None = None, place: Place = lambda batch: batch
) -> list[str]:
    """One sentence for each reason why `ranks` ranks of `passes` passes differ from one process; [] if none is seen.

    With `task`, whose batches `place` moves to the model, random parts are proved; without, they are known by the names
    of their settings. The model, its buffers and all random numbers are as before afterwards.
    """
    reasons: list[str] = []
    if task is not None:
        reasons += _random_data(task)
    if ranks * passes == 1:
        return reasons
    where = "rank" if ranks > 1 else "pass"
    differ = "so ranks differ from one process" if ranks > 1 else "so passes differ from a batch in one piece"
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not (isinstance(module, nn.SyncBatchNorm) and passes == 1):
            reasons.append(f"{name}: batch normalisation sees one {where}'s samples, {differ}")
            break
    mixing = coupled_part(model, task, place) if task is not None else None
    if mixing is not None:
        reasons.append(f"{mixing}: mixes the samples of a batch and sees one {where}'s samples, {differ}")
    name_of_hooked = hooks.nonlinear(model)
    if name_of_hooked is not None:
        reasons.append(f"{name_of_hooked}: its hook sees the gradient of one {where}'s samples, {differ}")
    culprit = random_part(model, task, place)
    if culprit is not None:
        name, kind = culprit
        reasons.append(f"{name}: {kind} draws other numbers on every {where}, {differ}")
    return reasons


def random_part(model: nn.Module, task: Task | None, place: Place = lambda batch: batch) -> tuple[str, str] | None:
    """(name, kind) of the first part of the model whose output in training mode is random; None if passes agree."""
    suspects = list(_suspects(model))
    if task is not None:
        times = PASSES_IF_SUSPECTED if suspects else PASSES
        with torch.no_grad(), watched(model) as outputs, undisturbed(model, task.train) as noted:
            try:
                batch = place(task.train.__getitems__(list(range(min(SAMPLES, len(task.train))))))
                passes = _Passes(model, noted, lambda: outputs(batch["x"]))
                culprit = passes.first_random(times)
                culprit = passes.first_random_later() if culprit is None else culprit
            except Exception:  # a person's own code: the rehearsal says what it raises
                pass
            else:
                if culprit is None:
                    return None
                module = model.get_submodule(culprit)
                return culprit or type(model).__name__, "dropout" if module in suspects else "a random part"
    named = {module: name for name, module in model.named_modules()}
    return (named[suspects[0]] or type(model).__name__, "dropout") if suspects else None


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


class _Passes:
    """Passes of a model over the same samples in training mode, all from the same state."""

    def __init__(self, model: nn.Module, noted: Noted, run: Callable[[], Outputs]) -> None:
        self.model, self.noted, self.run = model, noted, run

    def first_random(self, times: int, advances: Iterable[Callable[[int], None]] = ()) -> str | None:
        """The name of the first module that gives something else for the same; None if all passes agree.

        What counts the passes of the model is set forward by `advances`.
        """
        first: Outputs = {}
        for number in range(times):
            self.noted.undo(generators=False)  # a counter is not random
            self.model.train()
            for advance in advances:
                advance(LATER)
            torch.manual_seed(number)
            outputs = self.run()
            first = first or outputs
            if not _same(first[""].gave, outputs[""].gave):
                return first_differing(first, outputs, _same)
        return None

    def first_random_later(self) -> str | None:
        """The same after many passes: some dropout begins late. A model that cannot be set forward is not asked."""
        counters = self.noted.counters()
        try:
            return self.first_random(2, counters) if counters else None
        except Exception:  # a schedule that has come to its end
            return None


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
