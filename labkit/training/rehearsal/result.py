"""The result of a rank's rehearsal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RehearsalResult:
    """Findings of the rehearsal on one rank."""

    notes: list[str] = field(default_factory=list)
    """Sentences to be added to the run's warnings."""
    unused: list[str] = field(default_factory=list)
    """Names of trainable parameters that got no gradient in some pass on some rank."""
    dynamic: bool = False
    """Whether the control flow may depend on the samples, on chance or on the number of the pass, on some rank."""
    user_code: bool = True
    """Whether the task, or a module of its model, is not labkit's own."""
    task_hash: str = ""
    """Hash of the task that the rank has built; runs of the same task have equal hashes."""
    model_flops: int | None = None
    """Model FLOPs of one sample, which rank 0 counts; None if they are not known."""
    seconds: float = 0.0
    """Duration of the rehearsal (s)."""

    def event(self) -> dict[str, Any]:
        """Return the fields of the event `rehearsal`."""
        fields = {"seconds": round(self.seconds, 4), "unused": self.unused[:20], "built": self.task_hash}
        return fields if self.model_flops is None else fields | {"model_flops_per_sample": self.model_flops}

    @property
    def irregular(self) -> bool:
        """Whether a pass may leave parameters without a gradient."""
        return self.dynamic or bool(self.unused)
