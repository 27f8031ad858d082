"""Plain gradient averaging: full precision, every update synchronous. What every other method is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from labkit.gradients.compression.compressor import Compressor, CostContext, GradientBucket, InFlight, Shape

if TYPE_CHECKING:
    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.experiment.problem import Problem


class Uncompressed(Compressor):
    """Gradients travel as they are.

    A ring all-reduce of n bytes over N ranks sends 2·(N-1)/N·n bytes from every rank (Patarasuk and Yuan, 2009).

    Most runs never come here: DDP's own reducer and shared memory do the same sums on a shorter way. It stands in where
    the exchange is to be steered (`gradients.overlap`, `gradients.hierarchical`).
    """

    name = "none"
    lossy = False

    def reduce(self, bucket: GradientBucket) -> InFlight:
        """One all-reduce, in place."""
        return self.reduce_uncompressed(bucket)

    @classmethod
    def bucket_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """2·(N-1)/N·n."""
        return cls.uncompressed_bytes(shapes, context)

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """It goes with everything."""
        return iter(())

    @classmethod
    def warnings(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """It is never without effect."""
        return iter(())
