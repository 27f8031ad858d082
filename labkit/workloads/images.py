"""Labelled images as training and held-out data, resized and normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.workloads import digits
from labkit.workloads.base import Data, TensorData


@dataclass(frozen=True)
class Images:
    """Both parts give batches `x` [N, channels, side, side] float32 and `y` [N] int64."""

    train: Data
    test: Data
    channels: int
    classes: list[str]
    majority_share: float
    """Share of the most frequent class in the held-out part: what always guessing it would score."""


def majority_share(labels: Any) -> float:
    """Share of the most frequent value."""
    _, counts = np.unique(np.asarray(labels), return_counts=True)
    return float(counts.max() / counts.sum())


def resize(images: Tensor, side: int) -> Tensor:
    """Bilinear: [N, C, H, W] to [N, C, side, side]."""
    return torch.nn.functional.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def digit_images(side: int) -> Images:
    """scikit-learn's digits, resized to `side` pixels, shifted and scaled by the training part's mean and deviation."""
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
