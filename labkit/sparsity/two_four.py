"""Linear layers whose weight, two of every four along the inputs, is multiplied by the kernels of GPUs for that.

    Y = X·W₂₄ᵀ sparse;   ∂X = ∂Y·W₂₄ and ∂W = ∂Yᵀ·X dense, straight through to all weights, as SR-STE wants it

The weight stays the dense parameter; it is compressed in every forward pass, after the mask of the update has been laid
on it. The backward pass is dense, because Wᵀ of a 2:4 matrix is none, so that of three products one gets faster, by
less than two: compressing costs as well. Source: torch.sparse.semi_structured of torch 2.13, a prototype there. Neither
of its libraries knows every GPU (pytorch/pytorch#132928: Hopper), so both are tried out.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SIDES = (32, 64)
"""Rows and columns of a weight have to be multiples of these: CUTLASS's bounds, cuSPARSELt's are lower."""
TYPES = (torch.bfloat16, torch.float16)

Multiply = Callable[[Tensor, Tensor], Tensor]
"""x [rows, inputs] and weight [outputs, inputs] to x·weightᵀ [rows, outputs]."""


def fits(weight: Tensor) -> bool:
    """Have its sides a length that kernels take?"""
    return weight.dim() == 2 and weight.shape[0] % SIDES[0] == 0 and weight.shape[1] % SIDES[1] == 0


def is_two_four(weight: Tensor) -> bool:
    """Are at most two of every four neighbours along the inputs different from zero?"""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight.detach() != 0).view(-1, 4).sum(1) <= 2).all())


def compressed(weight: Tensor) -> Any:
    """The semi-structured tensor of a 2:4 weight in 16 bits on a GPU. ValueError where there is no kernel."""
    found, reason = kernels(weight.device)
    if found is None:
        raise ValueError(reason)
    return found.from_dense(weight.detach().contiguous())


def sparse_product(x: Tensor, weight: Tensor) -> Tensor:
    """x·weightᵀ by the kernels."""
    return functional.linear(x, compressed(weight))


@functools.cache
def kernels(device: torch.device) -> tuple[Any, str]:
    """The class of torch that works here, cuSPARSELt's or CUTLASS's, and else None with the reason. It is tried out."""
    if device.type != "cuda":
        return None, f"2:4 kernels need a GPU, and this is {device}"
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    offered: list[Any] = [SparseSemiStructuredTensorCUTLASS]
    if torch.backends.cusparselt.is_available():
        offered.insert(0, SparseSemiStructuredTensorCUSPARSELT)
    said = ""
    for kind in offered:
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # a prototype, it says
                weight = torch.tensor([0.0, 1.0, 0.0, 2.0], device=device).repeat(64, 32).to(torch.bfloat16)
                x = torch.eye(128, device=device, dtype=torch.bfloat16)
                if torch.equal(functional.linear(x, kind.from_dense(weight)), weight.t()):
                    return kind, ""
                said = "its products are wrong"
        except (RuntimeError, AssertionError) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return None, f"torch's 2:4 kernels do not work on {torch.cuda.get_device_name(device)}: {said}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, multiply: Multiply) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        (change,) = gradients
        of_x = change @ weight if ctx.needs_input_grad[0] else None
        of_weight = change.t() @ x if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None


class SemiStructuredLinear(nn.Linear):
    """In place of an `nn.Linear`, with its parameters: [..., inputs] to [..., outputs].

    It multiplies by the kernels while it is `masked` and computes in 16 bits, and else as a dense layer.
    """

    def __init__(self, layer: nn.Linear, multiply: Multiply = sparse_product) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.training, self.multiply = layer.training, multiply
        self.masked = False
        """Is the weight 2:4 at the moment?"""
        self.products = 0
        """Sparse products made so far."""

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        if not self.masked or dtype not in TYPES:
            return functional.linear(input, self.weight, self.bias)
        self.products += 1
        x = input.to(dtype).flatten(0, -2).contiguous()
        out: Tensor = _Product.apply(x, self.weight.to(dtype), self.multiply)  # type: ignore[no-untyped-call]
        out = out.unflatten(0, input.shape[:-1])
        return out if self.bias is None else out + self.bias.to(dtype)


def replace(
    model: nn.Module, names: Iterable[str], multiply: Multiply = sparse_product
) -> dict[str, SemiStructuredLinear]:
    """Put such a layer in place of each linear one whose weight is named and fits; returns them by that name."""
    made = {}
    for name in names:
        path = name.rpartition(".")[0]
        parent, _, own = path.rpartition(".")
        layer = model.get_submodule(path)
        if type(layer) is nn.Linear and fits(layer.weight):
            made[name] = SemiStructuredLinear(layer, multiply)
            setattr(model.get_submodule(parent), own, made[name])
    return made
