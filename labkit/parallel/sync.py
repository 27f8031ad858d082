"""Gradients of all ranks added up in buckets, and ZeRO stages 1 and 2 on top of it (Rajbhandari et al. 2020).

| stage | each rank keeps of the                     | exchange of gradients | after the update   |
|-------|--------------------------------------------|-----------------------|--------------------|
| 0     | everything                                 | all-reduce            |                    |
| 1     | 1/N of the optimizer state                 | reduce-scatter        | gather parameters  |
| 2     | … and 1/N of the gradients                 | reduce-scatter        | gather parameters  |

(Stage 3, 1/N of the parameters too, is torch's `fully_shard`: see shard.py.)

A bucket is a stretch of memory in which the gradients of some parameters lie one after the other, so that one message
takes them all; with ZeRO the parameters themselves lie in such a stretch, rank r owns its r-th part, and the optimizer
sees that part only. A bucket leaves as soon as the last of its gradients is there, while the backward pass goes on.

With a compressor (labkit.gradients) a bucket of stage 0 goes through its exchange instead; what ZeRO sums along
dp_shard stays as it is, and the compressor stands between the replicas of a part.

What no rank has used in an update is left out of it, as the optimizer of one process leaves out what has no gradient:
it neither decays nor follows its momentum. So the ranks tell each other what they have used, and the optimizer sees the
piece of every parameter by itself, with a count of updates of its own.

Where a parameter's gradient is summed over other axes too (dp_replicate, cp, tp with sequence parallelism), the own
part is summed over those afterwards. All of that is linear, so the order does not matter.
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
from labkit.parallel.decay import by_shape, decays
from labkit.parallel.mesh import REDUCED, Mesh
from labkit.parallel.stages import SPLITTING

Named = list[tuple[str, nn.Parameter, ShardSpec]]


def summed_axes(holding: ShardSpec) -> tuple[str, ...]:
    """Axes over which the gradient of such a parameter is added up."""
    return tuple(axis for axis in REDUCED if axis not in holding.cuts) + tuple(sorted(holding.partial))


def share(holding: ShardSpec, mesh: Mesh) -> float:
    """What one rank's squared norm of such a parameter adds to the global one, where others hold the same values."""
    return 0.0 if holding.copy else mesh.size("pp", *holding.cuts) / mesh.layout.world_size


