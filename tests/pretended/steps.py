"""What happens in a step of the training loop: waits of the host, and memory of the GPU that grows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from labkit.training.trainer import Trainer
from tests.pretended.findings import FINDINGS
from tests.pretended.labels import LABELS

SETTLED = 3
"""Steps after which nothing is set up any more."""
GROWTH = 1024
"""Bytes per step that do not count: losses wait on the GPU until the meter reads them."""


class Steps:
    """Watches the steps of the trainer in this process."""

    def __init__(self) -> None:
        self.counted = 0
        self._bytes: list[tuple[int, Counter[str]]] = []

    def install(self) -> None:
        """Wrap the trainer's steps; a traced step may wait, it measures."""
        self._wrap("_step", lambda step, batches, trace=None: step if trace is None else None)
        self._wrap("_compute_share", lambda ticket, step, share: step)

    def _wrap(self, name: str, step_of: Callable[..., int | None]) -> None:
        """Watch a method of the trainer; `step_of` takes its arguments and returns the step, None if it is traced."""
        original = getattr(Trainer, name)

        def watched(trainer: Any, *args: Any) -> Any:
            step = step_of(*args)
            FINDINGS.in_step = step is not None and step >= trainer.first + SETTLED
            self.counted += FINDINGS.in_step
            try:
                return original(trainer, *args)
            finally:
                if FINDINGS.in_step:
                    self._bytes.append(_memory())
                FINDINGS.in_step = False

        setattr(Trainer, name, watched)

    def growth(self) -> list[str]:
        """Return a sentence if the memory of the GPU has grown with every one of the last steps."""
        sizes = [size for size, _ in self._bytes]
        steps = [after - before for before, after in pairwise(sizes)]
        if len(steps) < SETTLED or min(steps) < GROWTH:
            return []
        grown = self._bytes[-1][1] - self._bytes[0][1]
        where = max(grown, key=lambda place: grown[place])
        return [f"memory of the GPU grows with every step, from {sizes[0]} to {sizes[-1]} bytes, at {where}"]


def _memory() -> tuple[int, Counter[str]]:
    """Return the bytes on the GPU, in all and by the line that allocated them."""
    by_place: Counter[str] = Counter()
    for label in LABELS.on_gpu():
        by_place[label.place] += label.n_bytes
    return by_place.total(), by_place
