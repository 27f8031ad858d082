"""Linear layers with integer weights for inference, converted from those of a trained network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from labkit.quantization.codes import INT8, from_int4, int4_codes, int8_codes, on_int8, pack_int4, unpack_int4
from labkit.quantization.linear import NarrowLinear, chosen, int8_product, replace


class ConvertedLinear(nn.Module):
    """Base class: maps x [..., in] to [..., out] in float32."""

    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return out if self.bias is None else out.add_(self.bias)

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Multiply x [rows, in] by the weight, without bias: [rows, out]."""


class Int8WeightLinear(ConvertedLinear):
    """Linear layer with int8 weights and a scale per row; the product is in float32.

    torch 2.13 has a kernel for that on CPUs, `_weight_int8pack_mm`, which is not used: in float32 it takes ten to forty
    times as long, and in bfloat16 it reads beyond the weight if the inputs are not a multiple of 16 (with 70 the
    process crashes).
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        codes, scale = int8_codes(layer.weight.detach().float())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.squeeze(1))

    def product(self, x: Tensor) -> Tensor:
        """Convert the weight to the dtype of x and multiply."""
        return functional.linear(x, self.codes.to(x.dtype)).mul_(self.scale)


class Int8DynamicLinear(Int8WeightLinear):
    """Linear layer with int8 weights and inputs, which are quantized as they come with a scale per token."""

    def product(self, x: Tensor) -> Tensor:
        """Quantize x and multiply int8 matrices."""
        codes, steps = int8_codes(x)
        return int8_product(codes, self.codes.t()).to(x.dtype).mul_(steps).mul_(self.scale)


class Int8StaticLinear(Int8WeightLinear):
    """Linear layer with int8 weights and inputs; inputs share a scale from calibration and are clipped beyond it.

    `largest` is the magnitude that gets the highest code (calibration.py).
    """

    step: Tensor

    def __init__(self, layer: nn.Linear, largest: float) -> None:
        super().__init__(layer)
        self.register_buffer("step", self.scale.new_tensor(max(largest, 1e-12) / INT8))

    def product(self, x: Tensor) -> Tensor:
        """Quantize x with the fixed scale and multiply int8 matrices."""
        codes = (x * self.step.reciprocal()).round_().clamp_(-INT8, INT8).to(torch.int8)
        return int8_product(codes, self.codes.t()).to(x.dtype).mul_(self.scale * self.step)


class Int4WeightLinear(ConvertedLinear):
    """Linear layer with int4 weights, two per byte, and a scale for every 32 inputs; dequantized for every product.

    With `rounds_inputs`, inputs are rounded to int8 per token, as in quantization-aware training.
    """

    packed: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear, rounds_inputs: bool = False) -> None:
        super().__init__(layer)
        codes, scale = int4_codes(layer.weight.detach().float())
        self.register_buffer("packed", pack_int4(codes))
        self.register_buffer("scale", scale)
        self.rounds_inputs = rounds_inputs

    def product(self, x: Tensor) -> Tensor:
        """Dequantize the weight and multiply in float32."""
        weight = from_int4(unpack_int4(self.packed), self.scale, self.in_features)
        return functional.linear(on_int8(x) if self.rounds_inputs else x, weight)


def convert(
    model: nn.Module,
    method: str,
    head: bool = False,
    qat: str = "none",
    only: Sequence[str] | None = None,
    largest: Mapping[str, float] | None = None,
) -> list[str]:
    """Replace linear layers by ones with integer weights, in place, and return their names.

    `method` is a key of the registry, `qat` that of quantization-aware training; `only` restricts the layers.
    `largest` has by layer the largest magnitude of its inputs that is not clipped, for int8_static.
    """
    layers = [(name, layer) for name, layer in chosen(model, head) if only is None or name in only]

    names = {layer: name for name, layer in layers}

    def make(layer: nn.Linear) -> nn.Module:
        if method == "int4_weight_only":
            return Int4WeightLinear(layer, qat == "int4")
        if method == "int8_static":
            return Int8StaticLinear(layer, (largest or {})[names[layer]])
        return {"int8_dynamic": Int8DynamicLinear, "int8_weight_only": Int8WeightLinear}[method](layer)

    replace(model, [layer for _, layer in layers], make)
    return [name for name, _ in layers]


def dequantize(model: nn.Module) -> None:
    """Replace layers with quantized arithmetic by `nn.Linear` layers, in place, with the same parameters."""

    def make(layer: nn.Linear) -> nn.Module:
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        return linear

    replace(model, [module for module in model.modules() if isinstance(module, NarrowLinear)], make)


def num_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers; shared ones count once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
