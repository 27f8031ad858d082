"""Modules that the standby imports ahead, so that the ranks it forks later build their workload at once.

The standby forks, so it must stay single-threaded: with OMP_NUM_THREADS=1 and OPENBLAS_NUM_THREADS=1 set before numpy
loads, nothing here starts a thread. scikit-learn, scipy, datasets, transformers and pygame do, and are left out.
"""

from __future__ import annotations

from importlib import import_module

MODULES = (
    "pydoc_data.topics",
    "labkit.workloads.base",
    "labkit.workloads.custom",
    "labkit.workloads.custom_task",
    "labkit.workloads.driving",
    "labkit.workloads.driving_task",
    "labkit.workloads.fetch",
    "labkit.workloads.images",
    "labkit.workloads.language",
    "labkit.workloads.language_task",
    "labkit.experiment.locate",
    "labkit.workloads.models.gpt",
    "labkit.workloads.models.resnet",
    "labkit.workloads.models.vit",
    "labkit.workloads.options",
    "labkit.workloads.seed",
    "labkit.workloads.trial",
    "labkit.workloads.vision",
)


def preload() -> None:
    """Import the modules that building needs, and read the small built-in data once."""
    for name in MODULES:
        import_module(name)
    from labkit.workloads import digits, driving_data
    from labkit.workloads.images import digit_images
    from labkit.workloads.vision import VisionOptions

    digits.split()
    digit_images(VisionOptions().image_size)
    driving_data.load()