class Bucket:
    """Parameters whose gradients travel together and are added up on every rank (stage 0)."""

    parts = 1
    """Into how many parts, on as many ranks, the sum is cut."""

    def __init__(self, named: Named, mesh: Mesh, watch: Stopwatch, exchanges: GradientReducer | None = None) -> None:
        self.names = [name for name, _, _ in named]
        self.parameters = [parameter for _, parameter, _ in named]
        self.holding = named[0][2]
        self.length = sum(parameter.numel() for parameter in self.parameters)
        self.waiting = len(self.parameters)
        """Gradients that are not there yet."""
        self.used = [False] * len(self.parameters)
        """Which parameters have got a gradient in this update; after `finish`, on any rank."""
        self._mesh = mesh
        self._work: dist.Work | None = None
        self.sent = 0
        """Bytes that this rank has sent for it so far, by the formulas; without what a compressor counts."""
        self._watch = watch
        """Adds up how long exchanges were waited for."""
        self._make()
        group = self._replicas
        self._exchange: CommHook | None = exchanges.hook_for(group, summed=True) if exchanges and group else None

    def _make(self) -> None:
        self._group = self._mesh.group(*summed_axes(self.holding))
        self._lay_out_gradients(self.length)

    @property
    def _replicas(self) -> dist.ProcessGroup | None:
        """The ranks among which a compressor may stand."""
        return self._group

    def _lay_out_gradients(self, length: int) -> None:
        self.gradient = self.parameters[0].detach().new_zeros(length)
        for view, parameter in zip(self._views(self.gradient), self.parameters, strict=True):
            parameter.grad = view

    def _views(self, flat: Tensor) -> list[Tensor]:
        pieces = flat[: self.length].split([parameter.numel() for parameter in self.parameters])
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    def send(self) -> None:
        """Start the exchange."""
        if self._exchange is not None:
            self._exchange.start_reduce(
                self.gradient, self.parameters, [parameter.shape for parameter in self.parameters]
            )
        elif self._group is not None:
            self.sent += all_reduce_bytes(_bytes(self.gradient), self._group.size())
            self._work = dist.all_reduce(self.gradient, group=self._group, async_op=True)

    def arrive(self) -> None:
        """Wait for the exchange."""
        if self._work is not None:
            begun = self._watch.now()
            self._work.wait()
            self._work = None
            self._watch.add(begun)
        elif self._exchange is not None:
            self._exchange.wait()
        self.waiting = len(self.parameters)

    def release_unused(self) -> None:
        """Before a pass whose gradients no hook sees: what has none yet has to get a tensor of its own."""
        self._released = [at for at, used in enumerate(self.used) if not used]
        for at in self._released:
            self.parameters[at].grad = None

    def collect_used(self) -> None:
        """After such a pass: take in the gradients that have come."""
        views = self._views(self.gradient)
        for at in self._released:
            gradient = self.parameters[at].grad
            if gradient is not None:
                views[at].copy_(gradient)
                self.used[at] = True
            self.parameters[at].grad = views[at]

    def finish(self) -> None:
        """All passes have arrived: the optimizer leaves alone what nobody has used."""
        for parameter, used in zip(self.parameters, self.used, strict=True):
            if not used:
                parameter.grad = None

    @property
    def result(self) -> Tensor:
        """What this rank keeps of the gradient of the whole batch."""
        return self.gradient

    def optimized(self) -> list[tuple[nn.Parameter, bool]]:
        """What the optimizer works on, and whether it decays."""
        return by_shape(self.parameters)

    def clear(self) -> None:
        """Zero for the next update."""
        self.gradient.zero_()
        for at, (view, parameter) in enumerate(zip(self._views(self.gradient), self.parameters, strict=True)):
            if not self.used[at]:
                parameter.grad = view
            self.used[at] = False


@dataclass(frozen=True)
class Piece:
    """What the optimizer of a rank sees of one parameter in a bucket of ZeRO: a stretch of it, flat."""

    name: str
    """Of the parameter; empty for the zeros that fill up the last part."""
    at: int
    """Which parameter of the bucket it is."""
    own: nn.Parameter
    begin: int
    """Where the piece begins in this rank's part of the bucket."""
    start: int
    """Where it begins in the flat parameter."""

    @property
    def place(self) -> slice:
        """Where it lies in this rank's part of the bucket."""
        return slice(self.begin, self.begin + self.own.numel())

    def of(self, whole: Tensor) -> Tensor:
        """The same stretch of a tensor that is shaped like the parameter."""
        return whole.reshape(-1)[self.start : self.start + self.own.numel()]


