"""The number format of a run, and what it means for a tensor: floating tensors take it, complex ones its complex twin.

`Module.to(dtype)` makes real numbers of complex ones: the imaginary part is gone, with a warning in a log (seen with
torch 2.13). Rotary factors, spectral layers and phases are complex in many published models, so here they keep both
parts. Integers, booleans and everything else stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from labkit.experiment.fault import TaskFault
from labkit.gradients.updates.average import as_reals

__all__ = ["as_reals", "at_least_float32", "complex_names", "place_module", "placed", "type_of", "widened"]

COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}
"""The complex type whose two parts have this type. There is none of bfloat16, and that of float16 knows no products."""


def type_of(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The type that `tensor` takes in a run in `dtype`; TaskFault where no complex type has parts of that type."""
    if tensor.is_complex():
        if dtype not in COMPLEX:
            name = str(dtype).removeprefix("torch.")
            raise TaskFault(
                f"the model computes with complex numbers, which torch does not have in {name}: "
                "choose another number format (quantization.training), e.g. fp32 or bf16"
            )
        return COMPLEX[dtype]
    return dtype if tensor.is_floating_point() else tensor.dtype


def placed(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor on `device`, in the type that it takes in a run in `dtype`."""
    return tensor.to(device, type_of(tensor, dtype), non_blocking=True)


def place_module(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move parameters and buffers to `device` and cast them, in place; returns the module."""
    convert: Callable[[Tensor], Tensor] = lambda tensor: tensor.to(device, type_of(tensor, dtype))  # noqa: E731
    return module._apply(convert)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type in which losses are computed and targets are kept where weights are kept in `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def widened(output: Tensor) -> Tensor:
    """The output of a model as losses and metrics take it: floating numbers in float32 at least."""
    return output.to(at_least_float32(output.dtype)) if output.is_floating_point() else output


def complex_names(module: nn.Module) -> list[str]:
    """Names of the complex parameters that are trained."""
    return [name for name, one in module.named_parameters() if one.is_complex() and one.requires_grad]
