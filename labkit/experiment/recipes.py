"""Ready-made experiments, as functions. Each one learns in well under a minute on one core of a laptop.

On GPUs they train in bf16, which is several times as fast as fp32 there (`quantization.training=auto`).
"""

from __future__ import annotations

from collections.abc import Callable

from labkit.experiment.layout import Layout
from labkit.experiment.problem import ExperimentError, unknown
from labkit.experiment.schema import Experiment
from labkit.experiment.sections import Optimizer, Quantization, Training, Workload


def vision_ddp() -> Experiment:
    """Return a residual network on handwritten digits, data parallel."""
    return Experiment(
        workload=Workload(name="vision"),
        layout=Layout(dp_replicate=2),
        optimizer=Optimizer(lr=2e-3, weight_decay=0.05, warmup_steps=10),
        quantization=Quantization(training="auto"),
        training=Training(steps=180, global_batch=64),
    )


def vision_transformer_ddp() -> Experiment:
    """Return a small vision transformer on handwritten digits, data parallel."""
    return vision_ddp().replace("workload.model=vit", "optimizer.lr=3e-3", "training.steps=400")


def language_ddp() -> Experiment:
    """Return a small GPT on Python's own documentation, data parallel."""
    return Experiment(
        workload=Workload(name="language"),
        layout=Layout(dp_replicate=2),
        optimizer=Optimizer(lr=5e-3, weight_decay=0.1, warmup_steps=20, clip_norm=1.0),
        quantization=Quantization(training="auto"),
        training=Training(steps=400, global_batch=16),
    )


def driving_ddp() -> Experiment:
    """Return self-driving by behaviour cloning, data parallel."""
    return Experiment(
        workload=Workload(name="driving"),
        layout=Layout(dp_replicate=2),
        optimizer=Optimizer(lr=5e-3, weight_decay=0.05, warmup_steps=20),
        quantization=Quantization(training="auto"),
        training=Training(steps=300, global_batch=512),
    )


RECIPES: dict[str, Callable[[], Experiment]] = {
    "vision-ddp": vision_ddp,
    "vision-transformer-ddp": vision_transformer_ddp,
    "language-ddp": language_ddp,
    "driving-ddp": driving_ddp,
}


def recipe(name: str) -> Experiment:
    """Return the recipe called `name`; raises ExperimentError with the known names if there is none."""
    if name not in RECIPES:
        raise ExperimentError([unknown("", name, RECIPES, "recipe")])
    return RECIPES[name]()
