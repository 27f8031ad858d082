"""Buckets of ZeRO stages 1 and 2: the parameters of a bucket are sharded along dp_shard for the optimizer.

Rank r owns the r-th shard of the flat bucket, of equal length on all ranks: it keeps the sum of those gradients
(reduce-scatter), updates those parameters, and sends them to the others (all-gather). A shard begins and ends anywhere
in a parameter. The optimizer sees the piece of every parameter in it as a tensor of its own, with its own count of
steps, so that parameters that no rank has used in an update can be left out of it.

What is summed along dp_shard is not compressed, only the sum over the replicas of a shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.gradients.cost import all_gather_bytes, all_reduce_bytes, all_to_all_bytes
from labkit.parallel.cast import at_least_float32
from labkit.parallel.decay import decays
from labkit.parallel.sync.axes import summed_axes
from labkit.parallel.sync.bucket import Bucket


@dataclass(frozen=True)
class Piece:
    """A flat stretch of one parameter: the part of it in this rank's shard of a ZeRO bucket."""

    name: str
    """Name of the parameter; empty for the zeros that pad the last shard."""
    index: int
    """Index of the parameter in the bucket."""
    shard: nn.Parameter
    """The stretch as a parameter of the optimizer."""
    shard_offset: int
    """Offset of the piece in this rank's shard of the bucket."""
    parameter_offset: int
    """Offset of the piece in the flat parameter."""

    @property
    def shard_slice(self) -> slice:
        """Slice of the piece in this rank's shard of the bucket."""
        return slice(self.shard_offset, self.shard_offset + self.shard.numel())

    def select(self, tensor: Tensor) -> Tensor:
        """Return the same stretch of a tensor that has the shape of the parameter."""
        return tensor.reshape(-1)[self.parameter_offset : self.parameter_offset + self.shard.numel()]


