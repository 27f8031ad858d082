"""Linear layers whose 2:4 sparse weight is multiplied by GPU kernels for that format.

    Y = X·W₂₄ᵀ sparse;   ∂X = ∂Y·W₂₄ and ∂W = ∂Yᵀ·X dense, with a gradient for all weights, as SR-STE requires

The parameter stays the dense weight; it is compressed in every forward pass, after the mask of the step was applied.
The backward pass is dense, because the transpose of a 2:4 matrix is not 2:4. So one of three products gets faster, by
less than a factor of two, because compression takes time too. Source: torch.sparse.semi_structured of torch 2.13, where
it is a prototype. Neither of its libraries supports every GPU (pytorch/pytorch#132928: Hopper), so both are tried.
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
"""Rows and columns of a weight must be multiples of these (bounds of CUTLASS; those of cuSPARSELt are lower)."""
DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes in which the kernels are used."""

Multiply = Callable[[Tensor, Tensor], Tensor]
"""Maps x [rows, inputs] and a weight [outputs, inputs] to x·weightᵀ [rows, outputs]."""


def fits(weight: Tensor) -> bool:
    """Return whether the kernels support the shape of a weight."""
    return weight.dim() == 2 and weight.shape[0] % SIDES[0] == 0 and weight.shape[1] % SIDES[1] == 0


def is_two_four(weight: Tensor) -> bool:
    """Return whether at most two of every four consecutive weights along the inputs are non-zero."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight.detach() != 0).view(-1, 4).sum(1) <= 2).all())


def compress(weight: Tensor) -> Any:
    """Return the semi-structured tensor of a 2:4 weight in 16 bits on a GPU; raise ValueError if there is no kernel."""
    tensor_class, reason = kernels(weight.device)
    if tensor_class is None:
        raise ValueError(reason)
    return tensor_class.from_dense(weight.detach().contiguous())


def sparse_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x·weightᵀ, computed by the kernels."""
    return functional.linear(x, compress(weight))


@functools.cache
def kernels(device: torch.device) -> tuple[Any, str]:
    """Return torch's tensor class that works here, of cuSPARSELt or CUTLASS; None and the reason if neither does.

    Each is tried on a small product.
    """
    if device.type != "cuda":
        return None, f"2:4 kernels need a GPU, and this is {device}"
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    candidates: list[Any] = [SparseSemiStructuredTensorCUTLASS]
    if torch.backends.cusparselt.is_available():
        candidates.insert(0, SparseSemiStructuredTensorCUSPARSELT)
    reason = ""
    for tensor_class in candidates:
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # torch warns that it is a prototype
                weight = torch.tensor([0.0, 1.0, 0.0, 2.0], device=device).repeat(64, 32).to(torch.bfloat16)
                x = torch.eye(128, device=device, dtype=torch.bfloat16)
                if torch.equal(functional.linear(x, tensor_class.from_dense(weight)), weight.t()):
                    return tensor_class, ""
                reason = "its products are wrong"
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return None, f"torch's 2:4 kernels do not work on {torch.cuda.get_device_name(device)}: {reason}"


class _Product(torch.autograd.Function):
    """Computes x·weightᵀ with a sparse forward and a dense backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, multiply: Multiply) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        (output_gradient,) = gradients
        x_gradient = output_gradient @ weight if ctx.needs_input_grad[0] else None
        weight_gradient = output_gradient.t() @ x if ctx.needs_input_grad[1] else None
        return x_gradient, weight_gradient, None


class SemiStructuredLinear(nn.Linear):
    """Replaces an `nn.Linear` ([..., inputs] to [..., outputs]) and uses its parameters.

    It uses the 2:4 kernels while it is `masked` and computes in 16 bits; otherwise it is a dense layer.
    """

    def __init__(self, layer: nn.Linear, multiply: Multiply = sparse_product) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.training, self.multiply = layer.training, multiply
        self.masked = False
        """Whether the weight is 2:4 at the moment."""
        self.products = 0
        """Number of sparse products made so far."""

    def forward(self, input: Tensor) -> Tensor:
        device_type = input.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else input.dtype
        if not self.masked or dtype not in DTYPES:
            return functional.linear(input, self.weight, self.bias)
        self.products += 1
        x = input.to(dtype).flatten(0, -2).contiguous()
        out: Tensor = _Product.apply(x, self.weight.to(dtype), self.multiply)  # type: ignore[no-untyped-call]
        out = out.unflatten(0, input.shape[:-1])
        return out if self.bias is None else out + self.bias.to(dtype)


def replace(
    model: nn.Module, names: Iterable[str], multiply: Multiply = sparse_product
) -> dict[str, SemiStructuredLinear]:
    """Replace each linear layer whose weight is in `names` and has a supported shape; return the new layers by name."""
    layers = {}
    for name in names:
        path = name.rpartition(".")[0]
        parent, _, attribute = path.rpartition(".")
        layer = model.get_submodule(path)
        if type(layer) is nn.Linear and fits(layer.weight):
            layers[name] = SemiStructuredLinear(layer, multiply)
            setattr(model.get_submodule(parent), attribute, layers[name])
    return layers
