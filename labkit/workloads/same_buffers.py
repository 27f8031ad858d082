"""Restoring modules whose state may belong to labkit or torch, such as stages that a layout has taken over.

State of a user's own task beyond buffers is restored by restore.py, which must not touch the state of a layout.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the modes and buffers of the model and all random generators at the end."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, tensor) for module in model.modules() for name, tensor in module._buffers.items()]
    values = [None if tensor is None else tensor.detach().clone() for _, _, tensor in buffers]
    devices = {tensor.device.index or 0 for tensor in model.parameters() if tensor.device.type == "cuda"}
    ours, theirs = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(theirs)
            with torch.no_grad():
                for (module, name, tensor), value in zip(buffers, values, strict=True):
                    module._buffers[name] = tensor
                    if tensor is not None and value is not None:
                        tensor.copy_(value)
            for module, training in modes:
                module.training = training
