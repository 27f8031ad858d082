"""Which values the network really computes with: recorded in its matrix products over one held-out batch.

Dtypes are those of the matrices that reach the product, below autocast and below labkit's own quantized operations. The
values on a quantization grid come from the operation itself (`QuantizedLinearOp.operands`). Each value is counted
relative to the largest magnitude that shares its scale, in 255 bins from -1 to 1: one for every value of int8, with
zero in the middle.

Weights are recorded as they are multiplied: full tensors under every stage of ZeRO, and the local shard under tensor
parallelism. Only layers with their own weight matrix are recorded: linear layers and convolutions, not the experts of a
mixture.
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
"""Maximum number of layers per rank with histograms; they are evenly spaced."""
MOST_NUMBERS = 1 << 18
"""Approximate maximum number of values in a histogram; they are taken from evenly spaced rows."""
_ATEN = torch.ops.aten
_PRODUCTS = {
    _ATEN.mm.default: (0, 1),
    _ATEN.addmm.default: (1, 2),
    _ATEN.bmm.default: (0, 1),
    _ATEN.linear.default: (0, 1),
    _ATEN._int_mm.default: (0, 1),
    _ATEN.convolution.default: (0, 1),
}
"""Product operators, and the positions of the two arguments that are multiplied."""


class _Product(TorchDispatchMode):
    """Dispatch mode that stores the operator and the factors of the first product."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.call: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.call is None and func in _PRODUCTS:
            first, second = _PRODUCTS[func]
            self.call = func, (args[first], args[second])
        return func(*args, **(kwargs or {}))


@dataclass
class LayerRecord:
    """Record of a layer with a matrix product in one forward pass."""

    name: str
    module: nn.Module
    stage: int
    """Pipeline stage."""
    inputs: tuple[int, ...] = ()
    """Shape of the input; empty until the layer was called."""
    input_type: torch.dtype = torch.float32
    """Dtype of the input; `factors` are the dtypes in which input and weight were multiplied."""
    factors: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
    kinds: tuple[str, str] = ("", "")
    """Kinds of values of input and weight, in words, such as `int8`."""
    rows: int = 0
    """Number of vectors that the weight matrix was multiplied with."""
    shape: tuple[int, ...] = ()
    """Shape of the weight on this rank."""
    nonzero: int = 0
    stored: torch.dtype = torch.float32
    record: dict[str, Any] = field(default_factory=dict)
    """Entry of the layer in the event `numbers`; empty for layers without histograms."""

    @property
    def multiplied(self) -> str:
        """Kinds of inputs and weights in words, such as `int8 × ternary`."""
        return " × ".join(self.kinds)


