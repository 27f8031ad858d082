"""The learning rate of ranks that step by themselves, on a part of the batch each.

AdamW divides by the size of the gradients that it sees, and those of a rank's own samples are noisier than the mean
over N ranks: where noise prevails by √N. So its steps are that much shorter, and the mean of what N ranks do moves less
than synchronous training would. The square-root rule for adaptive optimizers puts that right: √N times the rate
(Malladi et al., "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", NeurIPS 2022). SGD divides by
nothing.
"""

from __future__ import annotations

import math

from pydantic import Field

from labkit.experiment import Experiment
from labkit.experiment.registry import Options


class LocalStepOptions(Options):
    """What rules have in common whose ranks step by themselves."""

    rate_factor: float | None = Field(default=None, gt=0, le=1000)
    """Factor on the learning rate of a rank that steps by itself; empty: the root of the number of ranks for AdamW."""


def local_lr_scale(options: LocalStepOptions, experiment: Experiment) -> float:
    """That factor."""
    if options.rate_factor is not None:
        return options.rate_factor
    return math.sqrt(experiment.layout.dp_replicate) if experiment.optimizer.name == "adamw" else 1.0
