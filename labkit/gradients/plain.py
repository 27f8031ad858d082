"""Plain gradient averaging: full precision, every update synchronous. What every other method is compared with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from labkit.experiment.registry import Options as BaseOptions

if TYPE_CHECKING:
    from torch import nn


class Uncompressed:
    """Gradients travel as they are.

    A ring all-reduce of n bytes over N ranks sends 2·(N-1)/N·n bytes from every rank (Patarasuk and Yuan, 2009).
    """

    class Options(BaseOptions):
        pass

    @staticmethod
    def attach(model: nn.Module) -> None:
        """Install the compressor on the replicated model: nothing to install."""

    @staticmethod
    def bytes_per_step(gradient_bytes: int, ranks: int) -> int:
        """Bytes that one rank sends per update."""
        return round(2 * (ranks - 1) / ranks * gradient_bytes)


class Synchronous:
    """All ranks wait for the average of all gradients before anyone changes a weight."""

    class Options(BaseOptions):
        pass

    @staticmethod
    def passes(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around one pass forward and backward: only the last of an update exchanges gradients."""
        no_sync = getattr(model, "no_sync", None)
        return nullcontext() if last or no_sync is None else no_sync()
