"""Compilation of the model's blocks by `torch.compile`: norms, activations and casts of a block become a few kernels.

A GPU computes these operations faster than Python can launch them one by one, and each kernel saved is one tensor less
to write to memory and read again. Blocks are compiled one by one, as in torchtitan, because equal blocks share the
compiled code, and because sharding, activation checkpointing and schedules work between blocks.

Compiled code does not see hooks that are registered later. So the traced step runs uncompiled (`uncompiled()`), and so
does the evaluation, whose batches have other sizes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from labkit.experiment import Experiment
from labkit.workloads.base import Blocks

LEAST_PARAMETERS = 50_000_000
"""Minimum size of a model that `auto` compiles. Compiling takes about ten seconds, too much for a small run."""
FORMATS = ("fp32", "tf32", "bf16", "fp16", "fp8", "pure_bf16")
"""Precisions whose matrix products can be compiled; the others use generators and counters of labkit's own."""


def compiles(experiment: Experiment, model: nn.Module, device: torch.device) -> bool:
    """Return True if the blocks of this model are to be compiled (`launch.compile`)."""
    if experiment.launch.compile != "auto":
        return experiment.launch.compile == "blocks"
    layout = experiment.layout
    return (
        device.type == "cuda"
        and isinstance(model, Blocks)
        and layout.world_size == layout.dp_replicate * layout.dp_shard
        and experiment.quantization.training in FORMATS
        and experiment.quantization.qat == "none"
        and experiment.sparsity.method == "none"
        and sum(parameter.numel() for parameter in model.parameters()) >= LEAST_PARAMETERS
    )


class Compiled:
    """Compiled blocks of one rank; `blocks` is their number, 0 if nothing is compiled."""

    def __init__(self, experiment: Experiment, model: nn.Module, device: torch.device) -> None:
        self.blocks = 0
        if compiles(experiment, model, device):
            parts: list[Any] = list(model.blocks.values()) if isinstance(model, Blocks) else [model]
            for part in parts:
                part.compile()
            self.blocks = len(parts)

    def uncompiled(self) -> AbstractContextManager[Any]:
        """Return a context in which every block runs in eager mode."""
        return torch.compiler.set_stance("force_eager") if self.blocks else nullcontext()

    def effective(self) -> str:
        """Return what is compiled, in words for the run's summary."""
        return f"{self.blocks} blocks" if self.blocks else "none"
