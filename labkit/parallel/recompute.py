"""Activation checkpointing: activations are recomputed in the backward pass instead of being kept (Chen et al. 2016,
arXiv:1604.06174).

`full` keeps only the input of every block. `selective` also keeps the results of matrix products, convolutions and
attention, which cost the most to recompute, and recomputes what is cheap: norms, activations, sums (as torchtitan
does; Korthikanti et al. 2022, arXiv:2205.05198). Neither changes a number.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from labkit.workloads.base import Blocks

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.bmm.default,
    _aten._int_mm.default,
    _aten.addmm.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
"""Operations whose results `selective` keeps."""


def _policy(context: Any, operation: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def apply(module: nn.Module, which: str) -> None:
    """Checkpoint every block of `module`, in place, as `which` says ("full" or "selective"); parameter names stay.

    A model that is not a chain of blocks counts as one block and is recomputed as a whole.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if which == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in list(module.blocks.values()) if isinstance(module, Blocks) else [module]:
        block.forward = partial(checkpoint, block.forward, **options)
