"""What to run: the experiment, the layout, and the rules for what can be combined. Imports no torch."""

from labkit.experiment.layout import Layout
from labkit.experiment.machine import Machine
from labkit.experiment.problem import ExperimentError, Problem
from labkit.experiment.schema import Experiment
from labkit.experiment.sections import (
    Compression,
    Gradients,
    Launch,
    Network,
    Optimizer,
    Quantization,
    Sparsity,
    Training,
    Update,
    Workload,
)

__all__ = [
    "Compression",
    "Experiment",
    "ExperimentError",
    "Gradients",
    "Launch",
    "Layout",
    "Machine",
    "Network",
    "Optimizer",
    "Problem",
    "Quantization",
    "Sparsity",
    "Training",
    "Update",
    "Workload",
]
