"""Linear layers with integer weights, for a network that is trained; made from ordinary ones, never trained further."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from labkit.quantization.codes import INT8, from_int4, int4_codes, int8_codes, on_int8, pack_int4, unpack_int4
from labkit.quantization.linear import NarrowLinear, chosen, int8_product, replace


class ConvertedLinear(nn.Module):
    """Base: x [..., in] to [..., out] in float32."""

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
        """X [rows, in] to [rows, out], without bias."""


class Int8WeightLinear(ConvertedLinear):
    """int8 weights, a scale per row; the product is one in float32.

    torch 2.13 has a kernel for that on CPUs, `_weight_int8pack_mm`: in float32 it takes ten to forty times as long, in
    bfloat16 it reads beyond the weight where inputs are no multiple of 16 (with 70 the process ends). It is left alone.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        codes, scale = int8_codes(layer.weight.detach().float())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.squeeze(1))

    def product(self, x: Tensor) -> Tensor:
        """With the weight made whole."""
        return functional.linear(x, self.codes.to(x.dtype)).mul_(self.scale)


class Int8DynamicLinear(Int8WeightLinear):
    """int8 weights and inputs, which are rounded as they come with a scale per token."""

    def product(self, x: Tensor) -> Tensor:
        """One product of int8 matrices."""
        codes, steps = int8_codes(x)
        return int8_product(codes, self.codes.t()).to(x.dtype).mul_(steps).mul_(self.scale)


class Int8StaticLinear(Int8WeightLinear):
    """int8 weights and inputs with one scale for all inputs, known beforehand: what is beyond it is clipped.

    `largest`: the magnitude that gets the highest code (calibration.py).
    """

    step: Tensor

    def __init__(self, layer: nn.Linear, largest: float) -> None:
        super().__init__(layer)
        self.register_buffer("step", self.scale.new_tensor(max(largest, 1e-12) / INT8))

    def product(self, x: Tensor) -> Tensor:
        """One product of int8 matrices, without a look at the inputs before."""
        codes = (x * self.step.reciprocal()).round_().clamp_(-INT8, INT8).to(torch.int8)
        return int8_product(codes, self.codes.t()).to(x.dtype).mul_(self.scale * self.step)


class Int4WeightLinear(ConvertedLinear):
    """int4 weights, two in a byte, a scale for every 32 inputs; made whole for every product.

    `rounds_inputs`: as in quantization-aware training, to int8 per token.
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
        """One product in float32."""
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
    """Put integer layers in the place of the chosen linear ones, in place; their names.

    `method`: one of the registry; `qat`: what the network was trained for; `only`: these of the chosen layers;
    `largest`: by layer, the magnitude of its inputs that is not clipped, for int8_static.
    """
    layers = [(name, layer) for name, layer in chosen(model, head) if only is None or name in only]

    places = {layer: name for name, layer in layers}

    def make(layer: nn.Linear) -> nn.Module:
        if method == "int4_weight_only":
            return Int4WeightLinear(layer, qat == "int4")
        if method == "int8_static":
            return Int8StaticLinear(layer, (largest or {})[places[layer]])
        return {"int8_dynamic": Int8DynamicLinear, "int8_weight_only": Int8WeightLinear}[method](layer)

    replace(model, [layer for _, layer in layers], make)
    return [name for name, _ in layers]


def plain(model: nn.Module) -> None:
    """Put ordinary layers in the place of those with another arithmetic, in place: the network without quantization."""

    def make(layer: nn.Linear) -> nn.Module:
        made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        return made

    replace(model, [module for module in model.modules() if isinstance(module, NarrowLinear)], make)


def num_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
