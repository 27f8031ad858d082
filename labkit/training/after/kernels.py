"""What the kernels of sparse and narrow layers give: a pass of each kind of layer beside a dense float32 one.

New layers of the shapes that the first rank has, on as many rows as one of its passes in training, forward and backward
with the gradients of inputs and weight; measured in turn (A B A B) with this rank's threads, the median of at least
five. What a method does beside its layers (masks, rounding the weights, the optimizer) is in the step, not here.

In theory a product costs its multiplications with weights that are not zero, times the bytes of a number.
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
"""For all kinds together, the largest first; where a pass takes longer, it is measured on fewer rows."""
REPEATS, MOST_REPEATS = 5, 25
FEWEST_ROWS = 16
TRIED_FLOPS = 3e8
"""Of a first dense pass, which tells how many rows fit."""
MOST_NAMES, MOST_KINDS = 12, 64

Inside = Callable[[], AbstractContextManager[Any]]


@dataclass
class Kind:
    """Layers that are alike: same shape, input, arithmetic, kernel."""

    layers: list[LayerRecord] = field(default_factory=list)
    lead: int = 0
    """Length of the input's first dimension in a pass in training (rows, or images)."""

    @property
    def one(self) -> LayerRecord:
        return self.layers[0]

    @property
    def rows(self) -> int:
        """Vectors that the weight matrix is multiplied with."""
        return self.lead * (self.one.rows // self.one.inputs[0] if self.is_image else 1)

    @property
    def is_image(self) -> bool:
        return len(self.one.shape) == 4

    @property
    def is_plain(self) -> bool:
        """Dense in float32, as what it would be measured against."""
        full = self.one.multiplied == "float32 × float32" and self.one.stored == torch.float32
        return full and all(seen.nonzero == math.prod(seen.shape) for seen in self.layers)

    @property
    def flops(self) -> float:
        """Of a dense pass of one of these layers: forward, and twice backward."""
        return 6.0 * self.rows * math.prod(self.one.shape)

    def told(self, sparse: tuple[bool, bool, bool]) -> dict[str, Any]:
        """What is written down, apart from seconds."""
        nonzero = sum(seen.nonzero for seen in self.layers) / len(self.layers)
        arithmetic = getattr(self.one.module, "arithmetic", None)
        forward = max(factor.itemsize for factor in self.one.factors)
        backward = arithmetic.backward_bytes if isinstance(arithmetic, QuantizedLinearOp) else (forward, forward)
        return {
            "layers": [seen.name for seen in self.layers[:MOST_NAMES]],
            "count": len(self.layers),
            "shape": list(self.one.shape),
            "rows": self.rows,
            "multiplied": self.one.multiplied,
            "weights": math.prod(self.one.shape),
            "nonzero": nonzero,
            "sparse": list(sparse),
            "bytes": [forward, *backward],
        }

    def make(self) -> nn.Module | None:
        """A new layer as the run has it; None for what cannot be made alone (cut convolutions, fp8, 2:4 kernels)."""
        module: Any = self.one.module
        arithmetic = getattr(module, "arithmetic", None)
        known = type(module) in (nn.Conv2d, nn.Linear, CsrLinear) or (arithmetic is not None and not self.is_image)
        if not known:
            return None
        made: Any = self.plain().to(self.one.stored)
        if isinstance(module, CsrLinear):
            return CsrLinear(made, module.pattern.to_dense(torch.ones_like(module.weight)).bool())
        self._make_zero(made.weight)
        if not isinstance(arithmetic, QuantizedLinearOp):
            return made
        own = copy.copy(arithmetic)
        own.noise = torch.Generator(made.weight.device)
        return NarrowLinear(made, own)

    def plain(self) -> nn.Module:
        """A dense one in float32."""
        module: Any = self.one.module
        bias, device = module.bias is not None, module.weight.device
        if self.is_image:
            return _convolution(module, bias, self.one.shape)
        return nn.Linear(self.one.shape[1], self.one.shape[0], bias, device)

    @torch.no_grad()
    def _make_zero(self, weight: Tensor) -> None:
        """As many numbers as in the layer itself, at random."""
        zeros = weight.numel() - self.one.nonzero
        weight.view(-1)[torch.randperm(weight.numel(), device=weight.device)[:zeros]] = 0


def _convolution(module: nn.Conv2d, bias: bool, shape: tuple[int, ...]) -> nn.Conv2d:
    about = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups, bias)
    return nn.Conv2d(shape[1] * module.groups, shape[0], *about, device=module.weight.device)  # type: ignore[arg-type]


def wanted(experiment: Experiment) -> bool:
    """Is there a layer that is not dense and full?"""
    settings = experiment.quantization
    full = settings.training in ("fp32", "fp64") and settings.qat == "none"
    return not experiment.launch.isolated and not (full and experiment.sparsity.method == "none")


