"""Accuracy: the fraction of targets that the output predicts correctly, by definition between 0 and 1 on any ranks.

Accepted are class indices `[N, …]` with logits `[N, …, C]` or `[N, C, …]`, and targets 0 or 1, `[N]` or `[N, 1]`, with
one score for each sample. Targets that the loss ignores are not counted. Other shapes are refused: torch would compare
them by broadcasting, which once gave an accuracy of 31.0 (issue 11, B11).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from labkit.workloads.weights import is_of_classes, valid_targets


def correct_and_counted(loss_fn: Any, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return two scalars: how many targets the output predicts correctly, and how many are counted.

    Raises ValueError in one sentence for shapes for which accuracy is not defined.
    """
    if not is_of_classes(loss_fn) and output.numel() == target.numel() == len(target):
        right = _binary_correct(loss_fn, output, target)
        return right.sum(), right.new_ones(right.shape, dtype=torch.int64).sum()
    axis = _class_axis(loss_fn, output, target)
    counted = valid_targets(loss_fn, target)
    return ((output.argmax(axis) == target) & counted).sum(), counted.sum()


def _class_axis(loss_fn: Any, output: Tensor, target: Tensor) -> int:
    """Return the axis of `output` that contains the classes."""
    shapes = f"outputs {list(output.shape)} and targets {list(target.shape)} of {str(target.dtype)[6:]}"
    if target.is_floating_point() or target.is_complex() or output.dim() != target.dim() + 1 or not target.dim():
        raise ValueError(
            f"accuracy is not defined for {shapes}: it needs class indices [N, …] with scores [N, …, C] or [N, C, …], "
            'or one score for each target of 0 or 1; say metric="loss", or return a Task with metrics of its own'
        )
    second = output.shape[2:] == target.shape[1:] and len(output) == len(target)
    last = output.shape[:-1] == target.shape
    if second and (is_of_classes(loss_fn) or not last or target.dim() == 1):
        return 1  # if both fit, torch's own losses expect the classes on axis 1
    if last and not second:
        return output.dim() - 1
    if last:
        raise ValueError(
            f"the axis of the classes is ambiguous for {shapes}: use "
            "torch.nn.CrossEntropyLoss, whose classes are on axis 1, or return a Task with metrics of its own"
        )
    raise ValueError(f"accuracy is not defined for {shapes}: except for the classes their shapes must be the same")


def _binary_correct(loss_fn: Any, output: Tensor, target: Tensor) -> Tensor:
    """Return whether each score is on the side of the threshold that its target, 0 or 1, belongs to; bool [N]."""
    classes = target.flatten()
    if not bool(((classes == 0) | (classes == 1)).all()):
        raise ValueError(
            "accuracy of one score for each sample needs targets of 0 and 1, but they go from "
            f'{classes.min().item():g} to {classes.max().item():g}; say metric="loss"'
        )
    return (output.flatten() > threshold(loss_fn, output, target)) == (classes == 1)


def threshold(loss_fn: Any, output: Tensor, target: Tensor) -> float:
    """Return the score above which a sample belongs to class 1: 0 for logits, 0.5 for probabilities.

    The loss decides: with the target 1, a score of 0.25 has a smaller loss than with the target 0 only if scores are
    logits.
    """
    if isinstance(loss_fn, nn.BCEWithLogitsLoss):  # pos_weight moves the point of equal loss
        return 0.0
    if isinstance(loss_fn, nn.BCELoss):
        return 0.5
    with torch.no_grad():
        quarter = torch.full_like(output, 0.25)
        loss_of_one, loss_of_zero = (float(loss_fn(quarter, torch.full_like(target, value))) for value in (1, 0))
    return 0.0 if loss_of_one < loss_of_zero else 0.5
