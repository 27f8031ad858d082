"""Where the tensors of a model are while a layout cuts it: on the host, so that a rank's GPU gets its own part only.

A layout that shards a model exists because one GPU cannot hold it. So every rank builds, sparsifies and cuts the whole
model in the host's memory, where a large one is in mapped files (labkit.workloads.mapped), and moves what it keeps.
What needs the whole model on the device, the rehearsal and the measurement of blocks, borrows the device: afterwards
the model has the tensors that it had before (issue 13, fault 15).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from labkit.workloads.mapped import into_memory

TIMES = 3
"""Room that a model needs on the device to be rehearsed, in times its size: weights, gradients, activations."""


def has_room(size: int, device: torch.device) -> bool:
    """Return whether more than `size` bytes are free in the memory of a GPU, or in the host's memory for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] > size
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > size


def fits(module: nn.Module, device: torch.device, sharing: int) -> bool:
    """Return whether each of `sharing` ranks can hold the whole model on their GPU for a rehearsal."""
    size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    return has_room(TIMES * size * sharing, device)


def take(module: nn.Module, device: torch.device) -> None:
    """Move the parameters and buffers that this rank keeps to its device, in place: on a CPU out of mapped files."""
    if device.type == "cpu":
        into_memory(module)
    else:
        module._apply(lambda tensor: tensor.to(device))


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Hold the parameters and buffers of a module on `device` inside the context.

    Afterwards those of the host are back, with the values that they had before. Does nothing if they are there already.
    """
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    """The tensor of the host, and the one that took its place, by the address of the latter's storage."""

    def borrow(tensor: Tensor) -> Tensor:
        moved = tensor.detach().to(device)
        if tensor.device != moved.device:
            kept[moved.untyped_storage()._cdata] = tensor.detach(), moved
        return moved

    def give_back(tensor: Tensor) -> Tensor:
        original, _ = kept.get(tensor.untyped_storage()._cdata, (tensor, tensor))
        return original if original.shape == tensor.shape else tensor.detach().to(original.device)

    # Accelerate numbers the CPUs of ranks (cpu:1), tensors do not: only the kind of device tells where they are.
    if all(tensor.device.type == device.type for tensor in (*module.parameters(), *module.buffers())):
        yield
        return
    module._apply(borrow)
    try:
        yield
    finally:
        module._apply(give_back)
