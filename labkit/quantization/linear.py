"""Linear layers that compute in another precision, with the same weights under the same names.

A layer gets another *arithmetic*, which multiplies its inputs with its weight. The weight stays a float32 parameter, so
layouts shard, tie and save it as always; where a layout replaces a layer by a module of its own
(labkit.parallel.tensor.RowParallelLinear), that module takes over the arithmetic.

Only `torch.nn.Linear` itself is replaced. Convolutions and embeddings are not changed, and neither are the experts of a
mixture, whose weights are parameters with three dimensions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Operand:
    """One factor of a layer's product as it is multiplied; its values are codes · scale."""

    kind: str
    """Kind of values: `float32`, `int8`, `ternary`; `int4 grid` for values of a grid stored as floats."""
    codes: Tensor
    """Float values, or the codes of a grid: [rows, columns]."""
    highest: float
    """Largest magnitude that a code has or, on a grid, can have."""
    scale: Tensor | float = 1.0
    """Scale, which broadcasts to the codes."""
    share: str = "layer"
    """Which values share a scale, so that a code gives the size of a value relative to the largest of them."""

    @classmethod
    def of(cls, numbers: Tensor) -> Operand:
        """Wrap float values, with the largest magnitude among them as `highest`."""
        numbers = numbers.detach()
        highest = max(-float(numbers.amin()), float(numbers.amax())) if numbers.numel() else 0.0
        return cls(str(numbers.dtype).removeprefix("torch."), numbers, highest)

    @property
    def numbers(self) -> Tensor:
        """The values that are multiplied, as floats."""
        return self.codes * self.scale


class QuantizedLinearOp:
    """Arithmetic of one layer: computes x · wᵀ [..., out] from x [..., in] and weight [out, in], without bias."""

    products = 0
    """Number of int8 matrix products made so far."""
    backward_bytes: tuple[int, int] = (4, 4)
    """Bytes per element in the two backward products: for the gradient of the inputs and for that of the weight."""

    def __init__(self) -> None:
        self.noise: torch.Generator | None = None
        """Generator for stochastic rounding, which is seeded before every optimizer step."""
        self.watched = False
        """Whether to count the codes that are multiplied, which takes time."""
        self.counts: dict[int, int] = {}
        """How often each code occurred in a weight while `watched`."""
        self.reset_counts = False
        """Whether to reset the counts when the next weight is noted."""

    def __deepcopy__(self, memo: Any) -> QuantizedLinearOp:
        """Return this object, since copies of a layer share counts and generator."""
        return self

    @abstractmethod
    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the product, which autograd can differentiate."""

    @abstractmethod
    def operands(self, x: Tensor, weight: Tensor) -> tuple[Operand, Operand]:
        """Return the quantized factors for x [rows, in] and weight [out, in], in their shapes, without counting."""

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply int8 matrices [m, k] and [k, n] to int32 [m, n], and count the product."""
        self.products += 1
        return int8_product(a, b)

    def note(self, codes: Tensor) -> None:
        """Count the codes of a weight that is multiplied, if `watched`."""
        if self.watched:
            if self.reset_counts:
                self.counts, self.reset_counts = {}, False
            values, counts = codes.unique(return_counts=True)
            for value, count in zip(values.tolist(), counts.tolist(), strict=True):
                self.counts[int(value)] = self.counts.get(int(value), 0) + count


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply int8 matrices a [m, k] and b [k, n] exactly: int32 [m, n], by `torch._int_mm`."""
    if not a.is_cuda:
        return torch._int_mm(a, b)
    rows, columns = a.shape[0], b.shape[1]
    return torch._int_mm(*cublas_operands(a, b))[:rows, :columns]


def cublas_operands(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return a [m, k] and b [k, n] as cuBLAS multiplies int8 on every GPU: a row-major, b column-major.

    Zeros are added so that there are more than 16 rows and every size is a multiple of 8. Other layouts are refused
    with CUBLAS_STATUS_NOT_SUPPORTED, always (a column-major) or on some GPUs (pytorch #169956, #169961).
    """
    rows, inner, columns = a.shape[0], a.shape[1], b.shape[1]
    a = nn.functional.pad(a, (0, -inner % 8, 0, max(-rows % 8, 24 - rows))).contiguous()
    b = nn.functional.pad(b.t(), (0, -inner % 8, 0, -columns % 8)).contiguous()
    return a, b.t()


class NarrowLinear(nn.Linear):
    """Linear layer with its own arithmetic, which uses the parameters of another layer."""

    def __init__(self, layer: nn.Linear, arithmetic: QuantizedLinearOp) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.arithmetic = arithmetic
        self.training = layer.training

    def forward(self, input: Tensor) -> Tensor:
        out = self.arithmetic(input, self.weight)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def chosen(model: nn.Module, head: bool) -> list[tuple[str, nn.Linear]]:
    """Return the linear layers to quantize, with names: all of them, but the last one (the logits) only with `head`."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kinds = (nn.Linear, NarrowLinear)
    layers = layers if head else layers[:-1]
    return [(name, module) for name, module in layers if type(module) in kinds]


def replace(model: nn.Module, layers: Iterable[nn.Linear], make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace each layer by `make(layer)`, wherever the model uses it."""
    replacements = {layer: make(layer) for layer in layers}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() omits repeated uses
            if isinstance(child, nn.Linear) and child in replacements:
                setattr(parent, name, replacements[child])


def narrow(model: nn.Module, make: Callable[[], QuantizedLinearOp], head: bool) -> list[str]:
    """Give every layer of `chosen` its own arithmetic, in place, and return their names.

    Raises ValueError if there is no such layer.
    """
    layers = chosen(model, head)
    if not layers:
        raise ValueError(
            "the model has no linear layer that could be quantized besides its last one (quantization.head)"
        )
    replace(model, [layer for _, layer in layers], lambda layer: NarrowLinear(layer, make()))
    return [name for name, _ in layers]


def arithmetics(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Parameter, QuantizedLinearOp]]:
    """Yield the weights (this rank's shards) that have a quantized arithmetic, each with its arithmetic."""
    for module in modules:
        for part in module.modules():
            arithmetic = getattr(part, "arithmetic", None)
            if isinstance(arithmetic, QuantizedLinearOp):
                yield part.weight, arithmetic  # type: ignore[misc]
