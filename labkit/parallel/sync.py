"""Gradients of all ranks added up in buckets, and ZeRO stages 1 and 2 on top of it (Rajbhandari et al. 2020).

| stage | each rank keeps of the                     | reduction of gradients | after the update      |
|-------|--------------------------------------------|------------------------|-----------------------|
| 0     | everything                                 | all-reduce             |                       |
| 1     | 1/N of the optimizer state                 | reduce-scatter         | all-gather parameters |
| 2     | … and 1/N of the gradients                 | reduce-scatter         | all-gather parameters |

(Stage 3, 1/N of the parameters too, is torch's `fully_shard`: see shard.py.)

A bucket is a stretch of memory that holds the gradients of some parameters one after the other, so that they can be
reduced in one message; with ZeRO such a stretch also holds the parameters themselves, rank r owns its r-th shard, and
the optimizer sees only that shard. The reduction of a bucket starts as soon as the last of its gradients has been
computed, while the backward pass continues.

With a compressor (labkit.gradients) a bucket of stage 0 is reduced by its comm hook instead; what ZeRO sums along
dp_shard is not compressed, only the sum over the replicas of a shard.

Parameters that no rank has used in an update are left out of it, as the optimizer of one process leaves out parameters
without a gradient: they neither decay nor follow their momentum. So the ranks exchange which parameters they have used,
and the optimizer sees the piece of every parameter as a tensor of its own, with its own count of steps.

If the gradient of a parameter is summed over other axes too (dp_replicate, cp, tp with sequence parallelism), the local
shard is summed over those afterwards. All of that is linear, so the order does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.experiment import Gradients
from labkit.gradients.compression.compressor import replicas
from labkit.gradients.cost import all_gather_bytes, all_reduce_bytes, all_to_all_bytes
from labkit.gradients.exchange import CommHook, Counters, GradientReducer
from labkit.gradients.stopwatch import Stopwatch
from labkit.parallel.cast import at_least_float32
from labkit.parallel.cut import ShardSpec
from labkit.parallel.decay import decays, with_decay_flags
from labkit.parallel.mesh import REDUCED, Mesh

NamedParameters = list[tuple[str, nn.Parameter, ShardSpec]]


def summed_axes(spec: ShardSpec) -> tuple[str, ...]:
    """Return the axes over which the gradient of a parameter with this shard spec is summed."""
    return tuple(axis for axis in REDUCED if axis not in spec.shard_dims) + tuple(sorted(spec.partial))


def norm_share(spec: ShardSpec, mesh: Mesh) -> float:
    """Return the factor of one rank's squared norm in the global one: below 1 if other ranks hold the same values."""
    return 0.0 if spec.copy else mesh.size("pp", *spec.shard_dims) / mesh.layout.world_size