class Zero1Bucket(Bucket):
    """ZeRO stage 1: rank r adds up the r-th part only and keeps the optimizer's state for it."""

    def _make(self) -> None:
        mesh = self._mesh
        self._group = mesh.group("dp_shard")
        self._rest = mesh.group(*(axis for axis in summed_axes(self.holding) if axis != "dp_shard"))
        self.parts = mesh.size("dp_shard")
        self._size = math.ceil(self.length / self.parts)
        self.values = self.parameters[0].detach().new_zeros(self._size * self.parts)
        for view, parameter in zip(self._views(self.values), self.parameters, strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        self.pieces = self._cut(self._own_part(self.values))
        """In the order of the bucket; what fills up the last part comes last."""
        self._lay_out_gradients(self._size * self.parts)
        self._sum = self._make_sum()

    def _cut(self, part: Tensor) -> list[Piece]:
        """Cut this rank's part of the bucket where parameters begin."""
        first, end, pieces = self._mesh.index("dp_shard") * self._size, 0, []
        for at, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True)):
            begin, end = end, end + parameter.numel()
            low, high = max(begin, first), min(end, first + self._size)
            if low < high:
                own = nn.Parameter(part[low - first : high - first])
                pieces.append(Piece(name, at, own, low - first, low - begin))
        if (filled := max(0, end - first)) < self._size:
            pieces.append(Piece("", 0, nn.Parameter(part[filled:]), filled, 0))
        return pieces

    @property
    def _replicas(self) -> dist.ProcessGroup | None:
        return self._rest

    def _make_sum(self) -> Tensor:
        """Where the sum over the ranks stands: in place of the own part of what was sent, so it takes no memory."""
        return self._own_part(self.gradient)

    def _own_part(self, flat: Tensor) -> Tensor:
        index = self._mesh.index("dp_shard")
        return flat[index * self._size : (index + 1) * self._size]

    def send(self) -> None:
        """Start the exchange."""
        self.sent += all_to_all_bytes(_bytes(self.values), self.parts)
        self._arrived = self.values.new_empty(self._size)
        self._work = dist.reduce_scatter_tensor(self._arrived, self.gradient, group=self._group, async_op=True)

    def arrive(self) -> None:
        """Wait for the exchange and keep what has come."""
        super().arrive()
        self._keep(self._arrived)
        del self._arrived

    def _keep(self, arrived: Tensor) -> None:
        self._sum.copy_(arrived)  # the one exchange of the update

    def finish(self) -> None:
        """Sum over the other axes too."""
        if self._exchange is not None:
            pieces = [piece.own for piece in self.pieces]
            self._exchange.start_reduce(self._sum, pieces, [piece.shape for piece in pieces])
            self._exchange.wait()
        elif self._rest is not None:
            self.sent += all_reduce_bytes(_bytes(self._sum), self._rest.size())
            dist.all_reduce(self._sum, group=self._rest)
        for piece in self.pieces:
            piece.own.grad = self._sum[piece.place] if not piece.name or self.used[piece.at] else None

    @property
    def result(self) -> Tensor:
        """The own part."""
        return self._sum

    def optimized(self) -> list[tuple[nn.Parameter, bool]]:
        """The pieces of the own part."""
        return [(piece.own, decays(self.parameters[0])) for piece in self.pieces]

    def spread(self) -> dist.Work:
        """After the update: every rank gets the parts of all others. Wait for what it returns."""
        own = self._own_part(self.values).clone()
        self.sent += all_gather_bytes(_bytes(own), self.parts)
        work: dist.Work = dist.all_gather_into_tensor(self.values, own, group=self._group, async_op=True)
        return work

    def joined(self, read: Callable[[nn.Parameter], Tensor | None], dtype: torch.dtype) -> Tensor:
        """What `read` finds at the pieces, laid out like the own part; zeros where it finds nothing."""
        flat = self.values.new_zeros(self._size, dtype=dtype)
        for piece in self.pieces:
            if (value := read(piece.own)) is not None:
                flat[piece.place] = value.reshape(-1).to(flat.dtype)
        return flat

    def remembered(self, read: Callable[[nn.Parameter], dict[str, Any]]) -> Iterator[tuple[str, str, Tensor]]:
        """Name of the parameter, key and value of what an optimizer keeps of the whole parameters (collective).

        `read` gives what it keeps of a piece. A parameter that never had a gradient has nothing.
        """
        own = {piece.name: read(piece.own) for piece in self.pieces if piece.name}
        # Numbers by themselves are equal in all pieces; of tensors only that they are there.
        told = {
            name: {key: None if value.dim() else value.cpu() for key, value in kept.items() if value is not None}
            for name, kept in own.items()
        }
        parts: list[Any] = [None] * self.parts
        dist.all_gather_object(parts, told, group=self._group)
        kept = {name: keys for part in parts for name, keys in part.items()}
        for key in sorted({key for keys in kept.values() for key, value in keys.items() if value is None}):
            flat = self.joined(lambda piece, key=key: read(piece).get(key), at_least_float32(self.values.dtype))  # type: ignore[misc]
            whole = self.gathered(flat)
            yield from ((name, key, whole[name]) for name in self.names if key in kept.get(name, {}))
        yield from ((n, key, value) for n, keys in kept.items() for key, value in keys.items() if value is not None)

    def gathered(self, own: Tensor) -> dict[str, Tensor]:
        """Tensors shaped like the parameters, by name, from every rank's part (collective)."""
        flat = own.new_empty(len(self.values))
        dist.all_gather_into_tensor(flat, own.contiguous(), group=self._group)
        return dict(zip(self.names, self._views(flat), strict=True))


