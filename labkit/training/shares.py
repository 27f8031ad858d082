"""Shares of the batch that follow how fast each rank computes (`training.shares = "speed"`).

Ranks that wait for the slowest rank waste compute time. Here each rank's share of the next steps is proportional to the
samples per second that it has just computed, without waiting, so all ranks finish at about the same time. Every sample
still counts once and with the same weight (replicate.py), so the optimizer step equals that of one process, whatever
the shares are. Source: Chen et al., "Fast Distributed Deep Learning via Worker-adaptive Batch
Sizing" (LB-BSP), SoCC 2020.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

EVERY = 4
"""Number of optimizer steps between two adjustments of the shares."""
NEW = 0.6
"""Weight of the new speeds in an adjustment; below 1, so that one slow moment does not upset the shares."""


class Shares:
    """Shares of all ranks in the batch; every rank has the same numbers."""

    def __init__(self, ranks: int, follow: bool, device: torch.device) -> None:
        self.weights = [1 / ranks] * ranks
        """Fraction of the batch by rank; the sum is 1."""
        self.follow = follow
        self._device = device
        self._seconds = self._samples = 0.0

    def record(self, step: int, seconds: float, samples: float) -> None:
        """Record that this rank computed `samples` in `seconds` in step `step`; collective every `EVERY` steps."""
        if not self.follow:
            return
        self._seconds += seconds
        self._samples += samples
        if (step + 1) % EVERY == 0:
            self._update_weights()

    def _update_weights(self) -> None:
        speeds = torch.zeros(len(self.weights), dtype=torch.float64, device=self._device)
        speeds[dist.get_rank()] = self._samples / max(self._seconds, 1e-9)
        dist.all_reduce(speeds)
        self._seconds = self._samples = 0.0
        total = float(speeds.sum())
        fractions = [float(speed) / total for speed in speeds]
        self.weights = [NEW * new + (1 - NEW) * old for new, old in zip(fractions, self.weights, strict=True)]
