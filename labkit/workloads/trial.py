"""A pass through a module that leaves no trace: shapes and costs are found out before the training begins.

Modules change their buffers when they are called in training mode: running means of normalisations, counts of batches.
What is only tried must not count (issue 11, A7).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Afterwards all buffers of the module and torch's generators hold what they held, whatever is computed meanwhile.

    A buffer that was assigned anew is the former tensor again.
    """
    buffers = [
        (owner, name, buffer, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    devices = sorted({buffer.device.index for _, _, buffer, _ in buffers if buffer.is_cuda})
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, kept in buffers:
                owner._buffers[name] = buffer
                buffer.copy_(kept)
