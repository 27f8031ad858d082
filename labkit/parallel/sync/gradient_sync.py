"""All buckets of one rank: how parameters are sorted into them, and when each is reduced during a backward pass.

All ranks reduce the buckets in the same order, about the reverse order of the parameters, in which gradients are
computed. So that every rank leaves out the parameters that none has used, the ranks exchange which they have used while
the last buckets are reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.experiment import Gradients
from labkit.gradients.compression.compressor import replicas
from labkit.gradients.cost import all_reduce_bytes
from labkit.gradients.exchange import Counters, GradientReducer
from labkit.gradients.stopwatch import Stopwatch
from labkit.parallel.decay import decays
from labkit.parallel.mesh import REDUCED, Mesh
from labkit.parallel.sync.axes import norm_share, summed_axes
from labkit.parallel.sync.bucket import Bucket, NamedParameters
from labkit.parallel.sync.zero import Zero1Bucket, Zero2Bucket

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
        self._gathers: dict[Zero1Bucket, dist.Work] = {}
        """All-gathers of parameters that this rank has not waited for yet."""
        self._buckets_of: dict[nn.Module, list[Zero1Bucket]] = {}
        max_bytes, bucket_class = gradients.bucket_mb * 2**20, BUCKETS[stage]
        open_buckets: dict[tuple[object, ...], NamedParameters] = {}
        # Gradients are computed in about the reverse order of the parameters.
        for name, parameter, spec in reversed(named):
            layout = (summed_axes(spec), tuple(sorted(spec.shard_dims)), spec.tied, spec.copy)
            key = (*layout, decays(parameter), parameter.dtype)
            members = open_buckets.setdefault(key, [])
            members.append((name, parameter, spec))
            if sum(p.nbytes for _, p, _ in members) >= max_bytes:
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
        self._usage_bytes += all_reduce_bytes(used.nbytes, self._cpu_group.size())
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
        """After an optimizer step, start to all-gather the parameters of ZeRO, and set the gradients to zero.

        Nobody may read a parameter before `wait_for_parameters`. Those that the forward pass needs first come first.
        """
        self._gathers |= {sharded: sharded.all_gather_parameters() for sharded in reversed(self.sharded)}
        for bucket in self.buckets:
            bucket.clear()

    def wait_for_parameters(self, module: nn.Module | None = None) -> None:
        """Wait until this rank has the parameters of a module from all ranks; without a module, those of all."""
        needed = list(self._gathers) if module is None or not self._gathers else self._sharded_buckets(module)
        for bucket in needed:
            if (work := self._gathers.pop(bucket, None)) is not None:
                begun = self._stopwatch.now()
                work.wait()
                self._stopwatch.add(begun)

    def _sharded_buckets(self, module: nn.Module) -> list[Zero1Bucket]:
        """Return the buckets that hold parameters of a module."""
        if module not in self._buckets_of:
            own = set(map(id, module.parameters()))
            self._buckets_of[module] = [b for b in self.sharded if not own.isdisjoint(map(id, b.parameters))]
        return self._buckets_of[module]

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
