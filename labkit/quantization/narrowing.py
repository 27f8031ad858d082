"""The number formats of one rank at work: layers converted before any layout, weights rounded, and the proof of it all.

What `found` tells is measured on the tensors themselves: dtypes from hooks, products counted where they are made,
codes counted in what was multiplied, bytes of the optimizer's real state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from labkit.experiment import Experiment
from labkit.experiment.registry import registry
from labkit.quantization.arithmetic import FakeArithmetic, GridArithmetic, off_grid
from labkit.quantization.linear import QuantizedLinearOp, arithmetics, narrow
from labkit.quantization.optimizers import Narrow, NarrowAdamW, NarrowSGD

ON_GRID = 1e-2
"""So far from the grid, in its steps, float32 rounding may put a number that lies on it."""


class PrecisionController:
    """The formats that an experiment asks for.

    `place`: this rank's place among those that see different samples or hold different layers; ranks that hold parts
    of the same layers (tp) have the same place, and draw the same random numbers. `steps`: updates of the whole run.
    """

    def __init__(self, experiment: Experiment, place: int, steps: int, device: torch.device) -> None:
        settings = experiment.quantization
        self._experiment, self._place, self._steps = experiment, place, steps
        self._format = registry("quantization.training")[settings.training].load()
        self._qat = registry("quantization.qat")[settings.qat].load()
        self._noise, self._rounding = torch.Generator(device), torch.Generator(device)
        self._made: list[QuantizedLinearOp] = []
        self._parts: list[nn.Module] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._step = self._first = 0
        self._activations: torch.dtype | None = None
        self._before = self._products = self._updates = 0

    @property
    def plain(self) -> bool:
        """Is everything as in float32 (or float64)?"""
        settings, bits = self._experiment.quantization, self._experiment.optimizer.state_bits
        return settings.training in ("fp32", "fp64") and settings.qat == "none" and bits == 32

    @property
    def draws(self) -> bool:
        """Do copies of a weight stay equal only if they stand at the same place in the optimizer?"""
        return bool(self._format.own_optimizer) or self._experiment.optimizer.state_bits == 8

    # -- before the training ------------------------------------------------------------------------------------------

    def convert(self, model: nn.Module) -> None:
        """Give the layers of a whole model their arithmetic, in place."""
        settings = self._experiment.quantization
        make = self._qat.arithmetic(settings) or self._format.arithmetic(settings)
        if make is not None:
            narrow(model, lambda: self._noted(make()), settings.head)
        if self._format.dtype() == torch.bfloat16:
            blocks = list(getattr(model, "blocks", nn.ModuleDict()).values())
            (blocks[-1] if blocks else model).register_forward_hook(_in_float32)  # losses are computed in float32

    def _noted(self, arithmetic: QuantizedLinearOp) -> QuantizedLinearOp:
        arithmetic.noise = self._noise
        self._made.append(arithmetic)
        return arithmetic

    def optimizer(self) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None:
        """What makes the optimizer from groups of parameters, if the formats need one of their own."""
        if not self.draws:
            return None
        settings, seed = self._experiment.optimizer, self._experiment.training.seed
        kind = NarrowAdamW if settings.name == "adamw" else NarrowSGD
        return lambda groups: kind(groups, settings, seed)

    def start(self, parts: Iterable[nn.Module], optimizer: torch.optim.Optimizer, first: int) -> None:
        """The layout has been applied: `parts` of the model are here, and `first` updates are done."""
        self._parts, self._optimizer, self._first = list(parts), optimizer, first
        if not first:
            self._round_weights(None)
        if not self.plain:
            self._watch_activations()
            self._set(first)  # a stage that runs ahead computes before the first update begins

    def _watch_activations(self) -> None:
        """Note in which type the first layer with a product answers."""
        kinds = (nn.Linear, nn.Conv2d)
        found = [m for part in self._parts for m in part.modules() if isinstance(m, kinds) or hasattr(m, "arithmetic")]
        if not found:
            return

        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._activations = output.dtype
            handle.remove()

        handle = found[0].register_forward_hook(note)

    # -- every update -------------------------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """Update `step` (from 0) begins."""
        if self.plain:
            return
        self._step = step
        self._noise.manual_seed(self._seed(self._place))
        watched = self._set(step)
        if isinstance(self._optimizer, Narrow):
            self._optimizer.watched = watched
        self._before = self._total()

    def _set(self, step: int) -> bool:
        """What the layers do in update `step`; are they watched in it?"""
        watched = step in (self._first, self._steps - 1)
        begun = step >= math.ceil(self._experiment.quantization.qat_start * self._steps)
        for arithmetic in self._made:
            arithmetic.watched, arithmetic.anew = watched, watched and step > self._first
            if isinstance(arithmetic, FakeArithmetic):
                arithmetic.active = begun
        return watched

    def after_update(self) -> None:
        """The weights of the update are whole on this rank."""
        if self.plain:
            return
        self._rounding.manual_seed(self._seed(4098))  # a place that no rank has, the same on all
        self._round_weights(self._rounding)
        for arithmetic in self._made:
            arithmetic.watched = False
        self._products += self._total() - self._before
        self._updates += 1

    def _seed(self, place: int) -> int:
        return ((self._experiment.training.seed * 1_000_003 + self._step) * 4099 + place) % 2**63

    def _total(self) -> int:
        return sum(arithmetic.products for arithmetic in self._made)

    def _round_weights(self, generator: torch.Generator | None) -> None:
        for weight, arithmetic in arithmetics(self._parts):
            if isinstance(arithmetic, GridArithmetic):
                arithmetic.round_weight(_local(weight), generator)

    # -- the proof ----------------------------------------------------------------------------------------------------

    def found(self) -> dict[str, Any]:
        """What was really in force on this rank, measured; nothing where everything was as in float32."""
        if self.plain:
            return {}
        found: dict[str, Any] = {}
        if self._activations is not None:
            found["activations"] = _name(self._activations)
        here = list(arithmetics(self._parts))
        if here:
            found["narrow_layers"] = len(here)
        if self._products:
            found["int8_products"] = round(self._products / max(1, self._updates), 2)
        found |= codes_found([arithmetic for _, arithmetic in here])
        if any(isinstance(arithmetic, GridArithmetic) for _, arithmetic in here):
            lie = [off_grid(_local(weight)) < ON_GRID for weight, _ in here]
            found["weights_on_grid"] = f"{sum(lie)} of {len(lie)}"
            found["emulated"] = "numbers of the int8 grid in float32 memory"
        float8 = sum("Float8" in type(module).__name__ for part in self._parts for module in part.modules())
        if float8:
            found["float8_layers"] = float8
        if self._optimizer is not None and self.draws:
            found |= optimizer_found(self._optimizer)
        return found


def codes_found(here: list[QuantizedLinearOp]) -> dict[str, Any]:
    """How many different codes stood in the weights that were multiplied, and of ternary weights how often each."""
    counts: dict[int, int] = {}
    for arithmetic in here:
        for code, count in arithmetic.counts.items():
            counts[code] = counts.get(code, 0) + count
    if not counts:
        return {}
    found: dict[str, Any] = {"weight_values": len(counts)}
    if len(counts) <= 3:
        whole = sum(counts.values())
        found["ternary"] = ", ".join(f"{code}: {counts[code] / whole:.1%}" for code in sorted(counts))
    return found


def optimizer_found(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Types of weights and gradients, how weights were rounded, and bits per number of the state, from the tensors."""
    found: dict[str, Any] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found["weights"] = "+".join(sorted({_name(parameter.dtype) for parameter in parameters}))
    if isinstance(optimizer, Narrow):
        found["gradients"] = "+".join(sorted(map(_name, optimizer.gradient_types)))
        if optimizer.rounded:
            found["rounded_against_nearest"] = round(optimizer.against_nearest / optimizer.rounded, 3)
    numbers = size = 0
    for parameter in parameters:
        known = optimizer.state.get(parameter, {})
        state = [_local(value) for value in known.values() if value.dim()]
        size += sum(value.numel() * value.element_size() for value in state)
        moments = {name.removesuffix("_codes").removesuffix("_scale") for name in known} - {"step"}
        numbers += len(moments) * _local(parameter).numel()
    if numbers:
        found["optimizer_state_bits"] = round(8 * size / numbers, 2)
    return found


def _in_float32(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.float()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _local(tensor: Any) -> Tensor:
    """The part of this rank."""
    found: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return found
