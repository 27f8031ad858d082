"""Modules that a rank needs before its first step, imported early by the standby.

Otherwise the first step would take longer, because torch imports parts of itself on first use. Nothing here starts a
thread or touches CUDA, so that the process can still fork.
"""

from __future__ import annotations

from importlib import import_module

MODULES = (
    "torch",
    "torch._dynamo",  # every optimizer's constructor imports it: 1.7 s
    "torch.distributed",
    "torch.distributed.algorithms.ddp_comm_hooks",  # Accelerate imports it when it wraps a model in DDP
    "torch.nn.parallel",
    "torch.optim",
    "torch.utils.data",
    "accelerate",
    "accelerate.utils",
    "safetensors.torch",
    "labkit.training.worker",
    "labkit.gradients.compression.plain",
    "labkit.sparsity.dense",
    "labkit.quantization.full",
)


def preload() -> None:
    """Import everything in MODULES."""
    for name in MODULES:
        import_module(name)
