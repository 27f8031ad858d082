"""Means over ranks of what a rank holds: weights, buffers, moments. Complex numbers travel as pairs of real ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from labkit.gradients.cost import all_reduce_bytes
from labkit.gradients.wire import Communicator


def trained_of(model: nn.Module) -> list[Tensor]:
    """Trained weights, in the order of the model."""
    return [parameter.data for parameter in model.parameters() if parameter.requires_grad]


def buffers_of(model: nn.Module) -> list[Tensor]:
    """Buffers that have a mean (running means, real or complex), in the order of the model.

    Like the weights, as data: a pass that is under way in another thread may have noted them for its way back.
    """
    return [buffer.data for buffer in model.buffers() if buffer.is_floating_point() or buffer.is_complex()]


def counters_of(model: nn.Module) -> list[Tensor]:
    """Buffers of whole numbers and of truth values (counts of batches), in the order of the model."""
    return [buffer for buffer in model.buffers() if not (buffer.is_floating_point() or buffer.is_complex())]


def state_of(model: nn.Module) -> list[Tensor]:
    """Trained weights, then buffers."""
    return trained_of(model) + buffers_of(model)


def moments_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
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


def flat(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """One after the other, in one new stretch of memory."""
    pieces = [as_reals(tensor.detach()).reshape(-1) for tensor in tensors]
    return torch.cat([piece.to(dtype) if dtype else piece for piece in pieces]) if pieces else torch.zeros(0)


@torch.no_grad()
def fill(tensors: Iterable[Tensor], values: Tensor) -> None:
    """The inverse of `flat`: copy `values` back into the tensors."""
    begin = 0
    for tensor in map(as_reals, tensors):
        end = begin + tensor.numel()
        tensor.copy_(values[begin:end].view(tensor.shape))
        begin = end


@torch.no_grad()
def average(tensors: list[Tensor], wire: Communicator) -> None:
    """Replace each by its mean over the ranks (collective), all in one message per number format."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for alike in by_type.values():
        fill(alike, wire.all_reduce(flat(alike)).wait().div_(wire.size))


@torch.no_grad()
def take_over(tensors: list[Tensor], wire: Communicator) -> None:
    """Replace each by that of the first rank (collective)."""
    for tensor in tensors:
        tensor.copy_(wire.broadcast(tensor.contiguous()).wait())


def average_bytes(tensors: list[Tensor], ranks: int) -> int:
    """What one rank sends for that: an all-reduce per number format."""
    by_type: dict[torch.dtype, int] = {}
    for tensor in tensors:
        by_type[tensor.dtype] = by_type.get(tensor.dtype, 0) + tensor.numel() * tensor.element_size()
    return sum(all_reduce_bytes(size, ranks) for size in by_type.values())


@contextmanager
def _kept(tensors: list[Tensor]) -> Iterator[None]:
    """Whatever is done to the tensors meanwhile, afterwards they hold what they held, to the bit."""
    with torch.no_grad():
        own = [tensor.clone() for tensor in tensors]
        try:
            yield
        finally:
            for tensor, kept in zip(tensors, own, strict=True):
                tensor.copy_(kept)


@contextmanager
def moved(weights: list[Tensor], by: list[Tensor]) -> Iterator[None]:
    """Meanwhile the weights stand somewhere else."""
    with _kept(weights):
        for tensor, way in zip(weights, by, strict=True):
            tensor.add_(way)
        with torch.enable_grad():
            yield


@contextmanager
def held_aside(model: nn.Module, wire: Communicator) -> Iterator[None]:
    """Meanwhile the model holds the mean of all ranks' weights and buffers; counts are those of the first rank."""
    tensors, counters = state_of(model), counters_of(model)
    with _kept(tensors + counters):
        average(tensors, wire)
        take_over(counters, wire)
        yield
