"""The exchange of one rank's gradients by a compressor: all buckets of an update under way at once, every byte counted.

Buckets are sent as they come, while the backward pass goes on (or, without overlap, when it is over). Only when the
last one has been sent does anybody wait: then all are brought to their end, round by round, in the order in which they
came. So ranks start all collectives in one order, whatever the method, and the transfers lie beside the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from labkit.experiment import Experiment, Optimizer
from labkit.experiment.registry import registry
from labkit.gradients.compression.compressor import Compressor, GradientBucket, InFlight
from labkit.gradients.compression.hierarchical import Hierarchical
from labkit.gradients.stopwatch import Clock, Stopwatch
from labkit.gradients.wire import Communicator


@dataclass(frozen=True)
class Counters:
    """What combining gradients has cost a rank so far."""

    bytes: int = 0
    """Sent, counted where it left."""
    exposed_seconds: float = 0.0
    """Nothing was computed while gradients travelled; not a number where nobody can tell update by update."""
    compression_seconds: float = 0.0
    """Making gradients smaller and whole again."""
    formula_bytes: int = 0
    """What the formula of the method says of the same updates."""

    def __add__(self, other: Counters) -> Counters:
        """Both together."""
        return Counters(
            self.bytes + other.bytes,
            self.exposed_seconds + other.exposed_seconds,
            self.compression_seconds + other.compression_seconds,
            self.formula_bytes + other.formula_bytes,
        )

    def since(self, before: Counters) -> Counters:
        """What has come since then."""
        return Counters(
            self.bytes - before.bytes,
            self.exposed_seconds - before.exposed_seconds,
            self.compression_seconds - before.compression_seconds,
            self.formula_bytes - before.formula_bytes,
        )


class CommHook:
    """Gradients averaged (or, if `summed`, added up) in place, over the wire of the compressor."""

    def __init__(
        self, compressor: Compressor, overlap: bool = True, summed: bool = False, clock: Clock | None = None
    ) -> None:
        self.compressor = compressor
        self.step = 0
        """Updates done."""
        self.formula_bytes = 0
        self._overlap = overlap
        self._factor = compressor.world_size if summed else 1
        self._buckets: list[GradientBucket] = []
        self._rounds: list[InFlight] = []
        self._futures: list[torch.futures.Future[Tensor]] = []
        self._stopwatch = Stopwatch(clock)
        """At work and waiting, both."""
        self.disabled = False
        """Set while DDP only deals out its buckets: what it hands over then is no gradient and goes nowhere."""

    # -- one update ---------------------------------------------------------------------------------------------------

    def start_reduce(self, flat: Tensor, parameters: Sequence[Any], shapes: Sequence[torch.Size]) -> None:
        """Hand over the gradients of these parameters, one after the other in `flat`; they must stay until `wait`."""
        number = len(self._buckets)
        bucket = GradientBucket(flat, tuple(parameters), tuple(map(tuple, shapes)), self.step, number)
        self._buckets.append(bucket)
        self.formula_bytes += self.compressor.expected_bytes(bucket)
        if self._overlap:
            self._begin(bucket)

    def _begin(self, bucket: GradientBucket) -> None:
        begun = self._stopwatch.now()
        # What is linear may be scaled before or after; what is remembered should have the scale of the result.
        if self._factor != 1:
            bucket.flat.mul_(self._factor)
        rounds = self._reduce_scaled(bucket)
        next(rounds)
        self._rounds.append(rounds)
        self._stopwatch.add(begun)

    def _reduce_scaled(self, bucket: GradientBucket) -> InFlight:
        """The exchange, in units of the compressor."""
        scales = [self.compressor.scale(bucket, parameter) for parameter in bucket.parameters]
        pairs = [
            (view, scale) for view, scale in zip(bucket.views(bucket.flat), scales, strict=True) if scale is not None
        ]
        for view, scale in pairs:
            view.div_(scale.view_as(view))
        mean = yield from self.compressor.reduce(bucket)
        if mean is not bucket.flat:
            bucket.flat.copy_(mean)
        for view, scale in pairs:
            view.mul_(scale.view_as(view))
        return bucket.flat

    def wait(self) -> None:
        """Wait for all that was handed over; it stands in place of what was sent."""
        for bucket in self._buckets[len(self._rounds) :]:
            self._begin(bucket)
        begun = self._stopwatch.now()
        under_way = self._rounds
        while under_way:
            under_way = [rounds for rounds in under_way if not _go_on(rounds)]
        self._buckets, self._rounds = [], []
        self._stopwatch.add(begun)

    def end_update(self) -> None:
        """All gradients of the update are there."""
        self.step += 1

    # -- as DDP's communication hook ----------------------------------------------------------------------------------

    def register(self, replicated: Any) -> None:
        """Let it exchange the gradients of a DistributedDataParallel."""
        # Not typed: DDP compares annotations with classes, and they are strings here.
        replicated.register_comm_hook(self, lambda exchange, bucket: exchange.hook(bucket))

    def hook(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """What DDP calls for every `torch.distributed.GradBucket` that is complete, in one order on all ranks."""
        flat, parameters = bucket.buffer(), bucket.parameters()
        future = torch.futures.Future[Tensor](devices=[flat.device] if flat.is_cuda else None)
        if self.disabled:
            future.set_result(flat)
            return future
        self._futures.append(future)
        self.start_reduce(flat, parameters, [parameter.shape for parameter in parameters])
        if bucket.is_last():
            flats = [bucket.flat for bucket in self._buckets]
            self.wait()
            self.end_update()
            for waiting, result in zip(self._futures, flats, strict=True):
                waiting.set_result(result)
            self._futures = []
        return future

    # -- what it cost -------------------------------------------------------------------------------------------------

    def counters(self) -> Counters:
        """So far."""
        sent = sum(comm.sent for comm in self.compressor.comms)
        waited = sum(comm.seconds for comm in self.compressor.comms)
        return Counters(sent, waited, self._stopwatch.seconds - waited, self.formula_bytes)


def _go_on(rounds: InFlight) -> bool:
    """One round further; True if it is over."""
    try:
        next(rounds)
    except StopIteration:
        return True
    return False


class GradientReducer:
    """All exchanges of one rank: the compressor that its experiment wants, for every group that gradients go over."""

    def __init__(self, experiment: Experiment, steps: int, clock: Clock | None = None) -> None:
        self.clock = clock
        """That of the device that computes; None for the host's."""
        self._gradients, self._seed, self._steps = experiment.gradients, experiment.training.seed, steps
        self._hosts = getattr(experiment.launch.network, "hosts", 1)
        self._optimizer, self._pipeline = experiment.optimizer, experiment.layout.pp > 1
        self._method: type[Compressor] = registry("gradients.compression")[self._gradients.compression.method].load()
        self._options = self._method.Options(**self._gradients.compression.options)
        self._hooks: dict[int, CommHook] = {}

    @property
    def needs_hook(self) -> bool:
        """Must gradients take this way? What is not compressed, overlaps and knows no hosts has a shorter one."""
        return self._method.lossy or self._gradients.hierarchical

    def hook_for(self, group: dist.ProcessGroup, summed: bool = False) -> CommHook:
        """The exchange among the ranks of `group`; one for each group."""
        found = self._hooks.get(id(group))
        if found is None:
            compressor = self._compressor(group)
            found = self._hooks[id(group)] = CommHook(compressor, self._gradients.overlap, summed, self.clock)
        return found

    def _compressor(self, group: dist.ProcessGroup) -> Compressor:
        if self._gradients.hierarchical:
            return Hierarchical(self._method, self._options, self._hosts, self._steps, self._seed, self.clock)
        made = self._method(self._options, Communicator(group, self.clock), self._steps, self._seed)
        if self._pipeline:  # stages add up the gradients of weights that they share, and momenta do not add up
            made.averages_momentum = False
        return made

    @property
    def compressor_name(self) -> str:
        """Name of the compressor that is at work; "none" where gradients take another way."""
        names = {exchange.compressor.name for exchange in self._hooks.values()}
        return "+".join(sorted(names)) or "none"

    def end_update(self) -> None:
        """All gradients of the update are there (DDP's exchange notices by itself)."""
        for exchange in self._hooks.values():
            exchange.end_update()

    def resume(self, step: int) -> None:
        """So many updates are done."""
        for exchange in self._hooks.values():
            exchange.step = step

    def counters(self) -> Counters:
        """What all of them have cost so far."""
        return sum((exchange.counters() for exchange in self._hooks.values()), Counters())

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def has_local_state(self) -> bool:
        """Does each rank keep something for itself?"""
        return bool(self._hooks) and bool(self._method.describe_local_state(self._options))

    def state(self) -> dict[str, Tensor]:
        """What this rank's compressors keep, by the order in which their groups were made, which follows the layout."""
        found: dict[str, Tensor] = {}
        for place, exchange in enumerate(self._hooks.values()):
            found |= {f"{place}.{key}": tensor for key, tensor in exchange.compressor.state().items()}
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        for place, exchange in enumerate(self._hooks.values()):
            start = f"{place}."
            own = {key[len(start) :]: tensor for key, tensor in state.items() if key.startswith(start)}
            exchange.compressor.load(own)

    # -- the optimizer ------------------------------------------------------------------------------------------------

    def inner_optimizer_config(self) -> Optimizer:
        """The optimizer's, without what the compressor does in its place."""
        return self._method.inner_optimizer_config(self._options, self._optimizer) if self._hooks else self._optimizer

    def optimizer(self) -> Callable[[Any], torch.optim.Optimizer] | None:
        """What makes the optimizer from groups of parameters, if the compressor brings its own."""
        return next((exchange.compressor.optimizer(self._optimizer) for exchange in self._hooks.values()), None)

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Show the compressors what works on their results."""
        for exchange in self._hooks.values():
            exchange.compressor.attach_optimizer(optimizer, self._optimizer)
