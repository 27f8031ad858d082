"""Find the parts of a task that prevent several ranks or micro-batches from computing what one process computes.

Random parts are found by experiment: passes over the same samples in training mode must agree, and so must samples that
are read again. Batch normalisation uses statistics over a rank's samples and is recognised by its class; whatever else
mixes the samples of a batch is found by changing some of them (coupling.py). (Issue 11, A8, A9.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from labkit.training.rehearsal import hooks
from labkit.training.rehearsal.coupling import Outputs, Place, coupled_module, first_differing, record_modules
from labkit.workloads.base import Task
from labkit.workloads.restore import Snapshot, undisturbed

SAMPLES = 4
PASSES = 3
"""Number of passes over the same samples that must agree."""
PASSES_IF_SUSPECTED = 12
"""Number of these passes if a setting of the model has a name like dropout."""
LATER = 10**6
"""Number of passes by which a model's own counters are advanced, to detect randomness that starts late."""


def non_parity_modules(
    model: nn.Module, ranks: int, passes: int = 1, task: Task | None = None, place: Place = lambda batch: batch
) -> list[str]:
    """Return one sentence for each reason why `ranks` ranks with `passes` passes each differ from one process.

    With `task`, whose batches `place` moves to the model's device, random parts are found by experiment; without it,
    they are recognised by the names of their settings. The model, its buffers and all generators of random numbers are
    restored.
    """
    reasons: list[str] = []
    if task is not None:
        reasons += _random_data(task)
    if ranks * passes == 1:
        return reasons
    where = "rank" if ranks > 1 else "pass"
    differ = "so ranks differ from one process" if ranks > 1 else "so passes differ from a whole batch"
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not (isinstance(module, nn.SyncBatchNorm) and passes == 1):
            reasons.append(f"{name}: batch normalisation sees only one {where}'s samples, {differ}")
            break
    mixing_module = coupled_module(model, task, place) if task is not None else None
    if mixing_module is not None:
        reasons.append(f"{mixing_module}: mixes the samples of a batch but sees only one {where}'s, {differ}")
    hooked_parameter = hooks.nonlinear(model)
    if hooked_parameter is not None:
        reasons.append(f"{hooked_parameter}: its hook sees only the gradient of one {where}'s samples, {differ}")
    culprit = random_part(model, task, place)
    if culprit is not None:
        name, kind = culprit
        reasons.append(f"{name}: {kind} draws different random numbers on every {where}, {differ}")
    return reasons


def random_part(model: nn.Module, task: Task | None, place: Place = lambda batch: batch) -> tuple[str, str] | None:
    """Return (name, kind) of the first module whose output in training mode is random; None if all passes agree."""
    suspects = list(_suspects(model))
    if task is not None:
        times = PASSES_IF_SUSPECTED if suspects else PASSES
        with torch.no_grad(), record_modules(model) as outputs, undisturbed(model, task.train) as snapshot:
            try:
                batch = place(task.train.__getitems__(list(range(min(SAMPLES, len(task.train))))))
                passes = _Passes(model, snapshot, lambda: outputs(batch["x"]))
                culprit = passes.first_random(times)
                culprit = passes.first_random_later() if culprit is None else culprit
            except Exception:  # the user's own code: the rehearsal reports what it raises
                pass
            else:
                if culprit is None:
                    return None
                module = model.get_submodule(culprit)
                return culprit or type(model).__name__, "dropout" if module in suspects else "a random part"
    names = {module: name for name, module in model.named_modules()}
    return (names[suspects[0]] or type(model).__name__, "dropout") if suspects else None


def _suspects(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules with a non-zero setting whose name contains "drop"."""
    for module in model.modules():
        rates = [value for name, value in vars(module).items() if "drop" in name.lower()]
        if isinstance(module, _DropoutNd):
            rates.append(module.p)
        if isinstance(module, nn.RNNBase) and module.num_layers == 1:
            continue  # its dropout applies between layers
        if any(isinstance(value, float) and value > 0 for value in rates):
            yield module


class _Passes:
    """Passes of a model over the same samples in training mode, all from the same state."""

    def __init__(self, model: nn.Module, snapshot: Snapshot, run: Callable[[], Outputs]) -> None:
        self.model, self.snapshot, self.run = model, snapshot, run

    def first_random(self, times: int, advances: Iterable[Callable[[int], None]] = ()) -> str | None:
        """Return the name of the first module whose output differs for the same inputs; None if all passes agree.

        Each of `advances` moves one of the model's own pass counters forward by a given number.
        """
        first: Outputs = {}
        for number in range(times):
            self.snapshot.undo(generators=False)  # a counter is not random
            self.model.train()
            for advance in advances:
                advance(LATER)
            torch.manual_seed(number)
            outputs = self.run()
            first = first or outputs
            if not _same(first[""].output, outputs[""].output):
                return first_differing(first, outputs, _same)
        return None

    def first_random_later(self) -> str | None:
        """Do the same after `LATER` passes, as some dropout starts late; None if the model has no pass counters."""
        counters = self.snapshot.counters()
        try:
            return self.first_random(2, counters) if counters else None
        except Exception:  # a schedule that has ended
            return None


def _same(first: Any, second: Any) -> bool:
    """Return whether two outputs agree bit for bit; tensors in tuples, lists and dicts are compared one by one."""
    if isinstance(first, Tensor):
        return (
            isinstance(second, Tensor)
            and first.shape == second.shape
            and bool(torch.equal(_comparable(first), _comparable(second)))
        )
    if isinstance(first, dict):
        return isinstance(second, dict) and all(_same(value, second.get(name)) for name, value in first.items())
    if isinstance(first, tuple | list):
        return (
            isinstance(second, tuple | list)
            and len(first) == len(second)
            and all(_same(a, b) for a, b in zip(first, second, strict=True))
        )
    return True


def _comparable(tensor: Tensor) -> Tensor:
    """Return the tensor as real numbers with NaN replaced, so that NaN compares equal to NaN."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.nan_to_num() if tensor.is_floating_point() else tensor


def _random_data(task: Task) -> Iterator[str]:
    """Yield a sentence for each data set whose samples differ when they are read again."""
    for data, name, meaning in (
        (task.train, "training", "so ranks and repeated runs differ from one process unless all draw the same numbers"),
        (task.test, "held-out", "so metrics are not reproducible"),
    ):
        indices = list(range(min(SAMPLES, len(data))))
        with undisturbed(data):
            first = data.__getitems__(indices)
            if any(not _same(first, data.__getitems__(indices)) for _ in range(PASSES - 1)):
                yield f"the {name} samples differ each time they are read (random augmentation?), {meaning}"
