"""Hooks that a user has registered on parameters with `register_hook` or `register_post_accumulate_grad_hook`.

Hooks belong to the tensor. If a layout replaces the tensor, or bypasses autograd's own accumulation of gradients, they
would be lost silently. Otherwise they see the gradient of one rank's pass: the result equals that of one process only
if the hook is linear, which is tested by calling it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from labkit.experiment import Experiment
from labkit.gradients.parameter_hooks import accumulated_hooks, gradient_hooks
from labkit.workloads.restore import undisturbed

_WITHOUT = "remove the hook, or do its work in the model (a mask, a parametrization)"


def hooks_of(parameter: Tensor) -> list[Callable[[Tensor], Any]]:
    """Return the hooks of both kinds that are registered on a parameter."""
    return [*gradient_hooks(parameter), *accumulated_hooks(parameter)]


def hooked(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that have hooks, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if hooks_of(parameter)}


def lost_by(experiment: Experiment, model: nn.Module) -> str | None:
    """Return one sentence on why a hook of this model would be lost in this layout; None if all hooks work."""
    parameters, layout = hooked(model), experiment.layout
    if not parameters:
        return None
    name = next(iter(parameters))
    for cause, replaces, remedy in (
        ("ZeRO 3", layout.dp_shard > 1 and layout.zero_stage == 3, "set layout.zero_stage to 1 or 2"),
        ("tensor parallelism", layout.tp > 1, "set layout.tp to 1"),
        ("expert parallelism", layout.ep > 1, "set layout.ep to 1"),
        (layout.order.name, layout.pp > 1 and layout.order.asynchronous, "set layout.schedule to 1f1b"),
    ):
        if replaces:
            return (
                f"{name} has a hook ({_kind(parameters[name])}), which is lost under {cause}: {remedy}, or {_WITHOUT}"
            )
    late = next((name for name, parameter in parameters.items() if accumulated_hooks(parameter)), None)
    if late is not None and layout.splits_backward:
        return (
            f"{late} has a hook (register_post_accumulate_grad_hook), which the schedule {layout.order.name} never "
            f"calls: use register_hook, or set layout.schedule to 1f1b, or {_WITHOUT}"
        )
    return None


def _kind(parameter: Tensor) -> str:
    return "register_hook" if gradient_hooks(parameter) else "register_post_accumulate_grad_hook"


def lost_in(before: Mapping[str, nn.Parameter], stages: Iterable[nn.Module]) -> str | None:
    """Return a sentence about the first hook that was lost while the model was prepared for training, or None.

    `before` holds the parameters with hooks, by name, from before the preparation.
    """
    for stage in stages:
        for name, parameter in stage.named_parameters():
            if name in before and before[name] is not parameter:
                return (
                    f"{name} has a hook ({_kind(before[name])}), but this experiment trains another tensor in its "
                    f"place: {_WITHOUT}"
                )
    return None


def nonlinear(model: nn.Module) -> str | None:
    """Return the name of the first parameter whose hooks are not a linear map of the gradient; None for none."""
    parameters = hooked(model)
    if not parameters:
        return None
    with undisturbed(model), torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.requires_grad and not _is_linear(parameter):
                return name
    return None


def _is_linear(parameter: nn.Parameter) -> bool:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(parameter.shape, generator=generator).to(parameter) for _ in range(2))
    try:
        sum_of_results = _apply_hooks(parameter, first) + _apply_hooks(parameter, second)
        result_of_sum = _apply_hooks(parameter, first + second)
    except Exception:  # the user's own code, which may need more than a gradient
        return False
    return sum_of_results.shape == result_of_sum.shape and bool(
        torch.allclose(sum_of_results, result_of_sum, rtol=1e-3, atol=1e-3)
    )


def _apply_hooks(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """Return what the hooks of the parameter turn a gradient into; ValueError if they remove it."""
    gradient = gradient.clone()
    for hook in gradient_hooks(parameter):
        replacement = hook(gradient)
        gradient = gradient if replacement is None else replacement
    before, parameter.grad = parameter.grad, gradient.clone()
    for hook in accumulated_hooks(parameter):
        hook(parameter)
    result, parameter.grad = parameter.grad, before
    if result is None:
        raise ValueError("the hook removes the gradient")
    return result