class Zero2Bucket(Zero1Bucket):
    """ZeRO stage 2: gradients are collected when all are there, sent, and freed; between passes only sums stay."""

    def _lay_out_gradients(self, length: int) -> None:
        self.gradient = self.values.new_zeros(0)

    def _make_sum(self) -> Tensor:
        return torch.zeros_like(self._own_part(self.values))

    def release_unused(self) -> None:
        """Gradients are tensors of their own in any case."""

    def collect_used(self) -> None:
        """Whoever sends sees what is there."""

    def _keep(self, arrived: Tensor) -> None:
        self._sum += arrived  # one exchange a pass

    def send(self) -> None:
        """Collect, and start the exchange."""
        self.gradient = torch.zeros_like(self.values)
        for at, (view, parameter) in enumerate(zip(self._views(self.gradient), self.parameters, strict=True)):
            if parameter.grad is not None:
                view.copy_(parameter.grad)
                parameter.grad = None
                self.used[at] = True
        super().send()

    def arrive(self) -> None:
        """Wait for the exchange, add what has come and free what was sent."""
        super().arrive()
        self.gradient = self.values.new_zeros(0)

    def clear(self) -> None:
        """Zero for the next update."""
        self._sum.zero_()
        self.used = [False] * len(self.parameters)


BUCKETS: tuple[type[Bucket], ...] = (Bucket, Zero1Bucket, Zero2Bucket)
"""By stage."""


