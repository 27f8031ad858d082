"""Speed of the kernels of sparse and low-precision layers, compared with a dense float32 layer of the same shape.

New layers with the shapes on rank 0 run forward and backward, with the gradients of inputs and weight, on as many rows
as a micro-batch of the training has. Both layers are measured alternately (A B A B) with this rank's threads; the
result is the median of at least five passes. Work of a method outside of its layers (masks, rounding of weights, the
optimizer) is not included; it is part of the step time.

In theory a product costs its multiplications with non-zero weights, times the bytes of a value.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from labkit.experiment import Experiment
from labkit.experiment.registry import registry
from labkit.quantization.linear import NarrowLinear, QuantizedLinearOp
from labkit.sparsity.csr import CsrLinear
from labkit.training.probes.layers import LayerRecord

BUDGET_S = 0.5
"""Seconds for all kinds together, largest first; if a pass takes too long, it is measured on fewer rows."""
REPEATS, MOST_REPEATS = 5, 25
FEWEST_ROWS = 16
TRIED_FLOPS = 3e8
"""FLOP budget of the calibration pass that decides how many rows are timed."""
MOST_NAMES, MOST_KINDS = 12, 64

Inside = Callable[[], AbstractContextManager[Any]]


@dataclass
class Kind:
    """Layers with the same shape, input, quantized operation and kernel."""

    layers: list[LayerRecord] = field(default_factory=list)
    lead: int = 0
    """Length of the input's first dimension in a micro-batch of the training (rows, or images)."""

    @property
    def example(self) -> LayerRecord:
        """First layer of this kind."""
        return self.layers[0]

    @property
    def rows(self) -> int:
        """Number of vectors that the weight matrix is multiplied with."""
        return self.lead * (self.example.rows // self.example.inputs[0] if self.is_image else 1)

    @property
    def is_image(self) -> bool:
        """True for convolutions."""
        return len(self.example.shape) == 4

    @property
    def is_plain(self) -> bool:
        """True for dense float32 layers, which equal the layer they are compared with."""
        full = self.example.multiplied == "float32 × float32" and self.example.stored == torch.float32
        return full and all(layer.nonzero == math.prod(layer.shape) for layer in self.layers)

    @property
    def flops(self) -> float:
        """Floating-point operations of a dense pass of one of these layers: one forward and two backward products."""
        return 6.0 * self.rows * math.prod(self.example.shape)

    def fields(self, sparse: tuple[bool, bool, bool]) -> dict[str, Any]:
        """Return the entry of this kind in the event, without times; `sparse` says which products skip zeros."""
        nonzero = sum(layer.nonzero for layer in self.layers) / len(self.layers)
        arithmetic = getattr(self.example.module, "arithmetic", None)
        forward = max(factor.itemsize for factor in self.example.factors)
        backward = arithmetic.backward_bytes if isinstance(arithmetic, QuantizedLinearOp) else (forward, forward)
        return {
            "layers": [layer.name for layer in self.layers[:MOST_NAMES]],
            "count": len(self.layers),
            "shape": list(self.example.shape),
            "rows": self.rows,
            "multiplied": self.example.multiplied,
            "weights": math.prod(self.example.shape),
            "nonzero": nonzero,
            "sparse": list(sparse),
            "bytes": [forward, *backward],
        }

    def make(self) -> nn.Module | None:
        """Return a new layer as in the run; None for sharded convolutions, fp8 and 2:4 kernels."""
        module: Any = self.example.module
        arithmetic = getattr(module, "arithmetic", None)
        supported = type(module) in (nn.Conv2d, nn.Linear, CsrLinear) or (arithmetic is not None and not self.is_image)
        if not supported:
            return None
        layer: Any = self.plain().to(self.example.stored)
        if isinstance(module, CsrLinear):
            return CsrLinear(layer, module.pattern.to_dense(torch.ones_like(module.weight)).bool())
        self._zero_at_random(layer.weight)
        if not isinstance(arithmetic, QuantizedLinearOp):
            return layer
        own = copy.copy(arithmetic)
        own.noise = torch.Generator(layer.weight.device)
        return NarrowLinear(layer, own)

    def plain(self) -> nn.Module:
        """Return a new dense float32 layer of the same shape."""
        module: Any = self.example.module
        bias, device = module.bias is not None, module.weight.device
        if self.is_image:
            return _convolution(module, bias, self.example.shape)
        return nn.Linear(self.example.shape[1], self.example.shape[0], bias, device)

    @torch.no_grad()
    def _zero_at_random(self, weight: Tensor) -> None:
        """Set as many weights to zero as in the original layer, at random positions."""
        zeros = weight.numel() - self.example.nonzero
        weight.view(-1)[torch.randperm(weight.numel(), device=weight.device)[:zeros]] = 0


def _convolution(module: nn.Conv2d, bias: bool, shape: tuple[int, ...]) -> nn.Conv2d:
    about = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups, bias)
    return nn.Conv2d(shape[1] * module.groups, shape[0], *about, device=module.weight.device)  # type: ignore[arg-type]


