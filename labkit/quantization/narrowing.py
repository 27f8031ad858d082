"""Precision control on one rank: converts layers before the model is parallelized, rounds weights and measures both.

What `statistics` returns is measured on the tensors: dtypes by hooks, products counted where they are computed,
codes counted in the weights that were multiplied, bytes of the actual optimizer state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from labkit.experiment import Experiment
from labkit.experiment.random_streams import Stream, stream_seed
from labkit.experiment.registry import registry
from labkit.quantization.arithmetic import FakeArithmetic, GridArithmetic, off_grid
from labkit.quantization.linear import QuantizedLinearOp, arithmetics, narrow
from labkit.quantization.optimizers import Narrow, NarrowAdamW, NarrowSGD

ON_GRID = 1e-2
"""Distance from the grid, in grid steps, up to which a value counts as on it; float32 rounding may cause that much."""


class PrecisionController:
    """Applies the precisions that an experiment asks for.

    `place` is this rank's index among those with different samples or different layers; ranks with shards of the same
    layers (tp) have the same index and draw the same random numbers. `steps` is the number of steps of the whole run.
    """

    def __init__(self, experiment: Experiment, place: int, steps: int, device: torch.device) -> None:
        settings = experiment.quantization
        self._experiment, self._place, self._steps = experiment, place, steps
        self._format = registry("quantization.training")[settings.training].load()
        self._qat = registry("quantization.qat")[settings.qat].load()
        self._noise, self._rounding = torch.Generator(device), torch.Generator(device)
        self._ops: list[QuantizedLinearOp] = []
        self._modules: list[nn.Module] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._step = self._first = 0
        self._activations: torch.dtype | None = None
        self._before = self._products = self._updates = 0

    @property
    def is_full_precision(self) -> bool:
        """True if everything is computed as in float32 or float64."""
        settings, bits = self._experiment.quantization, self._experiment.optimizer.state_bits
        return settings.training in ("fp32", "fp64") and settings.qat == "none" and bits == 32

    @property
    def needs_own_optimizer(self) -> bool:
        """True if the optimizer rounds or packs; copies of a weight then stay equal only at the same index in it."""
        return bool(self._format.own_optimizer) or self._experiment.optimizer.state_bits == 8

    # -- before the training ------------------------------------------------------------------------------------------

    def convert(self, model: nn.Module) -> None:
        """Give the layers of the full model their arithmetic, in place."""
        settings = self._experiment.quantization
        make = self._qat.arithmetic(settings) or self._format.arithmetic(settings)
        if make is not None:
            narrow(model, lambda: self._register_op(make()), settings.head)
        if self._format.dtype() == torch.bfloat16:
            blocks = list(getattr(model, "blocks", nn.ModuleDict()).values())
            (blocks[-1] if blocks else model).register_forward_hook(_in_float32)  # losses are computed in float32

    def _register_op(self, arithmetic: QuantizedLinearOp) -> QuantizedLinearOp:
        arithmetic.noise = self._noise
        self._ops.append(arithmetic)
        return arithmetic

    def optimizer(self) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None:
        """Return a factory from parameter groups to an optimizer that rounds; None if torch's optimizer is used."""
        if not self.needs_own_optimizer:
            return None
        settings, seed = self._experiment.optimizer, self._experiment.training.seed
        optimizer_class = NarrowAdamW if settings.name == "adamw" else NarrowSGD
        return lambda groups: optimizer_class(groups, settings, seed)

    def start(self, parts: Iterable[nn.Module], optimizer: torch.optim.Optimizer, first: int) -> None:
        """Prepare for training after the model was parallelized: `parts` are on this rank, `first` steps are done."""
        self._modules, self._optimizer, self._first = list(parts), optimizer, first
        if not first:
            self._round_weights(None)
        if not self.is_full_precision:
            self._watch_activations()
            self._set(first)  # a pipeline stage that runs ahead computes before the first step begins

    def _watch_activations(self) -> None:
        """Record the dtype of the output of the first layer that computes a product."""
        kinds = (nn.Linear, nn.Conv2d)
        layers = [
            m for part in self._modules for m in part.modules() if isinstance(m, kinds) or hasattr(m, "arithmetic")
        ]
        if not layers:
            return

        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._activations = output.dtype
            handle.remove()

        handle = layers[0].register_forward_hook(note)

    # -- every update -------------------------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """Prepare step `step` (from 0): seed the generators and switch rounding and counting on or off."""
        if self.is_full_precision:
            return
        self._step = step
        self._noise.manual_seed(stream_seed(self._experiment.training.seed, Stream.LAYER_ROUNDING, step, self._place))
        watched = self._set(step)
        if isinstance(self._optimizer, Narrow):
            self._optimizer.watched = watched
        self._before = self._total()

    def _set(self, step: int) -> bool:
        """Set what the layers do in step `step`; return whether they count codes in it (in the first and last step)."""
        watched = step in (self._first, self._steps - 1)
        started = step >= math.ceil(self._experiment.quantization.qat_start * self._steps)
        for arithmetic in self._ops:
            arithmetic.watched, arithmetic.reset_counts = watched, watched and step > self._first
            if isinstance(arithmetic, FakeArithmetic):
                arithmetic.active = started
        return watched

    def after_update(self) -> None:
        """Round the weights after the optimizer step, once they are complete on this rank."""
        if self.is_full_precision:
            return
        self._rounding.manual_seed(stream_seed(self._experiment.training.seed, Stream.WEIGHT_ROUNDING, self._step))
        self._round_weights(self._rounding)
        for arithmetic in self._ops:
            arithmetic.watched = False
        self._products += self._total() - self._before
        self._updates += 1

    def _total(self) -> int:
        return sum(arithmetic.products for arithmetic in self._ops)

    def _round_weights(self, generator: torch.Generator | None) -> None:
        for weight, arithmetic in arithmetics(self._modules):
            if isinstance(arithmetic, GridArithmetic):
                arithmetic.round_weight(_local(weight), generator)

    # -- measurements -------------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        """Return what was measured on this rank, for the summary; {} in full precision."""
        if self.is_full_precision:
            return {}
        statistics: dict[str, Any] = {}
        if self._activations is not None:
            statistics["activations"] = _name(self._activations)
        layers = list(arithmetics(self._modules))
        if layers:
            statistics["narrow_layers"] = len(layers)
        if self._products:
            statistics["int8_products"] = round(self._products / max(1, self._updates), 2)
        statistics |= code_statistics([arithmetic for _, arithmetic in layers])
        if any(isinstance(arithmetic, GridArithmetic) for _, arithmetic in layers):
            on_grid = [off_grid(_local(weight)) < ON_GRID for weight, _ in layers]
            statistics["weights_on_grid"] = f"{sum(on_grid)} of {len(on_grid)}"
            statistics["emulated"] = "numbers of the int8 grid in float32 memory"
        float8 = sum("Float8" in type(module).__name__ for part in self._modules for module in part.modules())
        if float8:
            statistics["float8_layers"] = float8
        if self._optimizer is not None and self.needs_own_optimizer:
            statistics |= optimizer_statistics(self._optimizer)
        return statistics


