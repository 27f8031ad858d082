"""Means over ranks of what a rank holds: weights, buffers, moments. Complex numbers travel as pairs of real ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from labkit.gradients.cost import all_reduce_bytes
from labkit.gradients.wire import Communicator


def trainable_weights(model: nn.Module) -> list[Tensor]:
    """Trained weights, in the order of the model."""
    return [parameter.data for parameter in model.parameters() if parameter.requires_grad]


def floating_buffers(model: nn.Module) -> list[Tensor]:
    """Buffers that have a mean (running means, real or complex), in the order of the model.

    Like the weights, as data: a pass that is under way in another thread may have noted them for its way back.
    """
    return [buffer.data for buffer in model.buffers() if buffer.is_floating_point() or buffer.is_complex()]


def integer_buffers(model: nn.Module) -> list[Tensor]:
    """Buffers of whole numbers and of truth values (counts of batches), in the order of the model."""
    return [buffer for buffer in model.buffers() if not (buffer.is_floating_point() or buffer.is_complex())]


def weights_and_buffers(model: nn.Module) -> list[Tensor]:
    """Trained weights, then buffers."""
    return trainable_weights(model) + floating_buffers(model)


def optimizer_moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The optimizer's tensors that are shaped like weights, in the order of its parameters."""
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            found += [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
    return found


def as_reals(tensor: Tensor) -> Tensor:
    """A view of complex numbers as pairs of real ones, shape [..., 2]; real numbers as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def flatten(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """One after the other, in one new stretch of memory."""
    pieces = [as_reals(tensor.detach()).reshape(-1) for tensor in tensors]
    return torch.cat([piece.to(dtype) if dtype else piece for piece in pieces]) if pieces else torch.zeros(0)


@torch.no_grad()
def unflatten_into(tensors: Iterable[Tensor], values: Tensor) -> None:
    """The inverse of `flatten`: copy `values` back into the tensors."""
    begin = 0
    for tensor in map(as_reals, tensors):
        end = begin + tensor.numel()
        tensor.copy_(values[begin:end].view(tensor.shape))
        begin = end


@torch.no_grad()
def average(tensors: list[Tensor], comm: Communicator) -> None:
    """Replace each by its mean over the ranks (collective), all in one message per number format."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for alike in by_type.values():
        unflatten_into(alike, comm.all_reduce(flatten(alike)).wait().div_(comm.size))


@torch.no_grad()
def broadcast_from_first(tensors: list[Tensor], comm: Communicator) -> None:
    """Replace each by that of the first rank (collective)."""
    for tensor in tensors:
        tensor.copy_(comm.broadcast(tensor.contiguous()).wait())


def average_bytes(tensors: list[Tensor], world_size: int) -> int:
    """What one rank sends for that: an all-reduce per number format."""
    by_type: dict[torch.dtype, int] = {}
    for tensor in tensors:
        by_type[tensor.dtype] = by_type.get(tensor.dtype, 0) + tensor.numel() * tensor.element_size()
    return sum(all_reduce_bytes(size, world_size) for size in by_type.values())


@contextmanager
def _restored_afterwards(tensors: list[Tensor]) -> Iterator[None]:
    """Whatever is done to the tensors meanwhile, afterwards they hold what they held, to the bit."""
    with torch.no_grad():
        own = [tensor.clone() for tensor in tensors]
        try:
            yield
        finally:
            for tensor, kept in zip(tensors, own, strict=True):
                tensor.copy_(kept)


@contextmanager
def shifted_weights(weights: list[Tensor], by: list[Tensor]) -> Iterator[None]:
    """Meanwhile the weights stand somewhere else."""
    with _restored_afterwards(weights):
        for tensor, way in zip(weights, by, strict=True):
            tensor.add_(way)
        with torch.enable_grad():
            yield


@contextmanager
def averaged_replicas(model: nn.Module, comm: Communicator) -> Iterator[None]:
    """Meanwhile the model holds the mean of all ranks' weights and buffers; counts are those of the first rank."""
    tensors, counters = weights_and_buffers(model), integer_buffers(model)
    with _restored_afterwards(tensors + counters):
        average(tensors, comm)
        broadcast_from_first(counters, comm)
        yield
