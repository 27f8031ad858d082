"""Linear layers that compute in another number format, with the same weights under the same names.

A layer gets another *arithmetic*: what multiplies its inputs with its weight. The weight stays the float32 parameter
that it was, so layouts cut it, shard it, tie it and save it as always; where a layout puts a module of its own in the
place of a layer (labkit.parallel.tensor.RowParallelLinear), that module takes the arithmetic over.

Only `torch.nn.Linear` itself is replaced. Convolutions and embeddings stay as they are, and so do the experts of a
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
    """One side of a layer's product as it is multiplied: the numbers are codes · scale."""

    kind: str
    """What numbers they are: `float32`, `int8`, `ternary`; `int4 grid` for numbers of a grid in float memory."""
    codes: Tensor
    """Float numbers as they are, or the codes of a grid: [rows, numbers of a row]."""
    highest: float
    """The largest magnitude that a code has, or can have."""
    scale: Tensor | float = 1.0
    """Broadcasts to the codes."""
    share: str = "layer"
    """Which numbers have one scale, so that a code tells how large a number is beside the largest of these."""

    @classmethod
    def of(cls, numbers: Tensor) -> Operand:
        """Float numbers, measured by the largest magnitude among them."""
        numbers = numbers.detach()
        highest = max(-float(numbers.amin()), float(numbers.amax())) if numbers.numel() else 0.0
        return cls(str(numbers.dtype).removeprefix("torch."), numbers, highest)

    @property
    def numbers(self) -> Tensor:
        """What is multiplied, in float."""
        return self.codes * self.scale


class QuantizedLinearOp:
    """How one layer computes x · wᵀ: x [..., in] and weight [out, in] to [..., out], without bias."""

    products = 0
    """Products of int8 matrices made so far."""
    backward_bytes: tuple[int, int] = (4, 4)
    """Bytes of a number in the two products backward: for the gradient of the inputs, for that of the weight."""

    def __init__(self) -> None:
        self.noise: torch.Generator | None = None
        """What stochastic rounding draws from: seeded anew before every update."""
        self.watched = False
        """Note what is multiplied (which costs time) from here on."""
        self.counts: dict[int, int] = {}
        """While it was watched: how often each code stood in a weight."""
        self.anew = False
        """Forget these counts when the next weight is noted."""

    def __deepcopy__(self, memo: Any) -> QuantizedLinearOp:
        """Copies of a layer count together and draw from one source."""
        return self

    @abstractmethod
    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product, to be followed backward."""

    @abstractmethod
    def operands(self, x: Tensor, weight: Tensor) -> tuple[Operand, Operand]:
        """What is multiplied for x [rows, in] and weight [out, in]: their places are kept, nothing is counted."""

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of int8 matrices [m, k] and [k, n]: int32 [m, n], counted."""
        self.products += 1
        return int8_product(a, b)

    def note(self, codes: Tensor) -> None:
        """These codes are what is multiplied."""
        if self.watched:
            if self.anew:
                self.counts, self.anew = {}, False
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
    """A linear layer with an arithmetic of its own, on the parameters of another one."""

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
    """The linear layers that are narrowed, by name: all, the last one (the scores) only with `head`."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kinds = (nn.Linear, NarrowLinear)
    found = found if head else found[:-1]
    return [(name, module) for name, module in found if type(module) in kinds]


def replace(model: nn.Module, layers: Iterable[nn.Linear], make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put `make(layer)` in the place of each layer, in all places where it stands."""
    made = {layer: make(layer) for layer in layers}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves second places out
            if isinstance(child, nn.Linear) and child in made:
                setattr(parent, name, made[child])


def narrow(model: nn.Module, make: Callable[[], QuantizedLinearOp], head: bool) -> list[str]:
    """Give every chosen layer an arithmetic of its own, in place; their names. ValueError if there is none."""
    layers = chosen(model, head)
    if not layers:
        raise ValueError("the model has no linear layer that could be narrowed beside its last one (quantization.head)")
    replace(model, [layer for _, layer in layers], lambda layer: NarrowLinear(layer, make()))
    return [name for name, _ in layers]


def arithmetics(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Parameter, QuantizedLinearOp]]:
    """The weights that are multiplied by an arithmetic of ours, as this rank holds them, each with its arithmetic."""
    for module in modules:
        for part in module.modules():
            arithmetic = getattr(part, "arithmetic", None)
            if isinstance(arithmetic, QuantizedLinearOp):
                yield part.weight, arithmetic  # type: ignore[misc]
