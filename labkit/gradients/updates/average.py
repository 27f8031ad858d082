"""Averages over ranks of weights, buffers and moments. Complex numbers are sent as pairs of real ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from labkit.gradients.cost import all_reduce_bytes
from labkit.gradients.wire import Communicator


def trainable_weights(model: nn.Module) -> list[Tensor]:
    """Return the trainable weights, in the order of the model."""
    return [parameter.data for parameter in model.parameters() if parameter.requires_grad]


def floating_buffers(model: nn.Module) -> list[Tensor]:
    """Return the buffers that can be averaged (running means, real or complex), in the order of the model.

    Like the weights they are returned as `.data`: a pass in another thread may have saved them for its backward pass.
    """
    return [buffer.data for buffer in model.buffers() if buffer.is_floating_point() or buffer.is_complex()]


def integer_buffers(model: nn.Module) -> list[Tensor]:
    """Return the integer and boolean buffers (e.g. counts of batches), in the order of the model."""
    return [buffer for buffer in model.buffers() if not (buffer.is_floating_point() or buffer.is_complex())]


def weights_and_buffers(model: nn.Module) -> list[Tensor]:
    """Return the trainable weights, then the buffers that can be averaged."""
    return trainable_weights(model) + floating_buffers(model)


def optimizer_moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors of the optimizer's state that are not scalars, in the order of its parameters."""
    moments = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            moments += [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
    return moments


def as_reals(tensor: Tensor) -> Tensor:
    """Return a view of a complex tensor as pairs of real numbers, shape [..., 2]; a real tensor as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def flatten(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Concatenate tensors into a new flat one, converted to `dtype` if given."""
    pieces = [as_reals(tensor.detach()).reshape(-1) for tensor in tensors]
    return torch.cat([piece.to(dtype) if dtype else piece for piece in pieces]) if pieces else torch.zeros(0)


@torch.no_grad()
def unflatten_into(tensors: Iterable[Tensor], values: Tensor) -> None:
    """Copy the flat `values` back into the tensors, as the inverse of `flatten`."""
    begin = 0
    for tensor in map(as_reals, tensors):
        end = begin + tensor.numel()
        tensor.copy_(values[begin:end].view(tensor.shape))
        begin = end


@torch.no_grad()
def average(tensors: list[Tensor], comm: Communicator) -> None:
    """Replace each tensor by its mean over the ranks (collective), with one message per dtype."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for same_type in by_type.values():
        unflatten_into(same_type, comm.all_reduce(flatten(same_type)).wait().div_(comm.size))


@torch.no_grad()
def broadcast_from_first(tensors: list[Tensor], comm: Communicator) -> None:
    """Replace each tensor by that of the first rank (collective)."""
    for tensor in tensors:
        tensor.copy_(comm.broadcast(tensor.contiguous()).wait())


def average_bytes(tensors: list[Tensor], world_size: int) -> int:
    """Return the bytes that one rank sends for `average`: an all-reduce per dtype."""
    by_type: dict[torch.dtype, int] = {}
    for tensor in tensors:
        by_type[tensor.dtype] = by_type.get(tensor.dtype, 0) + tensor.numel() * tensor.element_size()
    return sum(all_reduce_bytes(size, world_size) for size in by_type.values())


@contextmanager
def _restored_afterwards(tensors: list[Tensor]) -> Iterator[None]:
    """Context manager that restores the values of the tensors at its end, bit for bit."""
    with torch.no_grad():
        copies = [tensor.clone() for tensor in tensors]
        try:
            yield
        finally:
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)


@contextmanager
def shifted_weights(weights: list[Tensor], offsets: list[Tensor]) -> Iterator[None]:
    """Context manager that shifts the weights by `offsets` and restores them at its end."""
    with _restored_afterwards(weights):
        for tensor, offset in zip(weights, offsets, strict=True):
            tensor.add_(offset)
        with torch.enable_grad():
            yield


@contextmanager
def averaged_replicas(model: nn.Module, comm: Communicator) -> Iterator[None]:
    """Context manager in which the model holds the mean weights and buffers of all ranks.

    Integer buffers are those of the first rank. Its end restores the model.
    """
    tensors, counters = weights_and_buffers(model), integer_buffers(model)
    with _restored_afterwards(tensors + counters):
        average(tensors, comm)
        broadcast_from_first(counters, comm)
        yield