def is_requested(experiment: Experiment) -> bool:
    """Return True if the run has sparse or low-precision layers."""
    settings = experiment.quantization
    full = settings.training in ("fp32", "fp64") and settings.qat == "none"
    return not experiment.launch.isolated and not (full and experiment.sparsity.method == "none")


def share(experiment: Experiment) -> float:
    """Return the samples per pass of a rank: of an accumulation pass, or of a micro-batch in a pipeline."""
    layout = experiment.layout
    pieces = layout.microbatches_per_pass if layout.pp > 1 else 1
    return experiment.training.global_batch / layout.data_parallel / experiment.gradients.accumulation / pieces


def kinds_of(layers: list[LayerRecord], samples: int, samples_per_pass: float) -> list[Kind]:
    """Group layers, recorded with `samples` samples, into kinds for `samples_per_pass`; most expensive first."""
    kinds: dict[Any, Kind] = {}
    for layer in layers:
        if not layer.inputs:
            continue
        image, module = len(layer.shape) == 4, layer.module
        lead = layer.inputs[0] if image else layer.rows
        sparsity = layer.nonzero if isinstance(module, CsrLinear) else layer.nonzero == math.prod(layer.shape)
        key = (type(module), layer.shape, layer.inputs[1:], lead, layer.kinds, layer.factors, layer.stored, sparsity)
        kind = kinds.setdefault(key, Kind())
        kind.layers.append(layer)
        kind.lead = max(1, math.ceil(lead * samples_per_pass / max(1, samples)))
    return sorted(kinds.values(), key=lambda kind: -kind.flops * len(kind.layers))


def measure(
    experiment: Experiment, layers: list[LayerRecord], samples: int, autocast: Inside, heartbeat: Callable[[], None]
) -> dict[str, Any]:
    """Return the fields of the event `kernels`. `layers` were recorded in a pass over `samples` samples."""
    kinds = kinds_of(layers, samples, share(experiment))
    sparse = registry("sparsity")[experiment.sparsity.method].load().sparse_products
    deadline = time.perf_counter() + BUDGET_S
    entries, left_out = [], 0
    for index, kind in enumerate(kinds[:MOST_KINDS]):
        heartbeat()
        fields, own = kind.fields(sparse), kind.make()
        left = deadline - time.perf_counter()
        if own is None or left <= 0:
            left_out += len(kind.layers)
        else:
            plain = kind.plain()
            # An unchanged layer costs what a dense one costs; a measured difference would be noise.
            own = plain if kind.is_plain else own
            fields |= _compare(kind, plain, own, autocast, left / min(4, len(kinds) - index))
        entries.append(fields)
    left_out += sum(len(kind.layers) for kind in kinds[MOST_KINDS:])
    return {"kinds": entries, "left_out": left_out, "samples": share(experiment)}


def _compare(kind: Kind, plain: nn.Module, own: nn.Module, autocast: Inside, budget: float) -> dict[str, Any]:
    """Return the median seconds of a pass of both layers, and on which fraction of the rows they were measured."""
    rest = kind.example.inputs[1:] if kind.is_image else kind.example.inputs[-1:]
    device = next(plain.parameters()).device
    lead, minimum = kind.lead, 1 if kind.is_image else min(FEWEST_ROWS, kind.lead)

    def passes(lead: int) -> tuple[Callable[[], float], Callable[[], float]]:
        x = torch.randn(lead, *rest, device=device)
        own_x = x.to(kind.example.input_type)
        return lambda: _timed(plain, x, nullcontext), lambda: _timed(own, own_x, autocast)

    until = time.perf_counter() + budget
    calibration_lead = min(lead, max(minimum, int(lead * TRIED_FLOPS / kind.flops)))
    dense, narrow = passes(calibration_lead)
    dense(), narrow()  # warm-up
    once = min(dense() + narrow() for _ in range(2))
    affordable = int(calibration_lead * budget / (once * (REPEATS + 1)))
    lead = min(lead, max(minimum, affordable))
    if lead != calibration_lead:
        dense, narrow = passes(lead)
    times: tuple[list[float], list[float]] = ([], [])
    while len(times[0]) < REPEATS or (time.perf_counter() < until and len(times[0]) < MOST_REPEATS):
        times[0].append(dense())
        times[1].append(times[0][-1] if own is plain else narrow())
    medians = [statistics.median(seconds) for seconds in times]
    return {"dense_seconds": medians[0], "seconds": medians[1], "measured": lead / kind.lead, "repeats": len(times[0])}


def _timed(layer: nn.Module, x: Tensor, inside: Inside) -> float:
    """Return the seconds of a forward and backward pass, also under no_grad; store no gradients."""
    x = x.detach().requires_grad_()
    _synchronize(x)
    begin = time.perf_counter()
    with torch.enable_grad(), inside():
        out = layer(x)
    torch.autograd.grad(out, [x, *layer.parameters()], torch.ones_like(out))
    _synchronize(x)
    return time.perf_counter() - begin


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()
