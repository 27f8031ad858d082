"""Runs: their directories, events, handles and comparisons. Imports no torch."""

from labkit.runs.compare import Comparison, compare
from labkit.runs.data import RunData
from labkit.runs.run import Run, RunFailed

__all__ = ["Comparison", "Run", "RunData", "RunFailed", "compare"]
