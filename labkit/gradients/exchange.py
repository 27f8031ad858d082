"""Communication hooks that reduce gradients with a compressor: all buckets in flight at once, every byte counted.

Each bucket is sent as soon as it is complete, while the backward pass continues (or, without overlap, when it is over).
A rank waits only after it has started the last bucket: then it advances all of them, round by round, in the order in
which they came. So all ranks start their collectives in the same order, whatever the method, and communication overlaps
with computation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from labkit.experiment import Experiment, Optimizer
from labkit.gradients.compression.compressor import Compressor, GradientBucket, InFlight
from labkit.gradients.compression.hierarchical import Hierarchical
from labkit.gradients.stopwatch import Clock, Stopwatch
from labkit.gradients.wire import Communicator


@dataclass(frozen=True)
class Counters:
    """Cost of combining gradients on one rank, accumulated from the start of the run."""

    bytes: int = 0
    """Bytes sent, as counted by the sender."""
    exposed_seconds: float = 0.0
    """Seconds of communication without computation; NaN where they cannot be measured for each step."""
    compression_seconds: float = 0.0
    """Seconds spent on compressing and decompressing gradients."""
    formula_bytes: int = 0
    """Bytes sent for the same gradients according to the formula of the method."""

    def __add__(self, other: Counters) -> Counters:
        """Return the sum of both, field by field."""
        return Counters(
            self.bytes + other.bytes,
            self.exposed_seconds + other.exposed_seconds,
            self.compression_seconds + other.compression_seconds,
            self.formula_bytes + other.formula_bytes,
        )

    def since(self, earlier: Counters) -> Counters:
        """Return what has been added since `earlier`."""
        return Counters(
            self.bytes - earlier.bytes,
            self.exposed_seconds - earlier.exposed_seconds,
            self.compression_seconds - earlier.compression_seconds,
            self.formula_bytes - earlier.formula_bytes,
        )


class CommHook:
    """Averages gradients (or sums them, if `summed`) in place over the ranks of its compressor.

    With `overlap`, the reduction of a bucket starts when it is handed over, otherwise in `wait`.
    """

    def __init__(
        self, compressor: Compressor, overlap: bool = True, summed: bool = False, clock: Clock | None = None
    ) -> None:
        self.compressor = compressor
        self.step = 0
        """Number of optimizer steps done."""
        self.formula_bytes = 0
        """Bytes sent so far according to the formula of the compressor."""
        self._overlap = overlap
        self._factor = compressor.world_size if summed else 1
        self._buckets: list[GradientBucket] = []
        self._reductions: list[InFlight] = []
        self._futures: list[torch.futures.Future[Tensor]] = []
        self._stopwatch = Stopwatch(clock)
        """Total time in this hook: compression and waiting."""
        self.disabled = False
        """True while DDP only assigns its buckets: what it hands over then is not a gradient and is not sent."""

    # -- one update ---------------------------------------------------------------------------------------------------

    def start_reduce(self, flat: Tensor, parameters: Sequence[Any], shapes: Sequence[torch.Size]) -> None:
        """Start to reduce a bucket: the gradients of `parameters`, concatenated in `flat`.

        `flat` must stay valid until `wait`, which leaves the result in it.
        """
        index = len(self._buckets)
        bucket = GradientBucket(flat, tuple(parameters), tuple(map(tuple, shapes)), self.step, index)
        self._buckets.append(bucket)
        self.formula_bytes += self.compressor.expected_bytes(bucket)
        if self._overlap:
            self._begin(bucket)

    def _begin(self, bucket: GradientBucket) -> None:
        begun = self._stopwatch.now()
        # A linear reduction may be scaled before or after; residuals should have the scale of the result.
        if self._factor != 1:
            bucket.flat.mul_(self._factor)
        reduction = self._reduce_scaled(bucket)
        next(reduction)
        self._reductions.append(reduction)
        self._stopwatch.add(begun)

    def _reduce_scaled(self, bucket: GradientBucket) -> InFlight:
        """Reduce a bucket in units of the compressor's scales: divide by them before and multiply by them after."""
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
        """Wait until all buckets are reduced; each result replaces the gradients in its `flat`."""
        for bucket in self._buckets[len(self._reductions) :]:
            self._begin(bucket)
        begun = self._stopwatch.now()
        in_flight = self._reductions
        while in_flight:
            in_flight = [reduction for reduction in in_flight if not _advance(reduction)]
        self._buckets, self._reductions = [], []
        self._stopwatch.add(begun)

    def end_update(self) -> None:
        """Count an optimizer step whose gradients have all been reduced."""
        self.step += 1

    # -- as DDP's communication hook ----------------------------------------------------------------------------------

    def register(self, replicated: Any) -> None:
        """Register this object as the communication hook of a DistributedDataParallel module."""
        # The lambda has no annotations: DDP compares them with classes, and here they would be strings.
        replicated.register_comm_hook(self, lambda hook, bucket: hook.reduce_ddp_bucket(bucket))

    def reduce_ddp_bucket(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Start to reduce a complete `torch.distributed.GradBucket`; DDP calls this in the same order on all ranks.

        The last bucket of a backward pass waits for all of them and completes their futures.
        """
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
            for future, result in zip(self._futures, flats, strict=True):
                future.set_result(result)
            self._futures = []
        return future

    # -- what it cost -------------------------------------------------------------------------------------------------

    def counters(self) -> Counters:
        """Return the costs so far."""
        sent = sum(comm.sent_bytes for comm in self.compressor.comms)
        waited = sum(comm.wait_seconds for comm in self.compressor.comms)
        return Counters(sent, waited, self._stopwatch.seconds - waited, self.formula_bytes)


def _advance(reduction: InFlight) -> bool:
    """Advance a reduction by one round; return True if it has ended."""
    try:
        next(reduction)
    except StopIteration:
        return True
    return False


class GradientReducer:
    """The communication hooks of one rank: one for each process group that gradients are reduced over.

    All of them use the compressor that the experiment asks for.
    """

    def __init__(self, experiment: Experiment, steps: int, clock: Clock | None = None) -> None:
        self.clock = clock
        """Clock of the device that computes; None for the host's."""
        self._gradients, self._seed, self._steps = experiment.gradients, experiment.training.seed, steps
        self._hosts = getattr(experiment.launch.network, "hosts", 1)
        self._optimizer, self._pipeline = experiment.optimizer, experiment.layout.pp > 1
        self._method: type[Compressor]
        self._method, self._options = self._gradients.compression.load()
        self._hooks: dict[int, CommHook] = {}

    @property
    def needs_hook(self) -> bool:
        """True if gradients need a custom hook (compression or hierarchical reduction) instead of DDP's reducer."""
        return self._method.lossy or self._gradients.hierarchical

    def hook_for(self, group: dist.ProcessGroup, summed: bool = False) -> CommHook:
        """Return the hook for the ranks of `group`, which is created on the first call."""
        hook = self._hooks.get(id(group))
        if hook is None:
            compressor = self._compressor(group)
            hook = self._hooks[id(group)] = CommHook(compressor, self._gradients.overlap, summed, self.clock)
        return hook

    def _compressor(self, group: dist.ProcessGroup) -> Compressor:
        if self._gradients.hierarchical:
            return Hierarchical(self._method, self._options, self._hosts, self._steps, self._seed, self.clock)
        compressor = self._method(self._options, Communicator(group, self.clock), self._steps, self._seed)
        if self._pipeline:  # stages sum the gradients of weights that they share, but momenta must not be summed
            compressor.averages_momentum = False
        return compressor

    @property
    def compressor_name(self) -> str:
        """Name of the compressor in use; "none" if no gradient passes through a hook."""
        names = {hook.compressor.name or type(hook.compressor).__name__ for hook in self._hooks.values()}
        return "+".join(sorted(names)) or "none"

    def end_update(self) -> None:
        """Count an optimizer step in all hooks (one that is registered with DDP does so by itself)."""
        for hook in self._hooks.values():
            hook.end_update()

    def resume(self, step: int) -> None:
        """Set the number of optimizer steps done, after a checkpoint was loaded."""
        for hook in self._hooks.values():
            hook.step = step

    def counters(self) -> Counters:
        """Return the costs of all hooks so far."""
        return sum((hook.counters() for hook in self._hooks.values()), Counters())

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def has_local_state(self) -> bool:
        """True if the compressors keep tensors that differ between ranks, such as error-feedback buffers."""
        return bool(self._hooks) and bool(self._method.describe_local_state(self._options))

    def state(self) -> dict[str, Tensor]:
        """Return the local state of all compressors; keys begin with the number of the hook.

        Hooks are numbered in the order in which they were created, which follows from the layout.
        """
        state: dict[str, Tensor] = {}
        for index, hook in enumerate(self._hooks.values()):
            state |= {f"{index}.{key}": tensor for key, tensor in hook.compressor.state().items()}
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for index, hook in enumerate(self._hooks.values()):
            prefix = f"{index}."
            own = {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}
            hook.compressor.load(own)

    # -- the optimizer ------------------------------------------------------------------------------------------------

    def inner_optimizer_config(self) -> Optimizer:
        """Return the optimizer config without the parts that the compressor implements itself."""
        return self._method.inner_optimizer_config(self._options, self._optimizer) if self._hooks else self._optimizer

    def optimizer(self) -> Callable[[Any], torch.optim.Optimizer] | None:
        """Return a factory from parameter groups to the compressor's own optimizer; None if it has none."""
        return next((hook.compressor.optimizer(self._optimizer) for hook in self._hooks.values()), None)

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Give all compressors the optimizer that was built."""
        for hook in self._hooks.values():
            hook.compressor.attach_optimizer(optimizer, self._optimizer)
