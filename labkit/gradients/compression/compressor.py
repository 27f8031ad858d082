"""The base class of compressors. It does not import torch, because forms and commands read the files of the methods.

A method answers three questions, following the split of GRACE (Xu et al., ICDCS 2021: compressor, communicator,
memory): what is sent of a bucket and how the mean over the ranks is computed from it (`reduce`), which residuals it
keeps (`error_feedback.py`), and how many bytes it sends by its formula (`wire_bytes`).

`reduce` is a generator: it starts to send, yields, and when it is resumed it waits for what has arrived and returns the
mean. So a method with two rounds of communication (PowerSGD, 1-bit Adam) reads as one piece of code, and many buckets
can be in flight at once: `exchange.py` advances all of them, round by round, in the same order on all ranks. No
collective ever starts in a callback or in another thread, where the order may differ between ranks: that is what makes
torch's PowerSGD hook fail on gloo.
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
"""A reduction in flight: resumed once per round, it returns the mean over the ranks, in the shape of `flat`."""


def numel(shapes: Sequence[Shape]) -> int:
    """Return the number of elements in tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes)


@dataclass(frozen=True)
class GradientBucket:
    """Gradients that are reduced together: those of `parameters`, concatenated in `flat`.

    `parameters` serve as keys of error-feedback buffers; `shapes` are the shapes of their gradients.
    """

    flat: Tensor
    parameters: tuple[Any, ...]
    shapes: tuple[Shape, ...]
    step: int
    """Number of optimizer steps done before this one, since the beginning of the training."""
    index: int
    """Position of the bucket among those of its optimizer step."""

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each parameter."""
        return [math.prod(shape) for shape in self.shapes]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return views of `flat`, which is laid out like the bucket's own, in the shapes of the parameters."""
        parts = flat.split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


@dataclass(frozen=True)
class CostContext:
    """Inputs of the byte formulas besides the shapes of the gradients."""

    world_size: int
    step: int
    """Number of optimizer steps done before."""
    steps: int
    """Number of optimizer steps of the whole training."""
    itemsize: int = 4
    """Bytes per element of the gradient."""


