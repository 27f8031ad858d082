"""What a compressor is. Imports no torch: forms and commands read the files of the methods.

A method answers three questions, after the split of GRACE (Xu et al., ICDCS 2021: compressor, communicator, memory):
what is sent of some gradients and how the mean over the ranks comes out of it (`reduce`), what it remembers
(`memory.py`), and how many bytes that takes by its formula (`wire_bytes`).

`reduce` is a generator: it begins to send, yields, goes on when it is asked for what has arrived, and returns the
mean. So a method that talks twice (PowerSGD, 1-bit Adam) reads as one piece of code, and many buckets can be under way
at once: `reduce.py` goes through all of them, round by round, in the same order on all ranks. No collective ever
starts in a callback or in another thread, where ranks may differ in order: that is what makes torch's PowerSGD hook
fail on gloo.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from labkit.experiment.problem import Problem
from labkit.experiment.registry import Options as BaseOptions
from labkit.gradients.cost import all_reduce_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from labkit.experiment import Experiment, Optimizer
    from labkit.experiment.layout import Layout
    from labkit.experiment.machine import Machine
    from labkit.gradients.compression.error_feedback import ErrorFeedback
    from labkit.gradients.wire import Communicator

Shape = tuple[int, ...]
InFlight = Generator[None, None, "Tensor"]
"""An exchange that is under way: resumed once a round, it returns the mean over the ranks, of the shape of `flat`."""


def numel(shapes: Sequence[Shape]) -> int:
    """Numbers in tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes)


@dataclass(frozen=True)
class GradientBucket:
    """Gradients that travel together: those of `parameters`, one after the other in `flat`.

    `parameters` are keys for what is remembered of them; `shapes` are those of their gradients.
    """

    flat: Tensor
    parameters: tuple[Any, ...]
    shapes: tuple[Shape, ...]
    step: int
    """Updates done before this one, since the beginning of the training."""
    number: int
    """Which bundle of its update this is."""

    @property
    def sizes(self) -> list[int]:
        """How many numbers each parameter has."""
        return [math.prod(shape) for shape in self.shapes]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of `flat`, which is laid out like the bundle's own, in the shapes of the parameters."""
        parts = flat.split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


@dataclass(frozen=True)
class CostContext:
    """When and among how many gradients travel: all that the number of bytes depends on, beside their shapes."""

    world_size: int
    step: int
    """Updates done before."""
    steps: int
    """Updates of the whole training."""
    itemsize: int = 4
    """Bytes of a number of the gradient."""


