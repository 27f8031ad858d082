"""Labelled images as training and held-out data, resized and normalised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.workloads import digits
from labkit.workloads.base import Batch, Data, TensorData


@dataclass(frozen=True)
class Images:
    """Training and held-out images; both give batches `x` [N, channels, side, side] float32 and `y` [N] int64."""

    train: Data
    test: Data
    channels: int
    classes: list[str]
    majority_share: float
    """Fraction of the most frequent class in the held-out part: the accuracy of always predicting it."""
    about: dict[str, Any] = field(default_factory=dict)
    """Facts about the data."""


def majority_share(labels: Any) -> float:
    """Return the fraction of the most frequent value."""
    _, counts = np.unique(np.asarray(labels), return_counts=True)
    return float(counts.max() / counts.sum())


def resize(images: Tensor, side: int) -> Tensor:
    """Resize images bilinearly: [N, C, H, W] to [N, C, side, side]."""
    return torch.nn.functional.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


class Shifted:
    """Images `x` of `data`, each also shifted by up to `shift` pixels each way: (2·shift + 1)² samples from each.

    The augmentation adds samples instead of random numbers: sample i is always the same image, on every rank and in
    every layout. The edge is repeated where the image was shifted away.
    """

    def __init__(self, data: Data, shift: int) -> None:
        self.data, self.shift = data, shift
        self.places = 2 * shift + 1

    def __len__(self) -> int:
        return len(self.data) * self.places**2

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index = torch.as_tensor(indices)
        place = index // len(self.data)
        batch = dict(self.data.__getitems__((index % len(self.data)).tolist()))
        images = batch["x"]
        height, width = images.shape[-2:]
        padded = torch.nn.functional.pad(images, [self.shift] * 4, mode="replicate")
        # All offsets at once as a view, [N, C, places, places, H, W]; then one offset for each image.
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        batch["x"] = windows[torch.arange(len(index)), :, place // self.places, place % self.places]
        return batch


@lru_cache(maxsize=4)
def digit_images(side: int) -> Images:
    """Return scikit-learn's digits, resized to `side` pixels and normalised with the training part's statistics."""
    pixels, labels = digits.raw()
    train, test = digits.split()
    x = resize(torch.from_numpy(pixels).unsqueeze(1), side)
    y = torch.from_numpy(labels)
    deviation, mean = torch.std_mean(x[train])
    x = (x - mean) / deviation
    return Images(
        TensorData(x=x[train], y=y[train]),
        TensorData(x=x[test], y=y[test]),
        channels=1,
        classes=[str(digit) for digit in range(digits.CLASSES)],
        majority_share=majority_share(labels[test]),
    )