class Compressor:
    """Base of all methods. A subclass has a `name` (its registry key), `Options`, `reduce` and `bucket_bytes`.

    One instance serves all buckets that are reduced over the ranks of one communicator. `steps` is the number of
    optimizer steps of the whole training. Random choices follow from `seed`, the step, the bucket and the rank.
    """

    name: ClassVar[str] = ""
    lossy: ClassVar[bool] = True
    """Whether the result differs from the exact mean of the gradients."""
    averages_momentum = False
    """Whether ranks average AdamW's momentum instead of the gradient (late.py); set to False where they cannot."""

    class Options(BaseOptions):
        pass

    def __init__(self, options: Any, comm: Communicator, steps: int, seed: int = 0) -> None:
        self.options, self.comm, self.steps, self.seed = options, comm, steps, seed

    @property
    def comms(self) -> tuple[Communicator, ...]:
        """All communicators that this method uses."""
        return (self.comm,)

    @property
    def world_size(self) -> int:
        """Number of ranks over which gradients are averaged."""
        return self.comm.size

    # -- the method ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def reduce(self, bucket: GradientBucket) -> InFlight:
        """Start to average `bucket.flat` over the ranks, possibly in place; see `InFlight`."""

    @classmethod
    def bucket_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """Return the bytes that one rank sends for a bucket with these shapes, by the formula of the method."""
        raise TypeError(f"{cls.__name__} has no formula for a single bucket")

    def reduce_uncompressed(self, bucket: GradientBucket) -> InFlight:
        """Average a bucket without compression, e.g. before compression starts."""
        pending = self.comm.all_reduce(bucket.flat.div_(self.comm.size))
        yield
        return pending.wait()

    @staticmethod
    def uncompressed_bytes(shapes: Sequence[Shape], context: CostContext) -> int:
        """Return the bytes that one rank sends for that: 2·(N-1)/N·n."""
        return all_reduce_bytes(numel(shapes) * context.itemsize, context.world_size)

    # -- its optimizer ------------------------------------------------------------------------------------------------

    @classmethod
    def inner_optimizer_config(cls, options: Any, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer config without the parts that the compressor implements itself, such as momentum."""
        return optimizer

    def optimizer(self, settings: Optimizer) -> Callable[[Any], torch.optim.Optimizer] | None:
        """Return a factory from parameter groups to the method's own optimizer; None if torch's optimizer is used."""
        return None

    def attach_optimizer(self, optimizer: torch.optim.Optimizer, settings: Optimizer) -> None:
        """Give the compressor the optimizer and its config; called once, after the optimizer was built."""

    def scale(self, bucket: GradientBucket, parameter: Any) -> Tensor | None:
        """Return the per-element scale that a gradient is divided by before compression and multiplied by afterwards.

        It has the shape of the parameter; None stands for no scaling.
        """
        return None

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @classmethod
    def describe_local_state(cls, options: Any) -> str:
        """Describe, for a message, what each rank keeps to itself between steps; empty if it keeps nothing."""
        return ""

    def state(self) -> dict[str, Tensor]:
        """Return this rank's error-feedback buffers for a checkpoint; keys begin with the name of the attribute."""
        state: dict[str, Tensor] = {}
        for name, errors in self._error_feedback().items():
            state |= {f"{name}.{key}": tensor for key, tensor in errors.state().items()}
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned, for the same ranks and the same layout, before the first optimizer step."""
        for name, errors in self._error_feedback().items():
            prefix = f"{name}."
            errors.load({key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)})

    def _error_feedback(self) -> dict[str, ErrorFeedback]:
        from labkit.gradients.compression.error_feedback import ErrorFeedback

        return {name.lstrip("_"): value for name, value in vars(self).items() if isinstance(value, ErrorFeedback)}

    # -- for callers --------------------------------------------------------------------------------------------------

    def start_reduce(self, bucket: GradientBucket) -> Callable[[], Tensor]:
        """Start to reduce a single bucket; calling the result waits and returns the mean."""
        reduction = self.reduce(bucket)
        next(reduction)
        return lambda: finish(reduction)

    @classmethod
    def wire_bytes(
        cls, options: Any, buckets: Sequence[Sequence[Shape]], world_size: int, step: int, steps: int, itemsize: int = 4
    ) -> int:
        """Return the bytes that one of `world_size` ranks sends in step `step` (from 0) of `steps`, by the formula.

        `buckets` has the shapes of the parameters in each bucket, `itemsize` is the number of bytes per element.
        """
        context = CostContext(world_size, step, steps, itemsize)
        return sum(cls.bucket_bytes(options, shapes, context) for shapes in buckets)

    def expected_bytes(self, bucket: GradientBucket) -> int:
        """Return the bytes that this rank sends for a bucket, by the formula of the method."""
        context = CostContext(self.comm.size, bucket.step, self.steps, bucket.flat.element_size())
        return self.bucket_bytes(self.options, bucket.shapes, context)

    def generator(self, bucket: GradientBucket, shared: bool = False) -> torch.Generator:
        """Return a random generator for a bucket: seeded by this rank, or the same on all ranks if `shared`.

        The rank is that within the communicator, so ranks that hold the same gradients in different groups (along tp)
        draw the same numbers.
        """
        import torch

        offset = 0 if shared else 1 + self.comm.rank
        seed = ((self.seed * 1_000_003 + bucket.step) * 4099 + bucket.index) * 4099 + offset
        return torch.Generator(bucket.flat.device).manual_seed(seed % 2**63)

    # -- rules --------------------------------------------------------------------------------------------------------

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why the method cannot run here; a subclass adds its own."""
        field, layout = "gradients.compression.method", experiment.layout
        if layout.dp_shard > 1 and layout.zero_stage == 3:
            reason = "ZeRO stage 3 reduces gradients inside torch's fully_shard, where no compressor can be applied"
            yield Problem(field, reason, "none")
        if experiment.launch.transport == "shared_memory" and replicas(layout) > 1:
            reason = "compressed gradients are sent through the process group, not through shared memory"
            yield Problem("launch.transport", reason, "auto")

    @classmethod
    def warnings(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why the method has no effect here."""
        field = "gradients.compression.method"
        if replicas(experiment.layout) == 1 and experiment.layout.dp_shard > 1:
            reason = "has no effect: ZeRO sums gradients by a reduce-scatter, to which no compressor applies"
            yield Problem(field, f"{reason}, and the shards have no replicas (layout.dp_replicate)")
        elif replicas(experiment.layout) == 1:
            yield Problem(field, "has no effect: no two ranks see different samples")
        elif experiment.launch.isolated:
            yield Problem(field, "has no effect: isolated ranks exchange nothing (launch.isolated)")


def finish(reduction: InFlight) -> Tensor:
    """Run a reduction to its end and return the mean."""
    while True:
        try:
            next(reduction)
        except StopIteration as done:
            mean: Tensor = done.value
            return mean


def resolve_start_step(requested: int | None, steps: int, fraction: float) -> int:
    """Resolve an optional start step: `requested`, or `fraction * steps` (rounded up) if it is None."""
    return math.ceil(fraction * steps) if requested is None else requested


def replicas(layout: Layout) -> int:
    """Return the number of ranks over which gradients are summed in a way that a compressor can take part in.

    ZeRO sums along dp_shard by a reduce-scatter, so with ZeRO only the replicas of a shard count.
    """
    return layout.dp_replicate * layout.cp * layout.ep
