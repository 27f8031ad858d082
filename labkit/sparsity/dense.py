"""No sparsity: every weight is used."""

from __future__ import annotations

from labkit.experiment.registry import Options


class Dense:
    """All connections stay."""

    class Options(Options):
        pass
