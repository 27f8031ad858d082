"""Structured sparsity: whole hidden units of MLPs and whole attention heads go, the weakest of each module first.

A unit is weak if all weights into it and out of it together are small (Li et al., ICLR 2017, arXiv:1608.08710; heads:
Michel et al., NeurIPS 2019, arXiv:1905.10650). Units go along the cubic of gradual pruning. What is left is a smaller
dense network: `shrink` makes it, and it computes the same with less work on any machine, without a sparse kernel.

The channels of the residual networks here are normalised in groups: without some of a group the others would be
normalised otherwise, so they stay.
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
    """Parts of a module that can go one by one: of `number`, unit u owns the u-th part of some rows and columns."""

    number: int
    into: tuple[str, ...]
    """Names of the weights into them, [rows, inputs]."""
    out: str
    """Name of the weight out of them, [outputs, columns]."""


class Structured(Cubic):
    """Gradual pruning of units and heads."""

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Why it cannot run here."""
        yield from Cubic.problems(experiment, machine)
        if experiment.workload.name == "vision" and experiment.workload.options.get("model") == "resnet":
            said = "channels of a residual network are normalised together and cannot go one by one"
            yield Problem("workload.model", said, "vit")

    @staticmethod
    def shapes(model: nn.Module, options: Any) -> dict[str, tuple[int, ...]]:
        """The weights into and out of units."""
        named = dict(model.named_parameters())
        return {name: tuple(named[name].shape) for units in units_of(model) for name in (*units.into, units.out)}

    @staticmethod
    def units(model: nn.Module) -> list[Units]:
        """All of the whole network."""
        return units_of(model)

    def notes(self) -> list[str]:
        """Units go whole and each module keeps one at least, so few units cannot come close to every target."""
        shapes, units = self.setting.shapes, self.setting.units
        zeros = weights = 0.0
        for each in units:
            size = sum(math.prod(shapes[name]) for name in (*each.into, each.out))
            weights += size
            zeros += size * (1 - self._kept(self.target, each.number) / each.number)
        reached = zeros / weights
        if abs(reached - self.target) <= REACHED_WITHIN:
            return []
        smallest = min(each.number for each in units)
        return [
            f"sparsity.target {self.target:g} is out of reach for structured sparsity, which ends at {reached:.2f}: "
            f"units and heads go whole, some modules have only {smallest}, and each keeps at least one"
        ]

    @staticmethod
    def _kept(sparsity: float, number: int) -> int:
        """How many of so many units stay."""
        return max(1, round((1 - sparsity) * number))

    def choose(self, step: int, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep the strongest units of each module."""
        from labkit.sparsity.choose import largest

        masks: dict[str, Tensor] = {}
        for units in self.setting.units:
            if units.out not in weights:
                continue  # another stage's
            squares = sum(_parts(weights[name], units.number).square().sum((1, 2)) for name in units.into)
            squares = squares + _parts(weights[units.out].t(), units.number).square().sum((1, 2))
            kept = largest(squares, self._kept(self.sparsity(step + 1), units.number))
            for name in units.into:
                masks[name] = _spread(kept, weights[name])
            masks[units.out] = _spread(kept, weights[units.out].t()).t().contiguous()
        return masks


def units_of(model: nn.Module) -> list[Units]:
    """The hidden units of every MLP and the heads of every attention (labkit.workloads.models.transformer)."""
    from labkit.workloads.models.transformer import MLP, Attention

    found = []
    for name, module in model.named_modules():
        if isinstance(module, MLP):
            found.append(Units(module.up.out_features, (f"{name}.up.weight",), f"{name}.down.weight"))
        elif isinstance(module, Attention):
            into = tuple(f"{name}.{part}.weight" for part in ("query", "key", "value"))
            found.append(Units(module.heads, into, f"{name}.out.weight"))
    return found


def shrink(model: nn.Module) -> nn.Module:
    """In place, without the units whose weights are all zero: the same function of fewer weights."""
    import torch

    for units in units_of(model):
        weights = [model.get_parameter(name) for name in units.into]
        squares = sum(_parts(weight.detach(), units.number).abs().sum((1, 2)) for weight in weights)
        out = model.get_parameter(units.out)
        squares = squares + _parts(out.detach().t(), units.number).abs().sum((1, 2))
        kept = squares != 0
        if not kept.any():
            kept[0] = True
        with torch.no_grad():
            for name in units.into:
                _keep_rows(model.get_submodule(name.removesuffix(".weight")), kept)
            _keep_columns(model.get_submodule(units.out.removesuffix(".weight")), kept)
    return model


def _parts(matrix: Tensor, number: int) -> Tensor:
    """[units, rows of a unit, columns]."""
    return matrix.reshape(number, -1, matrix.shape[-1])


def _spread(kept: Tensor, matrix: Tensor) -> Tensor:
    """The mask of a matrix from that of the units that own its rows."""
    rows = kept.repeat_interleave(matrix.shape[0] // len(kept))
    return rows.unsqueeze(1).expand(matrix.shape).contiguous()


def _keep_rows(layer: Any, kept: Tensor) -> None:
    from torch import nn

    rows = kept.repeat_interleave(layer.out_features // len(kept))
    layer.weight = nn.Parameter(layer.weight[rows])
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[rows])
    layer.out_features = int(rows.sum())


def _keep_columns(layer: Any, kept: Tensor) -> None:
    from torch import nn

    columns = kept.repeat_interleave(layer.in_features // len(kept))
    layer.weight = nn.Parameter(layer.weight[:, columns])
    layer.in_features = int(columns.sum())
