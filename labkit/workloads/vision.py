"""Image classification: a residual network or a vision transformer, on digits or on any labelled images.

The form and the command line import this file too: torch and the data libraries are imported inside `build()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from labkit.experiment.problem import Problem
from labkit.experiment.registry import Options
from labkit.workloads.network import Network
from labkit.workloads.rules import hub_data, nearest_divisor, without_effect

if TYPE_CHECKING:
    from labkit.experiment.machine import Machine
    from labkit.experiment.schema import Experiment
    from labkit.workloads.base import ClassificationTask

DIGITS = "digits"
DIGITS_TRAIN = 1438
"""Training samples of the digits (80 % of 1,797)."""


class VisionOptions(Options):
    """What is classified, and by which network."""

    model: Literal["resnet", "vit"] = "resnet"
    """The network: a residual network with group normalisation, or a small vision transformer."""
    data: str = Field(default=DIGITS, min_length=1, max_length=500)
    """Images: digits (no download), a folder with a subfolder per class, a parquet file, or a data set from the Hub."""
    image_size: int = Field(default=32, ge=8, le=512)
    """Height and width to which images are resized (pixels)."""
    shift: int = Field(default=3, ge=0, le=16)
    """Also train on images shifted by up to this many pixels each way: (2·shift + 1)² samples from each image."""
    width: int | None = Field(default=None, ge=4, le=2048)
    """Channels of the first stage (resnet) or embedding size (vit); if empty, 24 and 64."""
    depth: int | None = Field(default=None, ge=1, le=64)
    """Residual blocks per stage (resnet) or layers (vit); empty for 1 and 4."""
    patch: int = Field(default=8, ge=1, le=64)
    """Side of a patch (pixels); vit only."""
    heads: int = Field(default=4, ge=1, le=64)
    """Number of attention heads; vit only."""
    image_column: str = Field(default="", max_length=200)
    """Column with the images; empty to detect it."""
    label_column: str = Field(default="", max_length=200)
    """Column with the labels; empty to detect it."""

    @property
    def network_width(self) -> int:
        return self.width or {"resnet": 24, "vit": 64}[self.model]

    @property
    def network_depth(self) -> int:
        return self.depth or {"resnet": 1, "vit": 4}[self.model]


class Vision:
    """Image classification; the metric is held-out accuracy."""

    Options = VisionOptions

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        options = VisionOptions(**experiment.workload.options)
        width = options.network_width
        if options.model == "vit":
            if width % options.heads:
                yield Problem(
                    "workload.heads",
                    f"{options.heads} heads do not divide a width of {width}",
                    nearest_divisor(width, options.heads),
                )
            if options.image_size % options.patch:
                yield Problem(
                    "workload.patch",
                    f"patches of {options.patch} pixels do not divide images of {options.image_size}",
                    nearest_divisor(options.image_size, options.patch),
                )
        if options.data != DIGITS:
            yield from hub_data("workload.data", options.data, builtin=DIGITS)
            return
        samples = DIGITS_TRAIN * (2 * options.shift + 1) ** 2
        if experiment.training.global_batch > samples:
            yield Problem(
                "training.global_batch",
                f"the training set has {samples} samples, fewer than a batch of {experiment.training.global_batch}",
                samples,
            )

    @classmethod
    def warnings(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Warn about options that do nothing with the chosen network or data."""
        options = VisionOptions(**experiment.workload.options)
        if options.model == "resnet":
            yield from without_effect(options, ("patch", "heads"), "the residual network has no patches and no heads")
        if options.data == DIGITS:
            yield from without_effect(options, ("image_column", "label_column"), "the digits have no columns")

    @classmethod
    def describe(cls, options: VisionOptions) -> Network:
        """Return what layouts need to know of the network."""
        width, depth = options.network_width, options.network_depth
        if options.model == "resnet":
            groups = gcd(width, 8)
            return Network(3 * depth + 2, tp_sizes={f"the {groups} channel groups of a width of {width}": groups})
        patches = (options.image_size // options.patch) ** 2
        return Network(depth + 2, tp_sizes={f"the {options.heads} attention heads": options.heads}, sequence=patches)

    @classmethod
    def build(cls, options: Any, seed: int) -> ClassificationTask:
        """Read the data and build the network from a VisionOptions, a dict of its fields, or a workload section."""
        from labkit.workloads.base import ClassificationTask
        from labkit.workloads.images import Shifted, digit_images
        from labkit.workloads.models.resnet import resnet
        from labkit.workloads.models.vit import vit
        from labkit.workloads.options import read
        from labkit.workloads.seed import seeded

        options = read(VisionOptions, options)
        size = options.image_size
        if options.data == DIGITS:
            images = digit_images(size)
        else:
            from labkit.workloads.hub_images import hub_images

            images = hub_images(options.data, size, options.image_column, options.label_column)
        width, depth = options.network_width, options.network_depth
        with seeded(seed):
            model = (
                resnet(images.channels, len(images.classes), size, width, depth)
                if options.model == "resnet"
                else vit(images.channels, len(images.classes), size, options.patch, width, depth, options.heads)
            )
        train = Shifted(images.train, options.shift) if options.shift else images.train
        return ClassificationTask(
            model,
            train,
            images.test,
            data=options.data,
            classes=images.classes,
            majority_share=images.majority_share,
            train_images=len(images.train),
            train_samples=len(train),
            test_samples=len(images.test),
            image_shape=[images.channels, size, size],
            **images.about,
        )
