"""Check that the task's loss is the mean that `batch_weight` claims: the losses of parts must average to the whole.

With a loss that is a mean over something else, ranks or micro-batches, which see parts of a batch, do not train the
same as one process (issue 11, A6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.experiment.fault import describe_error
from labkit.training.rehearsal.moving_state import MovingState
from labkit.workloads.base import Batch, ClassificationTask, Task
from labkit.workloads.custom_task import SimpleTask
from labkit.workloads.language_task import LanguageTask
from labkit.workloads.restore import Snapshot, undisturbed
from labkit.workloads.weights import is_torch_loss

SAMPLES = 64
TOLERANCE = 1e-3
"""Relative tolerance of the loss: far above rounding, even in 16 bits; far below the effect of a different divisor."""
_UNPROVED = "could not verify that the loss is a mean over samples:"

Place = Callable[[Batch], Batch]


@dataclass
class LossProof:
    """Result of the check of a loss."""

    violation: str | None = None
    """Why several ranks or micro-batches cannot train with this loss, in one sentence; None if they can."""
    notes: list[str] = field(default_factory=list)
    """What could not be verified, and other reasons why ranks differ from one process."""


def prove_loss(task: Task, place: Place = lambda batch: batch) -> LossProof:
    """Compute the loss of a few samples together and in parts, and compare; the task is restored afterwards.

    The outputs are computed once, so that only the loss is checked. A loss that fails on single samples is tried on
    larger parts; one that fails on all parts is reported as unproved.
    """
    count = min(SAMPLES, len(task.train))
    if _is_known_mean(task) or count < 2:
        return LossProof()
    indices = np.linspace(0, len(task.train) - 1, count).astype(int).tolist()
    with undisturbed(task.model, task.train), torch.no_grad():
        task.model.eval()
        try:
            batch = place(task.train.__getitems__(indices))
            output = task.model(batch["x"])
        except Exception as error:  # the user's own code; the rehearsal has tried the training mode
            return LossProof(
                notes=[f"{_UNPROVED} {count} samples fail in evaluation mode ({describe_error(error, 120)})"]
            )
        with undisturbed(*_holders(task)) as snapshot:
            return _Trial(task, output, batch, snapshot).proof()


def _is_known_mean(task: Task) -> bool:
    """Return whether the loss is labkit's own or torch's own, whose divisors are known and tested."""
    if isinstance(task, SimpleTask):
        return task.weight_fn is None and is_torch_loss(task.loss_fn)
    return getattr(type(task), "loss", None) in (ClassificationTask.loss, LanguageTask.loss)


def _holders(task: Task) -> list[Any]:
    """Return the objects in which a loss may keep state: all attributes of the task except its model and data."""
    attributes = getattr(task, "__dict__", {})
    return [value for name, value in attributes.items() if name not in ("model", "train", "test")]


class _Trial:
    """The outputs of a few samples, and the loss of any part of them."""

    def __init__(self, task: Task, output: Any, batch: Batch, snapshot: Snapshot) -> None:
        self.task, self.output, self.batch, self.snapshot = task, output, batch, snapshot
        self.count = len(batch["x"])

    def proof(self) -> LossProof:
        """Return the result of all checks: finite, deterministic, stateless, and equal in parts."""
        module = getattr(self.task, "loss_module", None)
        moving = MovingState(module) if module is not None else None
        try:
            whole, again = self._loss(0, self.count), self._loss(0, self.count)
            later = self._loss(0, self.count, afresh=False)
            whole_weight = self._weight(0, self.count)
        except Exception as error:
            return LossProof(notes=[f"{_UNPROVED} it fails on {self.count} samples ({describe_error(error, 120)})"])
        if not np.isfinite(whole):
            return LossProof(notes=[f"{_UNPROVED} the loss of {self.count} samples is not finite"])
        if not _close(whole, again, 1e-6):
            return LossProof("the loss draws random numbers: it differs each time it is computed on the same outputs")
        # The state is compared too: one pass may move it so little that the next loss hardly differs.
        keeps = not _close(again, later, 1e-6) or (moving is not None and bool(moving.changed()))
        notes = [_KEEPS] if keeps else []
        refusal: Exception | None = None
        for cuts in _partitions(self.count):
            try:
                average, weights = self._parts(cuts)
            except Exception as error:
                refusal = refusal or error
                continue
            same_weight = abs(whole_weight - weights) <= TOLERANCE * max(1.0, abs(whole_weight))
            is_mean = same_weight and _close(average, whole, 1e-3)
            return LossProof(None if is_mean else self._sentence(whole, average, cuts), notes)
        assert refusal is not None
        unproved = f"{_UNPROVED} it fails on every part of {self.count} samples ({describe_error(refusal, 120)})"
        return LossProof(notes=[*notes, unproved])

    def _parts(self, cuts: list[int]) -> tuple[float, float]:
        """Return the weighted mean of the losses of the parts between `cuts`, and the sum of the weights."""
        total = weights = 0.0
        for begin, end in pairwise(cuts):
            weight = self._weight(begin, end)
            if weight:
                total += self._loss(begin, end) * weight
                weights += weight
        return (total / weights if weights else 0.0), weights

    def _loss(self, begin: int, end: int, afresh: bool = True) -> float:
        """Return the loss of the samples in [`begin`, `end`); `afresh` first restores the state that the loss keeps."""
        if afresh:
            self.snapshot.undo(generators=False)
        return float(self.task.loss(_rows(self.output, begin, end), self._part(begin, end)))

    def _weight(self, begin: int, end: int) -> float:
        return float(self.task.batch_weight(self._part(begin, end)))

    def _part(self, begin: int, end: int) -> Batch:
        return {name: _rows(tensor, begin, end) for name, tensor in self.batch.items()}

    def _sentence(self, whole: float, average: float, cuts: list[int]) -> str:
        parts = "by themselves" if len(cuts) == self.count + 1 else f"in {len(cuts) - 1} parts"
        return (
            f"the loss is not a mean over samples: {self.count} samples give {whole:.6g} together, but {average:.6g} "
            f"{parts}, so the parts of a batch do not average to it; define batch_weight, which says what the "
            "loss is a mean over, or train on one rank without accumulation"
        )


_KEEPS = (
    "the loss keeps state from one pass to the next, and every rank keeps state of its own samples, "
    "so ranks differ from one process"
)


def _partitions(count: int) -> Iterator[list[int]]:
    """Yield lists of boundaries that split `count` samples: single samples, pairs, fours, halves, 3/4 and 1/4."""
    for size in (1, 2, 4):
        if size < count:
            yield [*range(0, count - size + 1, size), count]
    yield [0, count // 2, count]
    if count > 2:
        yield [0, max(1, 3 * count // 4), count]


def _rows(value: Any, begin: int, end: int) -> Any:
    """Return a copy of some rows, since a loss may write to them; a value that is not a tensor is returned as it is."""
    return value[begin:end].clone() if isinstance(value, Tensor) else value


def _close(value: float, expected: float, floor: float) -> bool:
    return abs(value - expected) <= TOLERANCE * max(floor, abs(expected))
