"""What numbers the network really computes with: seen in its layers with a product, over one held-out batch.

Types are those of the matrices that reach the product, below autocast and below every arithmetic of ours. What the
numbers of a grid are, the arithmetic says itself (`QuantizedLinearOp.operands`). Each is counted relative to the
largest magnitude that shares its scale, in 255 bins from -1 to 1: one for every number of int8, the middle one is zero.

Weights are seen as they are multiplied, so whole under every stage of ZeRO; under tensor parallelism this rank's part.
Only layers with a weight matrix of their own are seen: linear layers and convolutions, no experts of a mixture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from labkit.parallel.cut import ShardSpec
from labkit.parallel.mesh import Mesh
from labkit.quantization.linear import Operand, QuantizedLinearOp
from labkit.sparsity.csr import CsrLinear

HALF = 127
BINS = 2 * HALF + 1
MOST_LAYERS = 12
"""So many layers of a rank are counted number by number, evenly chosen."""
MOST_NUMBERS = 1 << 18
"""Of so many numbers a histogram is made, from rows that are evenly chosen."""
_ATEN = torch.ops.aten
_PRODUCTS = {
    _ATEN.mm.default: (0, 1),
    _ATEN.addmm.default: (1, 2),
    _ATEN.bmm.default: (0, 1),
    _ATEN.linear.default: (0, 1),
    _ATEN._int_mm.default: (0, 1),
    _ATEN.convolution.default: (0, 1),
}
"""Products, and which of their arguments are multiplied."""


class _Product(TorchDispatchMode):
    """Notes what the first product is given, while it is open."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.found is None and func in _PRODUCTS:
            first, second = _PRODUCTS[func]
            self.found = func, (args[first], args[second])
        return func(*args, **(kwargs or {}))


@dataclass
class LayerRecord:
    """A layer with a product, as a forward pass found it."""

    name: str
    module: nn.Module
    stage: int
    """Of the pipeline."""
    inputs: tuple[int, ...] = ()
    """Shape of its input; empty until it was called."""
    input_type: torch.dtype = torch.float32
    """In which its input came; `factors` are the types in which input and weight were multiplied."""
    factors: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
    kinds: tuple[str, str] = ("", "")
    """What numbers input and weight are, in words."""
    rows: int = 0
    """Vectors that the weight matrix was multiplied with."""
    shape: tuple[int, ...] = ()
    """Of the weight on this rank."""
    nonzero: int = 0
    stored: torch.dtype = torch.float32
    told: dict[str, Any] = field(default_factory=dict)
    """What is written down of it."""

    @property
    def multiplied(self) -> str:
        """`int8 × ternary`: inputs × weights."""
        return " × ".join(self.kinds)