class GradientSync:
    """All buckets of one rank. `stage` 0 sums gradients; 1 and 2 are the stages of ZeRO along dp_shard."""

    averaged_over = 1
    """Gradients add up, nothing is averaged."""

    def __init__(
        self,
        named: Named,
        mesh: Mesh,
        stage: int,
        gradients: Gradients,
        exchanges: GradientReducer,
        sees_use: bool = True,
    ) -> None:
        """`sees_use`: do gradients reach the parameters themselves? Else all count as used in every update."""
        self._mesh, self._each_pass, self._overlap = mesh, stage == 2, gradients.overlap
        self._sees_use = sees_use
        self._splits = mesh.layout.pp > 1 and mesh.layout.schedule in SPLITTING
        """Do gradients of weights come outside of autograd's own run, where no hook sees them?"""
        self._on_host = mesh.on_host(*REDUCED) if sees_use else None
        self._sent_about_use = 0
        """Bytes by which this rank has told the others which parameters it has used, so far."""
        compresses = exchanges.needs_hook and replicas(mesh.layout) > 1
        self._exchanges = exchanges if compresses else None
        # On a GPU by events of the stream: the wait of NCCL returns to the host at once.
        self._watch = Stopwatch(exchanges.clock)
        self.buckets: list[Bucket] = []
        self._sends = self._hooks_send = False
        limit, kind_of_bucket = gradients.bucket_mb * 2**20, BUCKETS[stage]
        rows: dict[tuple[object, ...], Named] = {}
        # Gradients come in about the opposite order of the parameters.
        for name, parameter, holding in reversed(named):
            alike = (summed_axes(holding), tuple(sorted(holding.cuts)), holding.tied, holding.copy)
            kind = (*alike, decays(parameter), parameter.dtype)
            row = rows.setdefault(kind, [])
            row.append((name, parameter, holding))
            if sum(p.numel() * p.element_size() for _, p, _ in row) >= limit:
                self.buckets.append(kind_of_bucket(rows.pop(kind), mesh, self._watch, self._exchanges))
        self.buckets += [kind_of_bucket(row, mesh, self._watch, self._exchanges) for row in rows.values()]
        self._next = 0
        """The first bucket that has not left in this pass: they leave in one order, on all ranks the same."""
        for bucket in self.buckets:
            for at, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(self._ready(bucket, at))

    @property
    def sharded(self) -> list[Zero1Bucket]:
        """The buckets of ZeRO; none at stage 0."""
        return [bucket for bucket in self.buckets if isinstance(bucket, Zero1Bucket)]

    def _ready(self, bucket: Bucket, at: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            bucket.used[at] = True
            if self._hooks_send:
                bucket.waiting -= 1
                while self._next < len(self.buckets) and not self.buckets[self._next].waiting:
                    self._send_next()

        return hook

    def _send_next(self) -> None:
        self.buckets[self._next].send()
        self._next += 1

    def begin_pass(self, last: bool, scheduled: bool) -> None:
        """Before a pass: gradients leave as they come, in the last one, with stage 2 in each one.

        Those of a pipeline's schedule come from several microbatches and leave when it is over.
        """
        self._sends = last or (self._each_pass and not scheduled)
        self._hooks_send = self._sends and self._overlap and not scheduled
        self._next = 0
        if self._splits:
            for bucket in self.buckets:
                bucket.release_unused()

    def end_pass(self, last: bool) -> None:
        """After a pass: what was sent arrives; after the `last` one the update's gradients are complete."""
        if self._splits:
            for bucket in self.buckets:
                bucket.collect_used()
        if not self._sends:
            return
        self._hooks_send = False
        while self._next < len(self.buckets):
            self._send_next()
        agree = self._tell_use() if last else None
        for bucket in self.buckets:
            bucket.arrive()
        if agree is not None:
            agree()
            for bucket in self.buckets:
                bucket.finish()
            if self._exchanges is not None:
                self._exchanges.end_update()

    def _tell_use(self) -> Callable[[], None]:
        """Begin to tell the other ranks which parameters this one has used; what is returned waits for theirs.

        A parameter counts as used if it is on any rank with the same stages. A copy of a tied weight always does: what
        uses it may stand on another stage.
        """
        for bucket in self.buckets:
            if bucket.holding.tied or not self._sees_use:
                bucket.used = [True] * len(bucket.parameters)
        if self._on_host is None:
            return lambda: None
        used = torch.tensor([used for bucket in self.buckets for used in bucket.used], dtype=torch.uint8)
        self._sent_about_use += all_reduce_bytes(_bytes(used), self._on_host.size())
        work: Any = dist.all_reduce(used, dist.ReduceOp.MAX, group=self._on_host, async_op=True)

        def agree() -> None:
            work.wait()
            rest = iter(used.tolist())
            for bucket in self.buckets:
                bucket.used = [bool(next(rest)) for _ in bucket.used]

        return agree

    def optimized(self) -> list[tuple[nn.Parameter, bool]]:
        """What the optimizer works on, and whether it decays."""
        return [pair for bucket in self.buckets for pair in bucket.optimized()]

    def after_update(self) -> None:
        """The optimizer has stepped: with ZeRO all get all parts; gradients start from zero again."""
        for work in [bucket.spread() for bucket in self.sharded]:
            work.wait()
        for bucket in self.buckets:
            bucket.clear()

    def counters(self) -> Counters:
        """What combining gradients has cost so far, the gathering of parameters after an update included."""
        sent, waited = self._sent_about_use + sum(bucket.sent for bucket in self.buckets), self._watch.seconds
        counted = self._exchanges.counters() if self._exchanges is not None else Counters()
        return Counters(
            sent + counted.bytes,
            waited + counted.exposed_seconds,
            counted.compression_seconds,
            sent + counted.formula_bytes,
        )

    def terms(self) -> Iterable[tuple[Tensor, float]]:
        """Every gradient of this rank with the share of its squared norm that this rank adds to the global one."""
        for bucket in self.buckets:
            yield bucket.result, bucket.parts * share(bucket.holding, self._mesh)

    def tied(self) -> Iterable[tuple[str, Tensor]]:
        """Gradients of weights that other stages hold too."""
        for bucket in self.buckets:
            if bucket.holding.tied:
                yield bucket.holding.tied, bucket.result


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