def share(experiment: Experiment) -> float:
    """Samples in one pass of a rank (of a pipeline: in a microbatch)."""
    layout = experiment.layout
    pieces = layout.microbatches if layout.pp > 1 and layout.schedule != "naive" else 1
    if experiment.gradients.update.method == "pipedream":
        pieces = 1
    return experiment.training.global_batch / layout.data_parallel / experiment.gradients.accumulation / pieces


def kinds_of(layers: list[LayerRecord], samples: int, wanted_samples: float) -> list[Kind]:
    """What layers there are, the most expensive first; they were seen with `samples` samples."""
    found: dict[Any, Kind] = {}
    for seen in layers:
        if not seen.inputs:
            continue
        image, module = len(seen.shape) == 4, seen.module
        lead = seen.inputs[0] if image else seen.rows
        kept = seen.nonzero if isinstance(module, CsrLinear) else seen.nonzero == math.prod(seen.shape)
        key = (type(module), seen.shape, seen.inputs[1:], lead, seen.kinds, seen.factors, seen.stored, kept)
        kind = found.setdefault(key, Kind())
        kind.layers.append(seen)
        kind.lead = max(1, math.ceil(lead * wanted_samples / max(1, samples)))
    return sorted(found.values(), key=lambda kind: -kind.flops * len(kind.layers))


def measure(
    experiment: Experiment, layers: list[LayerRecord], samples: int, autocast: Inside, alive: Callable[[], None]
) -> dict[str, Any]:
    """The fields of the event `kernels`. `layers` were seen in a pass over `samples`; `alive` is called meanwhile."""
    kinds = kinds_of(layers, samples, share(experiment))
    sparse = registry("sparsity")[experiment.sparsity.method].load().sparse_products
    deadline = time.perf_counter() + BUDGET_S
    told, left_out = [], 0
    for at, kind in enumerate(kinds[:MOST_KINDS]):
        alive()
        fields, own = kind.told(sparse), kind.make()
        left = deadline - time.perf_counter()
        if own is None or left <= 0:
            left_out += len(kind.layers)
        else:
            plain = kind.plain()
            # A layer that is left as it is costs what a dense one costs: the difference would be noise.
            own = plain if kind.is_plain else own
            fields |= _beside(kind, plain, own, autocast, left / min(4, len(kinds) - at))
        told.append(fields)
    left_out += sum(len(kind.layers) for kind in kinds[MOST_KINDS:])
    return {"kinds": told, "left_out": left_out, "samples": share(experiment)}


def _beside(kind: Kind, plain: nn.Module, own: nn.Module, autocast: Inside, budget: float) -> dict[str, Any]:
    """Median seconds of a pass of both, and on how many rows."""
    rest = kind.one.inputs[1:] if kind.is_image else kind.one.inputs[-1:]
    device = next(plain.parameters()).device
    lead, greedy_cover = kind.lead, 1 if kind.is_image else min(FEWEST_ROWS, kind.lead)

    def passes(lead: int) -> tuple[Callable[[], float], Callable[[], float]]:
        x = torch.randn(lead, *rest, device=device)
        own_x = x.to(kind.one.input_type)
        return lambda: _timed(plain, x, nullcontext), lambda: _timed(own, own_x, autocast)

    until = time.perf_counter() + budget
    tried = min(lead, max(greedy_cover, int(lead * TRIED_FLOPS / kind.flops)))
    dense, narrow = passes(tried)
    dense(), narrow()  # the first pass of a kernel prepares things
    once = min(dense() + narrow() for _ in range(2))
    fitting = int(tried * budget / (once * (REPEATS + 1)))
    lead = min(lead, max(greedy_cover, fitting))
    if lead != tried:
        dense, narrow = passes(lead)
    found: tuple[list[float], list[float]] = ([], [])
    while len(found[0]) < REPEATS or (time.perf_counter() < until and len(found[0]) < MOST_REPEATS):
        found[0].append(dense())
        found[1].append(found[0][-1] if own is plain else narrow())
    medians = [statistics.median(seconds) for seconds in found]
    return {"dense_seconds": medians[0], "seconds": medians[1], "measured": lead / kind.lead, "repeats": len(found[0])}


def _timed(layer: nn.Module, x: Tensor, inside: Inside) -> float:
    """Seconds of a pass forward and backward, also where others follow no gradients; leaves none behind."""
    x = x.detach().requires_grad_()
    _wait(x)
    begun = time.perf_counter()
    with torch.enable_grad(), inside():
        out = layer(x)
    torch.autograd.grad(out, [x, *layer.parameters()], torch.ones_like(out))
    _wait(x)
    return time.perf_counter() - begun


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()
