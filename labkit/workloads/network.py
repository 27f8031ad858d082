"""What a workload tells about its network before it is built: what layouts can cut, and into how many parts (no torch).

A workload's class returns it from `describe(options)`. None, or an empty dict, stands for what only the ranks know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Network:
    """A network as far as the rules of layouts need it."""

    blocks: int | None = None
    """Length of its chain of blocks; None if only the ranks know it."""
    unsplittable: str = ""
    """Name of the network if it cannot be split into blocks, so that no axis can cut it; empty if it can."""
    has_plans: bool = True
    """Whether its layers say how tensor and context parallelism shard them."""
    tp_sizes: Mapping[str, int] = field(default_factory=dict)
    """What tensor parallelism distributes over ranks, in words, and how many of it there are."""
    sequence: int | None = None
    """Length of the sequence to which it attends; None if it has none."""
    keeps_norms_whole: str = ""
    """Why sequence parallelism cannot shard its norms; empty if it can."""
    experts: int = 0
    """Experts in each of its layers; 0 for none."""
    expert_capacity: bool = False
    """Whether an expert's tokens of a sequence are limited."""
    attention_dropout: bool = False
    """Whether its attention has dropout."""

    @property
    def name(self) -> str:
        """How refusals call the network if it cannot be cut; empty if it can."""
        return self.unsplittable or ("" if self.has_plans else "your own model")