class LayerProbe:
    """The layers of one rank, to be seen in one forward pass: `with watch.over(samples): …`, then `found()`.

    `stages` by their number; `shard_specs` tells how their parameters are cut over `mesh`.
    """

    def __init__(self, stages: Mapping[int, nn.Module], shard_specs: Mapping[str, ShardSpec], mesh: Mesh) -> None:
        self._shard_specs, self._mesh = shard_specs, mesh
        self.layers = [
            LayerRecord(name, module, stage)
            for stage, part in sorted(stages.items())
            for name, module in part.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d | CsrLinear) or hasattr(module, "arithmetic")
        ]
        self.samples = 0
        """In the batch that was seen."""
        self.unseen: dict[str, str] = {}
        """Layers that could not be looked at, and why."""

    @contextmanager
    def over(self, samples: int) -> Iterator[None]:
        """Every layer's first call meanwhile is looked at."""
        self.samples = samples
        most, last = min(MOST_LAYERS, len(self.layers)), len(self.layers) - 1
        chosen = {round(index * last / max(1, most - 1)) for index in range(most)}
        hooks = [hook for at, seen in enumerate(self.layers) for hook in self._hooks(seen, at in chosen)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hooks(self, seen: LayerRecord, told: bool) -> list[Any]:
        product = _Product()

        def before(module: nn.Module, inputs: Any, named: Any) -> None:
            if not seen.inputs and seen.name not in self.unseen:
                product.__enter__()  # type: ignore[no-untyped-call]

        def after(module: nn.Module, inputs: Any, named: Any, output: Tensor) -> None:
            if seen.inputs or seen.name in self.unseen:
                return
            product.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            try:
                self._look(seen, (*inputs, *named.values())[0], output, product, told)
            except Exception as error:  # a training does not end because somebody looked at it
                self.unseen[seen.name] = f"{type(error).__name__}: {error}"[:200]
                seen.inputs, seen.told = (), {}
            product.found = None

        return [
            seen.module.register_forward_pre_hook(before, with_kwargs=True),
            # First of all hooks: those of fully_shard take the weights away again.
            seen.module.register_forward_hook(after, with_kwargs=True, prepend=True),
        ]

    @torch.no_grad()
    def _look(self, seen: LayerRecord, x: Tensor, out: Tensor, product: _Product, told: bool) -> None:
        module: Any = seen.module
        weight = _weight(module)
        seen.inputs, seen.input_type = tuple(x.shape), x.dtype
        seen.shape, seen.stored = tuple(weight.shape), module.weight.dtype
        seen.nonzero = int(weight.count_nonzero())
        image = weight.dim() == 4
        # Of a linear layer its inputs tell: of its outputs a rank may keep a part (sequence parallelism).
        seen.rows = out.numel() // out.shape[1] if image else x.numel() // x.shape[-1]
        special = _special(product)
        sides = _sides(product, x, weight) if product.found and not special else (x, weight)
        seen.factors = (sides[0].dtype, sides[1].dtype)
        arithmetic = getattr(module, "arithmetic", None)
        if isinstance(arithmetic, QuantizedLinearOp):
            operands = arithmetic.operands(_some_rows(x.reshape(-1, x.shape[-1])), weight)
        else:
            operands = (Operand.of(_some_rows(sides[0].flatten(0, -2))), Operand.of(sides[1]))
        seen.kinds = (operands[0].kind, operands[1].kind)
        if special:
            seen.kinds = special
        if isinstance(module, CsrLinear):
            seen.kinds = (operands[0].kind, f"sparse {operands[1].kind}")
        if told:
            seen.told = {
                "name": seen.name,
                "stage": seen.stage,
                "shape": list(seen.shape),
                "part": self._part(seen),
                "stored": _name(seen.stored),
                "answers": _name(out.dtype),
                "input": _side(operands[0], seen.kinds[0], sides[0].dtype, x.numel()),
                "weight": _side(operands[1], seen.kinds[1], sides[1].dtype, weight.numel()),
            }

    def _part(self, seen: LayerRecord) -> str:
        """Which part of the layer this rank multiplies, in words; empty where that is all of it."""
        shard_dims = self._shard_specs.get(f"{seen.name}.weight", ShardSpec()).shard_dims
        return ", ".join(
            f"1 of {self._mesh.size(axis)} parts of the {'outputs' if dim == 0 else 'inputs'} ({axis})"
            for axis, dim in shard_dims.items()
        )

    def found(self) -> dict[str, Any]:
        """The fields of the event `numbers`."""
        told = [seen.told for seen in self.layers if seen.told]
        multiplied = sorted({seen.multiplied for seen in self.layers if seen.inputs})
        counts = {words: sum(seen.multiplied == words for seen in self.layers) for words in multiplied}
        found = {"samples": self.samples, "layers": told, "of_layers": len(self.layers), "multiplied": counts}
        return found | ({"unseen": self.unseen} if self.unseen else {})


def _weight(module: Any) -> Tensor:
    """The weight matrix [outputs, inputs] (of a convolution with two more dimensions) as the layer has it now."""
    weight: Tensor = module.pattern.to_dense(module.weight) if isinstance(module, CsrLinear) else module.weight.detach()
    return weight


def _special(product: _Product) -> tuple[str, str] | None:
    """In words what is multiplied by a kernel of its own: fp8, 2:4. Such tensors can be multiplied and nothing else."""
    factors = product.found[1] if product.found is not None else ()
    if all(type(factor) in (Tensor, nn.Parameter) for factor in factors):
        return None
    first, second = (_worded(factor) for factor in factors)
    return first, second


def _worded(factor: Tensor) -> str:
    name = type(factor).__name__
    if "Float8" in name:
        return "float8"
    return f"2:4 {_name(factor.dtype)}" if "SemiStructured" in name else _name(factor.dtype)


def _sides(product: _Product, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Input and weight as they reached the product: [rows, inputs] and [outputs, inputs]."""
    assert product.found is not None
    func, (first, second) = product.found
    if first.layout != torch.strided:  # W · X, with the non-zero numbers of W alone
        return second.t(), weight.to(first.dtype)
    return first, second if func in (_ATEN.convolution.default, _ATEN.linear.default) else second.mT


def _some_rows(matrix: Tensor) -> Tensor:
    """Whole rows, evenly chosen, with about as many numbers as are looked at."""
    most = max(1, MOST_NUMBERS // max(1, matrix.shape[1]))
    if len(matrix) <= most:
        return matrix
    return matrix[torch.linspace(0, len(matrix) - 1, most, device=matrix.device).round().long()]


def _side(operand: Operand, kind: str, factor: torch.dtype, size: int) -> dict[str, Any]:
    """One side of a product: its numbers in words and as counts."""
    codes = operand.codes.reshape(len(operand.codes), -1)
    return {
        "kind": kind,
        "factor": _name(factor),
        "zeros": 1 - int(codes.count_nonzero()) / max(1, codes.numel()),
        "share": operand.share,
        "numbers": size,
        "counts": histogram(_some_rows(codes), operand.highest),
    }


def histogram(codes: Tensor, highest: float) -> list[int]:
    """How many numbers, divided by `highest`, are nearest to each of -1, -126/127, …, 1; what is no number counts 0."""
    relative = (codes.float() / max(highest, torch.finfo(torch.float32).tiny)).nan_to_num(0.0, 1.0, -1.0)
    index = relative.mul(HALF).round_().clamp_(-HALF, HALF).long().flatten() + HALF
    counts: list[int] = torch.bincount(index, minlength=BINS).tolist()
    return counts


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
