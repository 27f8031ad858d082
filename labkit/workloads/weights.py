"""The divisor of a batch's mean loss, so that the parts of a batch add up to the whole.

With the mean losses l_p over parts p of a batch and their weights w_p, the loss of the whole batch is

    Σ_p w_p · l_p  /  Σ_p w_p

For most losses w is the number of samples. `CrossEntropyLoss` and `NLLLoss` on class indices divide by the sum of the
class weights of all targets that are not `ignore_index`; that sum is w here. Source: the formulas in torch's
documentation of these losses; issue 11, A6.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100
"""Target that torch's losses ignore unless they are given another `ignore_index`."""

_MODULES: dict[Any, type[nn.Module]] = {
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.nll_loss: nn.NLLLoss,
    functional.binary_cross_entropy: nn.BCELoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    functional.mse_loss: nn.MSELoss,
    functional.l1_loss: nn.L1Loss,
    functional.smooth_l1_loss: nn.SmoothL1Loss,
    functional.huber_loss: nn.HuberLoss,
    functional.kl_div: nn.KLDivLoss,
    functional.poisson_nll_loss: nn.PoissonNLLLoss,
    functional.soft_margin_loss: nn.SoftMarginLoss,
    functional.multi_margin_loss: nn.MultiMarginLoss,
    functional.multilabel_margin_loss: nn.MultiLabelMarginLoss,
    functional.multilabel_soft_margin_loss: nn.MultiLabelSoftMarginLoss,
    functional.hinge_embedding_loss: nn.HingeEmbeddingLoss,
}
_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.NLLLoss2d)
_OF_NUMBERS = (
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.KLDivLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
    nn.HingeEmbeddingLoss,
    nn.MultiLabelSoftMarginLoss,
)


def as_module(loss_fn: Any) -> Any:
    """Return a function of torch.nn.functional, or a partial of one, as the loss module that it corresponds to.

    A module stores its class weights as buffers, so that they are moved and cast with the run. Anything else is
    returned unchanged.
    """
    function, keywords = loss_fn, {}
    if isinstance(loss_fn, functools.partial) and not loss_fn.args:
        function, keywords = loss_fn.func, dict(loss_fn.keywords)
    module = _MODULES.get(function) if inspect.isfunction(function) or inspect.isbuiltin(function) else None
    if module is None or not set(keywords) <= set(inspect.signature(module).parameters):
        return loss_fn
    return module(**keywords)


def is_of_classes(loss_fn: Any) -> bool:
    """Return True for torch's own loss of class indices, with its own forward pass."""
    return _is(loss_fn, _OF_CLASSES)


def is_of_numbers(loss_fn: Any) -> bool:
    """Return True for a loss of torch whose targets are floating-point numbers, with its own forward pass."""
    return _is(loss_fn, _OF_NUMBERS)


def is_torch_loss(loss_fn: Any) -> bool:
    """Return True for one of torch's losses, with its own forward pass."""
    return _is(loss_fn, tuple(_MODULES.values()))


def _is(loss_fn: Any, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Return True if the loss is of one of these types and does not override its forward pass."""
    return any(isinstance(loss_fn, kind) and type(loss_fn).forward is kind.forward for kind in kinds)


def counts_targets(loss_fn: Any, target: Tensor) -> bool:
    """Return True if `loss_fn` averages over the valid targets, each with the weight of its class."""
    return is_of_classes(loss_fn) and not target.is_floating_point()


def valid_targets(loss_fn: Any, target: Tensor) -> Tensor:
    """Return which class indices count, bool in the shape of `target`: neither `ignore_index` nor below zero."""
    ignored = loss_fn.ignore_index if is_of_classes(loss_fn) else IGNORED
    return (target != ignored) & (target >= 0)


def batch_weight(loss_fn: Any, target: Tensor) -> Tensor | float:
    """Return the divisor of the mean loss over `target`: a scalar tensor, or the number of samples.

    A loss of unknown type counts samples; so do torch's losses of class probabilities and of numbers.
    """
    if not counts_targets(loss_fn, target):
        return float(len(target))
    valid = target != loss_fn.ignore_index
    if loss_fn.weight is None:
        return valid.sum()
    weights: Tensor = loss_fn.weight
    class_weights = weights.to(target.device, torch.promote_types(weights.dtype, torch.float32))
    return (class_weights[target.where(valid, target.new_zeros(()))] * valid).sum()


def mean_loss(loss_fn: Any, output: Tensor, target: Tensor) -> Tensor:
    """Return the mean loss (scalar); zero, with gradients of zero, if no target of the batch counts.

    Torch would divide zero by zero there.
    """
    if not counts_targets(loss_fn, target):
        loss: Tensor = loss_fn(output, target)
        return loss
    weight = torch.as_tensor(batch_weight(loss_fn, target)).to(output.dtype)
    total: Tensor = with_sum_reduction(loss_fn)(output, target)
    return total / weight.where(weight != 0, weight.new_ones(()))


def with_sum_reduction(loss_fn: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the same loss with reduction='sum'; it shares the buffers of `loss_fn`."""
    total = copy.copy(loss_fn)
    total.reduction = "sum"  # type: ignore[assignment]
    return total


def trainable_parameters(loss_fn: Any) -> list[str]:
    """Return the names of the parameters of a loss that an optimizer would have to train; [] for none.

    Parameters inside other objects (closure, partial, object) are found by the rehearsal, in the graph of a pass.
    """
    if not isinstance(loss_fn, nn.Module):
        return []
    return [name for name, parameter in loss_fn.named_parameters() if parameter.requires_grad]
