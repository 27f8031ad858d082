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


def obstacle(experiment: Experiment, model: nn.Module, device: torch.device) -> str:
    """Return why the blocks of this model are not to be compiled (`launch.compile`); empty if they are."""
    choice, layout = experiment.launch.compile, experiment.layout
    if choice != "auto":
        return "" if choice == "blocks" else "switched off"
    axes = [axis for axis in ("tp", "pp", "cp", "ep") if getattr(layout, axis) > 1]
    reasons = {
        "not on a GPU": device.type != "cuda",
        "the model is not a chain of blocks": not isinstance(model, Blocks),
        f"blocks are split by {' and '.join(axes)}": bool(axes),
        f"{experiment.quantization.training} computes with operations of labkit": (
            experiment.quantization.training not in FORMATS
        ),
        "quantization-aware training": experiment.quantization.qat != "none",
        "masks change the weights": experiment.sparsity.method != "none",
        "the model is small": sum(parameter.numel() for parameter in model.parameters()) < LEAST_PARAMETERS,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


class Compiled:
    """Compiled blocks of one rank; `blocks` is their number, 0 if nothing is compiled."""

    def __init__(self, experiment: Experiment, model: nn.Module, device: torch.device) -> None:
        self.blocks = 0
        self._obstacle = obstacle(experiment, model, device)
        if not self._obstacle:
            parts: list[Any] = list(model.blocks.values()) if isinstance(model, Blocks) else [model]
            for part in parts:
                part.compile()
            self.blocks = len(parts)

    def uncompiled(self) -> AbstractContextManager[Any]:
        """Return a context in which every block runs in eager mode."""
        return torch.compiler.set_stance("force_eager") if self.blocks else nullcontext()

    def effective(self) -> str:
        """Return what is compiled, or why nothing is, in words for the run's summary."""
        return f"{self.blocks} blocks" if self.blocks else f"none ({self._obstacle})"
