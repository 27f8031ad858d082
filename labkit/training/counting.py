"""What ranks send for their gradients and weights: counted for every step, and added up for the run."""

from __future__ import annotations

import math
from typing import Any

from labkit.gradients.exchange import Counters
from labkit.gradients.updates.update import UpdateRule
from labkit.parallel.model import ParallelModel
from labkit.parallel.replicate import ReplicatedModel


class CommunicationCount:
    """The counters of the model's gradient reduction and of the update rule, taken together."""

    def __init__(self, model: ReplicatedModel | ParallelModel, update: UpdateRule, compressor: str) -> None:
        self._model, self._update, self._compressor = model, update, compressor
        self._before, self._sum = Counters(), Counters()

    def begin_step(self) -> None:
        """Leave out what was sent since the last step: an evaluation, for example."""
        self._before = self._now() or self._before

    def take(self) -> Counters | None:
        """Return what was counted since `begin_step` or the last call, and add it to the sum; None without counters."""
        now = self._now()
        if now is None:
            return None
        difference, self._before = now.since(self._before), now
        self._sum += difference
        return difference

    def per_step(self, steps: int) -> dict[str, Any]:
        """Return communication per step of a run of `steps`: counted bytes, bytes by formula, compression (seconds)."""
        counted = self._sum
        if not steps or self._now() is None:
            return {}
        rule = self._update.counters()
        of_rule: dict[str, Any] = {} if rule is None else {"bytes_per_step": round(counted.bytes / steps)}
        if rule is not None and not math.isnan(counted.exposed_seconds):
            of_rule["exposed_seconds_per_step"] = counted.exposed_seconds / steps
        return of_rule | {
            "counted_bytes_per_step": counted.bytes / steps,
            "formula_bytes_per_step": counted.formula_bytes / steps,
            "compression_seconds": counted.compression_seconds / steps,
            "method": self._compressor,
        }

    def _now(self) -> Counters | None:
        """Return the counters so far; None if ranks do not communicate or nothing is counted."""
        counters = [part for part in (self._model.counters(), self._update.counters()) if part is not None]
        return sum(counters[1:], counters[0]) if counters else None
