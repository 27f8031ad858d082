"""Shares of the batch that follow how fast each rank computes (`training.shares = "speed"`).

Ranks that wait for the slowest lose what they could compute meanwhile. Here each rank's share of the next updates is
proportional to the samples per second that it has just computed, waiting left out; so all are done at about the same
time. Every sample still counts once and with the same weight (replicate.py), so the update stays what one process
computes, whatever the shares are. Sources: Chen et al., "Fast Distributed Deep Learning via Worker-adaptive Batch
Sizing" (LB-BSP), SoCC 2020.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

EVERY = 4
"""Updates between two looks at the ranks' speeds."""
NEW = 0.6
"""How much a look changes the shares: the rest stays, so that one slow moment does not throw them about."""


class Shares:
    """The shares of all ranks, equal on all of them."""

    def __init__(self, ranks: int, follow: bool, device: torch.device) -> None:
        self.weights = [1 / ranks] * ranks
        """Part of the batch by rank; they sum up to 1."""
        self.follow = follow
        self._device = device
        self._seconds = self._samples = 0.0

    def computed(self, step: int, seconds: float, samples: float) -> None:
        """Take note of what this rank has computed, samples of update `step` in seconds; now and then collective."""
        if not self.follow:
            return
        self._seconds += seconds
        self._samples += samples
        if (step + 1) % EVERY == 0:
            self._look()

    def _look(self) -> None:
        speeds = torch.zeros(len(self.weights), dtype=torch.float64, device=self._device)
        speeds[dist.get_rank()] = self._samples / max(self._seconds, 1e-9)
        dist.all_reduce(speeds)
        self._seconds = self._samples = 0.0
        total = float(speeds.sum())
        parts = [float(speed) / total for speed in speeds]
        self.weights = [NEW * part + (1 - NEW) * weight for part, weight in zip(parts, self.weights, strict=True)]
