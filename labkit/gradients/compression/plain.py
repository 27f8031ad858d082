"""Plain gradient averaging in full precision: the baseline that every other method is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from labkit.gradients.compression.compressor import Compressor, CostContext, GradientBucket, InFlight, Shape

if TYPE_CHECKING:
    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.experiment.problem import Problem


class Uncompressed(Compressor):
    """Averages gradients without compression.

    A ring all-reduce of n bytes over N ranks sends 2·(N-1)/N·n bytes from every rank (Patarasuk and Yuan, 2009).

    Most runs do not use it, because DDP's own reducer and shared memory compute the same sums faster. It is used where
    the reduction has to be controlled (`gradients.overlap`, `gradients.hierarchical`).
    """

    name = "none"
    lossy = False

    def reduce(self, bucket: GradientBucket) -> InFlight:
        """Average a bucket in place by one all-reduce."""
        return self.reduce_uncompressed(bucket)

    @classmethod
    def bucket_bytes(cls, options: Any, shapes: Sequence[Shape], context: CostContext) -> int:
        """Return 2·(N-1)/N·n for n bytes."""
        return cls.uncompressed_bytes(shapes, context)

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield nothing: it runs with every experiment."""
        return iter(())

    @classmethod
    def warnings(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield nothing: there are no warnings."""
        return iter(())