class LayerProbe:
    """Records the layers of one rank in one forward pass: `with probe.over(samples): …`, then `event_fields()`.

    `stages` are the rank's modules by stage number; `shard_specs` says how their parameters are sharded over `mesh`.
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
        """Number of samples in the recorded batch."""
        self.unseen: dict[str, str] = {}
        """Layers that could not be recorded, with the error."""

    @contextmanager
    def over(self, samples: int) -> Iterator[None]:
        """Record the first call of every layer inside the context; the batch has `samples` samples."""
        self.samples = samples
        limit, last = min(MOST_LAYERS, len(self.layers)), len(self.layers) - 1
        chosen = {round(index * last / max(1, limit - 1)) for index in range(limit)}
        hooks = [hook for index, layer in enumerate(self.layers) for hook in self._hooks(layer, index in chosen)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hooks(self, layer: LayerRecord, detailed: bool) -> list[Any]:
        """Register the hooks of one layer and return their handles; `detailed` asks for histograms."""
        product = _Product()

        def before(module: nn.Module, inputs: Any, named: Any) -> None:
            if not layer.inputs and layer.name not in self.unseen:
                product.__enter__()  # type: ignore[no-untyped-call]

        def after(module: nn.Module, inputs: Any, named: Any, output: Tensor) -> None:
            if layer.inputs or layer.name in self.unseen:
                return
            product.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            try:
                self._record(layer, (*inputs, *named.values())[0], output, product, detailed)
            except Exception as error:  # a probe must not end the training
                self.unseen[layer.name] = f"{type(error).__name__}: {error}"[:200]
                layer.inputs, layer.record = (), {}
            product.call = None

        return [
            layer.module.register_forward_pre_hook(before, with_kwargs=True),
            # Before all other hooks, because those of fully_shard free the gathered weights.
            layer.module.register_forward_hook(after, with_kwargs=True, prepend=True),
        ]

    @torch.no_grad()
    def _record(self, layer: LayerRecord, x: Tensor, out: Tensor, product: _Product, detailed: bool) -> None:
        """Fill the record of a layer from its input, output and first product."""
        module: Any = layer.module
        weight = _weight(module)
        layer.inputs, layer.input_type = tuple(x.shape), x.dtype
        layer.shape, layer.stored = tuple(weight.shape), module.weight.dtype
        layer.nonzero = int(weight.count_nonzero())
        image = weight.dim() == 4
        # For a linear layer count inputs: a rank may keep only a part of the outputs (sequence parallelism).
        layer.rows = out.numel() // out.shape[1] if image else x.numel() // x.shape[-1]
        special = _special(product)
        sides = _operands(product, x, weight) if product.call and not special else (x, weight)
        layer.factors = (sides[0].dtype, sides[1].dtype)
        arithmetic = getattr(module, "arithmetic", None)
        if isinstance(arithmetic, QuantizedLinearOp):
            operands = arithmetic.operands(_some_rows(x.reshape(-1, x.shape[-1])), weight)
        else:
            operands = (Operand.of(_some_rows(sides[0].flatten(0, -2))), Operand.of(sides[1]))
        layer.kinds = (operands[0].kind, operands[1].kind)
        if special:
            layer.kinds = special
        if isinstance(module, CsrLinear):
            layer.kinds = (operands[0].kind, f"sparse {operands[1].kind}")
        if detailed:
            layer.record = {
                "name": layer.name,
                "stage": layer.stage,
                "shape": list(layer.shape),
                "part": self._part(layer),
                "stored": _name(layer.stored),
                "answers": _name(out.dtype),
                "input": _operand_entry(operands[0], layer.kinds[0], sides[0].dtype, x.numel()),
                "weight": _operand_entry(operands[1], layer.kinds[1], sides[1].dtype, weight.numel()),
            }

    def _part(self, layer: LayerRecord) -> str:
        """Return in words which part of the layer this rank multiplies; empty if it is the full layer."""
        shard_dims = self._shard_specs.get(f"{layer.name}.weight", ShardSpec()).shard_dims
        return ", ".join(
            f"1 of {self._mesh.size(axis)} parts of the {'outputs' if dim == 0 else 'inputs'} ({axis})"
            for axis, dim in shard_dims.items()
        )

    def event_fields(self) -> dict[str, Any]:
        """Return the fields of the event `numbers`."""
        records = [layer.record for layer in self.layers if layer.record]
        multiplied = sorted({layer.multiplied for layer in self.layers if layer.inputs})
        counts = {words: sum(layer.multiplied == words for layer in self.layers) for words in multiplied}
        fields = {"samples": self.samples, "layers": records, "of_layers": len(self.layers), "multiplied": counts}
        return fields | ({"unseen": self.unseen} if self.unseen else {})


def _weight(module: Any) -> Tensor:
    """Return the weight [outputs, inputs] of a layer as it is now; that of a convolution has two more dimensions."""
    weight: Tensor = module.pattern.to_dense(module.weight) if isinstance(module, CsrLinear) else module.weight.detach()
    return weight


def _special(product: _Product) -> tuple[str, str] | None:
    """Return the two factors in words if a special kernel (fp8, 2:4) multiplies them, else None.

    Tensors of such kernels support no other operations.
    """
    factors = product.call[1] if product.call is not None else ()
    if all(type(factor) in (Tensor, nn.Parameter) for factor in factors):
        return None
    first, second = (_in_words(factor) for factor in factors)
    return first, second


def _in_words(factor: Tensor) -> str:
    name = type(factor).__name__
    if "Float8" in name:
        return "float8"
    return f"2:4 {_name(factor.dtype)}" if "SemiStructured" in name else _name(factor.dtype)


def _operands(product: _Product, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return input and weight as they reached the product: [rows, inputs] and [outputs, inputs]."""
    assert product.call is not None
    func, (first, second) = product.call
    if first.layout != torch.strided:  # W · X, where W stores only its non-zero values
        return second.t(), weight.to(first.dtype)
    return first, second if func in (_ATEN.convolution.default, _ATEN.linear.default) else second.mT


def _some_rows(matrix: Tensor) -> Tensor:
    """Return evenly spaced rows of a matrix, with about `MOST_NUMBERS` values in total."""
    limit = max(1, MOST_NUMBERS // max(1, matrix.shape[1]))
    if len(matrix) <= limit:
        return matrix
    return matrix[torch.linspace(0, len(matrix) - 1, limit, device=matrix.device).round().long()]


def _operand_entry(operand: Operand, kind: str, factor: torch.dtype, size: int) -> dict[str, Any]:
    """Return the entry for one operand of a product: kind of values, dtype, zeros and histogram."""
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
    """Return how many `codes / highest` are nearest to each of -1, -126/127, …, 1; NaN counts as 0."""
    relative = (codes.float() / max(highest, torch.finfo(torch.float32).tiny)).nan_to_num(0.0, 1.0, -1.0)
    index = relative.mul(HALF).round_().clamp_(-HALF, HALF).long().flatten() + HALF
    counts: list[int] = torch.bincount(index, minlength=BINS).tolist()
    return counts


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
