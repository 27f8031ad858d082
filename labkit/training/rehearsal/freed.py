"""Which parameters a backward pass reaches, without keeping all gradients of a model that no rank holds as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from labkit.workloads.mapped import is_mapped


@contextmanager
def gradients_freed(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, torch.layout]]:
    """Yield a dict that holds, after the context, the layout of each parameter's gradient by name, for those with one.

    All gradients are freed: those of a model with mapped parameters each as soon as it is complete, others at the end.
    """
    one_by_one = any(map(is_mapped, parameters.values()))
    layouts: dict[str, torch.layout] = {}

    def free(name: str, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            layouts[name] = parameter.grad.layout
            parameter.grad = None

    with ExitStack() as hooks:
        for name, parameter in parameters.items():
            if one_by_one:
                handle = parameter.register_post_accumulate_grad_hook(partial(free, name))
                hooks.callback(handle.remove)
        yield layouts
    for name, parameter in parameters.items():
        free(name, parameter)