class Zero1Bucket(Bucket):
    """ZeRO stage 1: rank r sums only the r-th shard of the gradients and keeps the optimizer state for it."""

    def _allocate(self) -> None:
        mesh = self._mesh
        self._group = mesh.group("dp_shard")
        self._outer_group = mesh.group(*(axis for axis in summed_axes(self.spec) if axis != "dp_shard"))
        self.num_shards = mesh.size("dp_shard")
        self._shard_size = math.ceil(self.length / self.num_shards)
        self.flat_parameters = self.parameters[0].detach().new_zeros(self._shard_size * self.num_shards)
        for view, parameter in zip(self._views(self.flat_parameters), self.parameters, strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        self.pieces = self._split_into_pieces(self._local_shard(self.flat_parameters))
        """In the order of the bucket; the padding of the last shard comes last."""
        self._allocate_gradients(self._shard_size * self.num_shards)
        self._sum = self._allocate_sum()

    def _split_into_pieces(self, shard: Tensor) -> list[Piece]:
        """Split this rank's shard of the bucket at the boundaries of parameters."""
        first, end, pieces = self._mesh.index("dp_shard") * self._shard_size, 0, []
        for index, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True)):
            begin, end = end, end + parameter.numel()
            low, high = max(begin, first), min(end, first + self._shard_size)
            if low < high:
                stretch = nn.Parameter(shard[low - first : high - first])
                pieces.append(Piece(name, index, stretch, low - first, low - begin))
        if (filled := max(0, end - first)) < self._shard_size:
            pieces.append(Piece("", 0, nn.Parameter(shard[filled:]), filled, 0))
        return pieces

    @property
    def _compression_group(self) -> dist.ProcessGroup | None:
        return self._outer_group

    def _allocate_sum(self) -> Tensor:
        """Return the memory of the sum over ranks: the local shard of the gradients, so it takes no extra memory."""
        return self._local_shard(self.gradient)

    def _local_shard(self, flat: Tensor) -> Tensor:
        index = self._mesh.index("dp_shard")
        return flat[index * self._shard_size : (index + 1) * self._shard_size]

    def start_reduce(self) -> None:
        """Start to reduce-scatter the gradients."""
        self.sent_bytes += all_to_all_bytes(self.flat_parameters.nbytes, self.num_shards)
        self._received = self.flat_parameters.new_empty(self._shard_size)
        self._work = dist.reduce_scatter_tensor(self._received, self.gradient, group=self._group, async_op=True)

    def wait(self) -> None:
        """Wait for the reduce-scatter and keep its result."""
        super().wait()
        self._accumulate(self._received)
        del self._received

    def _accumulate(self, received: Tensor) -> None:
        self._sum.copy_(received)  # the only reduction of the update

    def finalize(self) -> None:
        """Sum the local shard over the other axes and assign the gradients of the pieces."""
        if self._comm_hook is not None:
            shards = [piece.shard for piece in self.pieces]
            self._comm_hook.start_reduce(self._sum, shards, [shard.shape for shard in shards])
            self._comm_hook.wait()
        elif self._outer_group is not None:
            self.sent_bytes += all_reduce_bytes(self._sum.nbytes, self._outer_group.size())
            dist.all_reduce(self._sum, group=self._outer_group)
        for piece in self.pieces:
            piece.shard.grad = self._sum[piece.shard_slice] if not piece.name or self.used[piece.index] else None

    @property
    def reduced_gradient(self) -> Tensor:
        """The shard of the reduced gradient that this rank keeps."""
        return self._sum

    def optimizer_parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the pieces of this rank's shard, each with whether weight decay applies to it."""
        return [(piece.shard, decays(self.parameters[0])) for piece in self.pieces]

    def all_gather_parameters(self) -> dist.Work:
        """Start to all-gather the shards after an optimizer step; the caller waits for the returned work."""
        shard = self._local_shard(self.flat_parameters).clone()
        self.sent_bytes += all_gather_bytes(shard.nbytes, self.num_shards)
        work: dist.Work = dist.all_gather_into_tensor(self.flat_parameters, shard, group=self._group, async_op=True)
        return work

    def flat_shard(self, read: Callable[[nn.Parameter], Tensor | None], dtype: torch.dtype) -> Tensor:
        """Apply `read` to all pieces and return the results laid out like this rank's shard; zeros for None."""
        flat = self.flat_parameters.new_zeros(self._shard_size, dtype=dtype)
        for piece in self.pieces:
            if (value := read(piece.shard)) is not None:
                flat[piece.shard_slice] = value.reshape(-1).to(flat.dtype)
        return flat

    def optimizer_state(self, read: Callable[[nn.Parameter], dict[str, Any]]) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (name of the parameter, key, full value) of the optimizer state of all parameters (collective).

        `read` returns the state of a piece. A parameter that never had a gradient has no state.
        """
        local_state = {piece.name: read(piece.shard) for piece in self.pieces if piece.name}
        # Scalars are equal in all pieces and are sent as they are; None stands for a tensor, which is gathered below.
        scalars = {
            name: {key: None if value.dim() else value.cpu() for key, value in state.items() if value is not None}
            for name, state in local_state.items()
        }
        gathered: list[Any] = [None] * self.num_shards
        dist.all_gather_object(gathered, scalars, group=self._group)
        states = {name: state for of_rank in gathered for name, state in of_rank.items()}
        dtype = at_least_float32(self.flat_parameters.dtype)
        for key in sorted({key for state in states.values() for key, value in state.items() if value is None}):
            tensors = self.all_gather_by_name(self.flat_shard(lambda piece, key=key: read(piece).get(key), dtype))  # type: ignore[misc]
            yield from ((name, key, tensors[name]) for name in self.names if key in states.get(name, {}))
        yield from ((n, key, value) for n, state in states.items() for key, value in state.items() if value is not None)

    def all_gather_by_name(self, shard: Tensor) -> dict[str, Tensor]:
        """All-gather tensors laid out like the shards; return them by name, shaped like the parameters (collective)."""
        flat = shard.new_empty(len(self.flat_parameters))
        dist.all_gather_into_tensor(flat, shard.contiguous(), group=self._group)
        return dict(zip(self.names, self._views(flat), strict=True))


class Zero2Bucket(Zero1Bucket):
    """ZeRO stage 2: gradients are reduced and freed in each pass; only this rank's shard of the sum is kept."""

    def _allocate_gradients(self, length: int) -> None:
        self.gradient = self.flat_parameters.new_zeros(0)

    def _allocate_sum(self) -> Tensor:
        return torch.zeros_like(self._local_shard(self.flat_parameters))

    def release_unused(self) -> None:
        """Do nothing: every gradient is a new tensor in any case."""

    def collect_used(self) -> None:
        """Do nothing: `start_reduce` sees which gradients exist."""

    def _accumulate(self, received: Tensor) -> None:
        self._sum += received  # one reduction per pass

    def start_reduce(self) -> None:
        """Collect the gradients of all parameters in one tensor and start to reduce-scatter it."""
        self.gradient = torch.zeros_like(self.flat_parameters)
        for index, (view, parameter) in enumerate(zip(self._views(self.gradient), self.parameters, strict=True)):
            if parameter.grad is not None:
                view.copy_(parameter.grad)
                parameter.grad = None
                self.used[index] = True
        super().start_reduce()

    def wait(self) -> None:
        """Wait for the reduce-scatter, add its result to the sum and free the gradients."""
        super().wait()
        self.gradient = self.flat_parameters.new_zeros(0)

    def clear(self) -> None:
        """Set the sum to zero for the next update."""
        self._sum.zero_()
        self.used = [False] * len(self.parameters)
