"""What every workload gives to the ranks. Imports torch: only ranks (and tests) import this file.

A workload's own file (`vision.py`, …) is read by the form too, so it imports torch inside `build()` only:

    class Vision(WorkloadBase):
        class Options(...): ...                       # the fields beside workload.name
        @classmethod
        def problems(cls, experiment, machine): ...   # its rules
        @classmethod
        def build(cls, options, seed) -> Task: ...    # on the ranks
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


class Data(Protocol):
    """Samples by index, fetched many at a time."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The samples at `indices`, collated: every tensor has shape [len(indices), …]."""
        ...


class TensorData:
    """Samples that lie in memory: tensors with the same first dimension, by name."""

    def __init__(self, **tensors: Tensor) -> None:
        lengths = {len(tensor) for tensor in tensors.values()}
        if len(lengths) != 1:
            raise ValueError(f"tensors of one data set need one length, got {sorted(lengths)}")
        self.tensors = tensors
        self.length = lengths.pop()

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index = torch.as_tensor(indices)
        return {name: tensor.index_select(0, index) for name, tensor in self.tensors.items()}


class Blocks(nn.Module):
    """A model as a chain of named blocks: the forward pass runs them in order, so that the chain can be cut anywhere.

    Pipeline stages, per-block cost and sharding all cut between blocks, so no block may look past its neighbour.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(OrderedDict(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x


@dataclass(frozen=True)
class Metric:
    """The number by which people judge the workload."""

    key: str
    """Its name in the metrics, e.g. `accuracy`."""
    title: str
    """For the axis, e.g. `Held-out accuracy`."""
    higher_is_better: bool
    unit: str = ""
    """`%` shows a fraction as per cent."""


class Task(Protocol):
    """Data, model, loss and metrics of one workload, ready to train.

    The model is built in float32 on the CPU from the seed; the worker moves it. Everything here must give the same
    numbers on every rank.
    """

    model: nn.Module
    """Takes batch["x"]; the built-in ones are `Blocks`."""
    train: Data
    test: Data
    metric: Metric

    loss_module: nn.Module | None
    """The loss as a module, if it is one: it holds tensors (class weights) that move and are cast with the run."""

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean loss of the batch (a scalar). The loop weighs it by `batch_weight`, so that parts make up the whole.

        Zero, and no NaN, for a batch whose weight is zero.
        """
        ...

    def batch_weight(self, batch: Batch) -> Tensor | float:
        """What the batch's mean loss is a mean over: the number of samples, or of valid targets, or a sum of weights.

        Proportional to the divisor of `loss`; it depends on the batch alone. Zero for a batch that counts nothing.
        """
        ...

    def evaluate(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Sums over the samples of a held-out batch (scalars), always with `count`; ranks' sums are added up."""
        ...

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The metrics from the added-up sums: always `loss`, and the key of `metric`."""
        ...

    def closed_loop(self, model: nn.Module, rank: int, world_size: int, seed: int) -> dict[str, float]:
        """Sums of a test beyond the held-out data (e.g. driving for real), this rank's part of it; {} for none.

        Called once at the end of training; the added-up sums of all ranks go through `metrics` with the last
        evaluation's sums.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """What is worth knowing beside the metrics, as JSON: classes, majority share, unigram entropy, …"""
        ...


class ClassificationTask:
    """Cross-entropy over classes; the metric is the fraction of right answers."""

    def __init__(self, model: nn.Module, train: Data, test: Data, **facts: Any) -> None:
        self.model, self.train, self.test = model, train, test
        self.metric = Metric("accuracy", "Held-out accuracy", True, "%")
        self.loss_module: nn.Module | None = None
        self._facts = facts

    def batch_weight(self, batch: Batch) -> Tensor | float:
        return float(len(batch["y"]))

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(output, batch["y"])

    def evaluate(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        target = batch["y"]
        return {
            "count": output.new_tensor(len(target)),
            "loss": nn.functional.cross_entropy(output, target, reduction="sum"),
            "correct": (output.argmax(-1) == target).sum(),
        }

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["count"], "accuracy": sums["correct"] / sums["count"]}

    def closed_loop(self, model: nn.Module, rank: int, world_size: int, seed: int) -> dict[str, float]:
        return {}

    def facts(self) -> dict[str, Any]:
        return self._facts
