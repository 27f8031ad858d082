"""Structured sparsity: whole hidden units of MLPs and whole attention heads are pruned, the weakest of a module first.

A unit is weak if the weights into it and out of it are small in total (Li et al., ICLR 2017, arXiv:1608.08710; heads:
Michel et al., NeurIPS 2019, arXiv:1905.10650). Units are pruned along the cubic of gradual pruning. The result is a
smaller dense network: `shrink` builds it, and it computes the same with less work on any machine, without a sparse
kernel.

The channels of the residual networks here are normalised in groups: if some channels of a group were pruned, the others
would be normalised differently, so all channels stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labkit.experiment.problem import Problem
from labkit.sparsity.cubic import Cubic
from labkit.sparsity.method import REACHED_WITHIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine


@dataclass(frozen=True)
class Units:
    """Units of a module that can be pruned individually; unit u of `count` owns the u-th part of rows and columns."""

    count: int
    into: tuple[str, ...]
    """Names of the weights into the units, [rows, inputs]."""
    out: str
    """Name of the weight out of the units, [outputs, columns]."""


class Structured(Cubic):
    """Prunes hidden units and attention heads gradually."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run here."""
        yield from Cubic.problems(experiment, machine)
        if experiment.workload.name == "vision" and experiment.workload.options.get("model") == "resnet":
            reason = "channels of a residual network are normalised together and cannot be pruned one by one"
            yield Problem("workload.model", reason, "vit")

    @staticmethod
    def shapes(model: nn.Module, options: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the weights into and out of units, by name."""
        named = dict(model.named_parameters())
        return {name: tuple(named[name].shape) for units in units_of(model) for name in (*units.into, units.out)}

    @staticmethod
    def units(model: nn.Module) -> list[Units]:
        """Return all units of the full model."""
        return units_of(model)

    def notes(self) -> list[str]:
        """Return a sentence if the modules have too few units to come close to the target; [] otherwise."""
        shapes, units = self.context.shapes, self.context.units
        zeros = weights = 0.0
        for each in units:
            size = sum(math.prod(shapes[name]) for name in (*each.into, each.out))
            weights += size
            zeros += size * (1 - self._kept(self.target, each.count) / each.count)
        reached = zeros / weights
        if abs(reached - self.target) <= REACHED_WITHIN:
            return []
        smallest = min(each.count for each in units)
        return [
            f"sparsity.target {self.target:g} is out of reach for structured sparsity, which ends at {reached:.2f}: "
            f"units and heads go whole, some modules have only {smallest}, and each keeps at least one"
        ]

    @staticmethod
    def _kept(sparsity: float, count: int) -> int:
        """Return how many of `count` units stay: at least one."""
        return max(1, round((1 - sparsity) * count))

    def choose_masks(self, step: int, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep the strongest units of each module."""
        from labkit.sparsity.choose import mask_of_largest

        masks: dict[str, Tensor] = {}
        for units in self.context.units:
            if units.out not in weights:
                continue  # of another stage
            squares = sum(_split_rows(weights[name], units.count).square().sum((1, 2)) for name in units.into)
            squares = squares + _split_rows(weights[units.out].t(), units.count).square().sum((1, 2))
            kept_units = mask_of_largest(squares, self._kept(self.sparsity(step + 1), units.count))
            for name in units.into:
                masks[name] = _expand(kept_units, weights[name])
            masks[units.out] = _expand(kept_units, weights[units.out].t()).t().contiguous()
        return masks


def units_of(model: nn.Module) -> list[Units]:
    """Return the hidden units of every MLP and the heads of every attention (labkit.workloads.models.transformer)."""
    from labkit.workloads.models.transformer import MLP, Attention

    groups = []
    for name, module in model.named_modules():
        if isinstance(module, MLP):
            groups.append(Units(module.up.out_features, (f"{name}.up.weight",), f"{name}.down.weight"))
        elif isinstance(module, Attention):
            into = tuple(f"{name}.{part}.weight" for part in ("query", "key", "value"))
            groups.append(Units(module.heads, into, f"{name}.out.weight"))
    return groups


def shrink(model: nn.Module) -> nn.Module:
    """Remove the units whose weights are all zero, in place, and return the model, which computes the same function."""
    import torch

    for units in units_of(model):
        weights = [model.get_parameter(name) for name in units.into]
        squares = sum(_split_rows(weight.detach(), units.count).abs().sum((1, 2)) for weight in weights)
        out = model.get_parameter(units.out)
        squares = squares + _split_rows(out.detach().t(), units.count).abs().sum((1, 2))
        kept_units = squares != 0
        if not kept_units.any():
            kept_units[0] = True
        with torch.no_grad():
            for name in units.into:
                _keep_rows(model.get_submodule(name.removesuffix(".weight")), kept_units)
            _keep_columns(model.get_submodule(units.out.removesuffix(".weight")), kept_units)
    return model


def _split_rows(matrix: Tensor, count: int) -> Tensor:
    """Reshape a matrix to [units, rows of a unit, columns]."""
    return matrix.reshape(count, -1, matrix.shape[-1])


def _expand(kept_units: Tensor, matrix: Tensor) -> Tensor:
    """Expand a mask of units to a mask of the matrix whose rows they own."""
    rows = kept_units.repeat_interleave(matrix.shape[0] // len(kept_units))
    return rows.unsqueeze(1).expand(matrix.shape).contiguous()


def _keep_rows(layer: Any, kept_units: Tensor) -> None:
    """Remove the output features of a linear layer that belong to pruned units."""
    from torch import nn

    rows = kept_units.repeat_interleave(layer.out_features // len(kept_units))
    layer.weight = nn.Parameter(layer.weight[rows])
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[rows])
    layer.out_features = int(rows.sum())


def _keep_columns(layer: Any, kept_units: Tensor) -> None:
    """Remove the input features of a linear layer that belong to pruned units."""
    from torch import nn

    columns = kept_units.repeat_interleave(layer.in_features // len(kept_units))
    layer.weight = nn.Parameter(layer.weight[:, columns])
    layer.in_features = int(columns.sum())
