"""The learning rate of ranks that take local steps, each on its part of the batch.

AdamW divides by the size of its gradients, and those of a rank's own samples are noisier than the mean over N ranks: by
a factor of √N where noise dominates. So its steps are shorter by that factor, and the mean over N ranks moves less than
in synchronous training. The square-root scaling rule for adaptive optimizers corrects this: √N times the learning rate
(Malladi et al., "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", NeurIPS 2022). SGD does not divide,
so it needs no correction.
"""

from __future__ import annotations

import math

from pydantic import Field

from labkit.experiment import Experiment
from labkit.experiment.registry import Options


class LocalStepOptions(Options):
    """Options of all rules whose ranks take local steps."""

    rate_factor: float | None = Field(default=None, gt=0, le=1000)
    """Learning-rate multiplier of local steps; empty: the square root of the number of ranks for AdamW, 1 for SGD."""


def local_lr_scale(options: LocalStepOptions, experiment: Experiment) -> float:
    """Return the learning-rate multiplier for ranks that take local steps."""
    if options.rate_factor is not None:
        return options.rate_factor
    return math.sqrt(experiment.layout.dp_replicate) if experiment.optimizer.name == "adamw" else 1.0
