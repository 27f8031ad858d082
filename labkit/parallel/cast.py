"""The dtype of a run, and what it means for a tensor: real tensors are cast to it, complex ones to its complex twin.

`Module.to(dtype)` casts complex tensors to real ones: the imaginary part is gone, with only a warning in a log (seen
with torch 2.13). Rotary factors, spectral layers and phases are complex in many published models, so here they keep
both parts. Integers, booleans and everything else stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from labkit.experiment.fault import TaskFault
from labkit.gradients.updates.average import as_reals
from labkit.workloads.mapped import converted

__all__ = [
    "as_reals",
    "at_least_float32",
    "complex_parameter_names",
    "dtype_in_run",
    "place_module",
    "place_tensor",
    "widen",
]

COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}
"""Complex dtype by the dtype of its two parts. bfloat16 has none, and that of float16 cannot multiply."""


def dtype_in_run(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of `tensor` in a run in `dtype`; TaskFault if it is complex and no complex dtype fits."""
    if tensor.is_complex():
        if dtype not in COMPLEX:
            name = str(dtype).removeprefix("torch.")
            raise TaskFault(
                f"the model computes with complex numbers, which torch does not have in {name}: "
                "choose another number format (quantization.training), e.g. fp32 or bf16"
            )
        return COMPLEX[dtype]
    return dtype if tensor.is_floating_point() else tensor.dtype


def place_tensor(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the tensor on `device`, cast as a run in `dtype` needs it."""
    return tensor.to(device, dtype_in_run(tensor, dtype), non_blocking=True)


def place_module(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move parameters and buffers to `device` and cast them, in place; return the module."""
    convert: Callable[[Tensor], Tensor] = lambda tensor: converted(tensor, device, dtype_in_run(tensor, dtype))  # noqa: E731
    return module._apply(convert)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of losses and targets for weights in `dtype`: the wider of `dtype` and float32."""
    return torch.promote_types(dtype, torch.float32)


def widen(output: Tensor) -> Tensor:
    """Return a model's output for losses and metrics: real floating-point tensors in at least float32."""
    return output.to(at_least_float32(output.dtype)) if output.is_floating_point() else output


def complex_parameter_names(module: nn.Module) -> list[str]:
    """Return the names of the complex parameters that are trained."""
    return [name for name, p in module.named_parameters() if p.is_complex() and p.requires_grad]
