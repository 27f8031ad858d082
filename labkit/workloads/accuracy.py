"""Accuracy: the fraction of targets that the output gets right. By definition between 0 and 1, for any number of ranks.

Accepted are class indices `[N, …]` beside scores `[N, …, C]` or `[N, C, …]`, and targets 0 or 1, `[N]` or `[N, 1]`,
beside one score for each sample. Targets that the loss leaves out count nowhere. Other shapes are refused: torch would
compare them by broadcasting, and an accuracy of 31.0 came of that (issue 11, B11).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from labkit.workloads.weights import is_of_classes, valid_targets


def correct_and_counted(loss_fn: Any, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Two scalars: how many targets the output gets right, and how many there are. Raises ValueError in a sentence."""
    if not is_of_classes(loss_fn) and output.numel() == target.numel() == len(target):
        right = _binary_correct(loss_fn, output, target)
        return right.sum(), right.new_ones(right.shape, dtype=torch.int64).sum()
    axis = _class_axis(loss_fn, output, target)
    counted = valid_targets(loss_fn, target)
    return ((output.argmax(axis) == target) & counted).sum(), counted.sum()


def _class_axis(loss_fn: Any, output: Tensor, target: Tensor) -> int:
    """The axis of `output` that holds the classes."""
    shapes = f"outputs {list(output.shape)} and targets {list(target.shape)} of {str(target.dtype)[6:]}"
    if target.is_floating_point() or target.is_complex() or output.dim() != target.dim() + 1 or not target.dim():
        raise ValueError(
            f"accuracy is not defined for {shapes}: it needs class indices [N, …] with scores [N, …, C] or [N, C, …], "
            'or one score for each target of 0 or 1; say metric="loss", or return a Task with metrics of its own'
        )
    second = output.shape[2:] == target.shape[1:] and len(output) == len(target)
    last = output.shape[:-1] == target.shape
    if second and (is_of_classes(loss_fn) or not last or target.dim() == 1):
        return 1  # where both fit, torch's own losses have the classes there
    if last and not second:
        return output.dim() - 1
    if last:
        raise ValueError(
            f"it cannot be told which axis of the outputs holds the classes, for {shapes}: use "
            "torch.nn.CrossEntropyLoss, whose classes are on axis 1, or return a Task with metrics of its own"
        )
    raise ValueError(f"accuracy is not defined for {shapes}: apart from the classes their shapes must be the same")


def _binary_correct(loss_fn: Any, output: Tensor, target: Tensor) -> Tensor:
    """Of a target 0 or 1 beside one score: is it on the side of the threshold that the loss prefers? bool [N]."""
    wide = target.flatten()
    if not bool(((wide == 0) | (wide == 1)).all()):
        raise ValueError(
            "accuracy of one score for each sample needs targets of 0 and 1, they go from "
            f'{wide.min().item():g} to {wide.max().item():g}; say metric="loss"'
        )
    return (output.flatten() > threshold(loss_fn, output, target)) == (wide == 1)


def threshold(loss_fn: Any, output: Tensor, target: Tensor) -> float:
    """Above which score a sample belongs to class 1: 0 for logits, 0.5 for probabilities.

    The loss tells which: that of a score of 0.25 is smaller beside the target 1 only if scores are logits.
    """
    if isinstance(loss_fn, nn.BCEWithLogitsLoss):  # pos_weight moves the point of equal loss
        return 0.0
    if isinstance(loss_fn, nn.BCELoss):
        return 0.5
    with torch.no_grad():
        quarter = torch.full_like(output, 0.25)
        loss_of_one, loss_of_zero = (float(loss_fn(quarter, torch.full_like(target, value))) for value in (1, 0))
    return 0.0 if loss_of_one < loss_of_zero else 0.5