class Bucket:
    """Parameters whose gradients are reduced in one message and summed in full on every rank (stage 0)."""

    num_shards = 1
    """Number of shards of the sum, each on a rank of its own."""

    def __init__(
        self, named: NamedParameters, mesh: Mesh, stopwatch: Stopwatch, reducer: GradientReducer | None = None
    ) -> None:
        self.names = [name for name, _, _ in named]
        self.parameters = [parameter for _, parameter, _ in named]
        self.spec = named[0][2]
        self.length = sum(parameter.numel() for parameter in self.parameters)
        self.pending = len(self.parameters)
        """Number of gradients that have not been computed yet in this pass."""
        self.used = [False] * len(self.parameters)
        """Which parameters have received a gradient in this update; after `finalize`, on any rank."""
        self._mesh = mesh
        self._work: dist.Work | None = None
        self.sent_bytes = 0
        """Bytes that this rank has sent for the bucket so far, by the formulas; without those of a compressor."""
        self._stopwatch = stopwatch
        """Adds up the time spent waiting for reductions."""
        self._allocate()
        group = self._compression_group
        self._comm_hook: CommHook | None = reducer.hook_for(group, summed=True) if reducer and group else None

    def _allocate(self) -> None:
        self._group = self._mesh.group(*summed_axes(self.spec))
        self._allocate_gradients(self.length)

    @property
    def _compression_group(self) -> dist.ProcessGroup | None:
        """The ranks among which a compressor may reduce the gradients."""
        return self._group

    def _allocate_gradients(self, length: int) -> None:
        self.gradient = self.parameters[0].detach().new_zeros(length)
        for view, parameter in zip(self._views(self.gradient), self.parameters, strict=True):
            parameter.grad = view

    def _views(self, flat: Tensor) -> list[Tensor]:
        pieces = flat[: self.length].split([parameter.numel() for parameter in self.parameters])
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    def start_reduce(self) -> None:
        """Start to reduce the gradients."""
        if self._comm_hook is not None:
            self._comm_hook.start_reduce(
                self.gradient, self.parameters, [parameter.shape for parameter in self.parameters]
            )
        elif self._group is not None:
            self.sent_bytes += all_reduce_bytes(_bytes(self.gradient), self._group.size())
            self._work = dist.all_reduce(self.gradient, group=self._group, async_op=True)

    def wait(self) -> None:
        """Wait for the reduction."""
        if self._work is not None:
            begun = self._stopwatch.now()
            self._work.wait()
            self._work = None
            self._stopwatch.add(begun)
        elif self._comm_hook is not None:
            self._comm_hook.wait()
        self.pending = len(self.parameters)

    def release_unused(self) -> None:
        """Set gradients of parameters not used so far to None, so that a pass that no hook sees makes new tensors."""
        self._released = [index for index, used in enumerate(self.used) if not used]
        for index in self._released:
            self.parameters[index].grad = None

    def collect_used(self) -> None:
        """Copy the gradients that such a pass has made into the bucket and mark their parameters as used."""
        views = self._views(self.gradient)
        for index in self._released:
            gradient = self.parameters[index].grad
            if gradient is not None:
                views[index].copy_(gradient)
                self.used[index] = True
            self.parameters[index].grad = views[index]

    def finalize(self) -> None:
        """After the last pass of an update, remove the gradients of parameters that no rank has used."""
        for parameter, used in zip(self.parameters, self.used, strict=True):
            if not used:
                parameter.grad = None

    @property
    def reduced_gradient(self) -> Tensor:
        """The part of the reduced gradient that this rank keeps, flat."""
        return self.gradient

    def optimizer_parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the parameters that the optimizer updates, each with whether weight decay applies to it."""
        return with_decay_flags(self.parameters)

    def clear(self) -> None:
        """Set the gradients to zero for the next update."""
        self.gradient.zero_()
        for index, (view, parameter) in enumerate(zip(self._views(self.gradient), self.parameters, strict=True)):
            if not self.used[index]:
                parameter.grad = view
            self.used[index] = False


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
        self.sent_bytes += all_to_all_bytes(_bytes(self.flat_parameters), self.num_shards)
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
            self.sent_bytes += all_reduce_bytes(_bytes(self._sum), self._outer_group.size())
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
        self.sent_bytes += all_gather_bytes(_bytes(shard), self.num_shards)
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


BUCKETS: tuple[type[Bucket], ...] = (Bucket, Zero1Bucket, Zero2Bucket)
"""Bucket class by stage of ZeRO."""


class GradientSync:
    """All buckets of one rank. `stage` 0 sums gradients; 1 and 2 are the stages of ZeRO along dp_shard."""

    averaged_over = 1
    """Number of ranks by which gradients are divided: they are added up, not averaged."""

    def __init__(
        self,
        named: NamedParameters,
        mesh: Mesh,
        stage: int,
        gradients: Gradients,
        reducer: GradientReducer,
        tracks_use: bool = True,
    ) -> None:
        """Sort the parameters into buckets.

        With `tracks_use`, gradients reach the parameters themselves, so that hooks see which of them a pass uses;
        otherwise all count as used in every update.
        """
        self._mesh, self._reduces_every_pass, self._overlap = mesh, stage == 2, gradients.overlap
        self._tracks_use = tracks_use
        self._splits_backward = mesh.layout.splits_backward
        """True if weight gradients are computed outside of autograd's own run, where no hook sees them."""
        self._cpu_group = mesh.cpu_group(*REDUCED) if tracks_use else None
        self._usage_bytes = 0
        """Bytes that this rank has sent so far to report which parameters it has used."""
        compresses = reducer.needs_hook and replicas(mesh.layout) > 1
        self._reducer = reducer if compresses else None
        # On a GPU by events of the stream: the wait of NCCL returns to the host at once.
        self._stopwatch = Stopwatch(reducer.clock)
        self.buckets: list[Bucket] = []
        self._reduces = self._hooks_reduce = False
        max_bytes, bucket_class = gradients.bucket_mb * 2**20, BUCKETS[stage]
        open_buckets: dict[tuple[object, ...], NamedParameters] = {}
        # Gradients are computed in about the reverse order of the parameters.
        for name, parameter, spec in reversed(named):
            layout = (summed_axes(spec), tuple(sorted(spec.shard_dims)), spec.tied, spec.copy)
            key = (*layout, decays(parameter), parameter.dtype)
            members = open_buckets.setdefault(key, [])
            members.append((name, parameter, spec))
            if sum(p.numel() * p.element_size() for _, p, _ in members) >= max_bytes:
                self.buckets.append(bucket_class(open_buckets.pop(key), mesh, self._stopwatch, self._reducer))
        self.buckets += [bucket_class(rest, mesh, self._stopwatch, self._reducer) for rest in open_buckets.values()]
        self._next = 0
        """Index of the next bucket to reduce in this pass: all ranks reduce the buckets in the same order."""
        for bucket in self.buckets:
            for index, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(self._gradient_hook(bucket, index))

    @property
    def sharded(self) -> list[Zero1Bucket]:
        """The buckets of ZeRO; none at stage 0."""
        return [bucket for bucket in self.buckets if isinstance(bucket, Zero1Bucket)]

    def _gradient_hook(self, bucket: Bucket, index: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            bucket.used[index] = True
            if self._hooks_reduce:
                bucket.pending -= 1
                while self._next < len(self.buckets) and not self.buckets[self._next].pending:
                    self._start_next()

        return hook

    def _start_next(self) -> None:
        self.buckets[self._next].start_reduce()
        self._next += 1

    def begin_pass(self, last: bool, scheduled: bool) -> None:
        """Prepare a pass: its gradients are reduced as they are computed if it is the `last`, with stage 2 always.

        With a pipeline's schedule (`scheduled`) they come from several micro-batches and are reduced when it is over.
        """
        self._reduces = last or (self._reduces_every_pass and not scheduled)
        self._hooks_reduce = self._reduces and self._overlap and not scheduled
        self._next = 0
        if self._splits_backward:
            for bucket in self.buckets:
                bucket.release_unused()

    def end_pass(self, last: bool) -> None:
        """Wait for the reductions of a pass; after the `last` one the gradients of the update are complete."""
        if self._splits_backward:
            for bucket in self.buckets:
                bucket.collect_used()
        if not self._reduces:
            return
        self._hooks_reduce = False
        while self._next < len(self.buckets):
            self._start_next()
        wait_for_use = self._start_sharing_use() if last else None
        for bucket in self.buckets:
            bucket.wait()
        if wait_for_use is not None:
            wait_for_use()
            for bucket in self.buckets:
                bucket.finalize()
            if self._reducer is not None:
                self._reducer.end_update()

    def _start_sharing_use(self) -> Callable[[], None]:
        """Start to exchange which parameters each rank has used; return a function that waits for the result.

        A parameter counts as used if any rank with the same stages has used it. A copy of a tied weight always does:
        its use may be on another stage.
        """
        for bucket in self.buckets:
            if bucket.spec.tied or not self._tracks_use:
                bucket.used = [True] * len(bucket.parameters)
        if self._cpu_group is None:
            return lambda: None
        used = torch.tensor([used for bucket in self.buckets for used in bucket.used], dtype=torch.uint8)
        self._usage_bytes += all_reduce_bytes(_bytes(used), self._cpu_group.size())
        work: Any = dist.all_reduce(used, dist.ReduceOp.MAX, group=self._cpu_group, async_op=True)

        def wait_for_use() -> None:
            work.wait()
            flags = iter(used.tolist())
            for bucket in self.buckets:
                bucket.used = [bool(next(flags)) for _ in bucket.used]

        return wait_for_use

    def optimizer_parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the parameters that the optimizer updates, each with whether weight decay applies to it."""
        return [pair for bucket in self.buckets for pair in bucket.optimizer_parameters()]

    def after_update(self) -> None:
        """After an optimizer step, all-gather the parameters of ZeRO and set the gradients to zero."""
        for work in [bucket.all_gather_parameters() for bucket in self.sharded]:
            work.wait()
        for bucket in self.buckets:
            bucket.clear()

    def counters(self) -> Counters:
        """Return the cost of reducing gradients so far, including the all-gather of parameters after updates."""
        sent, waited = self._usage_bytes + sum(bucket.sent_bytes for bucket in self.buckets), self._stopwatch.seconds
        compressed = self._reducer.counters() if self._reducer is not None else Counters()
        return Counters(
            sent + compressed.bytes,
            waited + compressed.exposed_seconds,
            compressed.compression_seconds,
            sent + compressed.formula_bytes,
        )

    def norm_terms(self) -> Iterable[tuple[Tensor, float]]:
        """Yield each gradient of this rank with the factor of its squared norm in the global one."""
        for bucket in self.buckets:
            yield bucket.reduced_gradient, bucket.num_shards * norm_share(bucket.spec, self._mesh)

    def tied_gradients(self) -> Iterable[tuple[str, Tensor]]:
        """Yield (name, gradient) of the weights that other stages hold too."""
        for bucket in self.buckets:
            if bucket.spec.tied:
                yield bucket.spec.tied, bucket.reduced_gradient


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
