"""Is the task's loss the mean that its weights say? What parts of a batch give must add up to what the batch gives.

With a loss that is a mean over something else, ranks or passes that see parts of a batch train something else than one
process does (issue 11, A6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.experiment.fault import named
from labkit.workloads.base import Batch, ClassificationTask, Task
from labkit.workloads.custom_task import SimpleTask
from labkit.workloads.language_task import LanguageTask
from labkit.workloads.restore import Snapshot, undisturbed
from labkit.workloads.weights import is_torchs

SAMPLES = 64
TOLERANCE = 1e-3
"""Of the loss: far more than rounding, even in 16 bits; far less than what another divisor makes."""
_UNPROVED = "not proved that the loss is a mean over samples:"

Place = Callable[[Batch], Batch]


@dataclass
class LossProof:
    """What trying the loss has shown."""

    uneven: str | None = None
    """Why ranks or passes cannot train with it together, in one sentence."""
    notes: list[str] = field(default_factory=list)
    """What could not be proved, and other reasons why ranks differ from one process."""


def prove_loss(task: Task, place: Place = lambda batch: batch) -> LossProof:
    """Try the loss on a few samples together and on parts of them; what the task holds is as before afterwards.

    The outputs are computed once, so that only the loss is on trial. A loss that refuses single samples is tried on
    larger parts; one that refuses all parts is said to be unproved.
    """
    count = min(SAMPLES, len(task.train))
    if _proved(task) or count < 2:
        return LossProof()
    indices = np.linspace(0, len(task.train) - 1, count).astype(int).tolist()
    with undisturbed(task.model, task.train), torch.no_grad():
        task.model.eval()
        try:
            batch = place(task.train.__getitems__(indices))
            output = task.model(batch["x"])
        except Exception as error:  # a person's own code; the rehearsal has tried the training mode
            return LossProof(notes=[f"{_UNPROVED} {count} samples cannot be tried in evaluation ({named(error, 120)})"])
        with undisturbed(*_holders(task)) as snapshot:
            return _Trial(task, output, batch, snapshot).proof()


def _proved(task: Task) -> bool:
    """Whether the loss is labkit's own or torch's own, whose divisors are known and tested."""
    if isinstance(task, SimpleTask):
        return task.weight_fn is None and is_torchs(task.loss_fn)
    return getattr(type(task), "loss", None) in (ClassificationTask.loss, LanguageTask.loss)


def _holders(task: Task) -> list[Any]:
    """Where a loss may keep something: what the task holds beside its model and data."""
    attributes = getattr(task, "__dict__", {})
    return [value for name, value in attributes.items() if name not in ("model", "train", "test")]


class _Trial:
    """The outputs of a few samples, and the loss of any part of them."""

    def __init__(self, task: Task, output: Any, batch: Batch, snapshot: Snapshot) -> None:
        self.task, self.output, self.batch, self.snapshot = task, output, batch, snapshot
        self.count = len(batch["x"])

    def proof(self) -> LossProof:
        """Everything that is tried, one after another."""
        try:
            whole, again = self._loss(0, self.count), self._loss(0, self.count)
            later = self._loss(0, self.count, afresh=False)
            divisor = self._weight(0, self.count)
        except Exception as error:
            return LossProof(notes=[f"{_UNPROVED} it fails on {self.count} samples ({named(error, 120)})"])
        if not np.isfinite(whole):
            return LossProof(notes=[f"{_UNPROVED} that of {self.count} samples is no finite number"])
        if not _close(whole, again, 1e-6):
            return LossProof("the loss draws random numbers: it differs each time it is computed on the same outputs")
        notes = [] if _close(again, later, 1e-6) else [_KEEPS]
        refusal: Exception | None = None
        for cuts in _partitions(self.count):
            try:
                united, weights = self._parts(cuts)
            except Exception as error:
                refusal = refusal or error
                continue
            even = abs(divisor - weights) <= TOLERANCE * max(1.0, abs(divisor)) and _close(united, whole, 1e-3)
            return LossProof(None if even else self._sentence(whole, united, cuts), notes)
        assert refusal is not None
        refused = f"{_UNPROVED} it fails on every part of {self.count} samples ({named(refusal, 120)})"
        return LossProof(notes=[*notes, refused])

    def _parts(self, cuts: list[int]) -> tuple[float, float]:
        """The mean loss of the parts between `cuts`, as their weights unite them, and the sum of these weights."""
        total = weights = 0.0
        for begin, end in pairwise(cuts):
            weight = self._weight(begin, end)
            if weight:
                total += self._loss(begin, end) * weight
                weights += weight
        return (total / weights if weights else 0.0), weights

    def _loss(self, begin: int, end: int, afresh: bool = True) -> float:
        """Of the samples from `begin` to before `end`; what the loss keeps is put back first where it begins afresh."""
        if afresh:
            self.snapshot.undo(generators=False)
        return float(self.task.loss(_rows(self.output, begin, end), self._part(begin, end)))

    def _weight(self, begin: int, end: int) -> float:
        return float(self.task.batch_weight(self._part(begin, end)))

    def _part(self, begin: int, end: int) -> Batch:
        return {name: _rows(tensor, begin, end) for name, tensor in self.batch.items()}

    def _sentence(self, whole: float, united: float, cuts: list[int]) -> str:
        parts = "by themselves" if len(cuts) == self.count + 1 else f"in {len(cuts) - 1} parts"
        return (
            f"the loss is no mean over samples: {self.count} samples give {whole:.6g} together, but {united:.6g} "
            f"{parts}, so parts of a batch do not add up to it; give batch_weight, which says what a batch's "
            "loss is a mean over, or train on one rank without accumulation"
        )


_KEEPS = (
    "the loss keeps numbers from one pass to the next, and every rank keeps those of its own samples, "
    "so ranks differ from one process"
)


def _partitions(count: int) -> Iterator[list[int]]:
    """Where to cut `count` samples: one by one, pairs, fours, halves, three quarters and the rest."""
    for size in (1, 2, 4):
        if size < count:
            yield [*range(0, count - size + 1, size), count]
    yield [0, count // 2, count]
    if count > 2:
        yield [0, max(1, 3 * count // 4), count]


def _rows(value: Any, begin: int, end: int) -> Any:
    """A copy of some rows, which a loss may write to; what is no tensor goes as it is."""
    return value[begin:end].clone() if isinstance(value, Tensor) else value


def _close(value: float, expected: float, least: float) -> bool:
    return abs(value - expected) <= TOLERANCE * max(least, abs(expected))