class Compressor:
    """Base of all methods. A subclass has a `name` (its registry key), `Options`, `reduce` and `bucket_bytes`.

    One instance serves the exchanges among the ranks of one wire. `steps`: updates of the whole training; `seed`: what
    random choices follow from, beside step, bundle and place on the wire.
    """

    name: ClassVar[str] = ""
    lossy: ClassVar[bool] = True
    """Does the mean that comes out differ from the mean of what goes in?"""
    averages_momentum = False
    """Is what is averaged the momentum of AdamW (late.py)? Set to false for a run in which it must not be."""

    class Options(BaseOptions):
        pass

    def __init__(self, options: Any, comm: Communicator, steps: int, seed: int = 0) -> None:
        self.options, self.comm, self.steps, self.seed = options, comm, steps, seed

    @property
    def comms(self) -> tuple[Communicator, ...]:
        """All groups that it talks in."""
        return (self.comm,)

    @property
    def world_size(self) -> int:
        """Over how many ranks it averages."""
        return self.comm.size

    # -- the method ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def reduce(self, bucket: GradientBucket) -> InFlight:
        """Begin to average `bucket.flat` over the ranks; see `InFlight`. May work in place."""

    @classmethod
    def bucket_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """What one rank sends for one bundle, by the formula."""
        raise TypeError(f"{cls.__name__} has no formula for a bundle by itself")

    def reduce_uncompressed(self, bucket: GradientBucket) -> InFlight:
        """Average without compression, e.g. before the method begins."""
        pending = self.comm.all_reduce(bucket.flat.div_(self.comm.size))
        yield
        return pending.wait()

    @staticmethod
    def uncompressed_bytes(shapes: Sequence[Shape], context: CostContext) -> int:
        """The same in bytes: 2·(N-1)/N·n."""
        return all_reduce_bytes(numel(shapes) * context.itemsize, context.world_size)

    # -- its optimizer ------------------------------------------------------------------------------------------------

    @classmethod
    def inner_optimizer_config(cls, options: Any, optimizer: Optimizer) -> Optimizer:
        """The optimizer's settings, without what the compressor does in its place."""
        return optimizer

    def optimizer(self, settings: Optimizer) -> Callable[[Any], torch.optim.Optimizer] | None:
        """Makes the optimizer from groups of parameters, if the method brings its own for these settings."""
        return None

    def attach_optimizer(self, optimizer: torch.optim.Optimizer, settings: Optimizer) -> None:
        """What works on the result, and what the experiment asks of it; called once it exists."""

    def scale(self, bucket: GradientBucket, parameter: Any) -> Tensor | None:
        """What the gradient of this parameter is divided by while it is under way, of its shape; None for nothing."""
        return None

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @classmethod
    def describe_local_state(cls, options: Any) -> str:
        """What each rank keeps for itself from update to update, in words; empty if it keeps nothing."""
        return ""

    def state(self) -> dict[str, Tensor]:
        """What this rank has of that, for a checkpoint: of every memory, by its name in this object."""
        found: dict[str, Tensor] = {}
        for name, memory in self._memories().items():
            found |= {f"{name}.{key}": tensor for key, tensor in memory.state().items()}
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from there: the same ranks, the same layout, before the first update."""
        for name, memory in self._memories().items():
            start = f"{name}."
            memory.load({key[len(start) :]: tensor for key, tensor in state.items() if key.startswith(start)})

    def _memories(self) -> dict[str, ErrorFeedback]:
        from labkit.gradients.compression.error_feedback import ErrorFeedback

        return {name.lstrip("_"): value for name, value in vars(self).items() if isinstance(value, ErrorFeedback)}

    # -- used by others -----------------------------------------------------------------------------------------------

    def start_reduce(self, bucket: GradientBucket) -> Callable[[], Tensor]:
        """Begin an exchange; call what is returned for the mean. For those who exchange one bundle at a time."""
        rounds = self.reduce(bucket)
        next(rounds)
        return lambda: finish(rounds)

    @classmethod
    def wire_bytes(
        cls, options: Any, buckets: Sequence[Sequence[Shape]], world_size: int, step: int, steps: int, itemsize: int = 4
    ) -> int:
        """Bytes that one of `world_size` ranks sends in update `step` (from 0) of `steps`, by the method's formula.

        `buckets`: shapes of the parameters in each bucket; `itemsize`: bytes of a number of the gradient.
        """
        context = CostContext(world_size, step, steps, itemsize)
        return sum(cls.bucket_bytes(options, shapes, context) for shapes in buckets)

    def expected_bytes(self, bucket: GradientBucket) -> int:
        """What this rank sends for this bundle, by the formula."""
        context = CostContext(self.comm.size, bucket.step, self.steps, bucket.flat.element_size())
        return self.bucket_bytes(self.options, bucket.shapes, context)

    def generator(self, bucket: GradientBucket, shared: bool = False) -> torch.Generator:
        """Random numbers for this bundle: those of this place on the wire, or the same on all ranks.

        Ranks that hold the same gradients in other groups (along tp) stand at the same place and draw the same.
        """
        import torch

        place = 0 if shared else 1 + self.comm.rank
        seed = ((self.seed * 1_000_003 + bucket.step) * 4099 + bucket.number) * 4099 + place
        return torch.Generator(bucket.flat.device).manual_seed(seed % 2**63)

    # -- rules --------------------------------------------------------------------------------------------------------

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Why it cannot run; a subclass adds its own."""
        field, layout = "gradients.compression.method", experiment.layout
        if layout.dp_shard > 1 and layout.zero_stage == 3:
            reason = "ZeRO stage 3 exchanges gradients inside torch's fully_shard, where no compressor can stand"
            yield Problem(field, reason, "none")
        if experiment.launch.transport == "shared_memory" and replicas(layout) > 1:
            reason = "compressed gradients travel through the process group, not through shared memory"
            yield Problem("launch.transport", reason, "auto")

    @classmethod
    def warnings(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Where it has no effect."""
        field = "gradients.compression.method"
        if replicas(experiment.layout) == 1 and experiment.layout.dp_shard > 1:
            reason = "has no effect: ZeRO adds gradients up by a reduce-scatter, in which no compressor stands"
            yield Problem(field, f"{reason}, and there are no replicas beside it (layout.dp_replicate)")
        elif replicas(experiment.layout) == 1:
            yield Problem(field, "has no effect: no two ranks see different samples")
        elif experiment.launch.isolated:
            yield Problem(field, "has no effect on copies that never talk (launch.isolated)")


def finish(rounds: InFlight) -> Tensor:
    """Go on with an exchange to its end; the mean."""
    while True:
        try:
            next(rounds)
        except StopIteration as done:
            mean: Tensor = done.value
            return mean


def resolve_start_step(wanted: int | None, steps: int, part: float) -> int:
    """The first update of what begins at `wanted`; if that is left open, after `part` of the training."""
    return math.ceil(part * steps) if wanted is None else wanted


def replicas(layout: Layout) -> int:
    """Over how many ranks gradients are summed in a way that a compressor can stand in.

    ZeRO sums along dp_shard by a reduce-scatter; what is left to it are the replicas of a shard.
    """
    return layout.dp_replicate * layout.cp * layout.ep