def code_statistics(operations: list[QuantizedLinearOp]) -> dict[str, Any]:
    """Return the number of different codes in the weights and, for ternary weights, how often each occurred."""
    counts: dict[int, int] = {}
    for arithmetic in operations:
        for code, count in arithmetic.counts.items():
            counts[code] = counts.get(code, 0) + count
    if not counts:
        return {}
    statistics: dict[str, Any] = {"weight_values": len(counts)}
    if len(counts) <= 3:
        total = sum(counts.values())
        statistics["ternary"] = ", ".join(f"{code}: {counts[code] / total:.1%}" for code in sorted(counts))
    return statistics


def optimizer_statistics(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return dtypes of weights and gradients, how weights were rounded, and bits per element of the optimizer state."""
    statistics: dict[str, Any] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    statistics["weights"] = "+".join(sorted({_name(parameter.dtype) for parameter in parameters}))
    if isinstance(optimizer, Narrow):
        statistics["gradients"] = "+".join(sorted(map(_name, optimizer.gradient_types)))
        if optimizer.rounded:
            statistics["rounded_against_nearest"] = round(optimizer.not_to_nearest / optimizer.rounded, 3)
    elements = size = 0
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        tensors = [_local(value) for value in state.values() if value.dim()]
        size += sum(value.numel() * value.element_size() for value in tensors)
        moments = {name.removesuffix("_codes").removesuffix("_scale") for name in state} - {"step"}
        elements += len(moments) * _local(parameter).numel()
    if elements:
        statistics["optimizer_state_bits"] = round(8 * size / elements, 2)
    return statistics


def _in_float32(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.float()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _local(tensor: Any) -> Tensor:
    """Return this rank's shard, detached from autograd."""
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return local
