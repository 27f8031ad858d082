"""Blocks of the model compiled by `torch.compile`: the norms, activations and casts of a block become few kernels.

A GPU computes them faster than Python can launch them one by one, and each kernel that is saved is a tensor less to
write to memory and to read again. Blocks are compiled one by one, because blocks of one kind share what was compiled,
and because sharding, checkpointing and schedules stand between blocks (as torchtitan does it).

Hooks that are registered later are not seen by what was compiled. So the traced update, and evaluation, whose batches
have other sizes, run uncompiled: `uncompiled()`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from labkit.experiment import Experiment
from labkit.workloads.base import Blocks

LEAST_PARAMETERS = 50_000_000
"""`auto` compiles models from this size on. Compiling takes about ten seconds, which a small run does not win back."""
FORMATS = ("fp32", "bf16", "fp16", "fp8", "pure_bf16")
"""Number formats whose products the compiler knows; the others compute with generators and counters of labkit's own."""


def compiles(experiment: Experiment, model: nn.Module, device: torch.device) -> bool:
    """Tell whether the blocks of this model are to be compiled (`launch.compile`)."""
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
    """The compiled blocks of one rank; `blocks` is their number, 0 where nothing is compiled."""

    def __init__(self, experiment: Experiment, model: nn.Module, device: torch.device) -> None:
        self.blocks = 0
        if compiles(experiment, model, device):
            parts: list[Any] = list(model.blocks.values()) if isinstance(model, Blocks) else [model]
            for part in parts:
                part.compile()
            self.blocks = len(parts)

    def uncompiled(self) -> AbstractContextManager[Any]:
        """Return a context in which every block runs as it is written."""
        return torch.compiler.set_stance("force_eager") if self.blocks else nullcontext()

    def effective(self) -> str:
        """Say what is compiled, as the run's summary shows it."""
        return f"{self.blocks} blocks" if self.blocks else "none"
