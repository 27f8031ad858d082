"""What a rank imports before its first step, imported early by the standby.

Without this the first step would pay for it: torch loads parts of itself when they are first used. Nothing here starts
a thread or touches CUDA, so that the process can still fork.
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
