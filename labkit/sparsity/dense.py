"""No sparsity: every weight is used."""

from __future__ import annotations

from labkit.experiment.registry import Options as BaseOptions


class Dense:
    """All connections stay."""

    class Options(BaseOptions):
        pass
